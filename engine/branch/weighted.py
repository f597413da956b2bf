"""Attention in which each of the guide's keys counts `weight` times (method: guide weight).

One softmax over a window's keys and its guide keys, with log(weight) added to the logits of the
guide's. It is two attentions merged by their sums of exponentials, where PyTorch's kernel gives
those: no key is repeated, and window and guide keys need not be joined. Elsewhere (under autograd,
on devices without such a kernel) it is one attention with one bias per key.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..comfyui import models

MOST_WINDOWS = 2**15
"""Windows that a kernel takes at a time; some cards refuse more."""

Pair = tuple[Tensor, Tensor]
"""Keys and values."""
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def weighted_attention(q: Tensor, own: Pair, guide: Pair, heads: int, weight: float) -> Tensor:
    """Attention of windows to their keys, and to guide keys that count `weight` times each.

    Args:
        q: [n, L, C].
        own: keys and values [n, K, C].
        guide: keys and values [n, G, C].
        weight: above 0.

    Returns:
        [n, L, C].
    """
    tensors = (q, *own, *guide)
    if len(q) > MOST_WINDOWS:
        parts = zip(*(each.split(MOST_WINDOWS) for each in tensors), strict=True)
        return torch.cat(
            [weighted_attention(q, (k, v), (gk, gv), heads, weight) for q, k, v, gk, gv in parts]
        )
    by_head = [each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in tensors]
    attend = _attention_with_sums(*by_head[:3])
    # The sums have no gradient. Of a first block's tensors only the guide's need one.
    learning = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    if attend is None or learning:
        return _biased(q, own, guide, heads, weight)
    return _merged(attend, by_head, weight).transpose(1, 2).flatten(-2)


def _merged(attend: Attend, by_head: list[Tensor], weight: float) -> Tensor:
    """The attention to each kind of keys, in the proportion of their sums: [n, heads, L, d]."""
    q, k, v, guide_k, guide_v = by_head
    out, log_sum = attend(q, k, v)
    of_guide, guide_log_sum = attend(q, guide_k, guide_v)
    share = torch.sigmoid(guide_log_sum - log_sum + math.log(weight))
    return out.lerp_(of_guide, share[..., None].to(out.dtype))


def _attention_with_sums(q: Tensor, k: Tensor, v: Tensor) -> Attend | None:
    """A kernel from q, k, v [n, heads, L, d] to the output and log sums [n, heads, L] in float32.

    None where PyTorch has none for such tensors.
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if q.device.type == "cuda":
        asked = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
        if torch.backends.cuda.can_use_flash_attention(asked):
            return lambda *args: torch.ops.aten._scaled_dot_product_flash_attention(*args)[:2]
    return None


def _biased(q: Tensor, own: Pair, guide: Pair, heads: int, weight: float) -> Tensor:
    """One attention with a bias for each key, the same for all queries."""
    log_weight = math.log(weight)
    # Only the difference counts: what rounding takes from the guide's bias, the others give back.
    of_guide = float(torch.tensor(log_weight, dtype=q.dtype))
    bias = q.new_full((1, 1, 1, own[0].shape[1] + guide[0].shape[1]), of_guide - log_weight)
    bias[..., own[0].shape[1] :] = of_guide
    k, v = (torch.cat(each, dim=1) for each in zip(own, guide, strict=True))
    return models.biased_attention(q, k, v, heads, bias)
