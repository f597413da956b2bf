"""AtlasVidTCDecode against the reference's whole clip and the stock CreateVideo and SaveVideo."""

from fractions import Fraction

import av
import comfy.latent_formats
import comfy.model_management
import flashvsr_reference as reference
import folder_paths
import pytest
import torch
from atlasvid.engine.comfyui import models
from atlasvid.engine.flashvsr.bundle import FlashVSR
from atlasvid.engine.flashvsr.tc_decoder import TCRun, load_tc_decoder
from atlasvid.nodes.decode import AtlasVidDecodeToVideo
from atlasvid.nodes.encode import AtlasVidEncode
from atlasvid.nodes.flashvsr import AtlasVidTCDecode
from clips import render
from comfy_api.latest import InputImpl
from stock_nodes import create_video, save_video, saved_alike, video_from_images
from wan import rand, small_wan
from wan_vaes import wan21_vae

WEIGHTS = reference.tc_weights((8, 8, 4, 4))
TALL, WIDE = 32, 40
SAMPLES = {"samples": rand(1, 16, 6, TALL // 8, WIDE // 8, seed=4)}


@pytest.fixture(scope="module")
def flashvsr():
    decoder = load_tc_decoder(WEIGHTS, torch.float32)
    model = small_wan(num_layers=1, ffn_dim=256)
    return FlashVSR(model, None, rand(1, 4, 8), models.patcher(decoder), "v1.1")


@pytest.fixture(autouse=True)
def temp_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path / "temp"


def images(frames=21, seed=3):
    levels = (rand(frames, 9, 12, 3, seed=seed).sigmoid() * 255).round()
    return levels / 255


def expected(pixels, colour="adain", size=(TALL, WIDE)):
    """Straight from the definitions: [n, 3, height, width] in [-1, 1]."""
    picture = reference.upscaled((pixels * 255).round().byte().numpy(), *size)
    padded = reference.edge_padded(picture, TALL, WIDE)
    padded = padded[torch.arange(21).clamp(max=len(padded) - 1)]
    latents = comfy.latent_formats.Wan21().process_in(SAMPLES["samples"].double())
    frames = reference.tc_decode(WEIGHTS, latents, padded)
    frames = frames[: len(pixels), :, : size[0], : size[1]]
    return getattr(reference, colour)(frames, picture)


def as_images(frames):
    return (frames / 2 + 0.5).movedim(1, -1).float()


def decode(flashvsr, low_quality, **more):
    return AtlasVidTCDecode.execute(SAMPLES, low_quality, flashvsr, **more)[0]


@pytest.mark.parametrize("colour", ["adain", "wavelet"])
def test_gives_the_references_pixels(flashvsr, colour):
    video = decode(flashvsr, images(), colour=colour)
    difference = video.get_components().images - as_images(expected(images(), colour))
    assert difference.abs().max() < 1e-4
    assert video.get_frame_rate() == Fraction(16)


def test_the_padding_is_cropped_before_the_colours_are_taken(flashvsr):
    video = decode(flashvsr, images(20), width=33, height=25, fps=12.0)
    shown = video.get_components().images
    assert video.get_dimensions() == (33, 25)
    assert shown.shape == (20, 25, 33, 3)
    assert (shown - as_images(expected(images(20), size=(25, 33)))).abs().max() < 1e-4
    assert video.get_frame_rate() == Fraction(12)


def test_saved_files_equal_those_of_stock_nodes(flashvsr, tmp_path):
    ours = decode(flashvsr, images())
    theirs = create_video(ours.get_components().images, 16.0)
    assert saved_alike(ours, theirs, tmp_path)


def test_nothing_is_decoded_before_it_is_saved_and_then_once(flashvsr, tmp_path, monkeypatch):
    stock, steps = TCRun.step, []
    monkeypatch.setattr(TCRun, "step", lambda *args: steps.append(1) or stock(*args))
    video = decode(flashvsr, images())
    assert (video.get_frame_count(), video.get_duration()) == (21, 21 / 16)
    assert not steps
    save_video(video, tmp_path / "first")
    save_video(video.as_trimmed(0.5, 0.5), tmp_path / "second")
    assert len(steps) == 6


def test_the_videos_sound_and_rate_are_kept(flashvsr, tmp_path):
    sound = {"waveform": rand(1, 2, 44100, seed=1) * 0.1, "sample_rate": 44100}
    larger = images().repeat_interleave(4, 1).repeat_interleave(4, 2)
    file = save_video(create_video(larger, 24.0, sound), tmp_path / "in")
    given = InputImpl.VideoFromFile(str(file))
    video = decode(flashvsr, given)
    assert video.get_frame_rate() == given.get_frame_rate() == Fraction(24)
    components, theirs = video.get_components(), given.get_components()
    assert torch.equal(components.audio["waveform"], theirs.audio["waveform"])
    assert components.audio["sample_rate"] == 44100
    with av.open(str(save_video(video, tmp_path / "out"))) as container:
        assert container.streams.audio
    other = {"waveform": rand(1, 2, 100, seed=2), "sample_rate": 8000}
    replaced = decode(flashvsr, given, audio=other).get_components().audio
    assert torch.equal(replaced["waveform"], other["waveform"])


def test_a_silent_file_and_a_video_in_memory_are_read_alike(flashvsr, tmp_path):
    given = InputImpl.VideoFromFile(str(render(tmp_path / "clip.mp4", 21, width=64, height=48)))
    pixels = given.get_components().images
    expected = decode(flashvsr, pixels).get_components()
    for video in (given, video_from_images(pixels, 16.0)):
        components = decode(flashvsr, video).get_components()
        assert torch.equal(components.images, expected.images)
        assert components.audio is None


def test_a_video_that_is_still_a_latent_is_decoded_on_the_way(flashvsr):
    """AtlasVid Decode to Video's result is read without ever being in memory whole."""
    proxy = {"samples": rand(1, 16, 6, 2, 3, seed=5)}
    streamed = AtlasVidDecodeToVideo.execute(proxy, wan21_vae(), 8.0, "auto")[0]
    video = decode(flashvsr, streamed)
    ours = video.get_components().images
    whole = streamed.get_components().images
    expected = decode(flashvsr, whole).get_components().images
    assert (ours - expected).abs().max() < 0.05  # a level apart where it lies between two
    assert (ours - expected).abs().mean() < 1e-3
    assert video.get_frame_rate() == Fraction(8)
    read = torch.cat(list(streamed.batches()))
    assert (read - whole).abs().max() < 1e-5


def test_encode_takes_such_a_video_too():
    vae = wan21_vae()
    streamed = AtlasVidDecodeToVideo.execute({"samples": rand(1, 16, 2, 4, 4)}, vae, 8.0, "auto")[0]
    latent = AtlasVidEncode.execute(streamed, vae, "auto")[0]["samples"]
    whole = AtlasVidEncode.execute(streamed.get_components().images, vae, "auto")[0]["samples"]
    assert (latent - whole).abs().max() < 1e-3


def test_a_cancelled_save_leaves_nothing(flashvsr, tmp_path, temp_folder, monkeypatch):
    stock, steps = TCRun.step, []

    def cancel_later(*args):
        steps.append(1)
        if len(steps) == 3:
            comfy.model_management.interrupt_current_processing(True)
        return stock(*args)

    monkeypatch.setattr(TCRun, "step", cancel_later)
    video = decode(flashvsr, images())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        save_video(video, tmp_path / "out")
    assert list((tmp_path / "out").rglob("*")) == []
    assert list(temp_folder.iterdir()) == []
    assert save_video(video, tmp_path / "out").stat().st_size > 0


def test_what_does_not_fit_is_refused(flashvsr):
    without = FlashVSR(flashvsr.model, None, flashvsr.prompt, None, "v1")
    with pytest.raises(ValueError, match="loaded without its Tiny Conditional decoder"):
        decode(without, images())
    with pytest.raises(ValueError, match="there are 40 low-quality frames"):
        decode(flashvsr, images(40))
    with pytest.raises(ValueError, match="There are no frames"):
        decode(flashvsr, images(1)[:0])
    with pytest.raises(ValueError, match="48 x 32 does not fit into 40 x 32"):
        decode(flashvsr, images(), width=48)
