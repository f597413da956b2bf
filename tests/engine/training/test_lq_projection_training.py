"""Training runs of a small LQ projection against a small frozen transformer."""

import json
import math
import resource

import comfy.model_management
import pytest
import torch
from atlasvid.engine.comfyui import management, media, models
from atlasvid.engine.families import tiny, wan
from atlasvid.engine.flashvsr.blocks import BlockGrid
from atlasvid.engine.flashvsr.files import read_projection
from atlasvid.engine.flashvsr.memory import Places
from atlasvid.engine.flashvsr.projection import LowQualityProjection, ProjectionStream
from atlasvid.engine.flashvsr.schedule import Chunk
from atlasvid.engine.flashvsr.selection import Sparsity
from atlasvid.engine.flashvsr.transformer import OneStep
from atlasvid.engine.training.lq_projection import (
    ProjectionSettings,
    ProjectionTrainer,
    first_projection,
    new_projection,
    project_clip,
    widths_named,
)
from atlasvid.engine.training.objective import step_generator
from atlasvid.engine.training.one_step import TrainedStep
from atlasvid.engine.training.pairs import clips_without_captions, encode_clips
from clips import render
from flashvsr_dit_reference import DenseFlashVSR, tokens_of_frames
from safetensors import safe_open
from safetensors.torch import load_file
from wan import rand

WIDTHS = (6, 10, 256)
LAYERS = 2


def settings(steps=3, **more):
    usual = {"width": 144, "height": 128, "side": 128, "precision": "fp32", "learning_rate": 3e-3}
    return ProjectionSettings(steps, **(usual | more))


@pytest.fixture(scope="module")
def state():
    return tiny.wan_state(0, num_layers=LAYERS)


@pytest.fixture(scope="module")
def model(state):
    return models.load_diffusion_model(dict(state))  # the loader empties what it is given


@pytest.fixture(scope="module")
def prompt():
    return torch.randn(1, 7, 4096, generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    render(folder / "a.mp4", 26, width=144, height=128, caption=None)
    vae = media.load_vae(tiny.vae_state())
    files = encode_clips(clips_without_captions(folder), vae, folder / "encoded", settings())
    assert len(files) == 1
    return files


def test_the_latent_of_a_cut_begins_with_that_of_the_frames_decoded(samples):
    """A step reads 25 frames and learns the latent of the 21 that the first chunk makes."""
    tensors = load_file(samples[0])
    vae = media.load_vae(tiny.vae_state())
    decoded = models.wan_latent_in(media.encode_pixels(vae, tensors["frames"][:21].float() / 255))
    torch.testing.assert_close(tensors["latent"][:, :, :6], decoded, atol=1e-5, rtol=0)


def projection_state(seed=4, widths=WIDTHS):
    return tiny.random_weights(LowQualityProjection(widths), seed)


@pytest.fixture
def trainer(model, prompt, tmp_path):
    def make(chosen, name="run", start=None):
        start = start or new_projection(WIDTHS, chosen.seed)
        folder = tmp_path / name
        path = folder / "projection.safetensors"
        return ProjectionTrainer(chosen, model, prompt, start, path, folder / "state")

    return make


# --- Against the published method written out densely -----------------------------------------


def dense_gradients(state, prompt, weights, version, sparsity, given):
    """The clean latent and the projection's gradients by autograd in float64, whole and dense."""
    frames, noise, clean = (x.double() for x in given)
    weights = {name: w.double().requires_grad_() for name, w in weights.items()}
    shown = tokens_of_frames(weights, frames.transpose(0, 1), version)
    double = {name: w.double() for name, w in state.items()}
    choice = sparsity.sparse_ratio, sparsity.kv_ratio, sparsity.local_range
    predicted = DenseFlashVSR(double, prompt[0].double(), 2, *choice)(noise[0], shown)
    (predicted - clean[0]).square().mean().backward()
    return predicted.detach(), {name: w.grad for name, w in weights.items()}


@pytest.mark.parametrize(
    ("version", "grid", "sparsity"),
    [
        ("v1", BlockGrid(1, 1), Sparsity()),
        ("v1.1", BlockGrid(1, 3), Sparsity(0.05, 3.0, 3)),
    ],
)
def test_gradients_are_those_of_the_dense_method(state, model, prompt, version, grid, sparsity):
    high, wide = grid.rows * 16, grid.columns * 16
    frames = rand(25, 3, 8 * high, 8 * wide, seed=1).tanh()
    given = frames, rand(1, 16, 6, high, wide, seed=2), rand(1, 16, 6, high, wide, seed=3)
    weights = projection_state()
    expected, gradients = dense_gradients(state, prompt, weights, version, sparsity, given)

    projection = LowQualityProjection(WIDTHS)
    projection.load_state_dict(weights)
    with management.training():
        net = management.load_for_training(model, torch.float32, 0).model.diffusion_model
        evaluate = TrainedStep(net, prompt, torch.empty(0), grid, sparsity)
        predicted = evaluate(given[1], project_clip(projection, version, frames))
        (predicted - given[2]).square().mean().backward()
    torch.testing.assert_close(predicted[0].double(), expected, atol=1e-4, rtol=0)
    for name, weight in projection.named_parameters():
        theirs = gradients[name]
        assert theirs.abs().max() > 0
        assert (weight.grad - theirs).abs().max() < 1e-3 * theirs.abs().max()
    assert all(weight.grad is None for weight in net.parameters())


@pytest.mark.parametrize("version", ["v1", "v1.1"])
def test_a_whole_clip_is_the_stream(version):
    projection = LowQualityProjection.from_state(projection_state())
    frames = rand(13, 3, 48, 32).tanh()
    stream = ProjectionStream(projection, version, 64)
    video = frames.transpose(0, 1)
    stream.begin(video[:, :1])
    streamed = [stream.tokens(video[:, t : t + 4]) for t in (1, 5, 9)]
    whole = project_clip(projection, version, frames)
    torch.testing.assert_close(whole, torch.stack(streamed), atol=1e-4, rtol=0)


# --- Runs -----------------------------------------------------------------------------------


def one_step(model, prompt, projection, chosen, pair, noise):
    """The clean latent as nodes compute it."""
    places = Places(1, True, True, True, True, 4096)
    net = model.model.diffusion_model
    step = OneStep(net, prompt, torch.empty(0), chosen.grid, chosen.sparsity, places)
    shown = project_clip(projection, chosen.version, pair.shown)
    parts = step([Chunk(0, 6)], lambda t: noise[0, :, t], lambda t: shown[t])
    return torch.cat([latent for _, latent in parts], dim=2)


def test_a_run_learns_a_clip_and_its_file_is_a_projection(trainer, samples, model, prompt):
    chosen = settings(24, learning_rate=6e-3)
    run = trainer(chosen)
    before = {name: w.clone() for name, w in model.model.diffusion_model.state_dict().items()}
    run.run(samples)
    assert sum(run.losses[-5:]) < 0.8 * sum(run.losses[:5])
    now = model.model.diffusion_model.state_dict()
    assert all(torch.equal(now[name], weight) for name, weight in before.items())
    assert run.path.with_suffix(".png").stat().st_size > 1000
    with safe_open(run.path, "pt") as file:
        recipe = json.loads(file.metadata()["atlasvid_lq_projection"])
    assert (recipe["steps"], recipe["version"], recipe["side"]) == (24, "v1.1", 128)

    learned = read_projection(run.path)
    pair, noise = run.sample(step_generator(7, 0)), rand(1, 16, 6, 16, 16, seed=5)
    wanted = pair.latents[:, :, :6]
    with torch.no_grad():
        used, unused = (
            (one_step(model, prompt, p, chosen, pair, noise) - wanted).square().mean()
            for p in (learned, new_projection(WIDTHS, 0))
        )
    assert used < 0.85 * unused  # of noise and a degradation that no step has seen


def test_a_resumed_run_goes_on_exactly(trainer, samples):
    whole = trainer(settings(3), "whole")
    whole.run(samples)
    trainer(settings(1), "parts").run(samples)
    resumed = trainer(settings(3), "parts")
    assert resumed.run(samples) == 1
    assert resumed.losses == whole.losses
    for name, weight in whole.weights().items():
        assert torch.equal(weight, resumed.weights()[name])
    with pytest.raises(ValueError, match=r"version was v1\.1, now v1"):
        trainer(settings(4, version="v1"), "parts").run(samples)
    other = LowQualityProjection.from_state(projection_state(5))
    with pytest.raises(ValueError, match="start was "):
        trainer(settings(4), "parts", other).run(samples)


def test_a_projection_that_is_there_goes_on_and_stays_as_it_is(trainer, samples):
    weights = {name: w.to(torch.bfloat16) for name, w in projection_state().items()}
    start = LowQualityProjection.from_state(weights)
    run = trainer(settings(1, precision="bf16"), start=start)
    assert all(torch.equal(run.weights()[name], w.float()) for name, w in weights.items())
    run.run(samples)
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        name: tuple(w.shape) for name, w in read_projection(run.path).state_dict().items()
    }
    assert {w.dtype for w in run.saved_weights().values()} == {torch.bfloat16}
    assert {w.dtype for w in run.weights().values()} == {torch.float32}
    assert not all(torch.equal(run.weights()[name], w.float()) for name, w in weights.items())
    assert all(torch.equal(w, start.state_dict()[name]) for name, w in weights.items())


@pytest.mark.parametrize("call", [LAYERS + 1, 2 * LAYERS])
def test_cancelled_within_a_step_it_stops_at_the_next_block(trainer, samples, monkeypatch, call):
    """In the forward pass and in the backward pass, which computes the blocks again."""
    calls = []
    feed_forward = wan.feed_forward

    def counted(*given):
        calls.append(given)
        if len(calls) == 2 * LAYERS + call - 1:  # of the second step
            comfy.model_management.interrupt_current_processing(True)
        return feed_forward(*given)

    monkeypatch.setattr(wan, "feed_forward", counted)
    run = trainer(settings(9))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run.run(samples)
    assert len(calls) == 2 * LAYERS + call - 1
    monkeypatch.undo()
    assert trainer(settings(2)).run(samples) == 1


def test_a_full_disk_leaves_what_was_saved_intact(trainer, samples):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step, losses):
        if step == 2:  # from now on, no file may grow past 100 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

    try:
        with pytest.raises(RuntimeError, match=r"could not be written .* is intact\. Free some"):
            trainer(settings(3, save_every=1)).run(samples, on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert trainer(settings(3)).run(samples) == 2


def test_a_loss_that_is_not_finite_changes_nothing(trainer, samples, monkeypatch):
    run = trainer(settings(2))
    before = run.weights()
    loss = ProjectionTrainer.loss
    monkeypatch.setattr(ProjectionTrainer, "loss", lambda *given: math.inf * loss(*given))
    with pytest.raises(ValueError, match="at step 1; the state before it is kept"):
        run.run(samples)
    assert all(torch.equal(weight, before[name]) for name, weight in run.weights().items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": 29}, "frames is 29; the first chunk reads 25"),
        ({"side": 136}, "side is 136; it must be a multiple of 128"),
        ({"side": 256}, "side is 256; it must fit into 144 x 128"),
        ({"version": "v2"}, "version is 'v2'; allowed are v1 and v1.1"),
        ({"precision": "fp8"}, "allowed are bf16 and fp32"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        settings(**wrong)


def test_widths_are_two_numbers():
    assert widths_named("2048, 3072") == (2048, 3072)
    with pytest.raises(ValueError, match="write two numbers, such as 2048,3072"):
        widths_named("2048")


def test_what_a_training_begins_with_fits(model, prompt):
    given = LowQualityProjection.from_state(projection_state())
    assert first_projection(given, None, (1, 1), model, prompt, 0) is given
    assert first_projection(given, (6, 10), (1, 1), model, prompt, 0) is given
    assert first_projection(None, None, (4, 5), model, prompt, 0).widths == (4, 5, 256)
    assert first_projection(None, (7, 8), (4, 5), model, prompt, 0).widths == (7, 8, 256)
    with pytest.raises(ValueError, match="is 6,10 wide, and 7,8 was asked for"):
        first_projection(given, (7, 8), (1, 1), model, prompt, 0)
    narrow = LowQualityProjection.from_state(projection_state(widths=(6, 10, 128)))
    with pytest.raises(ValueError, match="tokens of 128 numbers, the transformer takes 256"):
        first_projection(narrow, None, (1, 1), model, prompt, 0)
    with pytest.raises(ValueError, match="The prompt has 64 numbers per token"):
        first_projection(given, None, (1, 1), model, prompt[..., :64], 0)
