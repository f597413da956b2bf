"""The parts of a block between its attentions, compiled where the artist asks for it.

The stock TorchCompileModel node is the switch. It would trace our loops over windows; instead its
choices are used for what is worth compiling, and the loops run as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..comfyui import management
from ..families.family import Family
from ..log import log


class Compiled:
    """A function through torch.compile; as it is once that failed."""

    def __init__(self, function: Callable, choices: dict[str, Any]):
        self.function = function
        self.compiled: Callable | None = torch.compile(function, **choices)

    def __call__(self, *args: Any) -> Any:
        if self.compiled is not None:
            try:
                return self.compiled(*args)
            except Exception as error:
                if management.is_out_of_memory(error) or management.is_cancelled(error):
                    raise
                log.warning(
                    "AtlasVid: torch.compile failed for %s, which now runs without: %s",
                    self.function.__name__,
                    str(error).strip().partition("\n")[0] or type(error).__name__,
                )
                self.compiled = None
        return self.function(*args)


@dataclass(frozen=True)
class Parts:
    """The parts of a block that can be exchanged for compiled ones.

    Queries and keys are normalised, not rotated. Where they need not be seen so, `turned_queries`
    and `turned_keys` make what attention reads of what `projected_queries` and `projected_keys`
    give: uncompiled, norm and rotation are one kernel; compiled, product and norm are.
    """

    queries: Callable[..., Tensor]
    keys: Callable[..., Tensor]
    feed_forward: Callable[..., Tensor]
    projected_queries: Callable[..., Tensor]
    projected_keys: Callable[..., Tensor]
    turned_queries: Callable[..., Tensor]
    turned_keys: Callable[..., Tensor]


def parts_of(family: Family, choices: dict[str, Any] | None) -> Parts:
    """The parts of a block, compiled with torch.compile's `choices` unless they are None.

    Not by `cudagraphs`, which wants one length and writes each result over the one before.
    """
    parts = family.queries, family.keys, family.feed_forward
    if choices is None or choices["backend"] == "cudagraphs":
        projected = family.projected_queries, family.projected_keys
        return Parts(*parts, *projected, family.turned_queries, family.turned_keys)
    if choices.get("dynamic") is None:  # chunks differ in length
        choices = {**choices, "dynamic": True}
    queries, keys, forward = (Compiled(part, choices) for part in parts)

    def turned(_: Any, x: Tensor, heads: int, freqs: Tensor, out: Tensor | None = None) -> Tensor:
        return family.rotate(x, heads, freqs, out)

    return Parts(queries, keys, forward, queries, keys, turned, turned)
