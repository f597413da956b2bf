"""Broken files of every kind, beside whole ones."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from environment import ROOT
from safetensors.numpy import load_file, save_file

from . import graphs
from .graphs import Prompt

WORLD = ROOT / "models" / "tiny_world" / "tiny_world_t2v.safetensors"
LAYER = "diffusion_model.blocks.0.self_attn.q"
DIM = 256


def clip(file: Path, frames: int = 18, size: int = 128) -> Path:
    """A small H.264 video of moving noise, with a caption beside it."""
    noise = np.random.default_rng(0).integers(0, 256, (size, 2 * size, 3), dtype=np.uint8)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "20"})
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for i in range(frames):
            picture = np.ascontiguousarray(noise[:, i : i + size])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    file.with_suffix(".txt").write_text("noise")
    return file


def prepare(host: Any) -> None:
    """A whole LoRA, and a clip to learn from."""
    (host.input / "clips").mkdir(exist_ok=True)
    clip(host.input / "clips" / "clip.mp4")
    save_file(pair(), host.loras / "whole.safetensors")


def pair(rank: int = 2, **changed: Any) -> dict[str, np.ndarray]:
    """A LoRA of one layer."""
    rng = np.random.default_rng(0)
    tensors = {
        f"{LAYER}.lora_A.weight": rng.normal(size=(rank, DIM)).astype(np.float32) * 0.01,
        f"{LAYER}.lora_B.weight": rng.normal(size=(DIM, rank)).astype(np.float32) * 0.01,
    }
    return tensors | {f"{LAYER}.{name}": value for name, value in changed.items()}


def lying_header(file: Path, length: int, header: Any) -> None:
    """A safetensors file whose head claims what is not there."""
    file.write_bytes(struct.pack("<Q", length) + json.dumps(header).encode())


def broken(host: Any) -> Iterator[tuple[str, Prompt, tuple[str, ...]]]:
    """(what is broken, a prompt that reads it, words that its error must say)."""
    for name, words in broken_loras(host.loras):
        yield f"LoRA {name}", graphs.with_lora(graphs.render(), f"{name}.safetensors"), words
    for name, words in broken_videos(host.input):
        yield f"video {name}", graphs.loading(f"{name}.mp4"), words
    for name, words in broken_clips(host.input):
        yield f"clips {name}", graphs.training(name, f"trained {name}"), words
    host.models.mkdir(parents=True, exist_ok=True)
    state = load_file(WORLD)
    key = next(name for name in state if name.endswith("blocks.0.ffn.0.weight"))
    save_file(state | {key: np.full_like(state[key], np.nan)}, host.models / "nan.safetensors")
    prompt = graphs.render()
    prompt["file"] = graphs.node("UNETLoader", unet_name="nan.safetensors", weight_dtype="default")
    prompt["attention"]["inputs"]["model"] = ["file", 0]
    yield "model with NaN weights", prompt, ("NaN or infinite", "model's file")


def broken_loras(folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    data = (folder / "whole.safetensors").read_bytes()

    def saved(name: str, tensors: dict[str, np.ndarray], metadata: Any = None) -> str:
        save_file(tensors, folder / f"{name}.safetensors", metadata)
        return name

    def written(name: str, content: bytes) -> str:
        (folder / f"{name}.safetensors").write_bytes(content)
        return name

    nan, two = np.array(np.nan, np.float32), np.array([1.0, 2.0], np.float32)
    bad = {**pair(), f"{LAYER}.lora_A.weight": np.full((2, DIM), np.inf, np.float32)}
    yield saved("infinite", bad), ("infinite.safetensors", "NaN or infinite")
    yield saved("nan-alpha", pair(alpha=nan)), ("alpha", "finite")
    yield saved("two-alphas", pair(alpha=two)), ("alpha", "one number")
    yield saved("rank-0", pair(rank=0)), ("rank 0",)
    narrow = {**pair(), f"{LAYER}.lora_A.weight": np.zeros((2, 7), np.float32)}
    yield saved("narrow", narrow), ("7 inputs", "another base model")
    yield saved("no-json", pair(), {"lora_adapter_metadata": "{no"}), ("no JSON object",)
    yield saved("a-list", pair(), {"lora_adapter_metadata": "[1]"}), ("no JSON object",)
    yield saved("recipe", pair(), {"atlasvid": "[" * 100_000}), ("metadata cannot be read",)
    yield written("empty", b""), ("empty.safetensors cannot be read",)
    yield written("cut", data[: len(data) // 2]), ("cannot be read",)
    yield written("text", b"no tensors" * 20), ("cannot be read",)
    entry = {"dtype": "F32", "shape": [2, 9999], "data_offsets": [0, 79992]}
    lying_header(folder / "lies.safetensors", 10**12, {"a": entry})
    yield "lies", ("cannot be read",)


def broken_videos(folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    data = clip(folder / "whole.mp4", 40).read_bytes()
    start, end = data.find(b"mdat") + 8, data.find(b"moov")
    third = (end - start) // 3
    noise = np.random.default_rng(0).integers(0, 256, third, dtype=np.uint8).tobytes()
    contents = {
        "empty": b"",
        "words": b"this is no video " * 40,
        "half": data[: len(data) // 2],
        "scratched": data[: start + third] + noise + data[start + 2 * third :],
    }
    for name, content in contents.items():
        (folder / f"{name}.mp4").write_bytes(content)
        said = "is damaged at" if name == "scratched" else "cannot be read as a video"
        yield name, (f"{name}.mp4", said)


def broken_clips(folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, content in (("empty-clip", b""), ("text-clip", b"no video")):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "a.mp4").write_bytes(content)
        (folder / name / "a.txt").write_text("words")
        yield name, ("None of the 1 clips can be used", "unreadable")
