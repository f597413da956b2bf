"""Prompts (API format) small enough to be run a thousand times."""

from __future__ import annotations

from typing import Any

Prompt = dict[str, dict[str, Any]]

PROXY, DETAIL, SAVE, DECODE, ENCODE, TRAIN = "proxy", "detail", "save", "decode", "encode", "train"
FRAMES = 5
SIZE = {"width": 128, "height": 128, "seconds": 0.25, "fps": 16.0}
PLAN = {**SIZE, "proxy_short_side": 128, "temporal_stride": 1}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def models(**plan: Any) -> Prompt:
    """The tiny family, its plan and its prompts."""
    return {
        "tiny": node("AtlasVidTinyModels", seed=0, weights="random"),
        "plan": node("AtlasVidPlan", model=["tiny", 0], **(PLAN | plan)),
        "text": node("CLIPTextEncode", clip=["tiny", 1], text="a lake"),
    }


def sampler(model: str, latent: list[Any], steps: int, seed: int) -> dict[str, Any]:
    return node(
        "KSampler",
        model=[model, 0],
        latent_image=latent,
        positive=["text", 0],
        negative=["text", 0],
        seed=seed,
        steps=steps,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )


def render(seed: int = 0, *, proxy_steps: int = 1, detail_steps: int = 1, **plan: Any) -> Prompt:
    """Proxy, detail, decode and save."""
    return models(**plan) | {
        PROXY: sampler("tiny", ["plan", 1], proxy_steps, seed),
        "attention": node(
            "AtlasVidHierarchicalAttention",
            model=["tiny", 0],
            plan=["plan", 0],
            proxy=[PROXY, 0],
            window="compact",
            overlap="shifted",
            guide_noise="matched",
            start_percent=0.0,
            end_percent=1.0,
        ),
        "latent": node("AtlasVidDetailLatent", plan=["plan", 0], proxy=[PROXY, 0]),
        DETAIL: sampler("attention", ["latent", 0], detail_steps, seed),
        **video([DETAIL, 0]),
    }


def video(samples: list[Any]) -> Prompt:
    """Decodes while it saves."""
    return {
        "video": node(
            "AtlasVidDecodeToVideo", samples=samples, vae=["tiny", 2], fps=16.0, bit_depth=8
        ),
        SAVE: node(
            "SaveVideo", video=["video", 0], filename_prefix="render", format="auto", codec="auto"
        ),
    }


def noise(seed: int, frames: int) -> Prompt:
    """A latent of noise, 320 x 192, that is there at once."""
    size = {"width": 320, "height": 192, "frames": frames}
    return {
        "tiny": node("AtlasVidTinyModels", seed=0, weights="random"),
        "noise": node("FaultNoise", seed=seed, **size),
    }


def saving(seed: int = 0, frames: int = 49) -> Prompt:
    """Nothing but the decode that writes a file."""
    return noise(seed, frames) | video(["noise", 0])


def decoding(seed: int = 0, frames: int = 49) -> Prompt:
    """Nothing but a decode to images."""
    return noise(seed, frames) | {
        DECODE: node("AtlasVidDecode", samples=["noise", 0], vae=["tiny", 2]),
        "sink": node("FaultSink", value=[DECODE, 0]),
    }


def encoding(seed: int = 0, frames: int = 49) -> Prompt:
    """Nothing but an encode of images of one colour."""
    size = {"width": 320, "height": 192, "batch_size": frames}
    return {
        "tiny": node("AtlasVidTinyModels", seed=0, weights="random"),
        "plain": node("EmptyImage", color=seed % 2**24, **size),
        ENCODE: node("AtlasVidEncode", pixels=["plain", 0], vae=["tiny", 2]),
        "sink": node("FaultSink", value=[ENCODE, 0]),
    }


def loading(video_file: str) -> Prompt:
    """Nothing but an encode of a video from the input folder."""
    return {
        "tiny": node("AtlasVidTinyModels", seed=0, weights="random"),
        "file": node("LoadVideo", file=video_file),
        ENCODE: node("AtlasVidEncode", pixels=["file", 0], vae=["tiny", 2]),
        "sink": node("FaultSink", value=[ENCODE, 0]),
    }


def with_lora(prompt: Prompt, file: str) -> Prompt:
    """The prompt with a guide LoRA."""
    attention = prompt["attention"]
    changed = {**attention, "inputs": {**attention["inputs"], "guide_lora": ["lora", 0]}}
    return {
        **prompt,
        "lora": node("AtlasVidGuideLoRA", lora=file, strength=1.0),
        "attention": changed,
    }


TRAINING = {
    "stage": "guide", "steps": 4, "window": "compact", "rank": 2, "alpha": 2.0,
    "targets": "self-attention", "optimizer": "AdamW", "learning_rate": 0.001, "shift": 5.0,
    "sigma_min": 0.0, "sigma_max": 1.0, "caption_dropout": 0.1, "accumulate": 1,
    "precision": "fp32", "cuts_per_clip": 1, "save_every": 2, "seed": 0, "resume": True,
}  # fmt: skip


def training(folder: str, name: str, **chosen: Any) -> Prompt:
    """A training of a guide LoRA on a folder of clips."""
    links = {"model": ["tiny", 0], "clip": ["tiny", 1], "vae": ["tiny", 2], "plan": ["plan", 0]}
    settings = TRAINING | {"folder": folder, "name": name} | chosen
    prompt = models() | {TRAIN: node("AtlasVidTrainLoRA", **links, **settings)}
    del prompt["text"]
    return prompt
