"""Parts of the training in the tiny world, against the stock classes and against themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from atlasvid.engine.comfyui import media, models
from atlasvid.engine.families import tiny
from world import dit, vae
from world.clips import random_clips, random_crop
from world.latents import LatentCode, fit, psnr
from world.training import train


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return random_clips(0, 24, 64, 48, frames=5)[0]


@pytest.fixture(scope="module")
def code(clips: torch.Tensor) -> LatentCode:
    return fit(clips[:20], steps=60, batch=4)


def small_vae() -> torch.nn.Module:
    model = media.build_wan_vae(8)
    vae.initialise(model, 3)
    return model


def test_whole_clips_go_through_the_vae_as_the_stock_class_takes_them():
    model = small_vae()
    video, latents = torch.randn(1, 3, 9, 32, 48), torch.randn(1, 16, 3, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(model, video), model.encode(video), atol=1e-5, rtol=0)
        expected = model.decode(latents)
        torch.testing.assert_close(vae.decode(model, latents), expected, atol=2e-5, rtol=0)


def test_a_stock_file_gives_latents_with_wans_statistics_and_can_be_turned_back():
    import comfy.latent_formats

    model = small_vae()
    stock = media.build_wan_vae(8)
    files = vae.as_stock(model.state_dict())
    stock.load_state_dict({name: value.float() for name, value in files.items()})
    latents = torch.randn(1, 16, 2, 4, 4)
    with torch.no_grad():
        wanted = model.decode(latents)
        given = stock.decode(comfy.latent_formats.Wan21().process_out(latents))
    assert (given - wanted).abs().max() < 0.02 * wanted.abs().max()  # half precision
    again = vae.from_stock(files)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again[name], value, atol=2e-3, rtol=2e-3)


def test_the_code_gives_clips_back_and_still_frames_agree(
    clips: torch.Tensor, code: LatentCode, tmp_path: Path
):
    held = clips[20:]
    assert psnr(code.decode(code.encode(held)), held) > 24
    still = held[:, :, :1].expand(-1, -1, 5, -1, -1)
    first, later = code.encode(still).unbind(2)
    torch.testing.assert_close(first, later, atol=1e-4, rtol=0)
    code.save(tmp_path / "code.safetensors")
    loaded = LatentCode.load(tmp_path / "code.safetensors")
    assert torch.equal(loaded.encode(held), code.encode(held))


def test_half_a_vae_learns_and_goes_on_where_it_was_stopped(code: LatentCode, tmp_path: Path):
    video = torch.stack([random_crop(np.random.default_rng(i), 32, frames=5) for i in range(2)])
    latents, recipe = code.encode(video), vae.VaeRecipe(steps=30, rate=3e-3, warmup=5)

    def steps(training: vae.VaeTraining, count: int) -> None:
        for _ in range(count):
            generator = torch.Generator().manual_seed(training.step)
            training.update(video, latents, generator)

    whole = vae.VaeTraining(small_vae(), "decoder", recipe)
    steps(whole, 30)
    assert whole.losses[-1] < 0.6 * whole.losses[0]
    stopped = vae.VaeTraining(small_vae(), "decoder", recipe)
    steps(stopped, 4)
    stopped.save(tmp_path / "half.pt")
    resumed = vae.VaeTraining(small_vae(), "decoder", recipe)
    resumed.load(tmp_path / "half.pt")
    steps(resumed, 2)
    assert resumed.losses == pytest.approx(whole.losses[:6], rel=1e-3)


def test_both_halves_are_tuned_together(code: LatentCode):
    """Kernels learn through the same numbers seen as matrices, and the pixels come closer."""
    video, _ = random_clips(5, 4, 32, 32, 5)
    whole = small_vae()
    vae.initialise(whole, 0)
    tuning = vae.VaeTuning(whole, vae.VaeRecipe(steps=40, rate=3e-3, warmup=5))
    before = {name: p.clone() for name, p in whole.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    losses = [tuning.update(video, code.encode(video), generator) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]
    still = [name for name, p in whole.named_parameters() if torch.equal(p, before[name])]
    assert not [name for name in still if "time_conv" not in name and "attn" not in name], still


def test_the_model_learns_goes_on_and_can_begin_with_a_finished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "in_training", True)
    config = {"dim": 128, "ffn_dim": 128, "num_heads": 1, "num_layers": 1, "text_dim": 4096}
    recipe = dit.DitRecipe(steps=12, cooldown=2, warmup=2)
    latents, text = torch.randn(4, 16, 1, 4, 4), torch.randn(4, 3, 4096)

    def training() -> dit.DitTraining:
        return dit.DitTraining(models.build_wan(**config), recipe)

    def batch(_step: int, _generator: torch.Generator):
        return latents, text

    whole = training()
    train(whole, batch, tmp_path / "whole.pt", lambda *_: None)
    assert whole.step == 12
    assert sum(whole.losses[-3:]) < sum(whole.losses[:3])
    resumed = training()
    resumed.load(tmp_path / "whole.pt")
    assert resumed.losses == whole.losses
    fresh = training()
    fresh.start_from({k: v.half() for k, v in whole.average.state_dict().items()})
    pairs = zip(fresh.model.parameters(), whole.average.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in pairs)


def test_noise_levels_spread_over_a_batch():
    sigma = dit.noise_levels(64, 2.5, torch.Generator().manual_seed(0))
    assert ((sigma > 0) & (sigma < 1)).all()
    assert sigma.median() == pytest.approx(2.5 / 3.5, abs=0.03)


def test_the_family_was_trained_with_the_sizes_that_the_tools_build():
    state = tiny.world_state("t2v")
    assert {k: v.shape for k, v in models.build_wan(**dit.CONFIG).state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
