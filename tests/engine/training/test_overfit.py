"""Learning one tiny clip by heart: the loss falls, and sampling moves towards the clip."""

import comfy.sample
import comfy.sd
import comfy.utils
import pytest
import torch
import torch.nn.functional as F
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.comfyui import management, media, models
from atlasvid.engine.families import tiny
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.lora.guide import load_guide_lora
from atlasvid.engine.proxy.frequencies import apply_rope_method
from atlasvid.engine.training.cache import LatentCache
from atlasvid.engine.training.clips import clips_in_folder
from atlasvid.engine.training.objective import NoiseLevels
from atlasvid.engine.training.trainer import Trainer, TrainSettings
from clips import render
from comfy.ldm.wan.model import sinusoidal_embedding_1d
from wan import plan_of, rand

WINDOW = Grid(4, 16, 16)
NOISE = NoiseLevels(5.0, 0.5, 1.0)


@pytest.fixture
def dataset_of(tmp_path):
    def made(plan, stage):
        render(tmp_path / "a.mp4", 18)
        vae = media.load_vae(tiny.vae_state())
        cache = LatentCache(tmp_path / "cache", plan, stage, vae, tiny.TinyTextEncoder())
        return cache.build(clips_in_folder(tmp_path), 1)

    return made


def denoiser(text):
    """A Wan that predicts the noise of any video, so that what is left to learn is the clip.

    A token holds its patch in some channels and a large constant in the others, which makes every
    LayerNorm nearly linear. The blocks are random and read all but the patch, so what they add is
    the same for every token and noise; the patch embedding takes that off in advance.
    """
    state = tiny.wan_state(0)
    patch = torch.linalg.qr(torch.cat([torch.ones(192, 1), rand(192, 64)], 1))[0][:, 1:]
    patch = F.pad(patch, (0, 0, 0, 64))
    order = torch.arange(64).view(16, 2, 2).permute(1, 2, 0).flatten()  # of a patch in the head
    state["patch_embedding.weight"] = patch.view(256, 16, 1, 2, 2).contiguous()
    state["patch_embedding.bias"] = F.pad(torch.tensor([3.0, -3.0]).repeat(32), (192, 0))
    state["head.head.weight"] = patch.T[order].contiguous()
    state["head.head.bias"] *= 0
    state["head.modulation"] *= 0
    reading = ("attn.q.weight", "self_attn.k.weight", "self_attn.v.weight", "ffn.0.weight")
    for name, weight in state.items():
        if name.endswith(reading):
            weight.sub_(weight @ patch @ patch.T)
        elif name.startswith("blocks") and name.endswith(".modulation"):
            weight[:, (2, 5)] += 1  # the gates
            weight[:, (1, 4), 192:] = -0.9  # the constant is large enough for the LayerNorms only
        elif "self_attn.norm_" in name:  # high frequencies tell positions apart
            weight[:] = 0.3
            for axis in (0, 44, 86):
                weight.view(2, 128)[:, axis : axis + 8] = 3.0
        elif name.startswith("time_projection"):
            weight.zero_()
    state |= one_over_sigma(state)
    for _ in range(2):
        scale, constant = response(state, text)
        state["head.head.weight"] /= scale
        state["patch_embedding.bias"] -= patch @ constant / scale
    return models.load_diffusion_model(state)


def one_over_sigma(state):
    """Time embeddings that make the head multiply by 1 / sigma, as v = (x - x_0) / sigma wants."""
    sigma = torch.linspace(0.45, 1.0, 400)
    hidden = F.linear(
        sinusoidal_embedding_1d(256, 1000 * sigma),
        state["time_embedding.0.weight"],
        state["time_embedding.0.bias"],
    )
    known = F.pad(F.silu(hidden), (0, 1), value=1.0)
    fitted = torch.linalg.lstsq(known * sigma[:, None], 1 - sigma[:, None]).solution[:, 0]
    return {
        "time_embedding.2.weight": fitted[:256].repeat(256, 1),
        "time_embedding.2.bias": fitted[256].repeat(256),
    }


def response(state, text):
    """What a Wan makes of noise, as a multiple of it, and of nothing, per place in a patch [64]."""
    wan = models.load_diffusion_model(dict(state)).model.diffusion_model
    noise = rand(1, 16, 5, 8, 8)
    with torch.no_grad():
        made, nothing = (wan(x, torch.tensor([1000.0]), text) for x in (noise, 0 * noise))
    scale = ((made - nothing) * noise).sum() / noise.square().sum()
    return scale, F.pixel_unshuffle(nothing[0].movedim(1, 0), 2).mean((0, 2, 3))


def mean_loss(trainer, dataset):
    """Over the same 16 noises and noise levels, whatever was trained."""
    step, losses, trainer.dataset = trainer.step, [], dataset
    with management.training(), torch.no_grad():
        for trainer.step in range(16):
            losses.append(float(trainer.loss(0)))
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
    sample = dataset.sample(0)
    model = denoiser(sample.text)
    settings = TrainSettings(
        "proxy", 500, 32, 32.0, learning_rate=1e-3, caption_dropout=0.0, precision="fp32",
        noise=NOISE,
    )  # fmt: skip
    trainer = Trainer(model, plan, settings, tmp_path / "proxy.safetensors", tmp_path / "run")
    before = mean_loss(trainer, dataset)
    result = trainer.run(dataset)
    after = mean_loss(trainer, dataset)
    lora = comfy.utils.load_torch_file(str(result.path))
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    with_lora, without = (
        distance(
            apply_rope_method(each, "linear", temporal_scale=1.0, spatial_scale=1.0, plan=plan),
            sample.guide,
            sample.text,
        )
        for each in (patched, model)
    )
    print(before, after, with_lora, without)
    assert after < before / 10
    assert with_lora < without / 5


def test_a_guide_lora_learns_what_the_guide_shows(dataset_of, tmp_path):
    """The target's own weights stay as they are: only what the guide can tell is learned."""
    plan = plan_of((5, 8, 8), (2, 4, 4))
    dataset = dataset_of(plan, "guide")
    sample = dataset.sample(0)
    model = denoiser(sample.text)
    settings = TrainSettings(
        "guide", 400, 32, 32.0, learning_rate=2e-3, window=WINDOW, caption_dropout=0.0,
        precision="fp32", noise=NOISE,
    )  # fmt: skip
    trainer = Trainer(model, plan, settings, tmp_path / "guide.safetensors", tmp_path / "run")
    before = mean_loss(trainer, dataset)
    result = trainer.run(dataset)
    after = mean_loss(trainer, dataset)
    with_lora, without = (
        distance(
            apply_detail_branch(model, plan, sample.guide, WINDOW, "clean", guide_lora=lora),
            sample.target,
            sample.text,
        )
        for lora in (load_guide_lora(result.path, 1.0), None)
    )
    print(before, after, with_lora, without)
    assert after < before / 10
    assert with_lora < without / 5
