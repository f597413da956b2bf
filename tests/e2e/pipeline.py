"""The whole pipeline as a prompt (API format), small enough for a test, and where it runs."""

import os
from pathlib import Path
from typing import Any

import pytest

Prompt = dict[str, dict[str, Any]]

DETAIL = "detail_sampler"


def comfyui_folder(variable: str) -> Path:
    """The ComfyUI that an environment variable names."""
    if variable not in os.environ:
        pytest.exit(f"{variable} is not set: run `python tools/test.py`", 2)
    return Path(os.environ[variable])


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def sampler(model: list[Any], latent: list[Any], **inputs: Any) -> dict[str, Any]:
    fixed = {"seed": 3, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"}
    return node(
        "KSampler",
        model=model,
        latent_image=latent,
        positive=["positive", 0],
        negative=["negative", 0],
        **{**fixed, "denoise": 1.0, **inputs},
    )


def pipeline(**plan: Any) -> Prompt:
    """Proxy, detail, decode and save on the tiny models; `plan` overrides the plan's inputs."""
    wish = {"width": 256, "height": 160, "seconds": 0.5, "fps": 16.0}
    wish |= {"proxy_short_side": 128, "temporal_stride": 2, **plan}
    detail = {"window": "compact", "overlap": "shifted", "guide_noise": "matched"}
    return {
        "tiny": node("AtlasVidTinyModels", seed=0, weights="random"),
        "plan": node("AtlasVidPlan", model=["tiny", 0], **wish),
        "positive": node("CLIPTextEncode", clip=["tiny", 1], text="a lake at dusk"),
        "negative": node("CLIPTextEncode", clip=["tiny", 1], text="blurry"),
        "rope": node(
            "AtlasVidRoPE",
            model=["tiny", 0],
            temporal_scale=4.0,
            spatial_scale=1.0,
            method="linear",
            plan=["plan", 0],
        ),
        "proxy_sampler": sampler(["rope", 0], ["plan", 1]),
        "latent": node("AtlasVidDetailLatent", plan=["plan", 0], proxy=["proxy_sampler", 0]),
        "attention": node(
            "AtlasVidHierarchicalAttention",
            model=["tiny", 0],
            plan=["plan", 0],
            proxy=["proxy_sampler", 0],
            start_percent=0.0,
            end_percent=1.0,
            **detail,
        ),
        DETAIL: sampler(["attention", 0], ["latent", 0], denoise=0.7),
        "decode": node(
            "VAEDecodeTiled",
            samples=[DETAIL, 0],
            vae=["tiny", 2],
            tile_size=256,
            overlap=64,
            temporal_size=64,
            temporal_overlap=8,
        ),
        "video": node("CreateVideo", images=["decode", 0], fps=wish["fps"]),
        "save": node(
            "SaveVideo", video=["video", 0], filename_prefix="test", format="auto", codec="auto"
        ),
    }
