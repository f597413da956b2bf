"""The cost model against counters of what really runs."""

import json
import struct
import time
from dataclasses import replace

import comfy.model_management
import pytest
import torch
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.branch.memory import wanted_bytes
from atlasvid.engine.branch.settings import GUIDE_NOISE, DetailSettings
from atlasvid.engine.comfyui import management, media
from atlasvid.engine.estimate import calibration, cost, overview
from atlasvid.engine.estimate.cost import ModelShape, Rates, Settings
from atlasvid.engine.families import tiny
from atlasvid.engine.families.family import family_of
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.geometry.layout import OVERLAPS, Layout
from atlasvid.engine.geometry.plan import make_plan
from atlasvid.engine.geometry.windows import COMPACT, SlidingWindows
from atlasvid.engine.vae import needs
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from wan import WAN21, forward, plan_of, rand, small_wan

SHAPE = ModelShape(name="small", dim=256, layers=3, ffn_dim=512, text_tokens=16)
UHD = make_plan(WAN21, 3840, 2160, 10.0, 16.0, 480, 4)
MACHINE = cost.Machine(card=24 * 2**30, host=64 * 2**30, disk=200 * 2**30)
RATES = Rates(1e14, 1e14, 1e12, 2e13, 1e10, 3e13)
QUERY = {
    "width": "3840",
    "height": "2160",
    "seconds": "10",
    "fps": "16",
    "proxy_short_side": "480",
    "temporal_stride": "4",
}


def explicit_attention(chosen, q, k, v, heads, **_):
    """Attention as two matrix products, which the counter sees."""
    del chosen
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
    return (scores @ v).transpose(1, 2).flatten(2)


def flops_on_the_cpu(q, k, v, *_, **__):
    """Of PyTorch's fused attention there, which its counter does not know."""
    return sdpa_flop_count(q, k, v)


def counted(patcher, *inputs) -> int:
    options = patcher.model_options["transformer_options"]
    options["optimized_attention_override"] = explicit_attention
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={fused: flops_on_the_cpu}) as counter:
        forward(patcher, *inputs)
    return counter.get_total_flops()


def inputs_of(latent):
    return rand(1, 16, *latent), torch.tensor([500.0]), rand(1, 16, 4096)


@pytest.mark.parametrize("window", [Grid(4, 8, 8), Grid(3, 5, 7), Grid(99, 99, 99)])
@pytest.mark.parametrize("overlap", ["shifted", "sliding"])
def test_flops_of_the_detail_branch(window, overlap):
    plan = plan_of((9, 24, 32), (3, 12, 16))
    model = apply_detail_branch(
        small_wan(), plan, rand(1, 16, 3, 12, 16), window, "matched", overlap=overlap
    )
    settings = Settings(window.clipped(plan.tokens), overlap=overlap)
    # The guide's last block only makes keys and values.
    work = cost.detail_work(SHAPE, plan, settings, 4) + cost.proxy_work(SHAPE, plan, 4)
    measured = counted(model, *inputs_of(plan.latent))
    assert work.flops == pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize("overlap", ["shifted", "sliding"])
def test_a_guide_weight_costs_no_flops_and_a_margin_those_of_its_keys(overlap):
    plan, window = plan_of((5, 16, 16), (2, 8, 8)), Grid(2, 2, 2)

    def measured(weight, margin):
        model = apply_detail_branch(
            small_wan(),
            plan,
            rand(1, 16, 2, 8, 8),
            window,
            "matched",
            overlap=overlap,
            guide_weight=weight,
            guide_margin=margin,
        )
        return counted(model, *inputs_of(plan.latent))

    def estimated(margin):
        settings = Settings(window, overlap=overlap, guide_margin=margin)
        return cost.detail_work(SHAPE, plan, settings, 4).flops

    assert measured(1, 0) == measured(8, 0)
    more = measured(8, 1) - measured(8, 0)
    assert more > 0
    assert more == pytest.approx(estimated(1) - estimated(0), rel=1e-6)


def test_what_a_margin_reads_is_in_the_memory():
    wide = replace(Settings(COMPACT), guide_margin=20)
    need = [
        cost.memory(cost.WAN_1_3B, UHD, s, MACHINE).card_least for s in (Settings(COMPACT), wide)
    ]
    assert need[0] < need[1]


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("guide_noise", GUIDE_NOISE)
@pytest.mark.parametrize("margin", [0, 3])
def test_memory_is_that_of_the_forwards_own_workload(overlap, guide_noise, margin):
    window, proxy = Grid(6, 20, 20), torch.zeros(1, 16, *UHD.proxy_latent)
    chosen = {"overlap": overlap, "guide_noise": guide_noise, "guide_margin": margin}
    settings = DetailSettings(Layout(UHD, window, overlap, margin), guide_noise, proxy)
    shape = family_of(small_wan()).shape(small_wan().model.diffusion_model)
    work = settings.workload(shape, 4, 1, keep_guide=True)
    no_card = replace(MACHINE, card=0, element_bytes=4)
    need = cost.memory(SHAPE, UHD, Settings(window, **chosen), no_card)
    latent, weights = 4 * 16 * UHD.latent.count, SHAPE.weights
    assert need.card == weights + wanted_bytes(work, latent)
    assert need.card_least == 8 * latent + work.least_chunk_bytes + 2 * weights // SHAPE.layers
    assert need.host == weights + latent + work.token_bytes + work.guide_bytes + work.ring_bytes


def test_flops_of_the_stock_forward():
    plan = plan_of((5, 16, 24), (2, 8, 12))
    work = cost.full_attention_work(SHAPE, plan, 4)
    assert work.flops == pytest.approx(counted(small_wan(), *inputs_of(plan.latent)), rel=0.01)


def test_flops_of_the_decoder():
    vae = media.load_vae(tiny.vae_state(dim=16)).first_stage_model.float()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pixels = vae.decode(rand(1, 16, 3, 8, 8))
    plan = plan_of((3, 8, 8), (1, 4, 4))
    assert tuple(pixels.shape[2:]) == (plan.frames, plan.height, plan.width)
    shape = replace(SHAPE, vae_channels=16)
    flops = cost.decode_flops(shape, plan) + cost.decode_attention_flops(shape, plan)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_attention_of_a_large_decode_is_counted():
    """A large part of an 8K decode, a small one of a 2K decode."""

    def share(width, height):
        plan = make_plan(WAN21, width, height, 1.75, 16.0, 480, 4)
        attention = cost.decode_attention_flops(cost.WAN_1_3B, plan)
        return attention / cost.decode_flops(cost.WAN_1_3B, plan)

    assert share(7680, 4320) == pytest.approx(16 * share(1920, 1080), rel=0.05)
    assert 0.3 < share(7680, 4320) < 0.5


def test_8k_fits_a_card_of_12_gib_and_says_so():
    plan = make_plan(WAN21, 7680, 4320, 1.8, 16.0, 480, 1)
    assert plan.frames == 29
    machine = replace(MACHINE, card=12 * 2**30)
    need = cost.memory(cost.WAN_1_3B, plan, Settings(COMPACT), machine)
    assert not cost.problems(plan, need, machine)
    least = needs.least_decode_bytes(8, 96, plan.latent[1:], 2)
    assert 1 * 2**30 < least <= need.card_least
    tiny_card = replace(MACHINE, card=least - 1)
    need = cost.memory(replace(SHAPE, layers=1), plan, Settings(COMPACT), tiny_card)
    assert need.card_least >= least, "the decode counts where sampling would fit"
    assert cost.problems(plan, need, tiny_card)


def test_paper_s_reduction_of_attention():
    """1208.2 x fewer FLOPs per layer at 4K x 161 frames (AtlasVid, table of the abstract)."""
    tokens = UHD.tokens.count
    keys = sum(Layout(UHD, COMPACT).keys)
    assert tokens / keys == pytest.approx(1208.2, rel=0.01)


def test_more_of_anything_takes_longer():
    settings = Settings(COMPACT)
    base = cost.seconds(cost.WAN_1_3B, UHD, settings, MACHINE, RATES)
    longer = make_plan(WAN21, 3840, 2160, 20.0, 16.0, 480, 4)
    wider = replace(settings, window=Grid(8, 32, 32))
    twice = replace(settings, detail_evaluations=2 * settings.detail_evaluations)
    clean = replace(settings, guide_noise="clean")
    for plan, chosen in ((longer, settings), (UHD, wider), (UHD, twice)):
        assert cost.seconds(cost.WAN_1_3B, plan, chosen, MACHINE, RATES).total > base.total
    assert cost.seconds(cost.WAN_1_3B, UHD, clean, MACHINE, RATES).detail < base.detail


def test_a_ring_that_fills_the_card_is_counted_in_host_memory():
    settings = Settings(Grid(21, 30, 52), overlap="sliding")
    kept = SlidingWindows(UHD.tokens, settings.window).ring.count + UHD.proxy_tokens.count
    ring = 2 * kept * cost.WAN_1_3B.dim * 2
    least = cost.memory(cost.WAN_1_3B, UHD, settings, MACHINE).card_least
    small, large = (
        cost.memory(cost.WAN_1_3B, UHD, settings, replace(MACHINE, card=least + beside))
        for beside in (ring - 1, ring)
    )
    assert small.host - large.host == ring
    assert not cost.problems(UHD, small, replace(MACHINE, card=least))


def test_what_will_not_fit_names_a_plan_that_fits():
    machine = replace(MACHINE, card=2 * 2**30, host=8 * 2**30)
    settings = Settings(COMPACT, streamed_decode=False)
    need = cost.memory(cost.WAN_1_3B, UHD, settings, machine)
    found = cost.problems(UHD, need, machine)
    assert any("AtlasVid Decode to Video" in text for text in found)
    large = make_plan(WAN21, 8192, 8192, 600.0, 16.0, 480, 4)
    need = cost.memory(cost.WAN_1_3B, large, Settings(COMPACT), MACHINE)
    found = cost.problems(large, need, MACHINE)
    text = next(line for line in found if "card memory" in line)
    length = float(text.split("at most about ")[1].split(" seconds")[0])
    shorter = make_plan(WAN21, 8192, 8192, length, 16.0, 480, 4)
    need = cost.memory(cost.WAN_1_3B, shorter, Settings(COMPACT), MACHINE)
    assert need.card_least <= MACHINE.card


def test_calibration_is_kept(tmp_path, monkeypatch):
    file = tmp_path / "folder" / "rates.json"
    assert calibration.known_rates(SHAPE, file) is None
    rates = calibration.rates_of(SHAPE, file)
    assert all(value > 0 for value in vars(rates).values())
    monkeypatch.setattr(calibration, "measure", None)  # would fail if it were measured again
    assert calibration.rates_of(SHAPE, file) == rates
    file.write_text("broken", "utf-8")
    assert calibration.known_rates(SHAPE, file) is None


def test_overview_has_a_picture_and_a_list():
    shown = overview.overview({**QUERY, "window": "compact", "model": "AtlasVidTinyModels"})
    assert shown["target"]["frames"] == 161
    assert shown["windows"]["columns"][0][:3] == [0, 256, 512]
    assert shown["windows"]["columns"][1][:3] == [0, 128, 384]
    rows = dict(shown["rows"])
    assert rows["Model"] == "AtlasVid Tiny Models"
    assert rows["Keys per query"] == "1,024 + 75 of the guide"
    json.dumps(shown)


@pytest.mark.parametrize(
    ("graph", "keys"),
    [
        ({}, "17,490 + 416 of the guide"),
        ({"window": "auto", "guide_lora": "1"}, "1,024 + 75 of the guide"),
        ({"window": "custom", "window.frames": "2", "window.height": "8"}, "16 + 12 of the guide"),
        ({"window": "compact", "guide_margin": "2"}, "1,024 + 567 of the guide"),
    ],
)
def test_overview_resolves_the_window(graph, keys):
    rows = dict(overview.overview({**QUERY, **graph})["rows"])
    assert rows["Keys per query"] == keys


def test_overview_knows_a_model_by_its_file(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    file = tmp_path / "some_wan.safetensors"
    state = tiny.wan_state(num_layers=2, dim=384, num_heads=3, ffn_dim=640)
    save_file({f"model.diffusion_model.{name}": value for name, value in state.items()}, file)
    shape = overview.shape_of_file(file)
    assert shape is not None
    assert (shape.dim, shape.layers, shape.ffn_dim, shape.in_dim) == (384, 2, 640, 16)
    assert shape.weight_bytes == file.stat().st_size
    loaded = overview.shape_of_model(small_wan())
    assert (loaded.dim, loaded.layers, loaded.ffn_dim, loaded.out_dim) == (256, 3, 512, 16)
    again = overview.overview({**QUERY, "shape": overview.shape_record(small_wan())})
    assert "assumed" not in dict(again["rows"])["Model"]
    assert "assumed" in dict(overview.overview(QUERY)["rows"])["Model"]


def test_the_largest_plan_has_a_small_picture():
    largest = {"width": "8192", "height": "8192", "seconds": "600", "fps": "120"}
    sides = {f"window.{side}": "1" for side in Grid._fields}
    query = {**QUERY, **largest, "temporal_stride": "1", "window": "custom", **sides}
    begun = time.monotonic()
    shown = overview.overview(query)
    assert time.monotonic() - begun < 2
    assert len(json.dumps(shown)) < 8_000
    for axis in ("columns", "rows", "frames"):
        for cuts in shown["windows"][axis]:
            assert len(cuts) <= overview.MOST_LINES + 2
    assert shown["windows"]["columns"][0][-1] == 8192
    assert shown["windows"]["frames"][1][-1] == shown["windows"]["latent_frames"]


@pytest.mark.parametrize(
    "record",
    [
        "no",
        "[]",
        "[" * 5_000,
        '{"dim": "256", "ffn_dim": 512, "layers": 3}',
        '{"dim": 0, "ffn_dim": 512, "layers": 3}',
        '{"dim": 256, "ffn_dim": 512, "layers": 0}',
        '{"dim": 200, "ffn_dim": 512, "layers": 3}',
        '{"dim": 1e9, "ffn_dim": 512, "layers": 3}',
        '{"dim": 256000000000, "ffn_dim": 512, "layers": 3}',
        '{"dim": 256, "ffn_dim": NaN, "layers": 3}',
        '{"dim": 256, "ffn_dim": 512, "layers": 3, "name": 5}',
        '{"dim": 256, "ffn_dim": 512, "layers": 3, "other": 5}',
    ],
)
def test_a_shape_that_is_none_is_refused(record):
    with pytest.raises(ValueError, match="shape is not a model's shape"):
        overview.overview({**QUERY, "shape": record})


def headed(entries, length=None):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


WHOLE = {
    "head.modulation": {"shape": [1, 2, 256]},
    "head.head.weight": {"shape": [64, 256]},
    "patch_embedding.weight": {"shape": [256, 16, 1, 2, 2]},
    "blocks.0.ffn.0.weight": {"shape": [512, 256]},
}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        headed([1, 2]),
        headed("text"),
        headed(WHOLE, length=2**63),
        headed(WHOLE, length=10_000),
        headed({}),
        headed(WHOLE | {"head.modulation": {}}),
        headed(WHOLE | {"head.modulation": [256]}),
        headed(WHOLE | {"head.modulation": {"shape": []}}),
        headed(WHOLE | {"head.modulation": {"shape": ["256"]}}),
        headed(WHOLE | {"head.modulation": {"shape": [1, 2, 0]}}),
        headed(WHOLE | {"head.modulation": {"shape": [1, 2, 256 * 10**9]}}),
        headed(WHOLE | {"blocks.0.ffn.0.weight": {"shape": [None]}}),
        headed(WHOLE | {"patch_embedding.weight": {"shape": [256]}}),
        struct.pack("<Q", 200_000) + b"[" * 200_000,
    ],
)
def test_a_file_whose_head_lies_is_no_model(tmp_path, content):
    (tmp_path / "lies.safetensors").write_bytes(content)
    assert overview.shape_of_file(tmp_path / "lies.safetensors") is None
    (tmp_path / "whole.safetensors").write_bytes(headed(WHOLE))
    assert overview.shape_of_file(tmp_path / "whole.safetensors") is not None


@pytest.mark.parametrize("kept", ["[]", "{}", '{"%s": 5}', '{"%s": {"matmul": 1}}'])
def test_measurements_that_something_else_wrote_are_passed_over(tmp_path, kept):
    file = tmp_path / "rates.json"
    file.write_text(kept.replace("%s", calibration._key(SHAPE)), "utf-8")
    assert calibration.known_rates(SHAPE, file) is None
    rates = vars(RATES) | {"matmul": 0.0}
    file.write_text(json.dumps({calibration._key(SHAPE): rates}), "utf-8")
    assert calibration.known_rates(SHAPE, file) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": "1e9"}, "seconds is 1e.09; allowed is 0.05 to 600"),
        ({"fps": "1e9"}, "fps is 1e.09; allowed is 1 to 120"),
        ({"guide_margin": "-1"}, "guide_margin is -1; it must be 0 or more"),
        ({"overlap": "none"}, "overlap is 'none'; allowed are shifted, sliding"),
        ({"guide_noise": "pink"}, "guide_noise is 'pink'"),
        ({"window": "custom", "window.frames": "0"}, "at least 1 token"),
        ({"width": "many"}, "width is 'many'; it must be a number"),
        ({"width": "10"}, "width is 10; allowed is"),
        ({"seconds": "nan"}, "seconds is nan; it must be a finite number"),
        ({"shape": "{}"}, "shape is not a model's shape"),
    ],
)
def test_overview_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        overview.overview({**QUERY, **change})


def test_a_cancel_that_a_measurement_hears_reaches_the_job(monkeypatch):
    def measured(shape):
        management.cancel()
        management.raise_if_cancelled()  # as ComfyUI's own layers do, and forget it then

    monkeypatch.setattr(overview.calibration, "rates_of", measured)
    overview.calibrate({})
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        management.raise_if_cancelled()
