"""Operations that cards do in one pass, each beside the plain ones that it stands for.

The variable ATLASVID_FUSED=0 leaves them all out. Each is compared with the plain ones at first use
and left out where they differ.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..comfyui import management, models
from ..log import log

ENABLED = os.environ.get("ATLASVID_FUSED", "1") != "0"
TOLERANCE = 0.01
"""Largest relative L1 error in half precision: both round differently."""
CHECKED = 256
"""Tokens of the comparison."""

_agreed: dict[tuple, bool] = {}


def linear_gelu(linear: Any, gelu: nn.Module, x: Tensor) -> Tensor:
    """gelu(linear(x)) for x [..., in], as the last step of the product where that can be."""
    if not _fits(linear, gelu, x):
        return gelu(linear(x))
    key = "linear_gelu", x.device, x.dtype
    if key not in _agreed:
        few = x.flatten(0, -2)[:CHECKED]
        _agreed[key] = agree(lambda: _fused(linear, few), lambda: gelu(linear(few)), key[0])
    return _fused(linear, x) if _agreed[key] else gelu(linear(x))


def _fits(linear: Any, gelu: nn.Module, x: Tensor) -> bool:
    """Whether a layer's weights are plain ones, and nothing else has to see its output."""
    return (
        ENABLED
        and x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and models.is_plain_linear(linear)
        and linear.weight.dtype == x.dtype
        and linear.bias is not None
        and isinstance(gelu, nn.GELU)
        and gelu.approximate == "tanh"
    )


def _fused(linear: Any, x: Tensor) -> Tensor:
    with models.weights(linear, x) as (weight, bias):
        assert bias is not None  # `_fits` has looked
        flat = torch.ops.aten._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return flat.unflatten(0, x.shape[:-1])


def agree(fused: Any, plain: Any, name: str) -> bool:
    """Whether two ways to compute agree; says so where they do not."""
    expected = plain().float()
    try:
        given = fused().float()
    except Exception as error:
        if management.is_out_of_memory(error):
            raise
        log.warning("AtlasVid: %s failed on this card (%s); computed in steps", name, error)
        return False
    error = float((given - expected).abs().mean() / expected.abs().mean().clamp(min=1e-12))
    if error <= TOLERANCE:  # false for NaN
        return True
    log.warning("AtlasVid: %s is off by %.2g on this card; computed in steps", name, error)
    return False
