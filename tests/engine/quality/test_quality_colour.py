"""Drift of known size per window."""

from itertools import pairwise, product

import pytest
import torch
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.geometry.windows import ShiftedWindows
from atlasvid.engine.quality.colour import rms_drift, window_drift, worst_drift
from atlasvid.engine.quality.frames import shrink
from atlasvid.engine.quality.lines import window_lines
from textures import panned, pink_noise


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("proxy_size", [(60, 100), (51, 87)])
def test_each_window_has_the_drift_that_it_was_given(block, proxy_size):
    size = Grid(17, 120, 200)
    video, _ = panned(*size, (2.1, 0.7))
    proxy = torch.stack([shrink(frame, proxy_size) for frame in video[::4]])
    lines = window_lines(ShiftedWindows(Grid(5, 8, 13), Grid(2, 4, 4)).boxes(block), size)
    axes = [list(pairwise(axis.edges)) for axis in lines]
    given = torch.randn(*map(len, axes), 3, generator=torch.Generator().manual_seed(0))
    drifted = video.clone()
    for at in product(*(range(len(axis)) for axis in axes)):
        t, y, x = (slice(*axis[i]) for axis, i in zip(axes, at, strict=True))
        drifted[t, y, x] += given[at] / 255
    clean, found = window_drift(video, proxy, 4, lines), window_drift(drifted, proxy, 4, lines)
    assert worst_drift(clean) < 1e-3
    # Pixels of the second proxy lie across borders and mix the drifts of two windows.
    tolerance = 1e-3 if proxy_size == (60, 100) else 0.35
    torch.testing.assert_close(found, given, atol=tolerance, rtol=0)


def test_a_truth_has_no_drift_from_its_own_proxy():
    video, _ = panned(5, 64, 96, (1.5, 0.0))
    proxy = torch.stack([shrink(frame, (16, 24)) for frame in video[::4]])
    lines = window_lines(ShiftedWindows(Grid(2, 4, 6), Grid(2, 2, 2)).boxes(0), Grid(5, 64, 96))
    drift = window_drift(video, proxy, 4, lines)
    assert drift.shape == (1, 2, 3, 3)
    assert worst_drift(drift) < 1e-3


def test_one_frame_and_a_window_that_covers_it():
    frame = pink_noise(33, 50)[None]
    lines = window_lines(ShiftedWindows(Grid(1, 3, 4), Grid(4, 16, 16)).boxes(1), Grid(1, 33, 50))
    drift = window_drift(frame + 2 / 255, frame, 4, lines)
    assert drift.shape == (1, 1, 1, 3)
    torch.testing.assert_close(drift, torch.full_like(drift, 2.0), atol=1e-3, rtol=0)


def test_rms_is_over_all_windows_and_the_worst_is_one():
    drift = torch.zeros(1, 2, 2, 3)
    drift[0, 1, 0] = torch.tensor([4.0, -4.0, 2.0])
    assert rms_drift(drift) == pytest.approx(3**0.5)
    assert worst_drift(drift) == pytest.approx(12**0.5)


def test_lines_for_another_size_are_refused():
    lines = window_lines(ShiftedWindows(Grid(1, 3, 4), Grid(4, 2, 2)).boxes(0), Grid(1, 48, 64))
    with pytest.raises(ValueError, match="made for 48 x 64"):
        window_drift(torch.rand(1, 40, 64, 3), torch.rand(1, 10, 16, 3), 4, lines)
