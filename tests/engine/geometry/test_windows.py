import pytest
import torch
from atlasvid.engine.geometry.alignment import GuideAlignment
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.geometry.windows import (
    Box,
    ShiftedWindows,
    cuts,
    flat_index,
    starts_of,
    trained_size,
)
from hypothesis import given
from hypothesis import strategies as st

CPU = torch.device("cpu")
sizes = st.tuples(st.integers(1, 9), st.integers(1, 13), st.integers(1, 13))


@given(sizes, sizes, st.integers(0, 1))
def test_boxes_cover_every_token_once(grid, window, block):
    grid, window = Grid(*grid), Grid(*window)
    seen = torch.zeros(grid.count, dtype=torch.int)
    groups = ShiftedWindows(grid, window).by_size(block)
    for size, boxes in groups.items():
        assert all(a <= b for a, b in zip(size, window, strict=True))
        index = flat_index(grid, starts_of(boxes, CPU), size)
        assert index.shape == (len(boxes), size.count)
        seen.index_add_(0, index.flatten(), torch.ones(index.numel(), dtype=torch.int))
    assert (seen == 1).all()


def test_flat_index_is_raster_order():
    grid = Grid(3, 4, 5)
    raster = torch.arange(grid.count).view(grid)
    boxes = [Box(Grid(1, 2, 3), Grid(2, 1, 2)), Box(Grid(0, 0, 0), Grid(2, 1, 2))]
    index = flat_index(grid, starts_of(boxes, CPU), boxes[0].size)
    assert torch.equal(index[0], raster[1:3, 2:3, 3:5].flatten())
    assert torch.equal(index[1], raster[:2, :1, :2].flatten())


def test_cuts_move_by_half_a_window():
    assert cuts(10, 4, False) == (0, 4, 8, 10)
    assert cuts(10, 4, True) == (0, 2, 6, 10)
    assert cuts(9, 4, True) == (0, 2, 6, 9)
    assert cuts(4, 4, True) == (0, 4)
    assert cuts(3, 1, True) == (0, 1, 2, 3)


@given(sizes, st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 8)), sizes)
def test_a_window_reads_its_surroundings_and_no_more(grid, guide, window):
    """Never fewer tokens for one window than for another, none beyond one guide token outside."""
    stride = 3
    grid = Grid(stride * (guide[0] - 1) + 1, max(grid[1], guide[1]), max(grid[2], guide[2]))
    guide, window = Grid(*guide), Grid(*window).clipped(grid)
    alignment = GuideAlignment(grid, guide, stride, window)
    for block in (0, 1):
        for box in ShiftedWindows(grid, window).boxes(block):
            read = alignment.box(box)
            assert read.size == alignment.count
            for axis in range(3):
                first, n = read.start[axis], read.size[axis]
                assert 0 <= first <= guide[axis] - n
                low, high = box.start[axis] - 0.5, box.start[axis] + box.size[axis] - 0.5
                spacing = alignment.spacing[axis]
                for i, p in enumerate(alignment.positions[axis]):
                    inside = low <= p < high
                    assert not inside or first <= i < first + n, "a covered token is always read"
                interior = low - spacing > 0 and high + spacing < grid[axis] - 1
                if interior and box.size[axis] == window[axis]:
                    for p in alignment.positions[axis][first : first + n]:
                        assert low - spacing - 1e-6 <= p <= high + spacing + 1e-6


def test_positions_follow_the_method():
    alignment = GuideAlignment(Grid(9, 8, 12), Grid(3, 4, 4), 4, Grid(4, 4, 4))
    time, height, width = alignment.positions
    assert time == (0.0, 2.875, 6.875)
    assert height == (0.5, 2.5, 4.5, 6.5)
    assert width == pytest.approx((1.0, 4.0, 7.0, 10.0))


def test_the_paper_reads_1099_keys():
    alignment = GuideAlignment(Grid(41, 135, 240), Grid(11, 30, 53), 4, Grid(4, 16, 16))
    assert alignment.count == Grid(3, 5, 5)


def test_trained_size_is_the_proxys_grid():
    assert trained_size(Grid(11, 30, 53)) == Grid(11, 30, 53)
    assert trained_size(Grid(40, 30, 53)) == Grid(21, 30, 53)
