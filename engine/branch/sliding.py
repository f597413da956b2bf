"""Sliding windows: query tiles that read a key window of fixed size around them.

Neighbouring tiles share keys, and a block must see every token as it was before the block. So the
grid is streamed along one axis: keys and values live in a ring of as many slices as a key window
is long, and are made before any tile that they belong to is written.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..device.chunks import in_chunks
from ..families.rotations import RopeAxes, join_axes
from ..geometry.alignment import GuideAlignment
from ..geometry.grid import Grid
from ..geometry.windows import Box, SlidingWindows, flat_index, starts_of
from .block_task import BlockTask
from .ring import Ring
from .weighted import Pair


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


@dataclass(frozen=True)
class Prepared:
    """What depends on geometry alone."""

    groups: list[TileGroup]
    """Tiles in streaming order."""
    tables: list[Tensor]
    """Per-axis rotations of the target."""
    guide_freqs: Tensor | None
    """Rotations of the guide."""

    def rotations_of(self, index: Tensor, grid: Grid) -> Tensor:
        """Rotations [1, n, 1, d/2, 2, 2] of tokens at raster indices [n]."""
        _, h, w = grid
        coordinates = (index // (h * w), index // w % h, index % w)
        rows = [table[i] for table, i in zip(self.tables, coordinates, strict=True)]
        return torch.cat(rows, dim=1)[None, :, None]


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
        self._prepared: dict[tuple[torch.device, torch.device, torch.device], Prepared] = {}

    def evaluate(self, task: BlockTask, index: int) -> None:
        del index  # the tiles are the same in every block
        ring, ev = task.ring, task.ev
        assert ring is not None
        ring.filled = 0
        prepared = self._prepare(ev.device, task.tokens.index_device, ring.index_device)
        if task.guide is not None:
            assert prepared.guide_freqs is not None
            keys, values = task.guide
            rotated = ev.family.rotate(keys[None], ev.heads, prepared.guide_freqs)[0]
            task = replace(task, guide=(rotated, values))
        for group in prepared.groups:
            self._fill(task, ring, group.last_slice, prepared)
            keys_per_tile = self.windows.window.count
            if task.guide is not None and self.alignment is not None:
                keys_per_tile += self.alignment.count.count
            size = (group.size.count + keys_per_tile) // 2
            in_chunks(
                range(size, len(group.tiles) * size + 1, size),
                ev.chunk,
                partial(self._evaluate, task, prepared, group),
            )

    def _prepare(self, device: torch.device, stored: torch.device, ring: torch.device) -> Prepared:
        """
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
            self._prepared[key] = Prepared(self._groups(*key), tables, guide_freqs)
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

    def _fill(self, task: BlockTask, ring: Ring, last: int, prepared: Prepared) -> None:
        """Make keys and values of the slices up to `last` from tokens not yet written."""
        if last <= ring.filled:
            return
        size = list(self.windows.grid)
        size[self.axis] = last - ring.filled
        index, stored = (
            flat_index(self.windows.grid, self._start_on(place, ring.filled), Grid(*size))[0]
            for place in (task.ev.device, task.tokens.index_device)
        )
        starts = self._start_on(ring.index_device, ring.filled)
        slots = flat_index(ring.grid, starts, Grid(*size), wrap=ring.grid)[0]

        ev, family = task.ev, task.ev.family

        def compute(begin: int, end: int) -> None:
            x, rows = task.read(stored[begin:end])
            y = family.attention_input(task.block, x, rows)
            freqs = prepared.rotations_of(index[begin:end], self.windows.grid)
            keys = family.rotate(ev.parts.keys(task.block, y), ev.heads, freqs)
            values = family.values(task.block, y)
            ring.write(slots[begin:end], keys[0], values[0])

        in_chunks(range(1, len(index) + 1), ev.chunk, compute)
        ring.settle()
        ring.filled = last

    def _start_on(self, device: torch.device, first: int) -> Tensor:
        """Where slice `first` starts [1, 3], made on the device: a copy would wait for its work."""
        starts = torch.zeros((1, 3), dtype=torch.long, device=device)
        starts[:, self.axis] = first
        return starts

    def _evaluate(
        self, task: BlockTask, prepared: Prepared, group: TileGroup, start: int, stop: int
    ) -> None:
        """Tiles start to stop of a group."""
        windows, ring, ev = self.windows, task.ring, task.ev
        assert ring is not None
        index = flat_index(windows.grid, group.tiles[start:stop], group.size).flatten()
        stored = flat_index(windows.grid, group.stored[start:stop], group.size).flatten()
        x, rows = task.read(stored)
        y = ev.family.attention_input(task.block, x, rows)
        freqs = prepared.rotations_of(index, windows.grid)
        q = ev.family.rotate(ev.parts.queries(task.block, y), ev.heads, freqs)
        q = q.view(stop - start, group.size.count, -1)
        slots = flat_index(ring.grid, group.keys[start:stop], windows.window, wrap=ring.grid)
        k, v = ring.read(slots)
        attended = task.attend(q, k, v, windows.window, self._aligned(task, group, start, stop))
        del y, q, k, v
        task.finish(x, attended, rows, stored)

    def _aligned(self, task: BlockTask, group: TileGroup, start: int, stop: int) -> Pair | None:
        """Keys and values [tiles, L, C] of the guide tokens that tiles start to stop read."""
        if task.guide is None:
            return None
        assert self.alignment is not None
        assert group.guide is not None
        starts = group.guide[start:stop]
        read = flat_index(self.alignment.guide, starts, self.alignment.count)
        return task.guide[0][read], task.guide[1][read]
