"""Operations in one pass against the plain ones, and when they are left out."""

import pytest
import torch
from atlasvid.engine.comfyui import management
from atlasvid.engine.families import fused
from torch import nn
from wan import rand, small_wan


@pytest.fixture
def layers():
    up, gelu, _ = small_wan(num_layers=1).model.diffusion_model.blocks[0].ffn
    return up, gelu


@pytest.fixture
def any_device(monkeypatch):
    """Takes the fused way wherever the tensors live."""
    monkeypatch.setattr(fused, "_fits", lambda *_: True)
    monkeypatch.setattr(fused, "_agreed", {})


def test_a_cpu_computes_in_steps(layers):
    up, gelu = layers
    x = rand(1, 9, 256)
    with torch.no_grad():
        assert torch.equal(fused.linear_gelu(up, gelu, x), gelu(up(x)))


def test_the_activation_in_the_product_agrees(layers, any_device):
    """On a CPU PyTorch's fused one is the exact GELU; on a card the same as the model's."""
    device = management.compute_device()
    up = layers[0].to(device)
    x = rand(2, 9, 256).to(device)
    gelu = nn.GELU() if device.type == "cpu" else layers[1]
    with torch.no_grad():
        given, expected = fused.linear_gelu(up, gelu, x), gelu(up(x))
    assert given.shape == expected.shape
    assert (given - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


def test_what_does_not_agree_is_left_out_with_one_line(layers, any_device, monkeypatch, caplog):
    up, gelu = layers
    monkeypatch.setattr(fused, "_fused", lambda linear, x: 2 * gelu(linear(x)))
    x = rand(1, 9, 256)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(fused.linear_gelu(up, gelu, x), gelu(up(x)))
    assert [r.getMessage() for r in caplog.records if "computed in steps" in r.getMessage()] == [
        "AtlasVid: linear_gelu is off by 1 on this card; computed in steps"
    ]


def test_only_plain_layers_in_half_precision_on_a_card_fit(layers, monkeypatch):
    up, gelu = layers
    on_card = torch.empty(0, dtype=torch.bfloat16)
    card = type("Card", (), {"is_cuda": True, "dtype": torch.bfloat16})()
    up.weight.data = up.weight.data.bfloat16()
    with torch.no_grad():
        assert fused._fits(up, gelu, card)
        assert not fused._fits(up, gelu, on_card)
        assert not fused._fits(nn.Sequential(up), gelu, card), "a LoRA or another pack's layer"
        assert not fused._fits(up, nn.GELU(), card)
        monkeypatch.setattr(fused, "ENABLED", False)
        assert not fused._fits(up, gelu, card)
    monkeypatch.setattr(fused, "ENABLED", True)
    with torch.enable_grad():
        assert not fused._fits(up, gelu, card), "it has no derivative"
