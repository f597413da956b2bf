"""The sizes of a model by which it is recognised and its work is counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseShape:
    """The sizes of a transformer."""

    dim: int
    ffn_dim: int
    layers: int
    in_dim: int = 16
    """Channels of its input: of a latent, and of an image that conditions it."""

    def __str__(self) -> str:
        return (
            f"{self.layers} blocks of width {self.dim} (feed-forward {self.ffn_dim}, "
            f"{self.in_dim} input channels)"
        )
