"""AtlasVidEncode and AtlasVidImageToVideo against the stock nodes."""

import struct

import av
import comfy.clip_vision
import folder_paths
import numpy as np
import pytest
import torch
from atlasvid.engine.comfyui import media
from atlasvid.engine.vae import sources
from atlasvid.engine.vae.encode import TiledEncoder
from atlasvid.engine.vae.regions import TileGrid
from atlasvid.nodes.encode import AtlasVidEncode, AtlasVidImageToVideo
from clips import render
from comfy_api.latest import InputImpl
from comfy_extras.nodes_wan import WanImageToVideo
from stock_nodes import create_video
from wan_vaes import wan21_vae, wan22_vae

import nodes as stock

TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def vae():
    return wan21_vae()


@pytest.fixture(autouse=True)
def temp_folder(tmp_path, monkeypatch):
    folder = tmp_path / "temp"
    monkeypatch.setattr(folder_paths, "temp_directory", str(folder))
    return folder


@pytest.fixture
def two_tiles(monkeypatch):
    monkeypatch.setattr(TiledEncoder, "plan", lambda self: TileGrid(self.height, self.width, 1, 2))


def images(frames: int, height: int = 64, width: int = 80) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(frames, 3, height // 8, width // 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").movedim(1, -1)


def stock_latent(vae, pixels):
    with torch.inference_mode():
        return stock.VAEEncode().encode(vae, pixels)[0]["samples"]


def video_file(tmp_path, frames: int, width: int = 80):
    path = str(tmp_path / "in.mp4")
    create_video(images(frames, width=width), 16.0).save_to(path)
    return InputImpl.VideoFromFile(path)


def test_images_encode_as_the_stock_node_does(vae, two_tiles):
    latent = AtlasVidEncode.execute(images(9), vae, "auto")[0]["samples"]
    assert (latent - stock_latent(vae, images(9))).abs().max() <= TOLERANCE


def test_video_files_encode_as_their_images_do(vae, two_tiles, tmp_path, temp_folder, monkeypatch):
    monkeypatch.setattr(sources, "FILE_BATCH", 5)
    video = video_file(tmp_path, 23)
    latent = AtlasVidEncode.execute(video, vae, "auto")[0]["samples"]
    expected = stock_latent(vae, video.get_components().images)
    assert latent.shape == (1, 16, 6, 8, 10)
    assert (latent - expected).abs().max() <= TOLERANCE
    assert list(temp_folder.iterdir()) == []


@pytest.mark.parametrize("start", [0.0, 0.5, -0.75])
@pytest.mark.parametrize("width", [80, 96])
def test_files_are_read_in_parts_as_the_core_reads_them_whole(tmp_path, start, width):
    video = video_file(tmp_path, 40, width).as_trimmed(start, 0.6, strict_duration=False)
    batches = list(media.video_batches(video, 6))
    assert max(map(len, batches)) <= 8
    assert torch.equal(torch.cat(batches), video.get_components().images)


def test_videos_made_of_images_encode_too(vae, two_tiles):
    video = create_video(images(5), 16.0)
    latent = AtlasVidEncode.execute(video, vae, "auto")[0]["samples"]
    assert (latent - stock_latent(vae, images(5))).abs().max() <= TOLERANCE


def turned(path):
    """The file as a phone writes it: its track says that players turn it clockwise."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def test_a_turned_video_encodes_as_the_stock_node_does(vae, two_tiles, tmp_path):
    video_file(tmp_path, 9)
    turned(tmp_path / "in.mp4")
    video = InputImpl.VideoFromFile(str(tmp_path / "in.mp4"))
    pixels = video.get_components().images
    latent = AtlasVidEncode.execute(video, vae, "auto")[0]["samples"]
    assert (latent - stock_latent(vae, pixels)).abs().max() <= TOLERANCE
    height, width = latent.shape[-2:]
    assert (height > width) == (pixels.shape[1] > pixels.shape[2])  # 0.18.0 turns nothing


def fast_start(path):
    """A file with its index before its pictures, which opens when it is cut short."""
    with (
        av.open(str(path)) as given,
        av.open(str(path.with_name("fast.mp4")), "w", options={"movflags": "faststart"}) as made,
    ):
        stream = given.streams.video[0]
        copied = made.add_stream_from_template(stream)
        for packet in given.demux(stream):
            if packet.dts is not None:
                packet.stream = copied
                made.mux(packet)
    return path.with_name("fast.mp4").read_bytes()


def scratched(data):
    """A third of the pictures replaced by noise."""
    start, end = data.find(b"mdat") + 8, data.find(b"moov")
    third = (end - start) // 3
    noise = np.random.default_rng(0).integers(0, 256, third, dtype=np.uint8).tobytes()
    return data[: start + third] + noise + data[start + 2 * third :]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: b"", "cannot be read as a video"),
        (lambda path: b"no video " * 99, "cannot be read as a video"),
        (lambda path: path.read_bytes()[:2000], "cannot be read as a video"),
        (
            lambda path: scratched(path.read_bytes()),
            r"is damaged at 0\.\d\d s|cannot be read",
        ),  # by 0.18.0
        (lambda path: fast_start(path)[:-3000], r"is damaged at|cannot be read as a video"),
    ],
    ids=["empty", "text", "no index", "scratched", "cut short"],
)
def test_damaged_videos_are_named(vae, tmp_path, temp_folder, harm, message):
    render(tmp_path / "in.mp4", 23)
    (tmp_path / "in.mp4").write_bytes(harm(tmp_path / "in.mp4"))
    video = InputImpl.VideoFromFile(str(tmp_path / "in.mp4"))
    with pytest.raises(ValueError, match=rf"^in\.mp4 ({message})"):
        AtlasVidEncode.execute(video, vae, "auto")
    assert not list(temp_folder.rglob("*"))


def test_no_frames_are_refused(vae):
    with pytest.raises(ValueError, match="no frames to encode"):
        AtlasVidEncode.execute(torch.zeros(0, 64, 64, 3), vae, "auto")


@pytest.mark.parametrize("start_frames", [1, 6])
@pytest.mark.parametrize("with_vision", [False, True])
def test_image_to_video_equals_the_stock_node(vae, two_tiles, start_frames, with_vision):
    start = images(start_frames, 72, 104)
    vision = comfy.clip_vision.Output() if with_vision else None
    positive = [[torch.ones(1, 4, 8), {"note": "positive"}]]
    negative = [[torch.zeros(1, 4, 8), {"note": "negative"}]]
    ours = AtlasVidImageToVideo.execute(
        positive, negative, vae, 80, 64, 13, start, "auto", clip_vision_output=vision
    )
    with torch.inference_mode():
        theirs = WanImageToVideo.execute(
            positive, negative, vae, 80, 64, 13, 1, start_image=start, clip_vision_output=vision
        )
    for mine, expected in zip(ours[:2], theirs[:2], strict=True):
        ((cond, values),), ((stock_cond, stock_values),) = mine, expected
        assert torch.equal(cond, stock_cond)
        assert values.keys() == stock_values.keys()
        assert values["note"] == stock_values["note"]
        assert values.get("clip_vision_output") is stock_values.get("clip_vision_output")
        assert torch.equal(values["concat_mask"], stock_values["concat_mask"])
        difference = values["concat_latent_image"] - stock_values["concat_latent_image"]
        assert difference.abs().max() <= TOLERANCE
    assert torch.equal(ours[2]["samples"], theirs[2]["samples"])
    assert "concat_mask" not in positive[0][1]


def test_image_to_video_refuses_the_wan22_vae():
    with pytest.raises(ValueError, match="Wan22ImageToVideoLatent"):
        AtlasVidImageToVideo.execute([], [], wan22_vae(), 64, 64, 5, images(1), "auto")
