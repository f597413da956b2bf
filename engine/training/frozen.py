"""Layers of the base model under autograd, without keeping or needing their weights as tensors.

ComfyUI may hold a weight on another device, quantised, or as an inference tensor, which autograd
refuses to save. So only the input's gradient is computed, with the weight fetched once more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..comfyui import models
from ..lora.view import with_layers


class _InputGradient(torch.autograd.Function):
    """A linear layer's forward as it is, and the gradient of its input; saves no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: nn.Module) -> Tensor:
        ctx.linear = linear
        return linear(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return models.linear_input_gradient(ctx.linear, gradients[0]), None


class FrozenLinear(nn.Module):
    """A linear layer of the base model that passes gradients through."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return _InputGradient.apply(x, self.linear)  # pyright: ignore[reportReturnType]


class FrozenNorm(nn.Module):
    """An RMSNorm or LayerNorm of the base model that passes gradients through."""

    def __init__(self, norm: Any):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        with models.weights(self.norm, x) as held:
            weight, bias = (None if t is None else t.detach().clone() for t in held)
        shape, eps = self.norm.normalized_shape, self.norm.eps
        if isinstance(self.norm, nn.RMSNorm):
            return F.rms_norm(x, shape, weight, eps)
        return F.layer_norm(x, shape, weight, bias, eps)


def freeze(module: nn.Module) -> nn.Module | None:
    """What stands in for a layer of the base model, or None where it can stay."""
    if isinstance(module, nn.Linear):
        return FrozenLinear(module)
    if isinstance(module, (nn.RMSNorm, nn.LayerNorm)) and module.weight is not None:
        return FrozenNorm(module)
    return None


def frozen_view(model: nn.Module) -> Any:
    """A view of a WanModel whose blocks and head pass gradients; the model is not touched."""
    layers = {
        name: frozen
        for name, module in model.named_modules()
        if name.startswith(("blocks.", "head.")) and (frozen := freeze(module))
    }
    return with_layers(model, layers)
