"""Tiles against the VAE's own untiled encode."""

import pytest
import torch
from atlasvid.engine.vae.encode import TiledEncoder, encode_frames
from atlasvid.engine.vae.regions import TileGrid
from atlasvid.engine.vae.sources import GreyAfter, ImageFrames, latent_groups
from atlasvid.engine.vae.wan import WanEncoder
from wan_vaes import wan21_vae, wan22_vae

TOLERANCE = 5e-6  # latents reach beyond 2 in size, pixels stop at 1
VAES = {"wan21": (wan21_vae, 8), "wan22": (wan22_vae, 16)}


@pytest.fixture(params=sorted(VAES), scope="module")
def vae_and_scale(request):
    make, scale = VAES[request.param]
    return make(), scale


def random_images(frames: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.rand(frames, height, width, channels, generator=generator)


def untiled(vae, images):
    with torch.inference_mode():
        return vae.encode(images)


def encode_in(grid: TileGrid, vae, source, monkeypatch):
    monkeypatch.setattr(TiledEncoder, "plan", lambda _self: grid)
    return encode_frames(vae, source)


@pytest.mark.parametrize(
    ("frames", "height", "width", "rows", "cols"),
    [
        (1, 13, 9, 2, 1),
        (4, 5, 6, 1, 1),  # fewer frames than two latents
        (5, 8, 17, 1, 3),
        (9, 21, 6, 3, 1),
        (15, 11, 12, 2, 2),  # two frames too many
    ],
)
def test_tiles_equal_the_untiled_encode(
    vae_and_scale, monkeypatch, frames, height, width, rows, cols
):
    vae, scale = vae_and_scale
    images = random_images(frames, height * scale, width * scale)
    latent = encode_in(TileGrid(height, width, rows, cols), vae, ImageFrames(images), monkeypatch)
    expected = untiled(vae, images)
    assert latent.shape == expected.shape
    assert latent.dtype == expected.dtype
    assert (latent - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("channels", [3, 4])
def test_sides_and_channels_are_cropped_as_the_stock_encode_does(monkeypatch, channels):
    vae = wan21_vae()
    images = random_images(5, 61, 78, channels)
    latent = encode_in(TileGrid(7, 9, 1, 2), vae, ImageFrames(images), monkeypatch)
    assert (latent - untiled(vae, images)).abs().max() <= TOLERANCE


def test_grey_frames_equal_a_tensor_of_grey_frames(monkeypatch):
    vae = wan21_vae()
    start = random_images(2, 48, 64)
    full = torch.cat([start, torch.full((11, 48, 64, 3), 0.5)])
    latent = encode_in(TileGrid(6, 8, 1, 2), vae, GreyAfter(start, 13), monkeypatch)
    assert (latent - untiled(vae, full)).abs().max() <= TOLERANCE


def test_out_of_memory_halves_the_tile(monkeypatch):
    vae = wan21_vae()
    images = random_images(9, 32, 128)
    stock = WanEncoder.features
    widths: list[int] = []

    def scarce(self, x, cache, regions, final):
        widths.append(regions[-1].cols.size)
        if regions[-1].cols.size > 4:
            raise torch.OutOfMemoryError("no room")
        return stock(self, x, cache, regions, final)

    monkeypatch.setattr(WanEncoder, "features", scarce)
    latent = encode_in(TileGrid(4, 16, 1, 2), vae, ImageFrames(images), monkeypatch)
    assert widths.count(8) == 2
    assert widths.count(4) == 4 * 5  # four tiles, chunks of 1, 2, 2, 2, 2 frames
    assert (latent - untiled(vae, images)).abs().max() <= TOLERANCE


def test_too_small_frames_are_refused():
    with pytest.raises(ValueError, match=r"6 x 64 pixels.*at least 8 x 8"):
        encode_frames(wan21_vae(), ImageFrames(random_images(1, 64, 6)))


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([1], [1]),
        ([4], [1]),
        ([9], [1, 4, 4]),
        ([3, 3, 3], [1, 4, 4]),
        ([1, 1, 1, 1, 1, 3], [1, 4]),
    ],
)
def test_groups_are_one_frame_then_four(batches, expected):
    frames = torch.arange(sum(batches)).float()
    groups = list(latent_groups(frames.split(batches)))
    assert [len(group) for group, _ in groups] == expected
    assert [last for _, last in groups] == [False] * (len(expected) - 1) + [True]
    joined = torch.cat([group for group, _ in groups])
    assert torch.equal(joined, frames[: len(joined)])
