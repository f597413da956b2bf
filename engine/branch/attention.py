"""Which kernel computes attention: ComfyUI's choice or the artist's, checked where it rounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..comfyui import management, models
from ..log import log

AUTO = "auto"
BACKENDS = (AUTO, "pytorch", "sage", "flash", "xformers")
QUANTISED = ("sage", "sage3")
CHECKED_QUERIES = 4_096
"""More than kernels call short (SageAttention 3: 1,024), few enough to cost no memory."""
TOLERANCE = 0.1
"""Largest relative L1 error of a kernel; SageAttention reports below 0.05 for its 8-bit ones."""

PLAIN = ("pytorch", "sub_quad", "split")
"""ComfyUI's attentions that compute the same as PyTorch's, at other speeds."""

_verdicts: dict[tuple, bool] = {}


def override_for(backend: str, device: torch.device) -> Callable | None:
    """An `optimized_attention_override` for a backend, or None to leave ComfyUI's as it is.

    `auto` follows ComfyUI's start flags; on the CPU its fallback is replaced by PyTorch's fused
    attention. Kernels that round are verified at first use and dropped when they are wrong.

    Raises:
        ValueError: unknown backend, or one that is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention is {backend!r}; allowed are {', '.join(BACKENDS)}.")
    if backend != AUTO:
        chosen = models.attention_function(backend)
        if chosen is None:
            here = [name for name in BACKENDS if name == AUTO or models.attention_function(name)]
            raise ValueError(
                f"attention is {backend!r}, which is not installed in this ComfyUI; "
                f"available are {', '.join(here)}."
            )
        if backend not in QUANTISED:
            return lambda _, *args, **kwargs: chosen(*args, **kwargs)
        return lambda _, *args, **kwargs: verified(backend, chosen, *args, **kwargs)
    if device.type == "cpu":
        return models.fused_on_cpu
    name = models.started_attention()
    if name in QUANTISED:
        return lambda chosen, *args, **kwargs: verified(name, chosen, *args, **kwargs)
    if name == "pytorch" and device.type == "cuda" and cudnn_is_faster(device):
        return lambda _, *args, **kwargs: models.cudnn_attention(*args, **kwargs)
    return None


CUDNN_SINCE = 9
"""Major compute capability (Hopper) from which cuDNN's attention is worth a measurement: before, it
is reported as fast as flash or slower."""
WORTH = 0.95
"""Share of flash's time below which cuDNN's is taken."""
ROUNDED = 0.01
"""Largest relative L1 error between two kernels that compute the same in half precision."""


@cache
def cudnn_is_faster(device: torch.device) -> bool:
    """Whether cuDNN's attention is right and clearly faster here, on compact windows of 1.3B."""
    if torch.cuda.get_device_capability(device)[0] < CUDNN_SINCE:
        return False
    pytorch = models.attention_function("pytorch")
    if pytorch is None:
        return False
    heads, windows, queries, keys = 12, 32, 1_024, 1_104
    try:
        q, k, v = (
            torch.randn((windows, n, heads * 128), device=device, dtype=torch.bfloat16)
            for n in (queries, keys, keys)
        )
        expected = pytorch(q, k, v, heads=heads).float()
        given = models.cudnn_attention(q, k, v, heads).float()
        difference = float((given - expected).abs().mean() / expected.abs().mean())
        del expected, given
        took = [
            _seconds(device, lambda call=call: call(q, k, v, heads=heads))
            for call in (models.cudnn_attention, pytorch)
        ]
    except Exception as error:
        if management.is_out_of_memory(error):
            return False
        log.warning("AtlasVid: cuDNN's attention failed (%s); using ComfyUI's choice", error)
        return False
    if not difference <= ROUNDED:  # true for NaN
        log.warning("AtlasVid: cuDNN's attention is off by %.2g on this card", difference)
        return False
    return took[0] < WORTH * took[1]


def _seconds(device: torch.device, call: Callable[[], object], rounds: int = 5) -> float:
    """Of the fastest of some rounds on a card."""
    found = []
    for _ in range(rounds):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record(torch.cuda.current_stream(device))
        call()
        ended.record(torch.cuda.current_stream(device))
        ended.synchronize()
        found.append(begun.elapsed_time(ended) / 1e3)
    return min(found)


def say_if_passed_over(backend: str, options: dict) -> None:
    """Say once that a kernel is not used where guide keys have a weight: PyTorch's alone can.

    Others do not give the sums that `branch.weighted` needs.

    Args:
        backend: the artist's choice.
        options: transformer options, in which another node may have chosen one.
    """
    name = models.started_attention() if backend == AUTO else backend
    if "optimized_attention_override" in options:
        name = "another node's attention"
    if name not in PLAIN:
        _say_passed_over(name)


@cache
def _say_passed_over(name: str | None) -> None:
    log.warning(
        "AtlasVid: windows use PyTorch's attention, as %s cannot weight the guide's keys; with "
        "guide_weight 1 it is used",
        name,
    )


def verified(
    name: str, chosen: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any
) -> Tensor:
    """`chosen`, or PyTorch's attention where `chosen` was found wrong for such tensors.

    It has the parameters of ComfyUI's attention. The check runs once per device, precision and
    head size, on queries of the first batch row.
    """
    key = (name, q.device, q.dtype, q.shape[-1] // heads)
    if key not in _verdicts:
        few = q[:1, :CHECKED_QUERIES], k[:1], v[:1]
        _verdicts[key] = _is_right(name, chosen, few, kwargs | {"heads": heads})
    if not _verdicts[key]:
        chosen = models.attention_function("pytorch") or chosen
    return chosen(q, k, v, heads=heads, **kwargs)


def _is_right(name: str, chosen: Callable, few: tuple[Tensor, ...], kwargs: dict) -> bool:
    reference = models.attention_function("pytorch")
    if reference is None:
        return True
    expected = reference(*few, **kwargs).float()
    try:
        given = chosen(*few, **kwargs).float()
    except Exception as error:
        if management.is_out_of_memory(error):
            raise
        log.warning("AtlasVid: %s attention failed (%s); using PyTorch's", name, error)
        return False
    error = float((given - expected).abs().mean() / expected.abs().mean().clamp(min=1e-12))
    if error <= TOLERANCE:  # false for NaN
        return True
    log.warning(
        "AtlasVid: %s attention is wrong on this card (relative error %.2g); using PyTorch's",
        name,
        error,
    )
    return False
