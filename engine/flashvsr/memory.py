"""Where the tensors of an up-scaling live, and in which order its work is done.

Pure arithmetic on what is free.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..geometry.shape import BaseShape
from .blocks import TOKENS, BlockGrid
from .schedule import FIRST_CHUNK, SLOT
from .selection import Sparsity

CUDA_CHUNK = 65_536
CPU_CHUNK = 4_096
"""Tokens at a time past which a larger chunk gains no speed."""
MIN_CHUNK = 1_024
CHUNK_VECTORS = 24
"""Vectors of a token that live at the peak of a chunk, beside its feed-forward's."""
MOST_CHUNKS = 64
"""In a piece: about 500 frames, after which weights are read once more."""
FIRST_SLOTS = FIRST_CHUNK // SLOT


@dataclass(frozen=True)
class Places:
    """What lives on the device; the rest lives in host memory.

    Args:
        chunks: in a piece; 1 is chunk by chunk, more is block by block.
        keys_stay: whether the keys of all blocks stay on the device, or one block's at a time.
        tokens: to compute at a time.
    """

    chunks: int
    tokens_on_device: bool
    queries_on_device: bool
    keys_on_device: bool
    keys_stay: bool
    tokens: int

    @property
    def order(self) -> str:
        """In words."""
        return "chunk by chunk" if self.chunks == 1 else "block by block"


@dataclass(frozen=True)
class Sizes:
    """Bytes of an up-scaling's tensors."""

    slot: int
    """A vector for every token of two latent frames."""
    layers: int
    most_slots: int
    kept_slots: int
    per_token: int
    head: int
    """Queries, keys and values of one head, their scores, and the keys that are gathered."""

    @classmethod
    def of(cls, grid: BlockGrid, shape: BaseShape, sparsity: Sparsity, itemsize: int) -> Sizes:
        slot = grid.count * TOKENS * shape.dim * itemsize
        most = sparsity.most_slots
        heads = max(1, shape.dim // 128)
        scores = 3 * 4 * grid.count**2 * most
        return cls(
            slot=slot,
            layers=shape.layers,
            most_slots=most,
            kept_slots=most - 1,
            per_token=(CHUNK_VECTORS * shape.dim + 2 * shape.ffn_dim) * itemsize,
            head=(2 * most + FIRST_SLOTS) * slot // heads + scores,
        )

    @property
    def one_cache(self) -> int:
        return 2 * self.most_slots * self.slot

    @property
    def all_caches(self) -> int:
        """The keys of all blocks, beside those of the one that is evaluated."""
        return 2 * self.kept_slots * self.slot * self.layers + self.one_cache

    @property
    def chunk(self) -> int:
        """Tokens and queries of the first, largest chunk."""
        return 2 * FIRST_SLOTS * self.slot

    def wanted(self, tokens: int) -> int:
        """What an up-scaling works with at full speed, block by block."""
        return self.one_cache + self.chunk + self.head + tokens * self.per_token

    def piece(self, chunks: int) -> int:
        """Tokens of the first chunks of a clip."""
        return (FIRST_SLOTS - 1 + chunks) * self.slot

    def on_device(self, places: Places) -> int:
        """Bytes of the device that an up-scaling takes beside the weights."""
        working = self.head + places.tokens * self.per_token
        if places.keys_stay:
            return working + self.all_caches + self.chunk
        if places.keys_on_device:
            return working + self.one_cache + FIRST_SLOTS * self.slot
        return working

    def on_host(self, places: Places, chunks: int) -> int:
        """Bytes of host memory that it takes for a clip of so many chunks."""
        if places.tokens_on_device:
            return 0
        kept = 0 if places.chunks >= chunks else self.all_caches - self.one_cache
        moved = 0 if places.keys_on_device else self.one_cache + FIRST_SLOTS * self.slot
        return self.piece(min(places.chunks, chunks)) + kept + moved


def choose_places(
    sizes: Sizes, free: int, host_free: int, most_tokens: int, clip: int = 2**31
) -> Places:
    """What fits into `free` bytes of the device and `host_free` of the host.

    All caches on the device: chunk by chunk. Else one block's cache there, and as many chunks in
    a piece as the host keeps; else queries and keys move head by head. A clip whose tokens the
    host keeps is one piece: no block's keys are wanted again.

    Args:
        clip: chunks of the clip.
    """
    left = free - sizes.head
    tokens = max(MIN_CHUNK, min(most_tokens, left // 2 // sizes.per_token))
    left -= tokens * sizes.per_token
    if left >= sizes.all_caches + sizes.chunk:
        return Places(1, True, True, True, True, tokens)
    one = left >= sizes.one_cache + FIRST_SLOTS * sizes.slot
    whole = Places(clip, False, one, one, False, tokens)
    room = host_free // 2  # the rest is for the host's other work
    if sizes.on_host(whole, clip) <= room:
        return whole
    # Caches of all blocks and the tokens of the piece.
    chunks = max(1, min(MOST_CHUNKS, (room - sizes.all_caches) // (2 * sizes.slot)))
    return Places(int(chunks), False, one, one, False, tokens)
