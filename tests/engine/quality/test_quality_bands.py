"""The bands against structure guidance's cosine modes and against pictures of known content."""

import pytest
import torch
from atlasvid.engine.proxy.structure import cosine_modes
from atlasvid.engine.quality import bands, frames
from hypothesis import given, settings
from hypothesis import strategies as st
from textures import panned, pink_noise

sides = st.integers(1, 40)


def wave(length, k):
    """A cosine mode with a root mean square of 0.1."""
    return 0.1 * length**0.5 * cosine_modes(length, length)[k].float()


@settings(deadline=None)
@given(sides, sides, st.data())
def test_shrinking_weighs_every_pixel_by_the_area_it_shares(height, width, data):
    """Against a dense matrix of overlaps, at any ratio."""
    size = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    frame = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(1))

    def overlaps(n, m):
        return torch.tensor(
            [
                [
                    max(0.0, min(p + 1, (i + 1) * n / m) - max(p, i * n / m)) * m / n
                    for p in range(n)
                ]
                for i in range(m)
            ]
        )

    dense = torch.einsum(
        "ip,pqc,jq->ijc", overlaps(height, size[0]), frame, overlaps(width, size[1])
    )
    torch.testing.assert_close(frames.shrink(frame, size), dense)


@settings(deadline=None)
@given(sides, sides, sides, sides)
def test_the_low_band_is_what_the_proxys_cosine_modes_hold(height, width, rows, columns):
    frame = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(1)).double()
    y, x = (m.T @ m for m in (cosine_modes(height, rows), cosine_modes(width, columns)))
    dense = torch.einsum("ip,pqc,jq->ijc", y, frame, x)
    torch.testing.assert_close(bands.low_pass(frame, (rows, columns)), dense)


def test_a_truth_is_faithful_to_its_own_proxy_and_an_error_has_its_size():
    video, _ = panned(9, 90, 130, (2.3, 1.1))
    proxy = torch.stack([frames.shrink(frame, (27, 40)) for frame in video[::4]])
    assert bands.psnr(bands.proxy_errors(video, proxy, 4)) == pytest.approx(100)
    errors = bands.proxy_errors(iter(video + 0.01), iter(proxy), 4)
    assert errors.shape == (3,)
    assert bands.psnr(errors) == pytest.approx(40, abs=0.01)


def test_proxy_frames_are_compared_with_the_frames_that_they_show():
    video, _ = panned(9, 64, 64, (3.0, 0.0))
    proxy = torch.stack([frames.shrink(frame, (16, 16)) for frame in video[::4]])
    one_late = torch.cat([video[:1], video[:-1]])
    assert bands.psnr(bands.proxy_errors(one_late, proxy, 4)) < 30


@pytest.mark.parametrize("frames_given", [8, 13])
def test_lengths_that_do_not_belong_together_are_refused(frames_given):
    with pytest.raises(ValueError, match="stride 4"):
        bands.proxy_errors(torch.rand(frames_given, 8, 8, 3), torch.rand(3, 4, 4, 3), 4)


def test_one_frame_is_a_video():
    frame = pink_noise(33, 47)[None]
    assert bands.psnr(bands.proxy_errors(frame, frame, 4)) == pytest.approx(100)
    assert bands.psnr(bands.low_band_errors(frame, frame, (8, 9))) == pytest.approx(100)


def test_detail_above_the_proxys_band_is_no_error_and_below_it_is():
    video, _ = panned(3, 64, 96, (1.5, 0.5))
    for k, psnr in ((10, 20), (40, 100)):
        changed = video + wave(96, k)[None, None, :, None]
        errors = bands.low_band_errors(changed, video, (16, 24))
        assert bands.psnr(errors) == pytest.approx(psnr, abs=0.5 if k == 40 else 0.01)


def test_energy_above_the_band_is_that_of_the_detail_alone():
    flat = torch.full((2, 64, 96, 3), 0.5)
    energies = bands.high_band_energies(flat + wave(96, 40)[None, None, :, None], (16, 24))
    assert energies.shape == (2,)
    assert bands.rms(energies) == pytest.approx(0.1, rel=1e-4)
    assert bands.rms(bands.high_band_energies(flat, (16, 24))) < 1e-6


def test_halved_detail_is_6_decibels_down_and_an_enlarged_proxy_far_more():
    truth, _ = panned(2, 96, 128, (1.0, 0.0))
    size = (24, 32)
    level = bands.rms(bands.high_band_energies(truth, size))
    halved = torch.stack([f - 0.5 * bands.high_pass(f, size) for f in truth])
    blurred = [frames.enlarge(frames.shrink(f, size), (96, 128)) for f in truth]
    assert bands.decibels(level, level) == 0
    assert bands.decibels(bands.rms(bands.high_band_energies(halved, size)), level) == (
        pytest.approx(-6.02, abs=0.01)
    )
    assert bands.decibels(bands.rms(bands.high_band_energies(blurred, size)), level) < -10


def test_what_is_no_frame_is_refused():
    with pytest.raises(ValueError, match=r"\(5, 5\); expected is \(height, width, 3\)"):
        bands.low_pass(torch.rand(5, 5), (2, 2))
    with pytest.raises(ValueError, match="uint8"):
        bands.low_pass(torch.zeros(5, 5, 3, dtype=torch.uint8), (2, 2))
    with pytest.raises(ValueError, match="Cannot shrink"):
        frames.shrink(torch.rand(5, 5, 3), (6, 5))
