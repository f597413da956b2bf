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
class Slots:
    """Where tiles of one place find keys in the ring, which they read in one pattern."""

    first: Tensor
    """The slot that a pattern counts from, [tiles, 1]."""
    pattern: Tensor
    """[keys]"""

    def of(self, start: int, stop: int) -> Tensor:
        """The slots [tiles, keys] of tiles start to stop."""
        return self.first[start:stop] + self.pattern


@dataclass(frozen=True)
class Slices:
    """Tokens that come into the ring together, in raster order."""

    stored: Tensor
    """Raster index [n], where the tokens live."""
    coordinates: Tensor
    """[3, n], on the device that computes."""
    slots: Tensor
    """In the ring [n], where it lives."""


@dataclass(frozen=True)
class Place:
    """All query tiles at one place along the streamed axis, those of one size side by side."""

    counts: list[tuple[Grid, int]]
    """Tiles of every size."""
    stored: Tensor
    """Raster index of every token, tile by tile, where the tokens live."""
    coordinates: Tensor
    """Of every token [3, tokens], on the device that computes."""
    ends: list[int]
    """Tokens up to the end of every tile."""
    costs: list[int]
    """Tokens up to the end of every tile, counting what its keys take besides."""
    keys: Slots
    guide: Slots | None
    fresh: Slices | None
    """What must come into the ring before these tiles; None where all is there."""

    def span(self, start: int, stop: int) -> slice:
        """The tokens of tiles start to stop."""
        return slice(self.ends[start - 1] if start else 0, self.ends[stop - 1])

    def parts(self, start: int, stop: int) -> Iterator[tuple[Grid, int]]:
        """Tiles start to stop: how many of every size."""
        first = 0
        for size, count in self.counts:
            inside = min(stop - first, count) - max(start - first, 0)
            if inside > 0:
                yield size, inside
            first += count

    def slots(self, start: int, stop: int) -> Tensor:
        """What tiles start to stop read of the ring [tiles, keys], of the guide last."""
        own = self.keys.of(start, stop)
        return own if self.guide is None else torch.cat([own, self.guide.of(start, stop)], dim=1)


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

    def rotations(self, coordinates: Tensor) -> Tensor:
        """Rotations [1, n, 1, d/2, 2, 2] of tokens at coordinates [3, n]."""
        rows = [table[i] for table, i in zip(self.tables, coordinates, strict=True)]
        return torch.cat(rows, dim=1)[None, :, None]


def coordinates_of(index: Tensor, grid: Grid) -> Tensor:
    """Coordinates [3, n] of tokens at raster indices [n]."""
    _, h, w = grid
    return torch.stack([index // (h * w), index // w % h, index % w])


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
        prepared = self._prepare(ev, task.tokens.index_device, ring)
        if task.guide is not None:
            assert prepared.guide_freqs is not None
            assert prepared.guide_slots is not None
            keys, values = task.guide
            rotated = ev.family.rotate(keys[None], ev.heads, prepared.guide_freqs)[0]
            ring.write(prepared.guide_slots, rotated, values)
        for place in prepared.places:
            if place.fresh is not None:
                self._fill(task, ring, place.fresh, prepared)
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
            places = self._places(device, stored, ring, copied)
            self._prepared[key] = Prepared(places, tables, guide_freqs, guide_slots)
        return self._prepared[key]

    def _places(
        self, device: torch.device, stored: torch.device, ring: Ring, copied: int
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
        grid, places, filled = self.windows.grid, [], 0
        for _, by_size in sorted(by_place.items()):
            tiles = [tile for group in by_size.values() for tile in group]
            index = [
                flat_index(grid, starts_of(group, device), size).flatten()
                for size, group in by_size.items()
            ]
            counts = [tile.size.count for tile in tiles]
            own, guide = self._slots(tiles, ring.index_device)
            window = self.windows.keys(tiles[0])
            last = window.start[self.axis] + window.size[self.axis]
            fresh = self._slices(filled, last, device, stored, ring) if last > filled else None
            filled = max(filled, last)
            places.append(
                Place(
                    [(size, len(group)) for size, group in by_size.items()],
                    torch.cat(index).to(stored),
                    coordinates_of(torch.cat(index), grid),
                    list(accumulate(counts)),
                    list(accumulate(n + 2 * copied * keys // ATTENTION for n in counts)),
                    own,
                    guide,
                    fresh,
                )
            )
        return places

    def _slices(
        self, first: int, last: int, device: torch.device, stored: torch.device, ring: Ring
    ) -> Slices:
        """Slices first to last of the streamed axis."""
        start, size, grid = [0, 0, 0], list(self.windows.grid), self.windows.grid
        start[self.axis], size[self.axis] = first, last - first
        index, in_store = (
            flat_index(grid, torch.tensor([start], device=where), Grid(*size))[0]
            for where in (device, stored)
        )
        starts = torch.tensor([start], device=ring.index_device)
        slots = flat_index(ring.grid, starts, Grid(*size), wrap=ring.grid)[0]
        return Slices(in_store, coordinates_of(index, grid), slots)

    def _slots(self, tiles: list[Box], device: torch.device) -> tuple[Slots, Slots | None]:
        """Where tiles of one place find their windows' keys in the ring, and the guide's."""
        windows, kept = self.windows, self.windows.ring
        boxes = [windows.keys(tile) for tile in tiles]
        # All windows of a place lie at the same slices; only there does the ring wrap around.
        along = [0, 0, 0]
        along[self.axis] = boxes[0].start[self.axis]
        start = torch.tensor([along], device=device)
        pattern = flat_index(kept, start, windows.window, wrap=kept)[0]
        across = starts_of(boxes, device) - start
        own = Slots(flat_index(kept, across, Grid(1, 1, 1)), pattern)
        if self.alignment is None:
            return own, None
        alignment = self.alignment
        starts = starts_of([alignment.box(box) for box in boxes], device)
        first = flat_index(alignment.guide, starts, Grid(1, 1, 1)) + kept.count
        return own, Slots(first, flat_index(alignment.guide, 0 * starts[:1], alignment.count)[0])

    def _fill(self, task: BlockTask, ring: Ring, fresh: Slices, prepared: Prepared) -> None:
        """Make keys and values of slices from tokens not yet written."""
        ev, family = task.ev, task.ev.family

        def compute(begin: int, end: int) -> None:
            x, rows = task.read(fresh.stored[begin:end])
            y = family.attention_input(task.block, x, rows)
            freqs = prepared.rotations(fresh.coordinates[:, begin:end])
            keys = ev.parts.projected_keys(task.block, y)
            keys = ev.parts.turned_keys(task.block, keys, ev.heads, freqs)
            values = family.values(task.block, y)
            ring.write(fresh.slots[begin:end], keys[0], values[0])

        in_chunks(range(1, len(fresh.stored) + 1), ev.chunk, compute)
        ring.settle()

    def _evaluate(
        self, task: BlockTask, prepared: Prepared, place: Place, start: int, stop: int
    ) -> None:
        """Tiles start to stop of a place. Linear layers see tiles of all sizes together."""
        stored = place.stored[place.span(start, stop)]
        x, rows = task.read(stored)
        # A call of its own, so that its queries, keys and values are gone before the feed-forward.
        y = task.ev.family.attention_input(task.block, x, rows)
        attended = self._attended(task, prepared, place, (start, stop), y)
        del y
        task.finish(x, attended, rows, stored)

    def _attended(
        self, task: BlockTask, prepared: Prepared, place: Place, tiles: tuple[int, int], y: Tensor
    ) -> Tensor:
        """Attention's output [1, n, C] for the inputs y [1, n, C] of some tiles of a place."""
        ev, ring = task.ev, task.ring
        assert ring is not None
        turns = prepared.rotations(place.coordinates[:, place.span(*tiles)])
        q = ev.parts.projected_queries(task.block, y)
        q = ev.parts.turned_queries(task.block, q, ev.heads, turns)[0]
        del turns
        k, v = ring.read(place.slots(*tiles))
        attended, first, n, window = [], 0, 0, self.windows.window
        for size, count in place.parts(*tiles):
            last = first + count * size.count
            part = q[first:last].unflatten(0, (count, size.count))
            keys = WindowKeys.split((k[n : n + count], v[n : n + count]), window.count)
            attended.append(task.attend(part, keys, window))
            first, n = last, n + count
        return attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)
