"""Shifted windows: disjoint boxes, read, evaluated and written back one after the other.

A block reads and writes only its own box, so nothing of the grid's length exists but the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import blocks, host
from .block_task import BlockTask
from .grid import Grid
from .rope import RopeAxes, join_axes
from .windows import Box, GuideAlignment, ShiftedWindows, flat_index, starts_of


@dataclass(frozen=True)
class WindowGroup:
    """Windows of one size: which tokens they hold, which of the guide they read, and rotations.

    Positions count from each window's first token, so windows of one size share them.
    """

    size: Grid
    tokens: Tensor
    """Index [windows, tokens] into the target's raster order, where the tokens live."""
    freqs: Tensor
    """Rotations [1, tokens, 1, d/2, 2, 2] of the window's own tokens."""
    guide: Tensor | None
    """Index [windows, guide tokens] into the guide's raster order."""
    guide_axes: tuple[Tensor, ...]
    """Per axis, rotations [windows, n, d_axis/2, 2, 2] of the guide tokens at positions P."""


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
        self._groups: dict[tuple[int, torch.device, torch.device], list[WindowGroup]] = {}

    def evaluate(self, task: BlockTask, index: int) -> None:
        for group in self.groups(index % 2, task.device, task.tokens.index_device):
            evaluate = partial(self.evaluate_windows, task, group)
            host.in_chunks(len(group.tokens), task.chunk, evaluate, group.size.count)

    def groups(
        self, parity: int, device: torch.device, index_device: torch.device
    ) -> list[WindowGroup]:
        """The windows of even or odd blocks with everything that depends on geometry alone."""
        key = parity, device, index_device
        if key not in self._groups:
            self._groups[key] = [
                self._group(boxes, device, index_device)
                for boxes in self.windows.by_size(parity).values()
            ]
        return self._groups[key]

    def _group(
        self, boxes: list[Box], device: torch.device, index_device: torch.device
    ) -> WindowGroup:
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
        tokens = flat_index(self.windows.grid, starts_of(boxes, index_device), size)
        return WindowGroup(size, tokens, self.rope.box(size, device), guide, tables)

    def evaluate_windows(self, task: BlockTask, group: WindowGroup, start: int, stop: int) -> None:
        """Windows start to stop of a group."""
        index = group.tokens[start:stop].flatten()
        x, modulation = task.read(index)
        attention = task.block.self_attn
        y = blocks.attention_input(task.block, x, modulation)
        y = y.view(stop - start, group.size.count, -1)
        q = blocks.rotate(blocks.queries(attention, y), task.heads, group.freqs)
        k = blocks.rotate(blocks.keys(attention, y), task.heads, group.freqs)
        v = attention.v(y)
        guide = _aligned_guide(task, group, slice(start, stop)) if task.guide else None
        attended = task.attend(q, k, v, group.size, guide)
        del y, q, k, v
        task.finish(x, attended, modulation, index)


def _aligned_guide(task: BlockTask, group: WindowGroup, windows: slice) -> tuple[Tensor, Tensor]:
    """Keys and values [windows, L, C] of the aligned guide tokens, keys rotated by P."""
    assert task.guide is not None
    assert group.guide is not None
    keys, values = task.guide
    index = group.guide[windows]
    freqs = join_axes([table[windows] for table in group.guide_axes])
    # One row of batch 1: rotation kernels take one set of rotations for all of a batch.
    rotated = blocks.rotate(keys[index].flatten(0, 1)[None], task.heads, freqs.flatten(0, 1)[None])
    return rotated[0].unflatten(0, index.shape), values[index]
