"""The detail branch against the stock forward and against the dense reference."""

from itertools import pairwise

import pytest
import torch
from atlasvid.engine.branch import block_task
from atlasvid.engine.branch import forward as engine_forward
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.branch.settings import GUIDE_NOISE, auto_guide_weight
from atlasvid.engine.comfyui import models
from atlasvid.engine.device.chunks import ChunkSize
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.geometry.layout import OVERLAPS
from dense_reference import dense_forward
from wan import forward, plan_of, rand, relative_error, small_wan

WHOLE = Grid(99, 99, 99)


@pytest.fixture(scope="module")
def wan():
    return small_wan()


@pytest.fixture(scope="module")
def wan_i2v():
    return small_wan(model_type="i2v", in_dim=36)


def inputs(latent, batch=1, channels=16, t=700.0):
    x = rand(batch, channels, *latent, seed=1)
    timestep = torch.full((batch,), t) - 50 * torch.arange(batch)
    return x, timestep, rand(batch, 16, 4096, seed=2)


def noised(wan, proxy, timestep, guide_noise):
    """The guide as the method defines it: clean, or (1 - sigma) p + sigma eps."""
    p = wan.model.latent_format.process_in(proxy)
    if guide_noise == "clean":
        return p.expand(len(timestep), -1, -1, -1, -1), torch.zeros(len(timestep))
    torch.manual_seed(0)
    eps = torch.randn(p.shape)
    sigma = (timestep / 1000).view(-1, 1, 1, 1, 1)
    return (1 - sigma) * p + sigma * eps, timestep


@pytest.mark.parametrize("latent", [(5, 8, 10), (5, 7, 9), (1, 6, 6)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_one_window_without_guide_is_the_stock_forward(wan, latent, batch, overlap):
    plan = plan_of(latent, (2 if latent[0] > 1 else 1, 4, 4))
    x, t, context = inputs(latent, batch)
    patched = apply_detail_branch(wan, plan, None, WHOLE, "clean", overlap=overlap)
    ours = forward(patched, x, t, context)
    assert relative_error(ours, forward(wan, x, t, context)) < 1e-5


def test_one_window_follows_stock_rope_options(wan):
    scaled = wan.clone()
    scaled.set_model_rope_options(
        scale_x=0.5, shift_x=2.0, scale_y=1.5, shift_y=0.0, scale_t=3.0, shift_t=1.0
    )
    x, t, context = inputs((5, 8, 10))
    stock = forward(scaled, x, t, context)
    assert relative_error(forward(wan, x, t, context), stock) > 1e-3
    plan = plan_of((5, 8, 10), (2, 4, 4))
    ours = forward(apply_detail_branch(scaled, plan, None, WHOLE, "clean"), x, t, context)
    assert relative_error(ours, stock) < 1e-5


def test_one_window_image_to_video_is_the_stock_forward(wan_i2v):
    plan = plan_of((5, 8, 10), (2, 4, 4))
    x, t, context = inputs((5, 8, 10), channels=36)
    clip = rand(1, 257, 1280, seed=3)
    ours = apply_detail_branch(wan_i2v, plan, None, WHOLE, "clean")
    stock = forward(wan_i2v, x, t, context, clip_fea=clip)
    assert relative_error(forward(ours, x, t, context, clip_fea=clip), stock) < 1e-5


def test_per_frame_timesteps_are_the_stock_forward(wan):
    """Wan 2.2 TI2V-5B gives every latent frame its own timestep."""
    plan = plan_of((5, 8, 10), (2, 4, 4))
    x, _, context = inputs((5, 8, 10))
    t = torch.tensor([[0.0, 700, 700, 650, 700]])
    ours = forward(apply_detail_branch(wan, plan, None, WHOLE, "clean"), x, t, context)
    assert relative_error(ours, forward(wan, x, t, context)) < 1e-5


def test_removing_the_node_restores_the_stock_output(wan):
    x, t, context = inputs((5, 8, 10))
    before = forward(wan, x, t, context)
    plan = plan_of((5, 8, 10), (2, 4, 4))
    forward(apply_detail_branch(wan, plan, None, Grid(2, 2, 2), "clean"), x, t, context)
    assert torch.equal(before, forward(wan, x, t, context))


CASES = [
    # target latent, proxy latent, stride, window, batch
    ((5, 14, 18), (2, 6, 8), 4, (2, 4, 4), 1),
    ((9, 11, 13), (3, 5, 6), 4, (3, 5, 4), 1),  # odd sizes, padded patches
    ((1, 12, 10), (1, 6, 5), 4, (4, 3, 2), 2),  # one latent frame
    ((4, 9, 16), (2, 4, 8), 3, (3, 99, 3), 1),
    ((5, 8, 8), (5, 4, 4), 1, (2, 3, 1), 2),
    ((9, 10, 10), (2, 10, 10), 8, (5, 2, 5), 1),
]


@pytest.mark.parametrize(("latent", "proxy_latent", "stride", "window", "batch"), CASES)
@pytest.mark.parametrize("guide_noise", GUIDE_NOISE)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_windows_and_guide_equal_the_dense_reference(
    wan, latent, proxy_latent, stride, window, batch, guide_noise, overlap
):
    plan = plan_of(latent, proxy_latent, stride)
    proxy = rand(1, 16, *proxy_latent, seed=4)
    x, t, context = inputs(latent, batch)
    patched = apply_detail_branch(wan, plan, proxy, Grid(*window), guide_noise, overlap=overlap)
    ours = forward(patched, x, t, context)
    guide, guide_t = noised(wan, proxy, t, guide_noise)
    with torch.no_grad():
        model = wan.model.diffusion_model
        dense = dense_forward(model, x, t, context, window, guide, guide_t, stride, overlap=overlap)
        unguided = dense_forward(model, x, t, context, window, overlap=overlap)
    assert relative_error(ours, dense) < 1e-4
    assert relative_error(unguided, dense) > 1e-2, "the guide must matter for this to be a test"


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_random_geometries_equal_the_dense_reference(wan, overlap):
    generator = torch.Generator().manual_seed(11)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    for _ in range(12):
        stride, proxy_frames = pick(1, 5), pick(1, 3)
        latent = (stride * (proxy_frames - 1) + 1, pick(2, 15), pick(2, 15))
        proxy_latent = (proxy_frames, pick(2, latent[1]), pick(2, latent[2]))
        window = (pick(1, 5), pick(1, 6), pick(1, 6))
        plan = plan_of(latent, proxy_latent, stride)
        proxy = rand(1, 16, *proxy_latent, seed=4)
        x, t, context = inputs(latent)
        patched = apply_detail_branch(wan, plan, proxy, Grid(*window), "matched", overlap=overlap)
        ours = forward(patched, x, t, context)
        guide, guide_t = noised(wan, proxy, t, "matched")
        with torch.no_grad():
            model = wan.model.diffusion_model
            dense = dense_forward(
                model, x, t, context, window, guide, guide_t, stride, overlap=overlap
            )
        assert relative_error(ours, dense) < 1e-4, (latent, proxy_latent, stride, window)


WEIGHTS = [0, 0.5, 1, 8, 32, 128]


def weighted_and_dense(wan, case, weight, margin, guide_noise, overlap):
    """Our forward and the dense one with a guide weight and margin."""
    latent, proxy_latent, stride, window, batch = case
    proxy = rand(1, 16, *proxy_latent, seed=4)
    x, t, context = inputs(latent, batch)
    patched = apply_detail_branch(
        wan,
        plan_of(latent, proxy_latent, stride),
        proxy,
        Grid(*window),
        guide_noise,
        overlap=overlap,
        guide_weight=weight,
        guide_margin=margin,
    )
    guide, guide_t = noised(wan, proxy, t, guide_noise)
    with torch.no_grad():
        dense = dense_forward(
            wan.model.diffusion_model,
            x,
            t,
            context,
            window,
            guide,
            guide_t,
            stride,
            overlap=overlap,
            guide_weight=weight,
            guide_margin=margin,
        )
    return forward(patched, x, t, context), dense


@pytest.mark.parametrize("case", [CASES[1], CASES[4]])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("guide_noise", GUIDE_NOISE)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_guide_weights_equal_the_dense_reference(wan, case, weight, guide_noise, overlap):
    ours, dense = weighted_and_dense(wan, case, weight, 0, guide_noise, overlap)
    assert relative_error(ours, dense) < 1e-4
    if weight != 1:
        plain, _ = weighted_and_dense(wan, case, 1, 0, guide_noise, overlap)
        assert relative_error(plain, dense) > 1e-2, "the weight must matter for this to be a test"


@pytest.mark.parametrize("margin", [1, 2, 99])
@pytest.mark.parametrize("weight", [1, 8])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_guide_margins_equal_the_dense_reference(wan, margin, weight, overlap):
    case = ((9, 22, 26), (3, 10, 12), 4, (3, 4, 4), 1)
    ours, dense = weighted_and_dense(wan, case, weight, margin, "matched", overlap)
    assert relative_error(ours, dense) < 1e-4
    aligned, _ = weighted_and_dense(wan, case, weight, margin - 1, "matched", overlap)
    assert (relative_error(aligned, dense) > 1e-3) == (margin < 99), "98 reads the whole guide too"


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_random_guide_weights_and_margins_equal_the_dense_reference(wan, overlap):
    generator = torch.Generator().manual_seed(12)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    for _ in range(12):
        stride, proxy_frames = pick(1, 5), pick(1, 3)
        latent = (stride * (proxy_frames - 1) + 1, pick(2, 15), pick(2, 15))
        proxy_latent = (proxy_frames, pick(2, latent[1]), pick(2, latent[2]))
        window = (pick(1, 5), pick(1, 6), pick(1, 6))
        case = latent, proxy_latent, stride, window, 1
        chosen = WEIGHTS[pick(0, 5)], pick(0, 2), GUIDE_NOISE[pick(0, 1)], overlap
        ours, dense = weighted_and_dense(wan, case, *chosen)
        assert relative_error(ours, dense) < 1e-4, (case, chosen)


def test_weight_one_is_the_plain_attention_and_zero_reads_no_guide(wan, monkeypatch):
    def never(*_):
        raise AssertionError("plain attention needs no weight")

    monkeypatch.setattr(block_task, "weighted_attention", never)
    plan, proxy = plan_of((5, 14, 18), (2, 6, 8)), rand(1, 16, 2, 6, 8)
    x, t, context = inputs((5, 14, 18))

    def run(proxy, **chosen):
        patched = apply_detail_branch(wan, plan, proxy, Grid(2, 4, 4), "clean", **chosen)
        return forward(patched, x, t, context)

    assert torch.equal(run(proxy, guide_weight="1"), run(proxy))
    monkeypatch.setattr(engine_forward, "GuideStream", never)
    assert torch.equal(run(proxy, guide_weight=0), run(None))


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize(
    "chosen",
    [{}, {"keep_blocks": 1}, {"memory_budget": "0.001 GB"}],
    ids=["all keys", "kept blocks", "host memory"],
)
def test_a_weight_is_the_guides_keys_repeated(wan, monkeypatch, overlap, chosen):
    """Also where keys are left out, or tokens and the ring live in host memory."""
    plan, proxy = plan_of((5, 36, 36), (2, 12, 12)), rand(1, 16, 2, 12, 12)
    patched = apply_detail_branch(
        wan, plan, proxy, Grid(4, 16, 16), "clean", overlap=overlap, guide_weight=3, **chosen
    )
    x, t, context = inputs((5, 36, 36), batch=2)
    ours = forward(patched, x, t, context)

    def repeated(q, own, guide, heads, weight):
        assert weight == 3
        k, v = (torch.cat([x, *[y] * 3], 1) for x, y in zip(own, guide, strict=True))
        return models.attention(q, k, v, heads, {})

    monkeypatch.setattr(block_task, "weighted_attention", repeated)
    assert relative_error(ours, forward(patched, x, t, context)) < 1e-5


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_patches_see_the_same_queries_and_keys_with_a_weight(overlap):
    wan = small_wan(num_layers=1)  # later blocks read what earlier ones attended to
    plan = plan_of((5, 8, 8), (2, 4, 4))
    x, t, context = inputs((5, 8, 8))
    seen = []
    for weight in (1, 8):
        patched = apply_detail_branch(
            wan,
            plan,
            rand(1, 16, 2, 4, 4),
            Grid(2, 2, 2),
            "clean",
            overlap=overlap,
            guide_weight=weight,
        )
        seen.append([])
        patched.set_model_attn1_patch(lambda a: seen[-1].append((a["q"], a["k"])) or a["x"])
        forward(patched, x, t, context)
    assert seen[0]
    for plain, weighted in zip(*seen, strict=True):
        assert torch.equal(plain[0], weighted[0])
        assert torch.equal(plain[1], weighted[1])


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        *(
            ({"guide_weight": wrong}, r"guide_weight is .*; write \"auto\" or a number from 0 on")
            for wrong in ("much", "", "nan", "inf", "-1", -0.5, None)
        ),
        ({"guide_margin": -1}, "guide_margin is -1; give 0 or more"),
    ],
)
def test_a_wrong_guide_weight_or_margin_is_refused(wan, chosen, message):
    plan = plan_of((5, 8, 8), (2, 4, 4))
    with pytest.raises(ValueError, match=message):
        apply_detail_branch(wan, plan, rand(1, 16, 2, 4, 4), Grid(2, 2, 2), "clean", **chosen)


def test_the_automatic_weight_follows_the_keys(wan):
    """48 keys of a window, 2 x 3 x 3 of the guide."""
    plan, x = plan_of((9, 16, 16), (3, 4, 4)), inputs((9, 16, 16))

    def run(weight):
        patched = apply_detail_branch(
            wan, plan, rand(1, 16, 3, 4, 4), Grid(3, 4, 4), "clean", guide_weight=weight
        )
        return forward(patched, *x)

    keys = plan.keys_per_query(Grid(3, 4, 4))
    assert torch.equal(run(" auto "), run(auto_guide_weight(*keys)))
    assert auto_guide_weight(*keys) > 1
    assert auto_guide_weight(3, 4) == 12
    assert auto_guide_weight(1, 64) == 1


def test_image_to_video_guide_equals_the_dense_reference(wan_i2v):
    latent, proxy_latent, window = (5, 12, 12), (2, 6, 6), (2, 3, 3)
    plan = plan_of(latent, proxy_latent)
    proxy = rand(1, 16, *proxy_latent, seed=4)
    x, t, context = inputs(latent, channels=36)
    clip = rand(1, 257, 1280, seed=3)
    patched = apply_detail_branch(wan_i2v, plan, proxy, Grid(*window), "clean")
    ours = forward(patched, x, t, context, clip_fea=clip)
    guide, guide_t = noised(wan_i2v, proxy, t, "clean")
    # P_t(1) = 4 - 1.125 = 2.875, nearest frame 3; half-size area means
    condition = x[:, 16:, [0, 3]].unflatten(3, (6, 2)).unflatten(5, (6, 2)).mean((4, 6))
    guide = torch.cat([guide, condition], 1)
    with torch.no_grad():
        dense = dense_forward(
            wan_i2v.model.diffusion_model, x, t, context, window, guide, guide_t, 4, clip
        )
    assert relative_error(ours, dense) < 1e-4


def test_per_frame_timesteps_with_guide_equal_the_dense_reference(wan):
    latent, proxy_latent, window = (5, 8, 12), (2, 4, 6), (2, 3, 3)
    plan = plan_of(latent, proxy_latent)
    proxy = rand(1, 16, *proxy_latent, seed=4)
    x, _, context = inputs(latent)
    t = torch.tensor([[0.0, 700, 700, 700, 700]])
    ours = forward(apply_detail_branch(wan, plan, proxy, Grid(*window), "matched"), x, t, context)
    p = wan.model.latent_format.process_in(proxy)
    torch.manual_seed(0)
    sigma = torch.tensor([0.0, 0.7]).view(1, 1, 2, 1, 1)
    guide = (1 - sigma) * p + sigma * torch.randn(p.shape)
    with torch.no_grad():
        dense = dense_forward(
            wan.model.diffusion_model, x, t, context, window, guide, torch.tensor([[0.0, 700]])
        )
    assert relative_error(ours, dense) < 1e-4


def test_guide_never_reads_the_target(wan, monkeypatch):
    """Asymmetry: the keys that the guide stream yields do not change with the target tokens."""
    from atlasvid.engine.branch import guide

    seen = []
    stock = guide.GuideStream.keys_of_blocks

    def recorded(self):
        for keys, values in stock(self):
            seen[-1].append((keys.clone(), values.clone()))
            yield keys, values

    monkeypatch.setattr(guide.GuideStream, "keys_of_blocks", recorded)
    plan = plan_of((5, 8, 8), (2, 4, 4))
    patched = apply_detail_branch(wan, plan, rand(1, 16, 2, 4, 4), Grid(2, 2, 2), "clean")
    x, t, context = inputs((5, 8, 8))
    outputs = []
    for target in (x, x + 1):
        seen.append([])
        outputs.append(forward(patched, target, t, context))
    assert relative_error(outputs[0], outputs[1]) > 1e-2
    assert len(seen[0]) == 3
    for (k0, v0), (k1, v1) in zip(*seen, strict=True):
        assert torch.equal(k0, k1)
        assert torch.equal(v0, v1)


def test_a_far_change_leaves_a_token_bit_equal():
    """Locality: in one block, a token sees its own window and nothing else of the target."""
    wan = small_wan(num_layers=1)
    plan = plan_of((5, 16, 16), (2, 8, 8))
    patched = apply_detail_branch(wan, plan, rand(1, 16, 2, 8, 8), Grid(2, 4, 4), "clean")
    x, t, context = inputs((5, 16, 16))
    changed = x.clone()
    changed[:, :, 2:] += 1
    changed[:, :, :, 8:] += 1
    a, b = forward(patched, x, t, context), forward(patched, changed, t, context)
    assert torch.equal(a[:, :, :2, :8, :8], b[:, :, :2, :8, :8])
    assert not torch.equal(a[:, :, 2:], b[:, :, 2:])


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_chunk_size_does_not_change_the_result(wan, monkeypatch, overlap):
    plan = plan_of((5, 14, 18), (2, 6, 8))
    proxy = rand(1, 16, 2, 6, 8)
    patched = apply_detail_branch(wan, plan, proxy, Grid(2, 4, 4), "clean", overlap=overlap)
    x, t, context = inputs((5, 14, 18))
    results, chunks, stock = [], [], ChunkSize.keep_pace

    def counted(self, tokens):  # called once for every chunk
        chunks[-1] += 1
        stock(self, tokens)

    monkeypatch.setattr(ChunkSize, "keep_pace", counted)
    for chunk in (7, 64, 100, 100_000):  # 100: windows of several sizes in one chunk
        monkeypatch.setattr(engine_forward, "CPU_CHUNK", chunk)
        chunks.append(0)
        results.append(forward(patched, x, t, context))
    assert all(relative_error(result, results[-1]) < 1e-6 for result in results)
    assert all(more > fewer for more, fewer in pairwise(chunks)), chunks


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_out_of_memory_halves_the_chunk_and_goes_on(wan, monkeypatch, overlap):
    plan = plan_of((5, 14, 18), (2, 6, 8))
    proxy = rand(1, 16, 2, 6, 8)
    patched = apply_detail_branch(wan, plan, proxy, Grid(2, 4, 4), "clean", overlap=overlap)
    x, t, context = inputs((5, 14, 18))
    expected = forward(patched, x, t, context)
    stock, sizes = models.attention, []

    def scarce(q, k, v, heads, options):
        sizes.append(len(q))
        if len(q) > 2:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return stock(q, k, v, heads, options)

    monkeypatch.setattr(models, "attention", scarce)
    assert relative_error(forward(patched, x, t, context), expected) < 1e-6
    assert max(sizes) > 2


def test_out_of_memory_in_the_guide_halves_its_queries(wan, monkeypatch):
    plan = plan_of((5, 14, 18), (2, 12, 16))
    patched = apply_detail_branch(wan, plan, rand(1, 16, 2, 12, 16), Grid(2, 4, 4), "clean")
    x, t, context = inputs((5, 14, 18))
    expected = forward(patched, x, t, context)
    stock, sizes = models.attention, []

    def scarce(q, k, v, heads, options):
        if k.shape[1] == plan.proxy_tokens.count:
            sizes.append(q.shape[1])
            if q.shape[1] > 30:
                raise torch.cuda.OutOfMemoryError("out of memory")
        return stock(q, k, v, heads, options)

    monkeypatch.setattr(models, "attention", scarce)
    assert relative_error(forward(patched, x, t, context), expected) < 1e-6
    assert sizes[:3] == [96, 48, 24]


def test_other_nodes_patches_still_work(wan):
    plan = plan_of((5, 8, 8), (2, 4, 4))
    patched = apply_detail_branch(wan, plan, rand(1, 16, 2, 4, 4), Grid(2, 2, 2), "clean")
    x, t, context = inputs((5, 8, 8))
    plain = forward(patched, x, t, context)
    seen = []

    kept = patched.clone()
    kept.set_model_patch_replace(
        lambda args, extra: extra["original_block"](args), "dit", "double_block", 1
    )
    kept.set_model_attn2_patch(lambda a: seen.append("attn2") or a["x"])
    kept.set_model_attn1_patch(lambda a: seen.append("attn1") or a["x"])
    assert torch.equal(forward(kept, x, t, context), plain)
    assert {"attn1", "attn2"} == set(seen)

    skipped = patched.clone()
    skipped.set_model_patch_replace(
        lambda args, extra: {"img": args["img"]}, "dit", "double_block", 1
    )
    assert relative_error(forward(skipped, x, t, context), plain) > 1e-3


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ((5, 8, 10), r"target latent is 5 x 8 x 10 .* the plan expects 5 x 8 x 8"),
        ((4, 8, 8), r"target latent is 4 x 8 x 8"),
    ],
)
def test_a_target_that_differs_from_the_plan_is_refused(wan, target, message):
    plan = plan_of((5, 8, 8), (2, 4, 4))
    patched = apply_detail_branch(wan, plan, None, Grid(2, 2, 2), "clean")
    with pytest.raises(ValueError, match=message):
        forward(patched, *inputs(target))


@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        (torch.zeros(1, 16, 2, 5, 4), r"proxy latent is 2 x 5 x 4 .* plan expects 2 x 4 x 4"),
        (torch.zeros(1, 48, 2, 4, 4), "48 channels.*another model family"),
        (torch.zeros(1, 4, 64, 64), "4 dimensions.*image model"),
        (torch.full((1, 16, 2, 4, 4), float("nan")), "NaN"),
    ],
)
def test_a_wrong_proxy_is_refused(wan, proxy, message):
    plan = plan_of((5, 8, 8), (2, 4, 4))
    with pytest.raises(ValueError, match=message):
        apply_detail_branch(wan, plan, proxy, Grid(2, 2, 2), "clean")


def test_unknown_conditioning_is_refused(wan):
    plan = plan_of((5, 8, 8), (2, 4, 4))
    patched = apply_detail_branch(wan, plan, None, Grid(2, 2, 2), "clean")
    x, t, context = inputs((5, 8, 8))
    with pytest.raises(ValueError, match="time_dim_concat"):
        forward(patched, x, t, context, time_dim_concat=x[:, :, :1])
    with pytest.raises(ValueError, match="reference_latent"):
        forward(patched, x, t, context, reference_latent=x[:, :, 0])
