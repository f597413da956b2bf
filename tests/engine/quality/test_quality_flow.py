"""Warping and flicker of texture whose motion is known to a part of a pixel."""

import math

import pytest
import torch
from atlasvid.engine.quality.flow import (
    flicker_energies,
    is_visible,
    rms_beyond,
    rms_in_grey_levels,
    warp,
    warping_errors,
)
from textures import panned, pink_noise

SPEED = (1.3, -0.6)


@pytest.fixture(scope="module")
def clip():
    return panned(8, 120, 151, SPEED)


def test_a_whole_shift_is_fetched_back_exactly():
    frame = pink_noise(20, 31)
    flow = torch.tensor([3.0, -2.0]).expand(20, 31, 2)
    following = frame.roll((-2, 3), (0, 1))
    warped, inside = warp(following, flow)
    assert inside.sum() == 18 * 28
    assert not inside[:2].any()
    assert not inside[:, -3:].any()
    torch.testing.assert_close(warped[inside], frame[inside])


def test_texture_that_follows_its_flow_has_next_to_no_error(clip):
    video, flow = clip
    with_flow = rms_in_grey_levels(warping_errors(video, flow))
    without = rms_in_grey_levels(warping_errors(video, torch.zeros_like(flow)))
    assert with_flow < 1.5
    assert without > 15
    backwards = rms_in_grey_levels(warping_errors(video, -flow))
    assert backwards > without
    assert rms_beyond(warping_errors(video, flow), warping_errors(video, flow)) == 0


def test_noise_shows_with_its_strength_beyond_the_truths_own(clip):
    video, flow = clip
    noise = 4 / 255 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    truth = warping_errors(video, 0 * flow)
    # A difference of two frames holds the noise of both.
    beyond = rms_beyond(warping_errors(video + noise, 0 * flow), truth)
    assert beyond == pytest.approx(4 * math.sqrt(2), rel=0.03)
    assert rms_beyond(truth, warping_errors(video + noise, 0 * flow)) == pytest.approx(-beyond)


def test_hidden_pixels_are_ignored(clip):
    video, flow = clip
    spoiled = video.clone()
    spoiled[1::2, 40:80, 40:80] = 1.0
    seen = torch.ones(7, 120, 151, dtype=torch.bool)
    seen[:, 35:85, 35:85] = False
    assert rms_in_grey_levels(warping_errors(spoiled, flow)) > 20
    assert rms_in_grey_levels(warping_errors(spoiled, flow, seen)) < 1.5
    assert rms_in_grey_levels(flicker_energies(spoiled, flow, seen)) < 0.5


def test_forward_and_backward_flow_tell_what_is_covered():
    """A square that moves right by 6 over a still ground: it covers the ground before it."""
    flow, backward = torch.zeros(40, 60, 2), torch.zeros(40, 60, 2)
    flow[10:30, 20:40, 0] = 6
    backward[10:30, 26:46, 0] = -6
    seen = is_visible(flow, backward)
    hidden = torch.zeros(40, 60, dtype=torch.bool)
    hidden[10:30, 40:46] = True
    # Interpolation blurs the flow's own edges.
    certain = torch.ones(40, 60, dtype=torch.bool)
    certain[8:32, 37:49] = False
    certain[12:28, 42:44] = True
    assert torch.equal(seen[certain], ~hidden[certain])


@pytest.mark.parametrize("amplitude", [0.5, 3.0])
def test_flicker_is_found_with_its_amplitude(clip, amplitude):
    video, flow = clip
    signs = torch.tensor([1.0, -1.0]).repeat(4)
    flickering = video + amplitude / 255 * signs.view(-1, 1, 1, 1)
    found = flicker_energies(iter(flickering), flow)
    assert found.shape == (7,)
    assert rms_in_grey_levels(found) == pytest.approx(2 * amplitude, rel=0.05)
    assert rms_beyond(found, flicker_energies(video, flow)) == pytest.approx(
        2 * amplitude, rel=0.01
    )


def test_still_brightness_does_not_flicker_and_texture_out_of_place_hardly(clip):
    video, flow = clip
    assert rms_in_grey_levels(flicker_energies(video, flow)) < 0.3
    shaken = video.clone()
    shaken[1::2] = torch.stack([f.roll(1, 1) for f in video[1::2]])
    errors, flicker = warping_errors(shaken, flow), flicker_energies(shaken, flow)
    assert rms_in_grey_levels(errors) > 4 * rms_in_grey_levels(flicker)


def test_a_patch_that_flickers_counts_by_its_share():
    video = torch.full((4, 64, 64, 3), 0.5)
    video[1::2, :32, :32] += 8 / 255
    found = rms_in_grey_levels(flicker_energies(video, torch.zeros(3, 64, 64, 2)))
    assert found == pytest.approx(8 / 2)


def test_one_frame_has_no_pair_and_flow_must_fit():
    frame = torch.rand(1, 9, 9, 3)
    for measure in (warping_errors, flicker_energies):
        assert measure(frame, torch.zeros(0, 9, 9, 2)).shape == (0,)
        assert math.isnan(rms_in_grey_levels(measure(frame, torch.zeros(0, 9, 9, 2))))
    with pytest.raises(ValueError, match="flow for 1 pairs"):
        warping_errors(torch.rand(3, 9, 9, 3), torch.zeros(1, 9, 9, 2))
    with pytest.raises(ValueError, match=r"needs \(9, 9, 2\)"):
        warping_errors(torch.rand(3, 9, 9, 3), torch.zeros(2, 8, 9, 2))
    nothing = torch.zeros(2, 9, 9, dtype=torch.bool)
    energies = warping_errors(torch.rand(3, 9, 9, 3), torch.zeros(2, 9, 9, 2), nothing)
    assert energies.isnan().all()
    assert rms_in_grey_levels(torch.tensor([math.nan, (2 / 255) ** 2])) == pytest.approx(2)
