"""Seams of known height, on texture, at cuts and elsewhere."""

import pytest
import torch
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.geometry.windows import ShiftedWindows, SlidingWindows, cuts
from atlasvid.engine.quality.lines import Lines, window_lines
from atlasvid.engine.quality.seams import column_seams, frame_seams, row_seams
from hypothesis import given, settings
from hypothesis import strategies as st
from textures import panned, pink_noise

VIDEO = Grid(21, 250, 500)
WINDOWS = ShiftedWindows(Grid(6, 16, 32), Grid(4, 8, 8))
LINES = window_lines(WINDOWS.boxes(0) + WINDOWS.boxes(1), VIDEO)


@pytest.fixture(scope="module")
def video():
    return panned(*VIDEO, (1.3, 0.4))[0]


def steps(length, positions, grey_levels):
    """A profile that goes up and down by so much at each position."""
    profile = torch.zeros(length)
    for i, p in enumerate(positions):
        profile[p:] += grey_levels / 255 * (-1) ** i
    return profile


def along(profile, axis):
    return profile.view([-1 if i == axis else 1 for i in range(4)])


def smeared(profile, pixels):
    padded = torch.nn.functional.pad(profile[None, None], (pixels // 2,) * 2, mode="replicate")
    return torch.nn.functional.avg_pool1d(padded, pixels, 1)[0, 0]


def test_lines_lie_where_tokens_of_both_blocks_meet():
    assert LINES.columns.cuts == (64, 128, 192, 256, 320, 384, 448)
    assert LINES.rows.cuts == (64, 128, 192)
    assert LINES.rows.others == (16, 32, 48, 80, 96, 112, 144, 160, 176, 208, 224, 240)
    # Latents 2 and 4 begin windows; the first latent is one frame, the others four.
    assert LINES.frames.cuts == (5, 13)
    assert LINES.frames.others == (1, 9, 17)
    assert LINES.frames.edges == (0, 5, 13, 21)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 9), st.integers(0, 1))
def test_lines_are_all_token_borders_and_cuts_are_the_windows(frames, side, window, block):
    windows = ShiftedWindows(Grid(frames, side, side), Grid(window, window, window))
    lines = window_lines(windows.boxes(block), Grid(4 * frames - 3, 16 * side, 16 * side))
    assert sorted(lines.rows.cuts + lines.rows.others) == list(range(16, 16 * side, 16))
    assert lines.rows.edges == tuple(16 * c for c in cuts(side, window, block == 1))
    assert lines.frames.edges[:-1] == tuple(
        4 * c - 3 if c else 0 for c in cuts(frames, window, block == 1)[:-1]
    )


def test_sliding_windows_meet_at_their_tiles():
    tiles = SlidingWindows(Grid(2, 12, 12), Grid(2, 8, 8)).tiles()
    assert window_lines(tiles, Grid(5, 192, 192)).rows.cuts == (64, 128)


def test_clean_texture_has_no_seams(video):
    for score in (row_seams(video, LINES.rows), column_seams(video, LINES.columns)):
        assert abs(score.excess) < 2.5
        assert score.ratio == pytest.approx(1, abs=0.05)
    time = frame_seams(video, LINES.frames)
    assert abs(time.excess) < 0.5
    assert time.ratio == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("reach", [1, 4])
@pytest.mark.parametrize("grey_levels", [4.0, 8.0])
@pytest.mark.parametrize("measure", [row_seams, column_seams])
def test_a_seam_is_found_with_its_height(video, measure, grey_levels, reach):
    axis = 1 if measure is row_seams else 2
    lines = LINES[axis]
    seamed = video + along(steps(lines.length, lines.cuts, grey_levels), axis)
    score = measure(seamed, lines, reach=reach)
    assert score.excess == pytest.approx(grey_levels, abs={1: 0.5, 4: 1.2}[reach])
    assert score.cuts == len(lines.cuts)
    across = (row_seams if measure is column_seams else column_seams)(seamed, LINES[3 - axis])
    assert abs(across.excess) < 2.5


@pytest.mark.parametrize("grey_levels", [0.5, 2.0, 8.0])
def test_a_jump_in_time_is_found_with_its_height(video, grey_levels):
    jumping = video + along(steps(21, LINES.frames.cuts, grey_levels), 0)
    score = frame_seams(jumping, LINES.frames)
    assert score.excess == pytest.approx(grey_levels, abs=0.15)
    assert score.ratio > 1.15


def test_a_grid_of_the_decoder_and_steps_elsewhere_are_no_seams(video):
    columns = LINES.columns
    everywhere = video + along(steps(500, range(16, 500, 16), 6.0), 2)
    between = video + along(steps(500, [p + 8 for p in columns.cuts], 6.0), 2)
    others = video + along(steps(500, columns.others, 6.0), 2)
    one_other = video + along(steps(500, columns.others[9:10], 30.0), 2)
    for changed in (everywhere, between, one_other):
        assert abs(column_seams(changed, columns).excess) < 2.5
        assert column_seams(changed, columns).ratio == pytest.approx(1, abs=0.05)
    assert column_seams(others, columns).excess < -4


def test_an_edge_of_the_content_on_one_cut_is_no_seam(video):
    edge = video + along(steps(500, [256], 60.0), 2)
    assert abs(column_seams(edge, LINES.columns).excess) < 2.5


def test_less_the_truth_a_twentieth_of_a_grey_level_shows(video):
    seamed = video + along(steps(500, LINES.columns.cuts, 0.05), 2)
    score = column_seams(seamed - video, LINES.columns)
    assert score.excess == pytest.approx(0.05, rel=0.05)
    assert column_seams(video - video, LINES.columns).ratio == 1


def test_a_seam_that_the_decoder_smeared_is_found_in_part_with_a_long_reach():
    seam = steps(500, LINES.columns.cuts, 4.0)
    for pixels, least in ((3, 3.2), (9, 2.1), (15, 1.0)):
        changed = along(smeared(seam, pixels), 2).expand(2, 64, -1, 3)
        assert least < column_seams(changed, LINES.columns, reach=8).excess <= 4.01


def test_texture_that_breaks_at_windows_shows_in_the_ratio(video):
    """Windows from as many pictures of the same brightness: no offset, but no continuation."""
    pieces = [pink_noise(250, 500, seed=i) for i in range(8)]
    pieces = [p - p.mean((0, 1)) for p in pieces]
    edges = LINES.columns.edges
    frame = torch.cat([p[:, a:b] for p, a, b in zip(pieces, edges, edges[1:], strict=False)], 1)
    assert column_seams(frame[None], LINES.columns, reach=1).ratio > 1.5


def test_without_cuts_there_are_no_seams_and_without_other_lines_no_measure():
    one_frame = pink_noise(64, 64)[None]
    score = column_seams(one_frame, Lines(64, (), (16, 32, 48)))
    assert (score.excess, score.ratio, score.cuts) == (0, 1, 0)
    assert frame_seams(one_frame, Lines(1, (), ())).cuts == 0
    with pytest.raises(ValueError, match="more than 2 tokens"):
        column_seams(one_frame, Lines(64, (16, 32, 48), ()))
    with pytest.raises(ValueError, match="64 columns; the lines were made for 80"):
        column_seams(one_frame, Lines(80, (16,), (32,)))
