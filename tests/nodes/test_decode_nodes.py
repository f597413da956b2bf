"""AtlasVidDecode and AtlasVidDecodeToVideo against the stock decode, CreateVideo and SaveVideo."""

import errno
import io
import os
import subprocess
import sys
from argparse import Namespace
from fractions import Fraction
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import torch
from atlasvid.engine.comfyui import media
from atlasvid.engine.vae import scratch
from atlasvid.engine.vae.decode import TiledDecoder
from atlasvid.engine.vae.frames import dequantise, quantise
from atlasvid.engine.vae.regions import TileGrid
from atlasvid.engine.vae.wan import WanDecoder
from atlasvid.nodes.decode import AtlasVidDecode, AtlasVidDecodeToVideo
from stock_nodes import create_video, has_ten_bit, save_video, saved_alike
from wan_vaes import wan21_vae

import nodes as stock


@pytest.fixture(scope="module")
def vae():
    return wan21_vae()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two decodes sum in the same order, whatever else the machine does: files are compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def temp_folder(tmp_path, monkeypatch):
    folder = tmp_path / "temp"
    monkeypatch.setattr(folder_paths, "temp_directory", str(folder))
    return folder


@pytest.fixture
def two_tiles(monkeypatch):
    monkeypatch.setattr(TiledDecoder, "plan", lambda _self: TileGrid(10, 12, 1, 2))


@pytest.fixture
def one_tile(monkeypatch):
    monkeypatch.setattr(TiledDecoder, "plan", lambda _self: TileGrid(10, 12, 1, 1))


def latent(batch: int = 1, frames: int = 3):
    generator = torch.Generator().manual_seed(3)
    return {"samples": torch.randn(batch, 16, frames, 10, 12, generator=generator)}


def stock_images(vae, samples):
    with torch.inference_mode():
        return stock.VAEDecode().decode(vae, samples)[0]


def our_images(vae, samples):
    """The same decode as images: float32 differs from the stock's in the last bits."""
    return AtlasVidDecode.execute(samples, vae, "auto")[0]


def to_video(vae, samples, fps=16.0, **more):
    return AtlasVidDecodeToVideo.execute(samples, vae, fps, "auto", **more)[0]


def sound(seconds: float):
    generator = torch.Generator().manual_seed(5)
    waveform = torch.rand(1, 2, int(seconds * 44100), generator=generator) - 0.5
    return {"waveform": waveform, "sample_rate": 44100}


def test_decode_gives_the_stock_images(vae, two_tiles):
    images = AtlasVidDecode.execute(latent(), vae, "auto")[0]
    expected = stock_images(vae, latent())
    assert images.dtype == expected.dtype
    assert (images - expected).abs().max() <= 5e-6


@pytest.mark.parametrize("audio", [None, sound(1.0)], ids=["silent", "sound"])
def test_saved_files_equal_stock_files_byte_for_byte(vae, one_tile, tmp_path, audio):
    ours = to_video(vae, latent(), audio=audio)
    theirs = create_video(our_images(vae, latent()), 16.0, audio)
    assert saved_alike(ours, theirs, tmp_path)


def test_files_from_several_tiles_equal_what_stock_nodes_write(vae, two_tiles, tmp_path):
    images = our_images(vae, latent(batch=2))
    ours = to_video(vae, latent(batch=2))
    assert saved_alike(ours, create_video(images, 16.0), tmp_path)


def test_ten_bit_files_equal_stock_files_or_are_refused(vae, one_tile, tmp_path):
    if not has_ten_bit():
        with pytest.raises(ValueError, match="this ComfyUI writes videos of 8 bits"):
            to_video(vae, latent(), bit_depth=10)
        return
    video = to_video(vae, latent(), bit_depth=10)
    assert video.get_bit_depth() == 10
    theirs = create_video(our_images(vae, latent()), 16.0, bit_depth=10)
    assert saved_alike(video, theirs, tmp_path)


@pytest.mark.parametrize("bit_depth", [8, 10])
def test_frames_survive_the_buffer(bit_depth):
    levels = torch.linspace(0, 1, 70_001)[:, None, None, None]
    once = quantise(levels, bit_depth)
    again = quantise(dequantise(once, bit_depth), bit_depth)
    assert torch.equal(once.int(), again.int())


def test_metadata_reaches_the_file_and_buffers_work(vae, tmp_path):
    import av

    target = io.BytesIO()
    to_video(vae, latent()).save_to(target, metadata={"prompt": {"1": "x"}})
    target.seek(0)
    with av.open(target) as container:
        assert container.metadata["prompt"] == '{"1": "x"}'


def test_saving_twice_decodes_once(vae, two_tiles, tmp_path, monkeypatch):
    video = to_video(vae, latent())
    save_video(video, tmp_path / "first")
    images = our_images(vae, latent())

    def again(*_args):
        raise AssertionError("decoded a second time")

    monkeypatch.setattr(WanDecoder, "pixels", again)
    assert saved_alike(video, create_video(images, 16.0), tmp_path)


def test_buffers_go_with_the_video(vae, two_tiles, tmp_path, temp_folder):
    video = to_video(vae, latent())
    save_video(video, tmp_path / "out")
    (buffer,) = temp_folder.iterdir()
    assert buffer.stat().st_size == 9 * 80 * 96 * 3
    del video
    assert list(temp_folder.iterdir()) == []


def test_measures_answer_without_decoding(vae, monkeypatch):
    monkeypatch.setattr(WanDecoder, "pixels", None)
    monkeypatch.setattr(WanDecoder, "middle", None)
    video = to_video(vae, latent(batch=2), fps=12.0)
    assert video.get_dimensions() == (96, 80)
    assert video.get_frame_count() == 18
    assert video.get_frame_rate() == Fraction(12)
    assert video.get_duration() == 1.5
    assert video.get_container_format() == "mov,mp4,m4a,3gp,3g2,mj2"
    trimmed = video.as_trimmed(0.5, 0.5)
    assert trimmed.get_frame_count() == 6
    assert video.as_trimmed(-0.5, 0.0).get_frame_count() == 6
    assert video.as_trimmed(1.0, 2.0).get_frame_count() == 6
    assert video.as_trimmed(1.0, 2.0, strict_duration=True) is None
    assert video.as_trimmed(9.0, 0.0) is None


def test_components_are_the_exact_pixels(vae, two_tiles):
    video = to_video(vae, latent(), audio=sound(0.5))
    components = video.get_components()
    assert (components.images - stock_images(vae, latent())).abs().max() <= 5e-6
    assert components.frame_rate == Fraction(16)
    assert torch.equal(components.audio["waveform"], sound(0.5)["waveform"])


def test_a_trimmed_video_holds_its_frames_and_sound(vae, one_tile, tmp_path):
    video = to_video(vae, latent(), audio=sound(9 / 16)).as_trimmed(0.25, 0.25)
    images = our_images(vae, latent())[4:8]
    audio = sound(9 / 16)
    audio["waveform"] = audio["waveform"][..., 11025:22050]
    assert saved_alike(video, create_video(images, 16.0, audio), tmp_path)
    assert torch.equal(video.get_components().images, images)


def test_a_cancelled_save_leaves_nothing(vae, two_tiles, tmp_path, temp_folder, monkeypatch):
    calls = []
    stock_pixels = WanDecoder.pixels

    def cancel_later(*args):
        calls.append(1)
        if len(calls) == 4:  # in the last tile, when frames already flow into the file
            comfy.model_management.interrupt_current_processing(True)
        return stock_pixels(*args)

    monkeypatch.setattr(WanDecoder, "pixels", cancel_later)
    video = to_video(vae, latent(frames=5))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        save_video(video, tmp_path / "out")
    assert list((tmp_path / "out").rglob("*")) == []
    assert list(temp_folder.iterdir()) == []
    monkeypatch.setattr(WanDecoder, "pixels", stock_pixels)
    assert save_video(video, tmp_path / "out").stat().st_size > 0


def test_too_small_a_disk_is_refused_before_decoding(vae, two_tiles, tmp_path, monkeypatch):
    monkeypatch.setattr(WanDecoder, "middle", None)
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda _folder: Namespace(free=1000))
    with pytest.raises(
        OSError, match=r"9 frames of 96 x 80 needs .* KiB .*1000 bytes are free.*--temp"
    ):
        to_video(vae, latent()).save_to(str(tmp_path / "clip.mp4"))


GROWTH = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {tools!r}]
import conftest, folder_paths, torch
from measure import measure
from atlasvid.nodes.decode import AtlasVidDecodeToVideo
from wan_vaes import wan21_vae
folder_paths.temp_directory = {folder!r}
vae = wan21_vae()
def save(latents):
    samples = {{"samples": torch.randn(1, 16, latents, 16, 16)}}
    video = AtlasVidDecodeToVideo.execute(samples, vae, 16.0, "auto")[0]
    video.save_to(str(Path({folder!r}) / "clip.mp4"))
save(3)
for latents in (21, 41):
    print(measure(lambda: save(latents))["grown_bytes"])
"""


def test_memory_does_not_grow_with_the_frames(tmp_path):
    """81 and 161 frames in a process of its own; as one float batch they would be 15 and 30 MiB.

    Both are longer than what the encoder looks ahead, which is memory too.
    """
    here = Path(__file__).resolve().parent.parent
    code = GROWTH.format(tests=str(here), tools=str(here.parent / "tools"), folder=str(tmp_path))
    # Else the C library keeps freed memory for later, more of it the longer a process runs.
    give_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **give_back},
    )
    short, long = (int(line) / 2**20 for line in done.stdout.splitlines()[-2:])
    assert long - short < 6, f"{short:.0f} MiB for 81 frames, {long:.0f} MiB for 161"


def test_a_disk_that_fills_up_is_named(vae, two_tiles, tmp_path, temp_folder, monkeypatch):
    """Halfway, where there was room at the start: a device that is always full in its place."""
    video = to_video(vae, latent())
    with monkeypatch.context() as patch:
        patch.setattr(scratch, "scratch_name", lambda suffix: f"atlasvid-0-0-0{suffix}")
        temp_folder.mkdir(exist_ok=True)
        (temp_folder / "atlasvid-0-0-0.scratch").symlink_to("/dev/full")
        patch.setattr(scratch, "sweep", lambda folder: None)
        with pytest.raises(OSError, match=r"stopped: the disk of .* is full.*Free some") as failed:
            video.save_to(str(tmp_path / "clip.mp4"))
    assert "Errno" not in str(failed.value)
    assert not list(tmp_path.rglob("*.mp4"))
    assert not list(temp_folder.iterdir())
    video.save_to(str(tmp_path / "clip.mp4"))


def test_a_file_that_may_not_grow_is_named(vae, two_tiles, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(media, "encode_video", full)
    with pytest.raises(OSError, match=r"^Saving clip\.mp4 stopped: the disk of"):
        to_video(vae, latent()).save_to(str(tmp_path / "clip.mp4"))
    assert not list(tmp_path.glob("*.mp4"))


def test_files_of_killed_processes_are_swept(tmp_path):
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, psutil; print(os.getpid(), int(psutil.Process().create_time()))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    pid, started = child.stdout.split()
    stale = [
        tmp_path / f"atlasvid-{pid}-{started}-aa.scratch",
        tmp_path / f".atlasvid-{pid}-{started}-aa.mp4",
    ]
    reused_pid = tmp_path / f"atlasvid-{os.getpid()}-1-aa.scratch"
    foreign = tmp_path / "atlasvid-notes.txt"
    mine = tmp_path / scratch.scratch_name(".scratch")
    for path in [*stale, reused_pid, foreign, mine]:
        path.touch()
    scratch.sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {foreign, mine}
