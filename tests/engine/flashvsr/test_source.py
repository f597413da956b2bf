"""Low-quality frames against plain PIL, and their bounded window."""

import struct
from fractions import Fraction

import flashvsr_reference as reference
import numpy as np
import pytest
import torch
from atlasvid.engine.flashvsr.schedule import Schedule
from atlasvid.engine.flashvsr.source import (
    Footage,
    LowQuality,
    Upscale,
    padded_size,
)
from atlasvid.engine.vae.decode import TiledDecoder
from atlasvid.engine.vae.sources import frame_source
from atlasvid.engine.vae.video import StreamedVideo
from clips import render
from comfy_api.latest import InputImpl
from wan import rand
from wan_vaes import wan21_vae


def levels(frames, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


def low_quality(pixels, upscale=None, behind=32):
    footage = Footage.of(frame_source(torch.from_numpy(pixels).float() / 255))
    return LowQuality(footage, upscale or Upscale.by(footage.size, 4), behind)


@pytest.mark.parametrize("frames", [1, 2, 20, 21, 22, 28, 29, 30, 81])
def test_frames_are_rounded_up(frames):
    read = Schedule(frames).read
    assert read == reference.clip_length(frames)
    assert read % 8 == 1
    assert 4 * Schedule(frames).latent_frames - 3 == read - 4 >= frames


@pytest.mark.parametrize("frames", [1, 2, 20, 21, 22, 28])
def test_the_last_frame_is_repeated(frames):
    pixels = levels(frames, 5, 7)
    source = low_quality(pixels)
    expected = reference.edge_padded(reference.upscaled(pixels, 20, 28), 128, 128)
    read = torch.cat([source.frames(i, i + 4) for i in range(0, source.frames_in_all - 1, 4)])
    assert len(read) == source.frames_in_all - 1
    assert read.dtype == torch.float32
    numbers = torch.arange(len(read)).clamp(max=frames - 1)
    assert (read - expected[numbers]).abs().max() < 1e-6


@pytest.mark.parametrize("size", [(37, 50), (128, 256), (129, 128), (11, 333)])
def test_any_size_is_padded_and_cropped_back(size):
    pixels = levels(2, 9, 16)
    upscale = Upscale.to((9, 16), size)
    assert upscale.padded == padded_size(size)
    assert all(
        side % 128 == 0 and 0 <= side - s < 128
        for side, s in zip(upscale.padded, size, strict=True)
    )
    source = low_quality(pixels, upscale)
    frames = source.frames(0, 2)
    assert frames.shape == (2, 3, *upscale.padded)
    picture = reference.upscaled(pixels, *size)
    assert (upscale.crop(frames) - picture).abs().max() < 1e-6
    assert (frames - reference.edge_padded(picture, *upscale.padded)).abs().max() < 1e-6
    assert torch.equal(source.pictures(0, 2), upscale.crop(frames))


def test_scales_round_as_the_published_code():
    assert Upscale.by((33, 51), 1.5).scaled == (round(33 * 1.5), round(51 * 1.5))
    assert Upscale.by((270, 480), 4).padded == (1152, 1920)


@pytest.mark.parametrize("channels", [3, 4])
def test_alpha_is_left_out(channels):
    pixels = torch.from_numpy(levels(1, 6, 6)).float() / 255
    images = torch.cat([pixels, pixels[..., :1]], -1)[..., :channels]
    footage = Footage.of(frame_source(images))
    frames = LowQuality(footage, Upscale.by((6, 6), 2)).pictures(0, 1)
    assert (frames - reference.upscaled(levels(1, 6, 6), 12, 12)).abs().max() < 1e-6


def test_two_readers_share_a_bounded_window():
    pixels = levels(60, 4, 4)
    source = low_quality(pixels, behind=25)
    expected = reference.edge_padded(reference.upscaled(pixels, 16, 16), 128, 128)
    for first in range(0, 56, 4):
        ahead = source.frames(first, first + 4)
        assert (ahead - expected[first : first + 4]).abs().max() < 1e-6
        late = max(0, first - 21)
        behind = source.frames(late, late + 4)
        assert (behind - expected[late : late + 4]).abs().max() < 1e-6
        assert len(source._window) <= 25
    with pytest.raises(ValueError, match="Frame 3 was asked for, but frames before 31 are re"):
        source.frames(3, 4)


def test_a_range_longer_than_the_window_is_read_whole():
    pixels = levels(30, 4, 4)
    source = low_quality(pixels, behind=8)
    expected = reference.edge_padded(reference.upscaled(pixels, 16, 16), 128, 128)
    assert (source.frames(0, 21) - expected[:21]).abs().max() < 1e-6
    assert len(source._window) == 8
    assert (source.frames(13, 25) - expected[13:25]).abs().max() < 1e-6


def test_reading_far_ahead_keeps_no_more():
    source = low_quality(levels(60, 4, 4), behind=8)
    source.frames(50, 54)
    assert len(source._window) == 8


def test_nonsense_is_refused():
    source = low_quality(levels(3, 4, 4))
    with pytest.raises(ValueError, match="Frames 4 to 4 are no range"):
        source.frames(4, 4)
    with pytest.raises(ValueError, match="4 x 4 pixels, and 5 x 4 were expected"):
        low_quality(levels(3, 4, 4), Upscale.by((4, 5), 2))
    with pytest.raises(ValueError, match="cannot become 0 x 0"):
        Upscale.by((4, 4), 0.1)
    with pytest.raises(ValueError, match=r"16 x 200 does not fit into 128 x 128"):
        Upscale((4, 4), (200, 16), (128, 128))


def test_a_file_is_counted_and_read_in_parts(tmp_path, monkeypatch):
    file = render(tmp_path / "clip.mp4", 37, width=64, height=48)
    video = InputImpl.VideoFromFile(str(file))
    monkeypatch.setattr(type(video), "get_frame_count", lambda _self: 5)  # containers estimate
    footage = Footage.of(frame_source(video))
    assert (footage.frames, footage.size) == (37, (48, 64))
    images = (video.get_components().images * 255).round().byte().numpy()
    expected = reference.upscaled(images, 96, 128)
    source = LowQuality(footage, Upscale.by((48, 64), 2), behind=8)
    for first in range(0, 40, 4):
        numbers = torch.arange(first, first + 4).clamp(max=36)
        assert (source.pictures(first, first + 4) - expected[numbers]).abs().max() < 1e-6


def test_a_clip_that_is_decoded_when_it_is_read_is_decoded_before(monkeypatch):
    """Later, its VAE would come between the models of the up-scaling."""
    video = StreamedVideo(TiledDecoder(wan21_vae(), rand(1, 16, 2, 4, 4)), Fraction(16))
    footage = Footage.of(frame_source(video))
    assert (footage.frames, footage.size) == (5, (32, 32))
    monkeypatch.setattr(TiledDecoder, "tiles", lambda *_: 1 / 0)
    for _ in range(2):  # for the transformer and for the decoder
        source = LowQuality(footage, Upscale.by((32, 32), 4))
        assert source.frames(0, source.frames_in_all - 1).shape == (24, 3, 128, 128)


def test_a_lying_clip_is_read_upright(tmp_path):
    file = render(tmp_path / "lying.mp4", 3, width=64, height=48)
    data = bytearray(file.read_bytes())
    matrix = data.index(b"tkhd") + 44  # of the track's header: how players turn it
    data[matrix : matrix + 20] = struct.pack(">5i", 0, 1 << 16, 0, -(1 << 16), 0)
    file.write_bytes(data)
    video = InputImpl.VideoFromFile(str(file))
    assert Footage.of(frame_source(video)).size == video.get_components().images.shape[1:3]


def test_a_source_that_shrank_is_said():
    source = low_quality(levels(3, 4, 4))
    source.footage = Footage(source.footage.source, 9, (4, 4))
    with pytest.raises(ValueError, match="ended after 3 of 9 frames"):
        source.frames(0, 4)
