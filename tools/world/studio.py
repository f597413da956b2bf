"""Makes videos of the tiny world by every method that `tools/evaluate.py` compares.

A method is judged on proxies of known truth: a scene is drawn at the proxy's size and rate and
encoded, so that the target's truth is the same scene drawn at the target's size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .clips import HEIGHT, WIDTH
from .scenes import FPS, SPAN, Scene, View, random_scene, render

STEPS, PROXY_STEPS, CFG = 8, 16, 3.0


@dataclass(frozen=True)
class Method:
    """How a target is made from a proxy.

    Args:
        kind: `branch` (the detail branch), `stock` (the model alone, at the target's size),
            `upscale` (the proxy resampled bicubically) or `flashvsr`.
        window: `trained size` or `compact`.
        guide_weight: None for what `auto` gives.
        weight_factor: instead of a weight, how often all guide keys together count against all of
            the window's own.
        structure: strength of structure guidance; 0 leaves it out.
        lora: whether the guide LoRA is used.
        close: whether the detail's prompt speaks of a close view, as windows see it.
        decoder: of FlashVSR.
    """

    name: str
    kind: str = "branch"
    window: str = "trained size"
    overlap: str = "shifted"
    guide_noise: str = "matched"
    guide_weight: float | None = None
    weight_factor: float | None = None
    guide_margin: int = 0
    structure: float = 1.0
    structure_end: float = 1.0
    denoise: float = 0.7
    lora: bool = False
    steps: int = STEPS
    cfg: float = CFG
    close: bool = False
    decoder: str = "tiny conditional"


@dataclass(frozen=True)
class Case:
    """A scene with the plan by which it is made, and its truth.

    Args:
        proxy: latent of the scene at the proxy's size, as the VAE encodes it.
        proxy_frames: the same, decoded [F, h, w, 3].
        truth: the scene at the target's size [T, H, W, 3].
        times: of the target's frames, seconds.
    """

    scene: Scene
    seed: int
    plan: Any
    proxy: Tensor
    proxy_frames: Tensor
    truth: Tensor
    times: np.ndarray

    @property
    def view(self) -> View:
        """The target's camera."""
        return View(self.plan.width, self.plan.height)


def as_images(video: Tensor) -> Tensor:
    """[3, T, H, W] -> [T, H, W, 3]."""
    return video.permute(1, 2, 3, 0).contiguous()


class Studio:
    """The trained family, ready to make cases and videos."""

    def __init__(self, family: Any):
        self.model, self.proxy_model = family.model, family.proxy_model
        self.family, self.vae, self.text_encoder = family, family.vae, family.text_encoder

    def plan(self, factor: int, stride: int, latents: int) -> Any:
        """A plan of `factor` times the trained size, from a proxy of so many latent frames."""
        from atlasvid.engine.families.family import latent_space
        from atlasvid.engine.geometry.plan import make_plan

        seconds = 4 * stride * (latents - 1) / FPS
        space = latent_space(self.model)
        width, height = factor * WIDTH, factor * HEIGHT
        return make_plan(space, width, height, max(seconds, 0.05), FPS, HEIGHT, stride)

    def case(self, seed: int, plan: Any) -> Case:
        """The scene of a seed: its proxy and its truth."""
        rng = np.random.default_rng(500_000 + seed)
        scene = random_scene(rng)
        start = rng.uniform(0.5, SPAN - 0.5 - (plan.frames - 1) / FPS)
        times = start + np.arange(plan.frames) / FPS
        small = View(plan.proxy_width, plan.proxy_height)
        drawn = as_images(render(scene, small, times[:: plan.temporal_stride]))
        proxy = self.vae.encode(drawn)
        large = View(plan.width, plan.height)
        return Case(
            scene,
            seed,
            plan,
            proxy,
            self.decode(proxy),
            as_images(render(scene, large, times)),
            times,
        )

    def conditioning(self, prompt: str) -> list:
        encode = self.text_encoder.encode_from_tokens_scheduled
        return [encode(self.text_encoder.tokenize(text)) for text in (prompt, "")]

    def decode(self, latent: Tensor) -> Tensor:
        """Frames [T, H, W, 3] of a latent."""
        from atlasvid.engine.vae.decode import decode_images

        return decode_images(self.vae, latent)

    def sample(self, model: Any, prompt: str, latent: Tensor, how: Method, seed: int) -> Tensor:
        """What the stock sampler makes of a latent, by a method's steps, cfg and denoise."""
        import comfy.sample

        noise = comfy.sample.prepare_noise(latent, seed)
        return comfy.sample.sample(
            model,
            noise,
            how.steps,
            how.cfg,
            "euler",
            "simple",
            *self.conditioning(prompt),
            latent,
            denoise=how.denoise,
            seed=seed,
            disable_pbar=True,
        )

    def proxy(self, plan: Any, prompt: str, seed: int, scaled: bool, lora: bool) -> Tensor:
        """A proxy latent by sampling, with or without scaled RoPE and its LoRA."""
        from atlasvid.engine.proxy.frequencies import apply_rope_method

        model = self.proxy_model if lora else self.model
        if scaled:
            model = apply_rope_method(
                model,
                "linear",
                temporal_scale=float(plan.temporal_stride),
                spatial_scale=1.0,
                plan=plan,
            )
        empty = torch.zeros(1, plan.space.channels, *plan.proxy_latent)
        return self.sample(model, prompt, empty, SAMPLED_PROXY, seed)

    def branch(self, case_plan: Any, proxy: Tensor, method: Method) -> Any:
        """The model with the detail branch of a method."""
        from atlasvid.engine.branch.apply import apply_detail_branch
        from atlasvid.engine.branch.settings import preset_window
        from atlasvid.engine.geometry.windows import COMPACT
        from atlasvid.engine.proxy.structure import apply_structure_guidance

        window = preset_window(method.window, case_plan, COMPACT)
        keys = case_plan.keys_per_query(window, method.guide_margin)
        lora = self.family.guide_lora if method.lora else None
        weight: Any = "auto" if method.guide_weight is None else method.guide_weight
        if method.weight_factor is not None:
            weight = method.weight_factor * keys[0] / keys[1]
        model = apply_detail_branch(
            self.model,
            case_plan,
            proxy,
            window,
            method.guide_noise,
            overlap=method.overlap,
            guide_weight=weight,
            guide_margin=method.guide_margin,
            guide_lora=lora,
        )
        if method.structure:
            model = apply_structure_guidance(
                model,
                case_plan,
                proxy,
                strength=method.structure,
                end_percent=method.structure_end,
            )
        return model

    def make(self, case: Case, method: Method) -> Tensor:
        """The frames [T, H, W, 3] of a method."""
        return self.render(case.plan, case.proxy, case.scene.prompt, case.seed, method)

    def render(self, plan: Any, proxy: Tensor, prompt: str, seed: int, method: Method) -> Tensor:
        """The frames of a method from any proxy latent."""
        from atlasvid.engine.proxy.latents import upscale_proxy

        if method.kind == "upscale":
            return upscaled(self.decode(proxy), plan)
        if method.kind == "flashvsr":
            return self.super_resolved(self.decode(proxy), plan, seed, method)
        model = self.model if method.kind == "stock" else self.branch(plan, proxy, method)
        start = upscale_proxy(proxy, plan)
        if method.close:
            prompt = prompt.replace("wide view", "close view")
        return self.decode(self.sample(model, prompt, start, method, seed))

    def super_resolved(self, frames: Tensor, plan: Any, seed: int, method: Method) -> Tensor:
        """What FlashVSR makes of a proxy's frames, which are repeated where it has fewer."""
        from atlasvid.engine.flashvsr.selection import Sparsity
        from atlasvid.engine.flashvsr.tiny import LOCAL_RANGE, trained_flashvsr
        from atlasvid.engine.flashvsr.video import upscaled_video

        times = (torch.arange(plan.frames) / plan.temporal_stride).round().long()
        video, _ = upscaled_video(
            trained_flashvsr(),
            frames[times.clamp(max=len(frames) - 1)],
            width=plan.width,
            height=plan.height,
            sparsity=Sparsity(local_range=LOCAL_RANGE),
            seed=seed,
            decoder=method.decoder,
            vae=self.vae,
        )
        return video.get_components().images


def upscaled(frames: Tensor, plan: Any) -> Tensor:
    """A proxy's frames resampled to the target: bicubically in space, linearly in time."""
    large = F.interpolate(
        frames.movedim(-1, 1), (plan.height, plan.width), mode="bicubic", antialias=True
    )
    times = torch.arange(plan.frames) / plan.temporal_stride
    low = times.floor().long().clamp(max=len(frames) - 1)
    high = (low + 1).clamp(max=len(frames) - 1)
    share = (times - low).view(-1, 1, 1, 1)
    return (large[low] * (1 - share) + large[high] * share).clamp(0, 1).movedim(1, -1)


SAMPLED_PROXY = Method("proxy", denoise=1.0, steps=PROXY_STEPS)
DEFAULT = Method("the shipped default")
FROM_NOISE = replace(DEFAULT, structure=0, denoise=1.0)
TRAINED = Method(
    "guide LoRA, compact, from noise",
    window="compact",
    guide_noise="clean",
    structure=0,
    denoise=1.0,
    lora=True,
)
UPSCALED = Method("proxy up-scaled", kind="upscale")
FLASHVSR = Method("FlashVSR", kind="flashvsr")
BEST = replace(
    TRAINED,
    name="guide LoRA, 0.7 and structure, close-up prompt, cfg 1",
    denoise=0.7,
    structure=1.0,
    close=True,
    cfg=1.0,
)
METHODS = (
    UPSCALED,
    FLASHVSR,
    replace(FLASHVSR, name="FlashVSR, Wan VAE", decoder="Wan VAE"),
    replace(FROM_NOISE, name="stock model at full size", kind="stock"),
    replace(FROM_NOISE, name="windows alone", guide_weight=0),
    replace(FROM_NOISE, name="guide, weight 1", guide_weight=1),
    replace(FROM_NOISE, name="guide, 16 x ratio", weight_factor=16.0),
    replace(DEFAULT, name="structure alone", guide_weight=0, denoise=1.0),
    replace(DEFAULT, name="0.7 and structure, no guide", guide_weight=0),
    replace(DEFAULT, name="0.7 and structure, weight 1", guide_weight=1),
    replace(DEFAULT, name="0.7 and structure, 16 x ratio (the default)"),
    replace(DEFAULT, name="the default, close-up prompt, cfg 1", close=True, cfg=1.0),
    TRAINED,
    BEST,
)
SETTINGS = (
    DEFAULT,
    *(replace(DEFAULT, name=f"denoise {d}", denoise=d) for d in (0.5, 0.6, 0.8, 1.0)),
    *(replace(DEFAULT, name=f"structure strength {s}", structure=s) for s in (0.0, 0.5, 2.0)),
    *(replace(DEFAULT, name=f"structure until {e}", structure_end=e) for e in (0.3, 0.6)),
    *(replace(DEFAULT, name=f"guide {w:g} x ratio", weight_factor=w) for w in (1.0, 4.0, 64.0)),
    replace(DEFAULT, name="guide margin 2", guide_margin=2),
    replace(DEFAULT, name="clean guide", guide_noise="clean"),
    replace(DEFAULT, name="compact windows", window="compact"),
    replace(DEFAULT, name="sliding windows", overlap="sliding"),
    replace(DEFAULT, name="cfg 1", cfg=1.0),
    replace(DEFAULT, name="close-up prompt", close=True),
    *(replace(DEFAULT, name=f"{n} steps", steps=n) for n in (4, 16)),
)
"""One setting at a time; the default is denoise 0.7, structure 1 until 1.0, guide 16 x ratio,
cfg 3, the proxy's own prompt, 8 steps."""
