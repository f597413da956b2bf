"""What the detail branch, training and the estimate know of a model's architecture.

A family is a module (or any object) with these members, listed in `FAMILIES`. All else that stands
on it, windows, alignment, chunks, memory, runs, works on tokens and does not know what a block is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..comfyui import models
from ..geometry.shape import BaseShape
from ..geometry.space import LatentSpace
from . import wan
from .rotations import RopeAxes


class Conditioning(Protocol):
    """What the forward is given beside latent and timestep."""

    @property
    def options(self) -> dict:
        """The stock transformer options."""
        ...

    def require_known(self) -> None:
        """Raises ValueError where there is a kind that the detail branch does not know."""
        ...


class Text(Protocol):
    """What cross-attention reads, of a batch."""

    @property
    def tokens(self) -> Tensor:
        """[B, L, C]"""
        ...

    def with_tokens(self, tokens: Tensor) -> Any:
        """The same with other tokens [B, L, C]."""
        ...

    def of(self, item: int) -> Any:
        """The text of one batch item."""
        ...


class Modulation(Protocol):
    """How the timestep changes a block, for one batch item."""

    @property
    def per_frame(self) -> bool:
        """Whether frames differ, so that it must be told which frames tokens lie in."""
        ...

    @property
    def gate(self) -> Tensor:
        """The feed-forward's gate [1 or n, C]."""
        ...

    def of_tokens(self, frames: Tensor) -> Any:
        """For tokens that lie in the given frames [n]."""
        ...

    def part(self, start: int, stop: int) -> Any:
        """For tokens start to stop of those that this modulation is for."""
        ...


class Family(Protocol):
    """A model family. `net` is its diffusion model, `block` one of its transformer blocks.

    Tokens are [B or 1, n, C]. The members are explained where the first family has them, in
    `families.wan`.
    """

    NAMES: str
    """The supported models, for an error message."""
    TIMESTEPS: float
    """The timestep at sigma 1."""

    def recognises(self, model: Any) -> bool: ...
    def latent_space(self, model: Any) -> LatentSpace: ...
    def shape(self, net: Any) -> BaseShape: ...
    def heads(self, net: Any) -> int: ...
    def blocks(self, net: Any) -> Sequence[Any]: ...
    def rotations(self, net: Any, options: Mapping[str, float]) -> RopeAxes: ...
    def conditioning(self, context: Tensor, args: tuple, kwargs: dict) -> Any: ...
    def text(self, net: Any, given: Any) -> Any: ...
    def time_embedding(
        self, net: Any, timestep: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]: ...
    def embed(self, net: Any, latent: Tensor) -> Tensor: ...
    def head(self, net: Any, tokens: Tensor, e: Tensor, width: int) -> Tensor: ...
    def modulation(self, block: Any, e0: Tensor) -> Any: ...
    def attention_input(self, block: Any, x: Tensor, rows: Any) -> Tensor: ...
    def queries(self, block: Any, y: Tensor) -> Tensor: ...
    def keys(self, block: Any, y: Tensor) -> Tensor: ...
    def values(self, block: Any, y: Tensor) -> Tensor: ...
    def rotate(self, x: Tensor, heads: int, freqs: Tensor, out: Tensor | None = None) -> Tensor: ...
    def projected_queries(self, block: Any, y: Tensor) -> Tensor: ...
    def projected_keys(self, block: Any, y: Tensor) -> Tensor: ...
    def turned_queries(self, block: Any, x: Tensor, heads: int, freqs: Tensor) -> Tensor: ...
    def turned_keys(
        self, block: Any, x: Tensor, heads: int, freqs: Tensor, out: Tensor | None = None
    ) -> Tensor: ...
    def attention_output(self, block: Any, x: Tensor, attended: Tensor, rows: Any) -> Tensor: ...
    def text_of_block(self, block: Any, text: Any) -> Any: ...
    def cross_attention(self, block: Any, x: Tensor, text: Any, options: dict) -> Tensor: ...
    def feed_forward(self, block: Any, x: Tensor, rows: Any) -> Tensor: ...


FAMILIES: list[Family] = [wan]


def family_of(model: Any) -> Family:
    """The family of a loaded model.

    Raises:
        ValueError: names the model found and the models supported.
    """
    for family in FAMILIES:
        if family.recognises(model):
            return family
    raise ValueError(
        "AtlasVid cannot work on this model: it was recognised as "
        f"{models.model_name(model)}. Supported are "
        f"{', '.join(family.NAMES for family in FAMILIES)}. Load one of those with Load Diffusion "
        "Model (VACE, Animate, Camera, Fun-Control and other architectures have other blocks)."
    )


def latent_space(model: Any) -> LatentSpace:
    """The latent space of a loaded model.

    Raises:
        ValueError: see `family_of`.
    """
    return family_of(model).latent_space(model)
