"""Sliding windows: query tiles that read a key window of fixed size around them.

Neighbouring tiles share keys, and a block must see every token as it was before the block. So the
grid is streamed along one axis: keys and values live in a ring of as many slices as a key window
is long, and are made before any tile that they belong to is written.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..device.chunks import in_chunks
from ..families import wan
from ..geometry.alignment import GuideAlignment
from ..geometry.grid import Grid
from ..geometry.windows import Box, SlidingWindows, flat_index, starts_of
from .block_task import BlockTask
from .ring import Ring
from .rotations import RopeAxes, join_axes


@dataclass(frozen=True)
class TileGroup:
    """Query tiles of one size and one place along the streamed axis.

    All starts are [tiles, 3].
    """

    size: Grid
    tiles: Tensor
    stored: Tensor
    """`tiles`, where the tokens live."""
    keys: Tensor
    """Of the key windows, where the ring lives."""
    guide: Tensor | None
    last_slice: int
    """Slices of the streamed axis that must be in the ring: up to, not including, this one."""


class SlidingAttention:
    """Evaluates blocks by sliding windows.

    Args:
        alignment: the guide's, or None without guide.
        rope: rotations of the target's positions.
    """

    def __init__(self, windows: SlidingWindows, alignment: GuideAlignment | None, rope: RopeAxes):
        self.windows = windows
        self.alignment = alignment
        self.rope = rope
        self.axis = windows.axis
        self._prepared: dict[
            tuple[torch.device, torch.device, torch.device],
            tuple[list[TileGroup], list[Tensor], Tensor | None],
        ] = {}

    def evaluate(self, task: BlockTask, index: int) -> None:
        del index  # the tiles are the same in every block
        ring = task.ring
        assert ring is not None
        ring.filled = 0
        groups, tables, guide_freqs = self._prepare(
            task.device, task.tokens.index_device, ring.index_device
        )
        guide = None
        if task.guide is not None:
            assert guide_freqs is not None
            keys, values = task.guide
            guide = wan.rotate(keys[None], task.heads, guide_freqs)[0], values
        for group in groups:
            self._fill(task, ring, group.last_slice, tables)
            keys_per_tile = self.windows.window.count
            if guide is not None and self.alignment is not None:
                keys_per_tile += self.alignment.count.count
            size = (group.size.count + keys_per_tile) // 2
            in_chunks(
                range(size, len(group.tiles) * size + 1, size),
                task.chunk,
                partial(self._evaluate, task, ring, guide, group, tables),
            )

    def _prepare(
        self, device: torch.device, stored: torch.device, ring: torch.device
    ) -> tuple[list[TileGroup], list[Tensor], Tensor | None]:
        """Tiles in streaming order, per-axis rotations of the target, rotations of the guide.

        Args:
            stored, ring: where indices of the tokens and of the ring must be.
        """
        key = device, stored, ring
        if key not in self._prepared:
            tables = [
                self.rope.table(axis, torch.arange(n, device=device))
                for axis, n in enumerate(self.windows.grid)
            ]
            guide_freqs = None
            if self.alignment is not None:
                guide_freqs = join_axes(
                    [
                        self.rope.tables(axis, torch.tensor([positions], device=device))
                        for axis, positions in enumerate(self.alignment.positions)
                    ]
                )
            self._prepared[key] = self._groups(*key), tables, guide_freqs
        return self._prepared[key]

    def _groups(
        self, device: torch.device, stored: torch.device, ring: torch.device
    ) -> list[TileGroup]:
        by_place: dict[tuple[int, Grid], list[Box]] = defaultdict(list)
        for tile in self.windows.tiles():
            by_place[tile.start[self.axis], tile.size].append(tile)
        groups = []
        for _, tiles in sorted(by_place.items()):
            keys = [self.windows.keys(tile) for tile in tiles]
            guide = None
            if self.alignment is not None:
                guide = starts_of([self.alignment.box(box) for box in keys], device)
            groups.append(
                TileGroup(
                    tiles[0].size,
                    starts_of(tiles, device),
                    starts_of(tiles, stored),
                    starts_of(keys, ring),
                    guide,
                    keys[0].start[self.axis] + keys[0].size[self.axis],
                )
            )
        return groups

    def _fill(self, task: BlockTask, ring: Ring, last: int, tables: list[Tensor]) -> None:
        """Make keys and values of the slices up to `last` from tokens not yet written."""
        if last <= ring.filled:
            return
        size = list(self.windows.grid)
        size[self.axis] = last - ring.filled
        index, stored = (
            flat_index(self.windows.grid, self._start_on(place, ring.filled), Grid(*size))[0]
            for place in (task.device, task.tokens.index_device)
        )
        starts = self._start_on(ring.index_device, ring.filled)
        slots = flat_index(ring.grid, starts, Grid(*size), wrap=ring.grid)[0]

        def compute(begin: int, end: int) -> None:
            x, modulation = task.read(stored[begin:end])
            y = wan.attention_input(task.block, x, modulation)
            freqs = self._rotations_of(index[begin:end], tables)
            keys = wan.rotate(task.parts.keys(task.block.self_attn, y), task.heads, freqs)
            values = task.block.self_attn.v(y)
            ring.write(slots[begin:end], keys[0], values[0])

        in_chunks(range(1, len(index) + 1), task.chunk, compute)
        ring.settle()
        ring.filled = last

    def _start_on(self, device: torch.device, first: int) -> Tensor:
        """Where slice `first` starts [1, 3], made on the device: a copy would wait for its work."""
        starts = torch.zeros((1, 3), dtype=torch.long, device=device)
        starts[:, self.axis] = first
        return starts

    def _rotations_of(self, index: Tensor, tables: list[Tensor]) -> Tensor:
        """Rotations [1, n, 1, d/2, 2, 2] of tokens at raster indices [n]."""
        _, h, w = self.windows.grid
        coordinates = (index // (h * w), index // w % h, index % w)
        rows = [table[i] for table, i in zip(tables, coordinates, strict=True)]
        return torch.cat(rows, dim=1)[None, :, None]

    def _evaluate(
        self,
        task: BlockTask,
        ring: Ring,
        guide: tuple[Tensor, Tensor] | None,
        group: TileGroup,
        tables: list[Tensor],
        start: int,
        stop: int,
    ) -> None:
        """Tiles start to stop of a group."""
        windows = self.windows
        index = flat_index(windows.grid, group.tiles[start:stop], group.size).flatten()
        stored = flat_index(windows.grid, group.stored[start:stop], group.size).flatten()
        x, modulation = task.read(stored)
        y = wan.attention_input(task.block, x, modulation)
        q = task.parts.queries(task.block.self_attn, y)
        q = wan.rotate(q, task.heads, self._rotations_of(index, tables))
        q = q.view(stop - start, group.size.count, -1)
        slots = flat_index(ring.grid, group.keys[start:stop], windows.window, wrap=ring.grid)
        k, v = ring.read(slots)
        aligned = None
        if guide is not None:
            assert self.alignment is not None
            assert group.guide is not None
            starts = group.guide[start:stop]
            read = flat_index(self.alignment.guide, starts, self.alignment.count)
            aligned = guide[0][read], guide[1][read]
        attended = task.attend(q, k, v, windows.window, aligned)
        del y, q, k, v
        task.finish(x, attended, modulation, stored)
