"""Training forwards against the stock forward and the dense reference, values and gradients."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from atlasvid.engine.branch.settings import DetailSettings
from atlasvid.engine.branch.shifted import ShiftedAttention
from atlasvid.engine.comfyui import management, models
from atlasvid.engine.device.chunks import ChunkSize
from atlasvid.engine.families import wan as wan_family
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.geometry.layout import Layout
from atlasvid.engine.training.adapters import ADAPTER, build_adapters
from atlasvid.engine.training.forward import Nets, guide_forward, proxy_forward
from atlasvid.engine.training.frozen import frozen_view
from dense_reference import dense_forward
from peft import LoraConfig, get_peft_model
from wan import plan_of, rand, relative_error, small_wan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wan():
    return small_wan().model.diffusion_model


@pytest.fixture(scope="module")
def adapters(wan):
    built = build_adapters(wan, 4, 6.0, "attention and feed-forward", 0, CPU)
    with torch.no_grad():
        for i, (name, weight) in enumerate(built.named_parameters()):
            if "lora_B" in name:  # 0 at the start, and then lora_A would have no gradient
                weight.copy_(0.1 * rand(*weight.shape, seed=i))
    return built


@pytest.fixture
def reference(wan, adapters):
    """peft's own model around a copy of the base, with the same adapter weights."""
    targets = [name for name, _ in adapters.layers.items()]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    model = get_peft_model(copy.deepcopy(wan), config)
    for name, layer in adapters.layers.items():
        own = model.base_model.model.get_submodule(name)
        for side in ("lora_A", "lora_B"):
            getattr(own, side)["default"].weight.data.copy_(getattr(layer, side)[ADAPTER].weight)
    return model


def gradients(adapters, loss):
    return dict(
        zip(
            (name for name, _ in adapters.named_parameters()),
            torch.autograd.grad(loss, adapters.parameters(), allow_unused=True),
            strict=True,
        )
    )


def reference_gradients(reference, loss):
    weights = {
        name.removeprefix("base_model.model.").replace(".default.", "."): weight
        for name, weight in reference.named_parameters()
        if "lora_" in name
    }
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return dict(zip(weights, found, strict=True))


def same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    scale = max(g.abs().max() for g in theirs.values() if g is not None)
    for name, gradient in theirs.items():
        mine = ours[name]
        if gradient is None or mine is None:
            # The last block's guide output is read by nobody.
            zero = [g for g in (gradient, mine) if g is not None]
            assert all(not g.any() for g in zero), name
            continue
        assert (mine - gradient).abs().max() < 1e-5 * scale, name


@pytest.fixture
def spans(monkeypatch):
    """Which windows were evaluated together, chunk by chunk."""
    found, stock = [], ShiftedAttention.attended

    def recorded(self, task, order, start, stop, y):
        found.append((start, stop))
        return stock(self, task, order, start, stop, y)

    monkeypatch.setattr(ShiftedAttention, "attended", recorded)
    return found


CASES = [
    # target latent, proxy latent, stride, window, batch, chunk, guide weight
    ((5, 8, 12), (2, 4, 6), 4, (2, 3, 3), 1, 2048, 1),
    ((5, 8, 12), (2, 4, 6), 4, (2, 3, 3), 1, 2048, 8),
    ((5, 9, 11), (2, 5, 6), 4, (2, 2, 4), 2, 20, 1),
    ((5, 9, 11), (2, 5, 6), 4, (2, 2, 4), 2, 20, 0.5),
    ((4, 8, 8), (2, 4, 4), 3, (99, 99, 99), 1, 2048, 128),
]


@pytest.mark.parametrize(
    ("latent", "proxy_latent", "stride", "window", "batch", "chunk", "weight"), CASES
)
@pytest.mark.parametrize(
    ("guide_noise", "stage"), [("clean", "guide"), ("matched", "guide"), ("clean", "target")]
)
def test_detail_gradients_equal_the_dense_reference(
    wan,
    adapters,
    reference,
    latent,
    proxy_latent,
    stride,
    window,
    batch,
    chunk,
    weight,
    guide_noise,
    stage,
    spans,
):
    x, context = rand(batch, 16, *latent, seed=1), rand(batch, 16, 4096, seed=2)
    t, target = torch.full((batch,), 600.0), rand(batch, 16, *latent, seed=3)
    proxy = rand(1, 16, *proxy_latent, seed=4)
    plan = plan_of(latent, proxy_latent, stride)
    layout = Layout(plan, Grid(*window))
    settings = DetailSettings(layout, guide_noise, proxy, guide_weight=weight)
    with management.training():
        chunk = ChunkSize(chunk)
        views = frozen_view(wan), adapters.view
        nets = Nets(*(views if stage == "guide" else reversed(views)))
        ours = guide_forward(nets, wan_family, settings, (x, t, context), chunk)
        assert (len(spans) > batch * len(wan.blocks)) == (chunk.tokens < plan.tokens.count)
        mine = gradients(adapters, F.mse_loss(ours, target))

    guide, guide_t = proxy.expand(batch, -1, -1, -1, -1), torch.zeros(batch)
    if guide_noise == "matched":
        torch.manual_seed(0)
        guide, guide_t = 0.4 * guide + 0.6 * torch.randn(proxy.shape), t

    @contextmanager
    def adapted():
        reference.base_model.enable_adapter_layers()
        yield
        reference.base_model.disable_adapter_layers()

    reference.base_model.disable_adapter_layers()
    inner = reference.base_model.model
    dense = dense_forward(
        inner,
        x,
        t,
        context,
        window,
        guide,
        guide_t,
        stride,
        guide_weight=weight,
        **{"adapted" if stage == "guide" else "target_adapted": adapted},
    )
    reference.base_model.enable_adapter_layers()
    assert relative_error(ours, dense) < 1e-5
    same_gradients(mine, reference_gradients(reference, F.mse_loss(dense, target)))


def test_proxy_gradients_equal_the_stock_forward(wan, adapters, reference):
    latent = (3, 8, 12)
    x, context = rand(1, 16, *latent, seed=1), rand(1, 16, 4096, seed=2)
    t, target = torch.tensor([600.0]), rand(1, 16, *latent, seed=3)
    plan = plan_of((9, 16, 24), latent)
    with management.training():
        ours = proxy_forward(adapters.view, plan, x, t, context)
        mine = gradients(adapters, F.mse_loss(ours, target))
        options = {"rope_options": {"scale_t": 4.0}}
        stock = reference.base_model.model(x, t, context, transformer_options=options)
        theirs = reference_gradients(reference, F.mse_loss(stock, target))
    assert relative_error(ours, stock) < 1e-6
    same_gradients(mine, theirs)


def in_another_thread(call):
    """As autograd works through a card's part of a graph, and computes blocks again there."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@pytest.mark.parametrize("run", [lambda call: call(), in_another_thread], ids=["here", "elsewhere"])
def test_weights_from_inference_mode_and_in_another_type(wan, run):
    """What a loader node leaves behind, stored as bf16: gradients as with those values."""
    with torch.inference_mode():
        stored = small_wan().model.diffusion_model
        for linear in stored.blocks.modules():
            if isinstance(linear, torch.nn.Linear):
                linear.weight = torch.nn.Parameter(linear.weight.bfloat16(), requires_grad=False)
                linear.comfy_cast_weights = True
    rounded = small_wan().model.diffusion_model
    for linear in rounded.blocks.modules():
        if isinstance(linear, torch.nn.Linear):
            linear.weight.data = linear.weight.bfloat16().float()
    assert stored.blocks[0].ffn[0].weight.is_inference()
    plan = plan_of((5, 8, 8), (2, 4, 4))
    settings = DetailSettings(Layout(plan, Grid(2, 2, 2)), "clean", rand(1, 16, 2, 4, 4))
    x, t, context = rand(1, 16, 5, 8, 8), torch.tensor([500.0]), rand(1, 16, 4096)
    results = []
    for model in (stored, rounded):
        built = build_adapters(model, 4, 4.0, "attention", 0, CPU)
        with management.training():
            chunk = ChunkSize(2048)
            out = guide_forward(
                Nets(frozen_view(model), built.view), wan_family, settings, (x, t, context), chunk
            )
            loss = out.square().mean()
            results.append(run(partial(gradients, built, loss)))
    same_gradients(*results)


def kept_bytes(wan, adapters, latent):
    """What autograd keeps between the forward and the backward pass."""
    plan = plan_of(latent, (2, 4, 4))
    settings = DetailSettings(Layout(plan, Grid(4, 4, 4)), "clean", rand(1, 16, 2, 4, 4))
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage, storage.nbytes()  # holding it keeps its address taken
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    x = rand(1, 16, *latent)
    with management.training(), hooks:
        t, context = torch.tensor([500.0]), rand(1, 16, 4096)
        chunk = ChunkSize(2048)
        guide_forward(
            Nets(frozen_view(wan), adapters.view), wan_family, settings, (x, t, context), chunk
        )
    return sum(size for _, size in kept.values())


def test_of_the_target_little_more_than_each_blocks_input_is_kept(wan, adapters):
    """Activations are bounded by a chunk of windows: queries, keys, feed-forward are not kept."""
    small, large = (kept_bytes(wan, adapters, (5, side, side)) for side in (16, 48))
    tokens = 5 * (24 * 24 - 8 * 8)
    per_token = (large - small) / tokens
    assert per_token < (len(wan.blocks) + 4) * wan.dim * 4


def test_the_model_is_not_touched(wan, adapters):
    names = [type(module).__name__ for module in wan.modules()]
    build_adapters(wan, 2, 2.0, "attention", 0, CPU)
    assert [type(module).__name__ for module in wan.modules()] == names
    assert not any("lora" in name for name, _ in wan.named_parameters())


def test_other_layers_than_comfyuis_are_run_again():
    """A quantised layer of another pack has no weight that we could read."""

    class Packed(torch.nn.Linear):
        def forward(self, x):
            return F.linear(x, self.packed * 0.5)

    linear = Packed(3, 5)
    linear.packed = rand(5, 3)
    gradient = rand(2, 5, seed=1)
    assert torch.allclose(
        models.linear_input_gradient(linear, gradient), gradient @ linear.packed * 0.5
    )


@pytest.mark.parametrize("rank", [0, 129])
def test_a_rank_outside_the_layers_is_refused(wan, rank):
    with pytest.raises(ValueError, match="allowed is 1 to 128"):
        build_adapters(wan, rank, 1.0, "attention", 0, CPU)
