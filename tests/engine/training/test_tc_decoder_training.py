"""Training runs of a small Tiny Conditional decoder: what is learned, saved and refused."""

import math

import comfy.latent_formats
import comfy.model_management
import flashvsr_reference as reference
import pytest
import torch
from atlasvid.engine.comfyui import media
from atlasvid.engine.families import tiny
from atlasvid.engine.flashvsr.tc_decoder import TCDecoder, Widths, load_tc_decoder
from atlasvid.engine.training.degradation import Degradation, blurred, compressed
from atlasvid.engine.training.objective import step_generator
from atlasvid.engine.training.pairs import clips_without_captions, encode_clips
from atlasvid.engine.training.tc_decoder import DecoderSettings, DecoderTrainer, decode_clip
from clips import picture, render
from safetensors.torch import load_file
from wan import rand

WIDTHS = (8, 8, 4, 4)


def settings(steps=3, **more):
    usual = {"width": 64, "height": 48, "frames": 5, "side": 32, "precision": "fp32"}
    return DecoderSettings(steps, widths=Widths(*WIDTHS), **(usual | more))


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    render(folder / "a.mp4", 12, width=96, height=64, caption=None)
    render(folder / "short.mp4", 2, width=96, height=64, caption=None)
    vae = media.load_vae(tiny.vae_state())
    clips = clips_without_captions(folder)
    files = encode_clips(clips, vae, folder / "encoded", settings())
    assert encode_clips(clips, vae, folder / "encoded", settings()) == files
    return files


def trainer(folder, chosen):
    return DecoderTrainer(chosen, folder / "decoder.safetensors", folder / "run")


def test_the_whole_clip_is_the_reference_and_has_gradients():
    weights = reference.tc_weights(WIDTHS)
    decoder = load_tc_decoder(weights, torch.float32).requires_grad_(True)
    latents, frames = rand(1, 16, 3, 2, 3), rand(9, 3, 16, 24, seed=1).tanh()
    decoded = decode_clip(decoder, latents, frames)
    expected = reference.tc_decode(weights, latents, frames)
    assert (decoded - expected).abs().max() < 1e-5 * expected.abs().max()
    decoded.square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in decoder.parameters())


def test_samples_are_good_frames_and_normalised_latents(samples):
    assert len(samples) == 2  # of the longer clip; the short one has too few frames
    tensors = load_file(samples[0])
    assert tensors["frames"].shape == (5, 48, 64, 3)
    vae = media.load_vae(tiny.vae_state())
    latent = vae.encode(tensors["frames"].float() / 255).float()
    expected = comfy.latent_formats.Wan21().process_in(latent)
    assert torch.equal(tensors["latent"], expected)


def test_a_run_learns_and_its_file_is_a_decoder(samples, tmp_path):
    run = trainer(tmp_path, settings(60, learning_rate=3e-3))
    run.run(samples)
    assert sum(run.losses[-10:]) < 0.6 * sum(run.losses[:10])
    decoder = load_tc_decoder(load_file(run.path), torch.float32)
    pair = run.sample(step_generator(0, 0))
    with torch.inference_mode():
        again = decode_clip(decoder, pair.latents, pair.shown)
        expected = decode_clip(run.decoder, pair.latents, pair.shown)
    assert (again - expected).abs().max() < 1e-6  # convolutions may differ with where weights lie
    assert run.path.with_suffix(".png").stat().st_size > 1000


def test_a_resumed_run_goes_on_exactly(samples, tmp_path):
    whole = trainer(tmp_path / "whole", settings(4))
    whole.run(samples)
    trainer(tmp_path / "parts", settings(2)).run(samples)
    resumed = trainer(tmp_path / "parts", settings(4))
    assert resumed.run(samples) == 2
    assert resumed.losses == whole.losses
    for name, weight in whole.weights().items():
        assert torch.equal(weight, resumed.weights()[name])
    other = trainer(tmp_path / "parts", settings(5, side=24))
    with pytest.raises(ValueError, match="side was 32, now 24"):
        other.run(samples)


def test_a_cancelled_run_keeps_what_it_learned(samples, tmp_path):
    def cancel(step, _):
        if step == 2:
            comfy.model_management.interrupt_current_processing(True)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        trainer(tmp_path, settings(9)).run(samples, on_step=cancel)
    assert trainer(tmp_path, settings(3)).run(samples) == 2


def test_half_precision_learns_too(samples, tmp_path):
    run = trainer(tmp_path, settings(2, precision="bf16"))
    run.run(samples)
    assert all(torch.isfinite(weight).all() for weight in run.weights().values())
    assert {weight.dtype for weight in run.weights().values()} == {torch.float32}
    start = TCDecoder(Widths(*WIDTHS))
    assert start.dtype == torch.float32


def test_a_loss_that_is_not_finite_changes_nothing(samples, tmp_path, monkeypatch):
    run = trainer(tmp_path, settings(2))
    before = run.weights()
    loss = DecoderTrainer.loss
    monkeypatch.setattr(DecoderTrainer, "loss", lambda *given: math.inf * loss(*given))
    with pytest.raises(ValueError, match="at step 1; the state before it is kept"):
        run.run(samples)
    assert all(torch.equal(weight, before[name]) for name, weight in run.weights().items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": 6}, "frames is 6; it must be 1 more than a multiple of 4"),
        ({"side": 20}, "side is 20; it must be a multiple of 8"),
        ({"side": 56}, "side is 56; it must fit into 64 x 48"),
        ({"precision": "fp8"}, "allowed are bf16 and fp32"),
        ({"steps": 0}, "must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        settings(**({"steps": 1} | wrong))


def test_a_folder_without_videos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no video in"):
        clips_without_captions(tmp_path)


def frames(count=2, height=40, width=56):
    return torch.stack([torch.from_numpy(picture(i / 8, width, height)) for i in range(count)])


def test_degradation_is_drawn_once_and_anew():
    degrade, good = Degradation(), frames()
    poor = degrade(good, torch.Generator().manual_seed(1))
    assert poor.shape == (2, 10, 14, 3)
    assert poor.dtype == torch.uint8
    assert torch.equal(poor, degrade(good, torch.Generator().manual_seed(1)))
    assert not torch.equal(poor, degrade(good, torch.Generator().manual_seed(2)))
    with pytest.raises(ValueError, match="scale is 0"):
        Degradation(scale=0)


def test_each_degradation_does_what_it_says():
    good = frames()
    none = {"blur": (0.05, 0.05), "noise": (0.0, 0.0), "quality": (95, 95), "scale": 1}
    seed = torch.Generator().manual_seed

    def harm(**more):
        poor = Degradation(**(none | more))(good, seed(0))
        return (poor.float() - good.float()).abs().mean()

    assert harm() < 1.5
    for more in ({"blur": (4.0, 4.0)}, {"noise": (0.1, 0.1)}, {"quality": (5, 5)}):
        assert harm(**more) > 1.5 * harm()


def test_blur_keeps_planes_and_spreads_points():
    assert (blurred(torch.full((1, 3, 9, 9), 0.7), 1.5) - 0.7).abs().max() < 1e-6
    point = torch.zeros(1, 3, 31, 31)
    point[..., 15, 15] = 1
    spread = blurred(point, 2.0)[0, 0]
    places = torch.arange(31.0) - 15
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    assert (spread.sum(0) * places**2).sum().sqrt() == pytest.approx(2, abs=0.05)
    assert (spread.sum(1) * places**2).sum().sqrt() == pytest.approx(2, abs=0.05)


def test_compression_is_near_at_high_quality():
    good = frames()
    assert (compressed(good, 95).float() - good.float()).abs().mean() < 1.5
