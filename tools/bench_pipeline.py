"""The whole way from a prompt to frames, stage by stage, against stock sampling.

What the paper timed is 4K x 81 frames with text encoding, both branches and decode. That is the
size on a CUDA card; on the CPU it is one that takes minutes. Weights are random: speed does not
depend on them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import RESULTS, markdown_table, measure, run_case, save_results

NATIVE_STEPS = 50
PROXY_STEPS = 30
DETAIL_STEPS = 20
CFG = 5.0
PROMPT_TOKENS = 512
CPU_CASE = {"width": 768, "height": 512, "seconds": 2.0, "short_side": 128}
CUDA_CASE = {"width": 3840, "height": 2160, "seconds": 5.0, "short_side": 480}
STAGES = ("text", "proxy", "detail", "decode")


@dataclass(frozen=True)
class Configuration:
    """How the detail is sampled.

    Args:
        weight: of the guide's keys; `auto` as in the node.
        structure: whether structure guidance is on.
    """

    window: str
    guide_noise: str
    weight: str
    denoise: float
    structure: bool

    def describe(self) -> str:
        """The configuration in a table's row."""
        start = "from noise" if self.denoise == 1 else f"denoise {self.denoise:g}"
        structure = ", structure guidance" if self.structure else ""
        return (
            f"{self.window} windows, shifted, {self.guide_noise} guide of weight {self.weight}, "
            f"{start}{structure}"
        )


CONFIGURATIONS = {
    "shipped": Configuration("trained size", "matched", "auto", 0.7, True),
    "compact": Configuration("compact", "clean", "1", 1.0, False),
}
"""The 4K graph's, training-free; and the paper's reading, without the guide LoRA that it wants."""
NATIVE = "native"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument(
        "--configurations",
        nargs="*",
        choices=list(CONFIGURATIONS),
        default=list(CONFIGURATIONS),
        help="of the detail (all)",
    )
    for name in ("width", "height", "short-side"):
        parser.add_argument(f"--{name}", type=int, help="another size than the machine's usual")
    parser.add_argument("--seconds", type=float, help="another length")


def run(args: argparse.Namespace) -> None:
    import torch

    if args.case:
        case = json.loads(args.case)
        configuration = case.pop("configuration")
        print(json.dumps(Pipeline(**case).run(configuration)))
        return
    cuda = torch.cuda.is_available()
    case = {"shape": "1.3B", **CUDA_CASE} if cuda else {"shape": "tiny", **CPU_CASE}
    asked = {key: getattr(args, key) for key in CPU_CASE}
    case |= {key: value for key, value in asked.items() if value is not None}
    rows = [
        run_case("pipeline", case | {"configuration": name})
        for name in (*args.configurations, NATIVE)
    ]
    name = "pipeline_cuda" if cuda else "pipeline_cpu"
    save_results(name, rows, table(rows))
    plot(name, rows)


def seconds_of(row: dict[str, Any], decode: float) -> float:
    """End to end. Stock sampling is given our decode: the stock one may not fit the card."""
    if row["configuration"] == NATIVE:
        return row["text"] + NATIVE_STEPS * row["native step"] + decode
    return sum(row[stage] for stage in STAGES)


def table(rows: list[dict[str, Any]]) -> str:
    """One row per configuration, each with all that it was measured with."""
    first, native = rows[0], rows[-1]
    total = seconds_of(native, first["decode"])
    lines = []
    for row in rows:
        own = seconds_of(row, first["decode"])
        if row is native:
            what = f"stock sampling, full attention, {NATIVE_STEPS} steps (one timed), cfg {CFG:g}"
            cells = ["-", f"{own - row['text'] - first['decode']:.1f}", f"{first['decode']:.1f}"]
        else:
            what = (
                f"{row['configuration']}: {CONFIGURATIONS[row['configuration']].describe()}; proxy "
                f"{PROXY_STEPS} steps, detail {DETAIL_STEPS}, Euler, cfg {CFG:g}"
            )
            cells = [f"{row[stage]:.1f}" for stage in STAGES[1:]]
        lines.append([what, f"{row['text']:.1f}", *cells, f"{own:.1f}", f"{total / own:.1f} x"])
    header = [
        f"{first['width']} x {first['height']}, {first['frames']} frames, {first['tokens']:,} "
        f"tokens, Wan {first['shape']}; seconds",
        *STAGES,
        "end to end",
        "faster than stock",
    ]
    return markdown_table(header, lines)


def text_encoder(whole: bool) -> Any:
    """A stock UMT5 with random weights: XXL as Wan's where it is `whole`, else two thin layers."""
    import comfy.ops
    import comfy.text_encoders.t5
    import torch
    from atlasvid.engine.comfyui import management

    config = Path(comfy.text_encoders.t5.__file__).with_name("umt5_config_xxl.json")
    sizes = json.loads(config.read_text("utf-8"))
    if not whole:
        sizes |= {"d_model": 256, "d_ff": 640, "num_heads": 4, "num_layers": 2, "vocab_size": 512}
    device = management.compute_device() if whole else torch.device("cpu")
    dtype = torch.bfloat16 if whole else torch.float32
    net = comfy.text_encoders.t5.T5(sizes, dtype, device, comfy.ops.disable_weight_init)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    ids = torch.randint(2, sizes["vocab_size"], (1, PROMPT_TOKENS), device=device)
    return lambda: [net(ids, torch.ones_like(ids), dtype=dtype) for _ in range(2)]


class Pipeline:
    """One plan, its models and its stages, through the stock sampler."""

    def __init__(
        self,
        shape: str,
        width: int,
        height: int,
        seconds: float,
        short_side: int,
        steps: tuple[int, int] = (PROXY_STEPS, DETAIL_STEPS),
    ):
        import torch
        from atlasvid.engine.comfyui import media
        from atlasvid.engine.families import tiny
        from atlasvid.engine.families.family import latent_space
        from atlasvid.engine.geometry.plan import make_plan
        from bench_attention import SHAPES

        self.whole = shape != "tiny"
        self.steps = steps
        self.times: dict[str, float] = {}
        with torch.inference_mode():
            encode = text_encoder(self.whole)
            encode()  # the first call also warms up
            self._stage("text", encode)
            del encode
        self.model = SHAPES[shape].load()
        self.vae = media.load_vae(tiny.vae_state(dim=96 if self.whole else 8))
        space = latent_space(self.model)
        self.plan = make_plan(space, width, height, seconds, 16.0, short_side, 4)
        self.conditioning = [[[torch.randn(1, PROMPT_TOKENS, 4096), {}]] for _ in range(2)]

    def _stage(self, name: str, call: Callable[[], Any]) -> Any:
        kept: list[Any] = []
        self.times[name] = measure(lambda: kept.append(call()))["seconds"]
        return kept[0]

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

    def run(self, configuration: str) -> dict[str, Any]:
        """Seconds of every stage, each after the one before it."""
        import torch

        with torch.inference_mode():
            if configuration == NATIVE:
                self._native_step()
            else:
                self._make(CONFIGURATIONS[configuration])
        return {**self.times, "frames": self.plan.frames, "tokens": self.plan.tokens.count}

    def _make(self, chosen: Configuration) -> None:
        import torch
        from atlasvid.engine.proxy.frequencies import apply_rope_method
        from atlasvid.engine.proxy.latents import upscale_proxy
        from atlasvid.engine.vae.decode import decode_images

        plan, (proxy_steps, detail_steps) = self.plan, self.steps
        empty = torch.zeros(1, plan.space.channels, *plan.proxy_latent)
        proxy_model = apply_rope_method(
            self.model, "linear", temporal_scale=4.0, spatial_scale=1.0, plan=plan
        )
        self.sample(proxy_model, empty, 1)  # loads the weights
        proxy = self._stage("proxy", lambda: self.sample(proxy_model, empty, proxy_steps))
        start = upscale_proxy(proxy, plan)
        branch = self._branch(chosen, proxy)
        detail = self._stage(
            "detail", lambda: self.sample(branch, start, detail_steps, denoise=chosen.denoise)
        )
        self._stage("decode", lambda: decode_images(self.vae, detail))

    def _branch(self, chosen: Configuration, proxy: Any) -> Any:
        from atlasvid.engine.branch.apply import apply_detail_branch
        from atlasvid.engine.branch.settings import preset_window
        from atlasvid.engine.geometry.windows import COMPACT
        from atlasvid.engine.proxy.structure import apply_structure_guidance

        window = preset_window(chosen.window, self.plan, COMPACT)
        model = apply_detail_branch(
            self.model, self.plan, proxy, window, chosen.guide_noise, guide_weight=chosen.weight
        )
        if not chosen.structure:
            return model
        return apply_structure_guidance(model, self.plan, proxy, strength=1.0, end_percent=0.6)

    def _native_step(self) -> None:
        import torch

        blank = torch.zeros(1, self.plan.space.channels, *self.plan.latent)
        ends: list[float] = []
        self.sample(
            self.model,
            blank,
            NATIVE_STEPS,
            last_step=2,
            callback=lambda *_: ends.append(time.perf_counter()),
        )
        self.times["native step"] = ends[1] - ends[0]  # the first also loads and warms up


def plot(name: str, rows: list[dict[str, Any]]) -> None:
    """Stages of every configuration beside stock sampling, as bars on one time axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    first, (*ours, native) = rows[0], rows
    colours = dict(zip(STAGES, ("#7cc47f", "#5a9e5a", "#a1309b", "#8888aa"), strict=True))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.5 * len(rows)))
    for i, row in enumerate(ours):
        left = 0.0
        for stage in STAGES:
            label = stage if i == 0 else None
            bar = axes.barh(row["configuration"], row[stage], left=left, color=colours[stage])
            bar.set_label(label)
            left += row[stage]
    total = seconds_of(native, first["decode"])
    axes.barh("stock", total, color="grey", label=f"{NATIVE_STEPS} stock steps, text, decode")
    axes.set_xlabel("seconds")
    title = f"{first['width']} x {first['height']}, {first['frames']} frames, {first['shape']} Wan"
    axes.set_title(title)
    axes.legend(loc="center right", fontsize=8)
    figure.savefig(RESULTS / f"{name}.png", dpi=120, bbox_inches="tight")
    plt.close(figure)
