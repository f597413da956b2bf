"""Memory and time of one training step of stage guide, over target tokens."""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from bench_attention import SHAPES, STRIDE
from measure import markdown_table, measure, run_case, save_results

# Token grids (frames, height, width) with a guide of a quarter of the size along every axis.
GROWTH = ((5, 16, 32), (9, 24, 40), (9, 48, 64))
HD_81 = (21, 45, 80)
"""720P x 81 frames: 75,600 tokens. Minutes per step on a CPU, so measured on a card only."""
LIMIT_GIB = 24
"""The card that 720P x 81 frames of the 1.3B model are to fit into."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    if args.case:
        print(json.dumps(run_one(**json.loads(args.case))))
        return
    import torch

    cuda = torch.cuda.is_available()
    shape = "1.3B" if cuda else "tiny"
    grids = (*GROWTH, HD_81) if cuda else GROWTH
    # On the CPU: freed memory goes back at once, else what the allocator keeps is measured.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    rows = [run_case("train", {"shape": shape, "grid": grid}) for grid in grids]
    header = ["shape", "target tokens", "seconds per step", "peak above the start", "per token"]
    lines = [
        [
            row["shape"],
            f"{row['tokens']:,}",
            f"{row['seconds']:.1f}",
            f"{row['grown_bytes'] / 2**20:,.0f} MiB",
            f"{row['grown_bytes'] / row['tokens'] / 1024:.1f} KiB",
        ]
        for row in rows
    ]
    if not cuda:
        lines.append(["1.3B on CUDA", "75,600", "not measured", "not measured", "not measured"])
    elif rows[-1]["peak_bytes"] > LIMIT_GIB * 2**30:
        print(f"720P x 81 frames took more than {LIMIT_GIB} GiB")
    save_results(f"train_{'cuda' if cuda else 'cpu'}", rows, markdown_table(header, lines))


def run_one(shape: str, grid: list[int]) -> dict[str, Any]:
    """The first step on random latents: forward, backward and optimizer.

    Not a second one: on the CPU, memory that the first one gave back would hide what it takes.
    """
    import torch
    from atlasvid.engine.comfyui import management

    with tempfile.TemporaryDirectory() as folder:
        trainer = prepare(shape, grid, Path(folder))
        with management.training():
            result = measure(trainer.learn)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {**result, "tokens": math.prod(grid), "peak_bytes": peak}


def prepare(shape: str, grid: list[int], folder: Path) -> Any:
    """A trainer of a model of one shape, on one random sample."""
    import torch
    from atlasvid.engine.families.family import latent_space
    from atlasvid.engine.geometry.plan import Plan
    from atlasvid.engine.geometry.windows import COMPACT
    from atlasvid.engine.training.cache import Dataset
    from atlasvid.engine.training.files import save_tensors
    from atlasvid.engine.training.trainer import Trainer, TrainSettings

    model = SHAPES[shape].load()
    space = latent_space(model)
    f, h, w = grid
    pixels = 2 * space.spatial
    plan = Plan(
        width=w * pixels,
        height=h * pixels,
        frames=4 * (f - 1) + 1,
        fps=16.0,
        temporal_stride=STRIDE,
        proxy_width=w // 4 * pixels,
        proxy_height=h // 4 * pixels,
        proxy_frames=4 * ((f - 1) // STRIDE) + 1,
        space=space,
    )
    tensors = {
        "target": torch.randn(1, space.channels, *plan.latent),
        "guide": torch.randn(1, space.channels, *plan.proxy_latent),
        "text": torch.randn(1, 512, 4096),
    }
    save_tensors(folder / "sample.safetensors", tensors, {})
    file = folder / "sample.safetensors"
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    settings = TrainSettings("guide", 2, window=COMPACT, precision=precision, caption_dropout=0.0)
    trainer = Trainer(model, plan, settings, folder / "lora.safetensors", folder / "run")
    trainer.dataset = Dataset((file,), file, ())
    return trainer
