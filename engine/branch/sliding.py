"""Sliding windows: query tiles that read a key window of fixed size around them.

Neighbouring tiles share keys, and a block must see every token as it was before the block. So the
grid is streamed along one axis: keys and values live in a ring of as many slices as a key window
is long, and are made before any tile that they belong to is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from ..device.chunks import in_chunks
from ..families.rotations import RopeAxes, join_axes
from ..geometry.alignment import GuideAlignment
from ..geometry.grid import Grid
from ..geometry.windows import Box, SlidingWindows, flat_index, starts_of
from .block_task import BlockTask, WindowKeys
from .evaluation import Evaluation
from .memory import ATTENTION
from .ring import Ring

COPIES_OF_KEPT_KEYS = 3
"""Of keys and values where some blocks of them are chosen: all, in blocks, and the chosen."""


@dataclass(frozen=True)
class TileGroup:
    """Query tiles of one size at one place along the streamed axis."""

    size: Grid
    tiles: Tensor
    """Where they start [tiles, 3]."""
    read: Tensor
    """Where the key windows start, [tiles, 3], where the ring lives."""
    guide: Tensor | None
    """Where what they read of the guide starts, [tiles, 3], where the ring lives."""

    def rotations(self, tables: list[Tensor], start: int, stop: int) -> Tensor:
        """Rotations [1, n, 1, d/2, 2, 2] of the tokens of tiles start to stop."""
        rows = []
        for axis, length in enumerate(self.size):
            along = torch.arange(length, device=self.tiles.device)
            rows.append(tables[axis][self.tiles[start:stop, axis, None] + along])
        return join_axes(rows).flatten(0, 1)[None]


@dataclass(frozen=True)
class Place:
    """All query tiles at one place along the streamed axis, those of one size side by side."""

    groups: list[TileGroup]
    stored: Tensor
    """Raster index of every token, tile by tile, where the tokens live."""
    ends: list[int]
    """Tokens up to the end of every tile."""
    costs: list[int]
    """Tokens up to the end of every tile, counting what its keys take besides."""
    last_slice: int
    """Slices of the streamed axis that must be in the ring: up to, not including, this one."""

    def span(self, start: int, stop: int) -> slice:
        """The tokens of tiles start to stop."""
        return slice(self.ends[start - 1] if start else 0, self.ends[stop - 1])

    def parts(self, start: int, stop: int) -> Iterator[tuple[TileGroup, int, int]]:
        """Tiles start to stop as tiles of each group."""
        first = 0
        for group in self.groups:
            a, b = max(start - first, 0), min(stop - first, len(group.tiles))
            if a < b:
                yield group, a, b
            first += len(group.tiles)


@dataclass(frozen=True)
class Prepared:
    """What depends on geometry alone."""

    places: list[Place]
    """In streaming order."""
    tables: list[Tensor]
    """Per-axis rotations of the target."""
    guide_freqs: Tensor | None
    """Rotations of the guide."""
    guide_slots: Tensor | None
    """Of the guide's tokens in the ring, where it lives."""

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
        prepared = self._prepare(ev, task.tokens.index_device, ring)
        if task.guide is not None:
            assert prepared.guide_freqs is not None
            assert prepared.guide_slots is not None
            keys, values = task.guide
            rotated = ev.family.rotate(keys[None], ev.heads, prepared.guide_freqs)[0]
            ring.write(prepared.guide_slots, rotated, values)
        for place in prepared.places:
            self._fill(task, ring, place.last_slice, prepared)
            in_chunks(place.costs, ev.chunk, partial(self._evaluate, task, prepared, place))

    def _prepare(self, ev: Evaluation, stored: torch.device, ring: Ring) -> Prepared:
        """
        Args:
            stored: where indices of the tokens must be.
        """
        device = ev.device
        key = device, stored, ring.index_device
        if key not in self._prepared:
            tables = [
                self.rope.table(axis, torch.arange(n, device=device))
                for axis, n in enumerate(self.windows.grid)
            ]
            guide_freqs = guide_slots = None
            if self.alignment is not None:
                guide_freqs = join_axes(
                    [
                        self.rope.tables(axis, torch.tensor([positions], device=device))
                        for axis, positions in enumerate(self.alignment.positions)
                    ]
                )
                guide_slots = torch.arange(self.alignment.guide.count, device=ring.index_device)
                guide_slots += ring.guide_start
            copied = COPIES_OF_KEPT_KEYS if ev.settings.keep_blocks else 1
            places = self._places(device, stored, ring.index_device, copied)
            self._prepared[key] = Prepared(places, tables, guide_freqs, guide_slots)
        return self._prepared[key]

    def _places(
        self, device: torch.device, stored: torch.device, ring: torch.device, copied: int
    ) -> list[Place]:
        """
        Args:
            copied: how often keys and values are in memory while a tile is evaluated.
        """
        by_place: dict[int, dict[Grid, list[Box]]] = defaultdict(lambda: defaultdict(list))
        for tile in self.windows.tiles():
            by_place[tile.start[self.axis]][tile.size].append(tile)
        keys = self.windows.window.count
        keys += self.alignment.count.count if self.alignment is not None else 0
        places = []
        for _, by_size in sorted(by_place.items()):
            groups, tokens, counts = [], [], []
            for size, tiles in by_size.items():
                groups.append(self._group(tiles, device, ring))
                index = flat_index(self.windows.grid, starts_of(tiles, stored), size)
                tokens.append(index.flatten())
                counts.extend([size.count] * len(tiles))
            window = self.windows.keys(tiles[0])
            places.append(
                Place(
                    groups,
                    torch.cat(tokens),
                    list(accumulate(counts)),
                    list(accumulate(n + 2 * copied * keys // ATTENTION for n in counts)),
                    window.start[self.axis] + window.size[self.axis],
                )
            )
        return places

    def _group(self, tiles: list[Box], device: torch.device, ring: torch.device) -> TileGroup:
        keys, guide = [self.windows.keys(tile) for tile in tiles], None
        if self.alignment is not None:
            guide = starts_of([self.alignment.box(box) for box in keys], ring)
        return TileGroup(tiles[0].size, starts_of(tiles, device), starts_of(keys, ring), guide)

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
        self, task: BlockTask, prepared: Prepared, place: Place, start: int, stop: int
    ) -> None:
        """Tiles start to stop of a place. Linear layers see tiles of all sizes together."""
        stored = place.stored[place.span(start, stop)]
        x, rows = task.read(stored)
        # A call of its own, so that its queries, keys and values are gone before the feed-forward.
        y = task.ev.family.attention_input(task.block, x, rows)
        attended = self._attended(task, prepared, list(place.parts(start, stop)), y)
        del y
        task.finish(x, attended, rows, stored)

    def _attended(
        self,
        task: BlockTask,
        prepared: Prepared,
        parts: list[tuple[TileGroup, int, int]],
        y: Tensor,
    ) -> Tensor:
        """Attention's output [1, n, C] for the inputs y [1, n, C] of some tiles of each group."""
        ev, ring = task.ev, task.ring
        assert ring is not None
        freqs = [group.rotations(prepared.tables, a, b) for group, a, b in parts]
        turns = freqs[0] if len(freqs) == 1 else torch.cat(freqs, dim=1)
        q = ev.family.rotate(ev.parts.queries(task.block, y), ev.heads, turns)
        attended, first, window = [], 0, self.windows.window
        for group, a, b in parts:
            shape = b - a, group.size.count
            last = first + shape[0] * shape[1]
            both = ring.read(self._slots(ring, group, a, b))
            keys = WindowKeys.split(both, window.count)
            attended.append(task.attend(q[0, first:last].unflatten(0, shape), keys, window))
            first = last
        return attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)

    def _slots(self, ring: Ring, group: TileGroup, start: int, stop: int) -> Tensor:
        """What tiles start to stop read of the ring [tiles, keys], of the guide last."""
        read = group.read[start:stop]
        slots = flat_index(ring.grid, read, self.windows.window, wrap=ring.grid)
        if group.guide is None:
            return slots
        assert self.alignment is not None
        starts = group.guide[start:stop]
        guide = flat_index(self.alignment.guide, starts, self.alignment.count)
        return torch.cat([slots, guide + ring.guide_start], dim=1)
