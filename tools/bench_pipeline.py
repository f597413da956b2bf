"""The whole way from a prompt to frames, stage by stage, against native sampling."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from measure import RESULTS, markdown_table, measure, run_case, save_results

NATIVE_STEPS = 50
PROXY_STEPS = 30
DETAIL_STEPS = 20
CFG = 5.0
CPU_CASE = {"width": 768, "height": 512, "seconds": 2.0, "short_side": 128}
CUDA_CASE = {"width": 3840, "height": 2160, "seconds": 5.0, "short_side": 480}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    import torch

    if args.case:
        print(json.dumps(Pipeline(**json.loads(args.case)).run()))
        return
    cuda = torch.cuda.is_available()
    case = {"shape": "1.3B", **CUDA_CASE} if cuda else {"shape": "tiny", **CPU_CASE}
    row = run_case("pipeline", case)
    name = "pipeline_cuda" if cuda else "pipeline_cpu"
    native = NATIVE_STEPS * row["native step"]
    ours = row["proxy"] + row["detail"] + row["decode"]
    lines = [
        [f"proxy, {PROXY_STEPS} steps with CFG", f"{row['proxy']:.1f} s"],
        [f"detail, {DETAIL_STEPS} steps with CFG", f"{row['detail']:.1f} s"],
        ["decode", f"{row['decode']:.1f} s"],
        ["together", f"{ours:.1f} s"],
        [f"native, {NATIVE_STEPS} steps with CFG (one step timed)", f"{native:.1f} s"],
        ["faster", f"{native / ours:.1f} x"],
    ]
    header = [
        f"{row['width']} x {row['height']}, {row['frames']} frames, {row['tokens']:,} tokens",
        "",
    ]
    save_results(name, [row], markdown_table(header, lines))
    plot(name, row, native)


class Pipeline:
    """One plan, its models and its stages, through the stock sampler."""

    def __init__(self, shape: str, width: int, height: int, seconds: float, short_side: int):
        import torch
        from atlasvid.engine.comfyui import media
        from atlasvid.engine.families import tiny
        from atlasvid.engine.families.family import latent_space
        from atlasvid.engine.geometry.plan import make_plan
        from bench_attention import SHAPES

        self.model = SHAPES[shape].load()
        self.vae = media.load_vae(tiny.vae_state(dim=8 if shape == "tiny" else 96))
        space = latent_space(self.model)
        self.plan = make_plan(space, width, height, seconds, 16.0, short_side, 4)
        self.conditioning = [[[torch.randn(1, 512, 4096), {}]] for _ in range(2)]

    def sample(self, model: Any, latent: Any, steps: int, **kwargs: Any) -> Any:
        import comfy.sample

        noise = comfy.sample.prepare_noise(latent, 0)
        return comfy.sample.sample(
            model,
            noise,
            steps,
            CFG,
            "euler",
            "simple",
            *self.conditioning,
            latent,
            disable_pbar=True,
            seed=0,
            **kwargs,
        )

    def run(self) -> dict[str, Any]:
        """Seconds of every stage, each after the one before it."""
        import torch
        from atlasvid.engine.branch.apply import apply_detail_branch
        from atlasvid.engine.geometry.windows import COMPACT
        from atlasvid.engine.proxy.frequencies import apply_rope_method
        from atlasvid.engine.proxy.latents import upscale_proxy
        from atlasvid.engine.vae.decode import decode_images

        plan, kept, times = self.plan, {}, {}

        def stage(name: str, call: Any) -> None:
            def keep() -> None:
                kept[name] = call()

            times[name] = measure(keep)["seconds"]

        channels = plan.space.channels
        empty = torch.zeros(1, channels, *plan.proxy_latent)
        proxy_model = apply_rope_method(
            self.model, "linear", temporal_scale=4.0, spatial_scale=1.0, plan=plan
        )
        with torch.inference_mode():
            self.sample(proxy_model, empty, 1)  # loads the weights
            stage("proxy", lambda: self.sample(proxy_model, empty, PROXY_STEPS))
            start = upscale_proxy(kept["proxy"], plan)
            branch = apply_detail_branch(self.model, plan, kept["proxy"], COMPACT, "clean")
            stage("detail", lambda: self.sample(branch, start, DETAIL_STEPS, denoise=0.7))
            stage("decode", lambda: decode_images(self.vae, kept["detail"]))
            kept.clear()
            blank = torch.zeros(1, channels, *plan.latent)
            ends: list[float] = []
            self.sample(
                self.model,
                blank,
                NATIVE_STEPS,
                last_step=2,
                callback=lambda *_: ends.append(time.perf_counter()),
            )
            times["native step"] = ends[1] - ends[0]  # the first also loads and warms up
        return {**times, "frames": plan.frames, "tokens": plan.tokens.count}


def plot(name: str, row: dict[str, Any], native: float) -> None:
    """Stages of ours beside native sampling, as bars on one time axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 2.2))
    left = 0.0
    for stage in ("proxy", "detail", "decode"):
        axes.barh("AtlasVid", row[stage], left=left, label=stage)
        left += row[stage]
    axes.barh("native", native, color="grey", label=f"{NATIVE_STEPS} native steps")
    axes.set_xlabel("seconds")
    axes.set_title(f"{row['width']} x {row['height']}, {row['frames']} frames, {row['shape']} Wan")
    axes.legend(loc="center right")
    figure.savefig(RESULTS / f"{name}.png", dpi=120, bbox_inches="tight")
