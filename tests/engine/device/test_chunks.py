"""Work in pieces: where chunks end, and what happens when one does not fit."""

import comfy.model_management
import pytest
import torch
from atlasvid.engine.device.chunks import ChunkSize, in_chunks


def out_of_memory(*_):
    raise torch.cuda.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    ("ends", "tokens", "spans"),
    [
        (range(1, 8), 3, [(0, 3), (3, 6), (6, 7)]),
        (range(4, 17, 4), 9, [(0, 2), (2, 4)]),
        ([8, 16, 18, 20, 21], 5, [(0, 1), (1, 2), (2, 5)]),  # items of several sizes
        ([8, 16, 18, 20, 21], 100, [(0, 5)]),
        (range(1, 1), 3, []),
    ],
)
def test_chunks_hold_as_many_items_as_fit_and_at_least_one(ends, tokens, spans):
    seen = []
    in_chunks(ends, ChunkSize(tokens), lambda start, stop: seen.append((start, stop)))
    assert seen == spans


def test_a_chunk_that_fails_is_halved_for_good():
    chunk, seen = ChunkSize(8), []

    def compute(start, stop):
        if stop - start > 2:
            out_of_memory()
        seen.append((start, stop))

    in_chunks(range(1, 6), chunk, compute)
    assert seen == [(0, 2), (2, 4), (4, 5)]
    assert chunk.tokens == 2


def test_a_single_item_is_tried_twice():
    """Copies on their way to the host may have held what it needed."""
    tries = []

    def fails_once(start, stop):
        tries.append(start)
        if tries.count(start) == 1:
            out_of_memory()

    in_chunks(range(1, 4), ChunkSize(1), fails_once)
    assert tries == [0, 0, 1, 1, 2, 2]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        in_chunks(range(1, 4), ChunkSize(1), out_of_memory)


def test_other_errors_are_not_repaired():
    with pytest.raises(ZeroDivisionError):
        in_chunks(range(1, 9), ChunkSize(8), lambda start, stop: 1 / 0)


def test_cancelling_is_checked_before_every_chunk():
    seen = []

    def compute(start, stop):
        seen.append(start)
        comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        in_chunks(range(1, 9), ChunkSize(2), compute)
    assert seen == [0]
