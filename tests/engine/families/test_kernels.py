"""Our Triton kernels, run by Triton's interpreter, against the stock norm and rotation."""

import importlib.util
from pathlib import Path

import pytest
import torch
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.comfyui import models
from atlasvid.engine.families import fused
from atlasvid.engine.geometry.grid import Grid
from wan import forward, plan_of, rand, relative_error, small_wan

triton = pytest.importorskip("triton", reason="Triton is not installed on this system")
HALF = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Largest error relative to the largest number: a rounding or two."""


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels as the interpreter runs them: on CPU tensors, with Triton's own semantics."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    place = Path(fused.__file__).with_name("kernels.py")
    spec = importlib.util.spec_from_file_location("interpreted_kernels", place)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    return kernels


@pytest.fixture
def on_any_device(interpreted, monkeypatch):
    """Takes the kernels wherever tensors live; counts calls."""
    calls = []

    def turned(x, weight, *given):
        calls.append(weight is not None)
        interpreted.norm_rotate(x, weight, *given)

    monkeypatch.setattr(fused, "_norm_rotate", turned)
    monkeypatch.setattr(fused, "_turns", lambda *_: True)
    monkeypatch.setattr(fused, "_agreed", {})
    return calls


def stock(norm, x, heads, freqs):
    """ComfyUI's own, one item at a time."""
    y = x if norm is None else norm(x)
    items = [
        models.apply_rope(item[None].unflatten(-1, (heads, -1)), turns[None]).flatten(-2)
        for item, turns in zip(y, freqs.expand(len(y), *freqs.shape[1:]), strict=True)
    ]
    return torch.cat(items)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("heads", "side"), [(1, 128), (3, 64), (5, 32)])
@pytest.mark.parametrize("shared", [True, False], ids=["one rotation", "a rotation each"])
@pytest.mark.parametrize("normed", [True, False], ids=["norm", "rotation alone"])
def test_the_kernel_is_the_stock_norm_and_rotation(
    on_any_device, dtype, heads, side, shared, normed
):
    """Read from and written to parts of larger tensors, whose other numbers stay."""
    n, rows, width = 3, 5, heads * side
    x = rand(n, rows + 3, width).to(dtype)[:, 2 : 2 + rows]
    freqs = rand(1 if shared else n, rows, 1, side // 2, 2, 2, seed=1)
    norm = None
    if normed:
        norm = small_wan(num_layers=1, dim=width, num_heads=heads).model.diffusion_model
        norm = norm.blocks[0].self_attn.norm_q.to(dtype)
    whole = torch.full((n, rows + 4, width), 7.0, dtype=dtype)
    out = whole[:, 1 : 1 + rows]
    with torch.no_grad():
        given = fused.norm_rotate(norm, x, heads, freqs, out)
        expected = stock(norm, x, heads, freqs)
    assert given is out
    assert set(on_any_device) == {normed}
    assert (out.float() - expected.float()).abs().max() <= HALF[dtype] * expected.abs().max()
    assert (whole[:, 0] == 7).all()
    assert (whole[:, 1 + rows :] == 7).all()


@pytest.mark.parametrize(
    ("overlap", "weight"), [("shifted", 1.0), ("shifted", 8.0), ("sliding", 1)]
)
def test_the_branch_by_kernels_is_the_branch_in_steps(on_any_device, monkeypatch, overlap, weight):
    model = small_wan(num_layers=1)
    plan, proxy = plan_of((3, 8, 12), (1, 4, 6)), rand(1, 16, 1, 4, 6, seed=4)
    given = rand(1, 16, 3, 8, 12), torch.tensor([600.0]), rand(1, 16, 4096, seed=2)
    chosen = {"guide_noise": "clean", "overlap": overlap, "guide_weight": weight}

    def run():
        return forward(apply_detail_branch(model, plan, proxy, Grid(2, 3, 3), **chosen), *given)

    by_kernels = run()
    assert True in on_any_device
    assert False in on_any_device, "the guide's keys are rotated alone"
    monkeypatch.setattr(fused, "_turns", lambda *_: False)
    assert relative_error(by_kernels, run()) < 1e-5


def test_a_kernel_that_is_wrong_is_left_out(on_any_device, monkeypatch, caplog):
    monkeypatch.setattr(fused, "_norm_rotate", lambda x, weight, freqs, out, *_: out.copy_(2 * x))
    x, freqs = rand(1, 4, 128), torch.eye(2).expand(1, 4, 1, 64, 2, 2)
    for _ in range(2):
        assert torch.equal(fused.norm_rotate(None, x, 1, freqs), x)
    assert caplog.text.count("AtlasVid: norm_rotate is off by 1 on this card") == 1


def test_only_plain_norms_in_half_precision_on_a_card_take_the_kernel(monkeypatch):
    norm = small_wan(num_layers=1).model.diffusion_model.blocks[0].self_attn.norm_q
    freqs = rand(1, 4, 1, 64, 2, 2)
    card = type("Card", (), {"is_cuda": True, "dtype": torch.bfloat16, "stride": lambda *_: 1})()
    with torch.no_grad():
        assert fused._turns(norm, card, freqs)
        assert fused._turns(None, card, freqs)
        assert not fused._turns(norm, rand(1, 4, 256), freqs)
        assert not fused._turns(torch.nn.Identity(), card, freqs), "a checkpoint without such norms"
        assert not fused._turns(norm, card, freqs.double())
        assert not fused._turns(norm, card, freqs.transpose(-1, -2))
        monkeypatch.setattr(fused, "_kernels", lambda: None)
        assert not fused._turns(norm, card, freqs)
    monkeypatch.undo()
    with torch.enable_grad():
        assert not fused._turns(norm, card, freqs), "it has no derivative"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled for a card alone")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_card_takes_the_kernel(monkeypatch, dtype):
    monkeypatch.setattr(fused, "_agreed", {})
    norm = small_wan(num_layers=1).model.diffusion_model.blocks[0].self_attn.norm_k
    norm = norm.to("cuda", dtype)
    x, freqs = rand(3, 40, 256).to("cuda", dtype), rand(1, 40, 1, 64, 2, 2, seed=1).cuda()
    with torch.no_grad():
        given, expected = fused.norm_rotate(norm, x, 2, freqs), stock(norm, x, 2, freqs)
    assert list(fused._agreed.values()) == [True]
    assert relative_error(given.float(), expected.float()) <= HALF[dtype]
