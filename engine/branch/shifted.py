"""Shifted windows: disjoint boxes, read, evaluated and written back one after the other.

A block reads and writes only its own box, so nothing of the grid's length exists but the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, repeat

import torch
from torch import Tensor

from ..device.chunks import in_chunks
from ..families.rotations import RopeAxes, join_axes
from ..geometry.alignment import GuideAlignment
from ..geometry.grid import Grid
from ..geometry.windows import Box, ShiftedWindows, flat_index, starts_of
from .block_task import BlockTask, WindowKeys
from .weighted import Pair


@dataclass(frozen=True)
class WindowGroup:
    """Windows of one size: which of the guide they read, and rotations.

    Positions count from each window's first token, so windows of one size share them.
    """

    size: Grid
    count: int
    """Windows."""
    freqs: Tensor
    """Rotations [1, tokens, 1, d/2, 2, 2] of the window's own tokens."""
    guide: Tensor | None
    """Index [windows, guide tokens] into the guide's raster order."""
    guide_axes: tuple[Tensor, ...]
    """Per axis, rotations [windows, n, d_axis/2, 2, 2] of the guide tokens at positions P."""


@dataclass(frozen=True)
class WindowOrder:
    """All windows of even or of odd blocks, those of one size side by side."""

    groups: list[WindowGroup]
    tokens: Tensor
    """Raster index [F * h * w] of every token, window by window, where the tokens live."""
    ends: list[int]
    """Tokens up to the end of every window."""

    def span(self, start: int, stop: int) -> slice:
        """The tokens of windows start to stop."""
        return slice(self.ends[start - 1] if start else 0, self.ends[stop - 1])

    def parts(self, start: int, stop: int) -> Iterator[tuple[WindowGroup, slice]]:
        """Windows start to stop as windows of each group."""
        first = 0
        for group in self.groups:
            a, b = max(start - first, 0), min(stop - first, group.count)
            if a < b:
                yield group, slice(a, b)
            first += group.count


class ShiftedAttention:
    """Evaluates blocks by shifted windows.

    Args:
        alignment: the guide's, or None without guide.
        rope: rotations of the target's positions.
    """

    def __init__(self, windows: ShiftedWindows, alignment: GuideAlignment | None, rope: RopeAxes):
        self.windows = windows
        self.alignment = alignment
        self.rope = rope
        self._orders: dict[tuple[int, torch.device, torch.device], WindowOrder] = {}

    def evaluate(self, task: BlockTask, index: int) -> None:
        order = self.order(index, task.ev.device, task.tokens.index_device)
        in_chunks(order.ends, task.ev.chunk, partial(self._evaluate, task, order))

    def order(self, index: int, device: torch.device, index_device: torch.device) -> WindowOrder:
        """The windows of block number `index` with everything that depends on geometry alone."""
        key = index % 2, device, index_device
        if key not in self._orders:
            by_size = self.windows.by_size(index)
            tokens, counts = [], []
            for size, boxes in by_size.items():
                starts = starts_of(boxes, index_device)
                tokens.append(flat_index(self.windows.grid, starts, size).flatten())
                counts.extend(repeat(size.count, len(boxes)))
            groups = [self._group(boxes, device) for boxes in by_size.values()]
            self._orders[key] = WindowOrder(groups, torch.cat(tokens), list(accumulate(counts)))
        return self._orders[key]

    def _group(self, boxes: list[Box], device: torch.device) -> WindowGroup:
        size, guide, tables = boxes[0].size, None, ()
        if self.alignment is not None:
            alignment = self.alignment
            starts = starts_of([alignment.box(box) for box in boxes], device)
            guide = flat_index(alignment.guide, starts, alignment.count)
            offsets = [[alignment.offsets(axis, box) for box in boxes] for axis in range(3)]
            tables = tuple(
                self.rope.tables(axis, torch.tensor(rows, device=device))
                for axis, rows in enumerate(offsets)
            )
        return WindowGroup(size, len(boxes), self.rope.box(size, device), guide, tables)

    def _evaluate(self, task: BlockTask, order: WindowOrder, start: int, stop: int) -> None:
        """Windows start to stop. Linear layers see windows of all sizes together."""
        index = order.tokens[order.span(start, stop)]
        x, rows = task.read(index)
        # A call of its own, so that its queries, keys and values are gone before the feed-forward.
        attended = self.attended(
            task, order, start, stop, task.ev.family.attention_input(task.block, x, rows)
        )
        task.finish(x, attended, rows, index)

    def attended(
        self, task: BlockTask, order: WindowOrder, start: int, stop: int, y: Tensor
    ) -> Tensor:
        """Attention's output [1, n, C] for the inputs y [1, n, C] of windows start to stop."""
        ev, block = task.ev, task.block
        parts = ev.parts
        q, k = parts.projected_queries(block, y), parts.projected_keys(block, y)
        v = ev.family.values(block, y)
        del y
        attended, first = [], 0
        for group, windows in order.parts(start, stop):
            shape = (windows.stop - windows.start, group.size.count)
            last = first + shape[0] * shape[1]
            part_q, part_k, part_v = (each[0, first:last].unflatten(0, shape) for each in (q, k, v))
            keys = _window_keys(task, group, windows, (part_k, part_v))
            part_q = parts.turned_queries(block, part_q, ev.heads, group.freqs)
            attended.append(task.attend(part_q, keys, group.size))
            first = last
        return attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)


def _window_keys(task: BlockTask, group: WindowGroup, windows: slice, own: Pair) -> WindowKeys:
    """What some windows of a group read.

    Args:
        own: projected keys, and values [windows, L, C].
    """
    ev, (k, v) = task.ev, own
    turned = partial(ev.parts.turned_keys, task.block, k, ev.heads, group.freqs)
    if task.guide is None:
        return WindowKeys((turned(), v), None)
    assert group.guide is not None
    index = group.guide[windows]
    guide_k, guide_v = (each[index] for each in task.guide)
    freqs = join_axes([table[windows] for table in group.guide_axes])
    if ev.settings.guide_weight != 1:  # two attentions, which read apart
        return WindowKeys((turned(), v), (ev.family.rotate(guide_k, ev.heads, freqs), guide_v))
    keys = k.new_empty(len(k), k.shape[1] + index.shape[1], k.shape[2])
    turned(out=keys[:, : k.shape[1]])
    ev.family.rotate(guide_k, ev.heads, freqs, out=keys[:, k.shape[1] :])
    return WindowKeys.split((keys, torch.cat([v, guide_v], dim=1)), k.shape[1])
