"""Long work in pieces: as many items at a time as fit, cancellable between them."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence

from ..comfyui import management
from . import copies


class ChunkSize:
    """How many tokens to evaluate at a time; lowered for good when they do not fit.

    Shared by all blocks and steps of a run, so that a size that failed is not tried again.
    """

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.ahead = 4
        """Chunks that the device may lag behind: enough to keep it busy, few enough to cancel."""
        self._waiting: deque[tuple[copies.Mark, int]] = deque()

    def stay_close(self) -> None:
        """Let the device lag behind by one chunk only: what a chunk holds is large."""
        self.ahead = 1

    def stop(self, start: int, ends: Sequence[int]) -> int:
        """Where a chunk ends that begins with item `start`; it has one item at least."""
        return max(start + 1, bisect_right(ends, _before(start, ends) + self.tokens, start))

    def halve(self, start: int, stop: int, ends: Sequence[int]) -> None:
        """Items start to stop did not fit."""
        self.tokens = max(1, (ends[stop - 1] - _before(start, ends)) // 2)

    def keep_pace(self, tokens: int) -> None:
        """Let the device catch up, so that cancelling and progress are prompt.

        By tokens: small chunks are soon done, and launching them takes as long as launching others.

        Args:
            tokens: of the chunk that was given to the device.
        """
        self._waiting.append((copies.Mark(management.compute_device()), tokens))
        behind = sum(count for _, count in self._waiting)
        while len(self._waiting) > 1 and behind > self.ahead * self.tokens:
            mark, count = self._waiting.popleft()
            behind -= count
            mark.wait()


def in_chunks(ends: Sequence[int], chunk: ChunkSize, compute: Callable[[int, int], None]) -> None:
    """Call compute(start, stop) over all items in chunks; halve a chunk that runs out of memory.

    A single item is tried once more, after the device has finished what it had to do: copies on
    their way hold memory too. `compute` must write its result last, so that a chunk that failed can
    be repeated. Cancelling is checked before every chunk.

    Args:
        ends: tokens up to the end of every item, `range(1, n + 1)` where items are tokens.

    Raises:
        Exception: whatever `compute` raises; out of memory only when a single item fails twice.
    """
    start, retried = 0, -1
    while start < len(ends):
        management.raise_if_cancelled()
        stop = chunk.stop(start, ends)
        try:
            compute(start, stop)
        except Exception as error:
            if not management.is_out_of_memory(error) or (stop - start == 1 and retried == start):
                raise
            if stop - start == 1:
                retried = start
            else:
                chunk.halve(start, stop, ends)
            stop = start
        if stop == start:  # outside the handler, whose traceback would keep the tensors alive
            management.empty_cache()
        else:
            chunk.keep_pace(ends[stop - 1] - _before(start, ends))
        start = stop


def _before(start: int, ends: Sequence[int]) -> int:
    return ends[start - 1] if start else 0
