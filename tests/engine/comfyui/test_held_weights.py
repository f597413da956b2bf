"""Weights that are brought to the device once for all chunks of a block."""

import comfy.ops
import pytest
import torch
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.comfyui import models
from atlasvid.engine.geometry.grid import Grid
from wan import forward, plan_of, rand, relative_error, small_wan

PLAN = plan_of((5, 14, 18), (2, 6, 8))


@pytest.fixture
def offloaded():
    """A model that is stored in another dtype than it computes in: every use is a cast."""
    wan = small_wan(num_layers=2)
    for layer in wan.model.diffusion_model.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.RMSNorm | torch.nn.LayerNorm):
            layer.comfy_cast_weights = True
            layer.to(torch.bfloat16)
    return wan


@pytest.fixture
def casts(monkeypatch):
    """How often each layer's weights were brought."""
    stock, seen = comfy.ops.cast_bias_weight, {}

    def counted(layer, x=None, *args, **kwargs):
        if layer.weight is not None and layer.weight.dtype != torch.float32:
            seen[id(layer)] = seen.get(id(layer), 0) + 1
        return stock(layer, x, *args, **kwargs)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", counted)
    return seen


@pytest.mark.parametrize("overlap", ["shifted", "sliding"])
@pytest.mark.parametrize("guide_noise", ["clean", "matched"])
def test_a_blocks_weights_are_brought_once(offloaded, casts, overlap, guide_noise, monkeypatch):
    from atlasvid.engine.branch import forward as engine_forward

    monkeypatch.setattr(engine_forward, "CPU_CHUNK", 64)  # many chunks
    patched = apply_detail_branch(
        offloaded, PLAN, rand(1, 16, 2, 6, 8), Grid(2, 4, 4), guide_noise, overlap=overlap
    )
    x, t, text = rand(1, 16, 5, 14, 18), torch.tensor([700.0]), rand(1, 16, 4096)
    ours = forward(patched, x, t, text)
    blocks = offloaded.model.diffusion_model.blocks
    layers = [id(layer) for layer in blocks.modules() if getattr(layer, "weight", None) is not None]
    assert {casts[layer] for layer in layers} == {1}
    monkeypatch.setattr(models, "HELD_LAYERS", ())
    assert relative_error(ours, forward(patched, x, t, text)) < 1e-6
    assert max(casts[layer] for layer in layers) > 5, "many chunks, or this tests nothing"


def test_layers_have_their_own_weights_again(offloaded):
    block = offloaded.model.diffusion_model.blocks[0]
    before = dict(block.named_parameters())

    def fail():
        with models.held_weights(block, torch.empty(0)):
            assert block.self_attn.q.weight.dtype == torch.float32
            raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        fail()
    after = dict(block.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


def test_quantised_and_resident_layers_are_left_alone():
    block = small_wan(num_layers=1).model.diffusion_model.blocks[0]
    kept = {name: id(p) for name, p in block.named_parameters()}
    with models.held_weights(block, torch.empty(0)):
        assert {name: id(p) for name, p in block.named_parameters()} == kept
