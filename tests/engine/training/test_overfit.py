"""Learning one tiny clip by heart: the loss falls, and sampling moves towards the clip."""

import comfy.sample
import comfy.sd
import comfy.utils
import pytest
import torch
from atlasvid.engine import host, tiny
from atlasvid.engine.detail import apply_detail_branch
from atlasvid.engine.grid import Grid
from atlasvid.engine.lora import load_guide_lora
from atlasvid.engine.rope import apply_rope_method
from atlasvid.engine.training.cache import LatentCache
from atlasvid.engine.training.clips import clips_in_folder
from atlasvid.engine.training.objective import NoiseLevels
from atlasvid.engine.training.trainer import Trainer, TrainSettings
from clips import render
from wan import plan_of

WINDOW = Grid(4, 16, 16)


@pytest.fixture
def dataset_of(tmp_path):
    def made(plan, stage):
        render(tmp_path / "a.mp4", 18)
        vae = host.load_vae(tiny.vae_state())
        cache = LatentCache(tmp_path / "cache", plan, stage, vae, tiny.TinyTextEncoder())
        return cache.build(clips_in_folder(tmp_path), 1)

    return made


def denoiser(strength):
    """A random Wan that passes its input on, so that it predicts the noise already.

    Its blocks add their random results with a strength; what is left to learn is the clip.
    """
    state = tiny.wan_state(0, num_layers=2)
    embed = torch.linalg.qr(torch.randn(256, 64, generator=torch.Generator().manual_seed(0)))[0]
    state["patch_embedding.weight"] = embed.view(256, 16, 1, 2, 2).contiguous()
    state["patch_embedding.bias"] *= 0
    order = torch.arange(64).view(16, 2, 2).permute(1, 2, 0).flatten()
    state["head.head.weight"] = 0.5 * embed.T[order].contiguous()
    state["head.head.bias"] *= 0
    state["head.modulation"] *= 0
    for name in state:
        if any(part in name for part in (".o.", ".ffn.2.")):
            state[name] *= strength
        elif name.startswith(("time_projection", "time_embedding.2")) or ".modulation" in name:
            state[name] *= 0.1
        if name.startswith("blocks") and name.endswith(".modulation"):
            state[name][:, (2, 5)] += 1  # the gates
    return host.load_diffusion_model(state)


def mean_loss(trainer, dataset):
    """Over the same 16 noises and noise levels, whatever was trained."""
    step, losses = trainer.step, []
    with host.training(), torch.no_grad():
        for trainer.step in range(16):
            losses.append(float(trainer.loss(dataset, 0)))
    trainer.step = step
    return sum(losses) / len(losses)


def distance(patched, clip, text):
    """How far what the stock sampler makes of noise is from a clip's latent."""
    noise = comfy.sample.prepare_noise(clip, 5)
    words = [[text, {}]]
    with torch.no_grad():
        made = comfy.sample.sample(
            patched, noise, 8, 1.0, "euler", "simple", words, words, torch.zeros_like(clip), seed=5
        )
    return float((made - clip).square().mean())


def test_a_proxy_lora_learns_a_clip_by_heart(dataset_of, tmp_path):
    plan = plan_of((5, 8, 8), (2, 8, 8))
    dataset = dataset_of(plan, "proxy")
    model = denoiser(1.0)
    settings = TrainSettings(
        "proxy", 700, 64, 64.0, optimizer="Prodigy", caption_dropout=0.0, precision="fp32",
        noise=NoiseLevels(5.0, 0.8, 1.0),
    )  # fmt: skip
    trainer = Trainer(model, plan, settings, tmp_path / "proxy.safetensors", tmp_path / "run")
    before = mean_loss(trainer, dataset)
    result = trainer.run(dataset)
    print("proxy", before, mean_loss(trainer, dataset))
    assert mean_loss(trainer, dataset) < before / 10

    lora = comfy.utils.load_torch_file(str(result.path))
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    sample = dataset.sample(0)
    with_lora, without = (
        distance(apply_rope_method(each, "linear", 1.0, 1.0, plan), sample.guide, sample.text)
        for each in (patched, model)
    )
    print(with_lora, without)
    assert with_lora < without / 2


def test_a_guide_lora_learns_what_the_guide_shows(dataset_of, tmp_path):
    """The target's own weights stay random: only what the guide can tell is learned."""
    plan = plan_of((5, 8, 8), (2, 4, 4))
    dataset = dataset_of(plan, "guide")
    model = denoiser(0.1)
    settings = TrainSettings(
        "guide", 160, 32, 32.0, learning_rate=2e-3, window=WINDOW, caption_dropout=0.0,
        precision="fp32", noise=NoiseLevels(5.0, 0.7, 1.0),
    )  # fmt: skip
    trainer = Trainer(model, plan, settings, tmp_path / "guide.safetensors", tmp_path / "run")
    before = mean_loss(trainer, dataset)
    result = trainer.run(dataset)
    assert mean_loss(trainer, dataset) < before / 2

    sample = dataset.sample(0)
    with_lora, without = (
        distance(
            apply_detail_branch(model, plan, sample.guide, WINDOW, "clean", guide_lora=lora),
            sample.target,
            sample.text,
        )
        for lora in (load_guide_lora(result.path, 1.0), None)
    )
    assert with_lora < without
    print("guide", before, mean_loss(trainer, dataset), with_lora, without)
