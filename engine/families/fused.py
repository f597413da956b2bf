"""Operations that cards do in one pass, each beside the plain ones that it stands for.

The variable ATLASVID_FUSED=0 leaves them all out. Each is compared with the plain ones at first use
and left out where they differ.
"""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType
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


@cache
def _kernels() -> ModuleType | None:
    """Our Triton kernels, where Triton is installed."""
    try:
        from . import kernels
    except ImportError:
        return None
    return kernels


def norm_rotate(
    norm: Any, x: Tensor, heads: int, freqs: Tensor, out: Tensor | None = None
) -> Tensor:
    """RMSNorm and RoPE of queries or keys in one pass over them, straight to where they are read.

    Args:
        norm: over all channels; None where x is normalised.
        x: [n, L, C].
        freqs: rotations [1 or n, L, 1, d / 2, 2, 2].
        out: where to write [n, L, C], with any strides but the last.
    """
    if _turns(norm, x, freqs):
        key = "norm_rotate", x.device, x.dtype, norm is None
        if key not in _agreed:
            few, turns = x[:1, :CHECKED], freqs[:1, :CHECKED]
            _agreed[key] = agree(
                lambda: _turned(norm, few, heads, turns, torch.empty_like(few)),
                lambda: _turned_in_steps(norm, few, heads, turns),
                key[0],
            )
        if _agreed[key]:
            return _turned(norm, x, heads, freqs, torch.empty_like(x) if out is None else out)
    turned = _turned_in_steps(norm, x, heads, freqs)
    return turned if out is None else out.copy_(turned)


def _turns(norm: Any, x: Tensor, freqs: Tensor) -> bool:
    """Whether the kernel takes these, and nothing else has to see what lies between."""
    return (
        ENABLED
        and x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.stride(-1) == 1
        and freqs.dtype == torch.float32
        and freqs.is_contiguous()
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and (norm is None or models.is_plain_norm(norm))
        and _kernels() is not None
    )


def _turned(norm: Any, x: Tensor, heads: int, freqs: Tensor, out: Tensor) -> Tensor:
    if norm is None:
        _norm_rotate(x, None, freqs, out, heads, 0.0)
        return out
    with models.weights(norm, x) as (weight, _):
        _norm_rotate(x, weight, freqs, out, heads, norm.eps)
    return out


@torch.library.custom_op("atlasvid::norm_rotate", mutates_args=("out",), device_types="cuda")
def _norm_rotate(
    x: Tensor, weight: Tensor | None, freqs: Tensor, out: Tensor, heads: int, eps: float
) -> None:
    """See `kernels.norm_rotate`. An operator, so that it can be simulated, counted and profiled."""
    kernels = _kernels()
    assert kernels is not None  # `_turns` has looked
    kernels.norm_rotate(x, weight, freqs, out, heads, eps)


_norm_rotate.register_fake(lambda x, weight, freqs, out, heads, eps: None)


def _turned_in_steps(norm: Any, x: Tensor, heads: int, freqs: Tensor) -> Tensor:
    y = x if norm is None else norm(x)
    if len(freqs) == 1:
        return models.apply_rope(y.unflatten(-1, (heads, -1)), freqs).flatten(-2)
    # One row of batch 1: rotation kernels take one set of rotations for all of a batch.
    row, turns = y.flatten(0, 1)[None], freqs.flatten(0, 1)[None]
    return models.apply_rope(row.unflatten(-1, (heads, -1)), turns).flatten(-2).view(y.shape)


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
