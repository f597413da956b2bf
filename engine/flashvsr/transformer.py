"""FlashVSR's one evaluation of a Wan transformer, with its cache of keys, in either order of work.

Chunk by chunk needs every block's cache; block by block over several chunks needs that of one. A
block's state depends on its own earlier chunks alone, so both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..comfyui import management
from ..device.chunks import ChunkSize, in_chunks
from ..device.outbox import Outbox
from ..device.parts import DeviceParts, HostParts, Parts
from ..families import wan
from .blocks import SIDE, TOKENS, BlockGrid
from .kernel import attention_for
from .memory import Places
from .rotations import BlockRotations
from .schedule import SLOT, Chunk
from .selection import Sparsity, chosen, pooled

TIMESTEP = 1000.0
LATENT_ROWS = 2 * SIDE
"""Rows of the latent in a row of blocks."""


@dataclass
class Slot:
    """Two latent frames of a chunk: their tokens, and what one block makes of them.

    Args:
        first: number of the first latent frame.
        noise: [1, 16, 2, h, w], float32.
        tokens: [N, 128, C] in block order.
    """

    first: int
    noise: Tensor
    tokens: Parts
    queries: Parts | None = None
    """[heads, N, 128, d]; attended values once they are known."""


@dataclass
class Keys:
    """Keys and values of one slot in one block, [heads, N, 128, d]."""

    keys: Parts
    values: Parts


@dataclass
class Memory:
    """What the blocks remember of earlier chunks: slots of keys, oldest first."""

    of_blocks: dict[int, list[Keys]] = field(default_factory=dict)

    def of(self, block: int) -> list[Keys]:
        return self.of_blocks.setdefault(block, [])


class Evaluation:
    """What stays the same in one evaluation of a transformer, wherever its tokens are.

    Args:
        net: a WanModel whose weights are loaded.
        prompt: the checkpoint's own text [1, L, 4096].
        like: an empty tensor of the device and dtype to compute in.
    """

    def __init__(
        self, net: Any, prompt: Tensor, like: Tensor, grid: BlockGrid, sparsity: Sparsity
    ) -> None:
        self.net = net
        self.like = like
        self.grid = grid
        self.sparsity = sparsity
        self.heads = wan.heads(net)
        self.rotations = BlockRotations(net.rope_embedder, grid, like.device)
        self.near = grid.local_mask(sparsity.local_range, like.device)
        timestep = torch.full((1,), TIMESTEP, device=like.device)
        self.time, self.modulation = wan.time_embedding(net, timestep, like.dtype)
        self.text = wan.Text(net.text_embedding(prompt.to(like)), None)
        self.options: dict[str, Any] = {}
        """The transformer options, for the attention to the text."""

    def chosen(self, queries: Tensor, means: Tensor) -> Tensor:
        """Which blocks of keys those of one slot and head attend to, bool [N, slots * N].

        Args:
            queries: [N, 128, d].
            means: of the keys' blocks [slots * N, d].
        """
        return chosen(pooled(queries), means, self.near, self.sparsity.budget(self.grid))

    def after_attention(
        self, block: Any, x: Tensor, attended: Tensor, rows: wan.Modulation
    ) -> Tensor:
        """The rest of a block on tokens x [1, n, C]."""
        x = wan.attention_output(block, x, attended, rows)
        x = x + wan.cross_attention(block, x, self.text, self.options)
        return torch.addcmul(x, wan.feed_forward(block, x, rows), rows.gate)

    def by_head(self, x: Tensor) -> Tensor:
        """[1, n * 128, C] -> [heads, n, 128, d]"""
        return x[0].unflatten(0, (-1, TOKENS)).unflatten(-1, (self.heads, -1)).permute(2, 0, 1, 3)

    def to_tokens(self, attended: Tensor) -> Tensor:
        """The inverse of `by_head`."""
        return attended.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)[None]


class OneStep(Evaluation):
    """Evaluates chunks of a clip in order.

    Args:
        at_block: called before every block of every chunk.
    """

    def __init__(
        self,
        net: Any,
        prompt: Tensor,
        like: Tensor,
        grid: BlockGrid,
        sparsity: Sparsity,
        places: Places,
        at_block: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(net, prompt, like, grid, sparsity)
        self.places = places
        self.chunk = ChunkSize(places.tokens)
        self.at_block = at_block
        self.attention = attention_for(like.device, like.dtype)
        self.memory = Memory()
        self._outbox = Outbox(like.device, "what FlashVSR keeps in host memory")

    def __call__(
        self,
        chunks: Iterable[Chunk],
        noise: Callable[[int], Tensor],
        conditioning: Callable[[int], Tensor],
    ) -> Iterator[tuple[int, Tensor]]:
        """The clean latent, a slot at a time: number of its first frame, [1, 16, 2, h, w].

        Args:
            noise: of a latent frame [16, h, w], float32.
            conditioning: the low-quality frames' tokens of a latent frame [h / 2, w / 2, C]; asked
                for every frame once, in order.
        """
        with self._outbox:
            for piece, last in _pieces(chunks, self.places.chunks):
                slots = [
                    [self._embedded(first, noise, conditioning) for first in range(*span, SLOT)]
                    for span in ((chunk.first, chunk.stop) for chunk in piece)
                ]
                self._outbox.settle()
                for index, block in enumerate(wan.blocks(self.net)):
                    for chunk_slots in slots:
                        self.at_block()
                        self._evaluate(index, block, chunk_slots)
                    self._put_away(index, last)
                for slot in (slot for chunk_slots in slots for slot in chunk_slots):
                    yield slot.first, self._denoised(slot)

    # --- Ends ---------------------------------------------------------------------------------

    def _embedded(self, first: int, noise: Any, conditioning: Any) -> Slot:
        frames = range(first, first + SLOT)
        own = torch.stack([noise(t) for t in frames], dim=1)[None]
        shown = torch.stack([conditioning(t).to(self.like.device) for t in frames])
        row = BlockGrid(1, self.grid.columns)
        dim = wan.shape(self.net).dim
        tokens = self._room(self.places.tokens_on_device, (self.grid.count, TOKENS, dim))

        def compute(start: int, stop: int) -> None:
            for i in range(start, stop):
                latent = own[:, :, :, i * LATENT_ROWS : (i + 1) * LATENT_ROWS].to(self.like)
                embedded = wan.embed(self.net, latent).view(SLOT, SIDE, -1, dim)
                added = embedded + shown[:, i * SIDE : (i + 1) * SIDE]
                tokens.write(slice(i * row.count, (i + 1) * row.count), row.to_blocks(added))

        in_chunks(range(1, self.grid.rows + 1), ChunkSize(1), compute)
        return Slot(first, own, tokens)

    def _denoised(self, slot: Slot) -> Tensor:
        clean = torch.empty_like(slot.noise)
        row = BlockGrid(1, self.grid.columns)

        def compute(start: int, stop: int) -> None:
            for i in range(start, stop):
                blocks = slot.tokens.read(slice(i * row.count, (i + 1) * row.count))
                for t, tokens in enumerate(row.to_raster(blocks)):
                    velocity = wan.head(
                        self.net, tokens.flatten(0, 1)[None], self.time, tokens.shape[1]
                    )
                    rows = slice(i * LATENT_ROWS, (i + 1) * LATENT_ROWS)
                    clean[0, :, t, rows] = slot.noise[0, :, t, rows] - velocity.to(clean)

        in_chunks(range(1, self.grid.rows + 1), ChunkSize(1), compute)
        return clean

    # --- A block ------------------------------------------------------------------------------

    def _evaluate(self, index: int, block: Any, slots: list[Slot]) -> None:
        """Block number `index` in place on the tokens of a chunk."""
        rows = wan.modulation(block, self.modulation[0])
        remembered = self.memory.of(index)
        remembered += [self._projected(block, slot, rows) for slot in slots]
        self._outbox.settle()

        def attend(start: int, stop: int) -> None:
            for head in range(start, stop):
                self._attend(head, slots, remembered)

        in_chunks(range(1, self.heads + 1), ChunkSize(1), attend)
        self._outbox.settle()
        del remembered[: self.sparsity.forgotten(len(remembered))]
        for slot in slots:
            self._finish(block, slot, rows)
            slot.queries = None
        self._outbox.settle()

    def _projected(self, block: Any, slot: Slot, rows: wan.Modulation) -> Keys:
        """Queries, keys and values of a slot."""
        dim = wan.shape(self.net).dim
        shape = (self.heads, self.grid.count, TOKENS, dim // self.heads)
        queries = self._room(self.places.queries_on_device, shape)
        keys, values = (self._room(self.places.keys_on_device, shape) for _ in range(2))

        def compute(start: int, stop: int) -> None:
            x = self._read(slot.tokens, start, stop)
            y = wan.attention_input(block, x, rows)
            rotations = self.rotations.of(slot.first, start, stop)
            made = (
                (queries, wan.rotate(wan.queries(block, y), self.heads, rotations)),
                (keys, wan.rotate(wan.keys(block, y), self.heads, rotations)),
                (values, wan.values(block, y)),
            )
            for store, part in made:
                store.write((slice(None), slice(start, stop)), self.by_head(part))

        self._over_blocks(compute)
        slot.queries = queries
        return Keys(keys, values)

    def _attend(self, head: int, slots: list[Slot], remembered: list[Keys]) -> None:
        """One head of a chunk; the queries of each slot are overwritten with what they attended."""
        k, v = (
            torch.cat([part.read(head) for part in parts])
            for parts in zip(*((slot.keys, slot.values) for slot in remembered), strict=True)
        )
        means, attended = pooled(k), []
        for slot in slots:
            assert slot.queries is not None
            q = slot.queries.read(head)
            kept = self.chosen(q, means)
            attended.append(self.attention(q, k, v, kept, self.chunk).contiguous())
        for slot, values in zip(slots, attended, strict=True):  # last: a head may be repeated
            assert slot.queries is not None
            slot.queries.write(head, values)

    def _finish(self, block: Any, slot: Slot, rows: wan.Modulation) -> None:
        """The rest of a block on one slot."""

        def compute(start: int, stop: int) -> None:
            assert slot.queries is not None
            attended = self.to_tokens(slot.queries.read((slice(None), slice(start, stop))))
            x = self._read(slot.tokens, start, stop)
            x = self.after_attention(block, x, attended, rows)
            slot.tokens.write(slice(start, stop), x.view(stop - start, TOKENS, -1))

        self._over_blocks(compute)

    # --- Where things are ---------------------------------------------------------------------

    def _put_away(self, index: int, last: bool) -> None:
        """Leave the device to the next block's keys, where they cannot all stay there.

        After the `last` piece nothing is wanted of them.
        """
        if last and not self.places.keys_stay:
            del self.memory.of_blocks[index]
        elif self.places.keys_on_device and not self.places.keys_stay:
            for slot in self.memory.of(index):
                slot.keys, slot.values = self._on_host(slot.keys), self._on_host(slot.values)

    def _on_host(self, parts: Parts) -> Parts:
        """A copy in host memory, head by head, of what is on the device."""
        if isinstance(parts, HostParts):
            return parts
        heads = [parts.read(head) for head in range(self.heads)]
        kept = HostParts((self.heads, *heads[0].shape), self.like.dtype, self._outbox)
        for head, values in enumerate(heads):
            kept.write(head, values)
        self._outbox.settle()  # the device's room is wanted now
        return kept

    def _room(self, on_device: bool, shape: tuple[int, ...]) -> Parts:
        """Uninitialised, on the device, or in host memory where there is no room."""
        made = management.empty_if_it_fits(self.like, shape) if on_device else None
        if made is None:
            return HostParts(shape, self.like.dtype, self._outbox)
        return DeviceParts(made)

    def _read(self, tokens: Parts, start: int, stop: int) -> Tensor:
        """Blocks start to stop as tokens [1, n, C] on the device."""
        return tokens.read(slice(start, stop)).flatten(0, 1)[None]

    def _over_blocks(self, compute: Callable[[int, int], None]) -> None:
        in_chunks(range(TOKENS, (self.grid.count + 1) * TOKENS, TOKENS), self.chunk, compute)


def _pieces(chunks: Iterable[Chunk], size: int) -> Iterator[tuple[list[Chunk], bool]]:
    """Up to `size` chunks at a time, and whether they are the last."""
    rest = iter(chunks)
    piece = list(islice(rest, size))
    while piece:
        following = list(islice(rest, size))
        yield piece, not following
        piece = following
