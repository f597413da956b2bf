"""All that a first session on a card should know, in eight minutes, most telling first.

Every result is written into benchmarks/card.jsonl and card.md as soon as it is there, so that a
session which is cut short keeps what it had. Nothing needs the network or a text encoder. Without
a card, `--tiny` runs the same steps small, to see that they run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import RESULTS, ROOT, conditions, markdown_table, measure, run_case

MINUTES = 8.0
UHD_81, UHD_161 = (21, 135, 240), (41, 135, 240)
TINY_GRID = (5, 16, 24)
TESTS = [
    "tests/engine/families/test_kernels.py",
    "tests/engine/branch/test_half.py",
    "tests/engine/branch/test_detail.py",
]
CHOSEN = "takes_the_kernel or half or random or stock or weights_equal"
TINY_CHOSEN = "half and shifted and plain"
VSR_SIZE = (768, 1408)
"""Height and width of the published demonstrations of FlashVSR."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help="the same steps, small, on any machine")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all steps")
    parser.add_argument("--only", help="steps whose names contain this")


@dataclass(frozen=True)
class Step:
    """One thing to know.

    Args:
        seconds: after which it is given up.
        run: measures it in processes of its own, within the seconds it is given.
    """

    name: str
    seconds: float
    run: Callable[[float], dict[str, Any]]


def run(args: argparse.Namespace) -> None:
    if args.case:
        case = json.loads(args.case)
        print(json.dumps({"chunks": chunks, "flashvsr": flashvsr}[case.pop("what")](**case)))
        return
    steps = tiny_steps() if args.tiny else card_steps()
    # What a tiny run finds says nothing: it is not kept beside the measurements.
    report = Report(Path(tempfile.gettempdir()) / "atlasvid-card" if args.tiny else RESULTS)
    end = time.monotonic() + 60 * args.minutes
    for step in steps:
        if args.only and args.only not in step.name:
            continue
        left = end - time.monotonic()
        if left < 10:
            report.add(step.name, {"skipped": "no time left"})
            continue
        begun = time.monotonic()
        try:
            found = step.run(min(step.seconds, left))
        except subprocess.TimeoutExpired as error:
            found = {"failed": f"not done after {error.timeout:.0f} s"}
        except Exception as error:  # a step that fails must not cost the others
            found = {"failed": str(error)[-1500:]}
        report.add(step.name, {**found, "took_s": round(time.monotonic() - begun, 1)})


class Report:
    """What was found so far, on disk."""

    def __init__(self, folder: Path):
        folder.mkdir(exist_ok=True)
        self.lines = folder / "card.jsonl"
        self.table = folder / "card.md"
        self.facts = conditions()
        self.rows: list[list[str]] = []
        self.lines.write_text(json.dumps(self.facts) + "\n", "utf-8")

    def add(self, name: str, found: dict[str, Any]) -> None:
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": name, **found}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        shown = ", ".join(f"{key} {_short(value)}" for key, value in found.items())
        self.rows.append([name, shown.replace("\n", " ").replace("|", "/")])
        heading = ", ".join(f"{key} {value}" for key, value in self.facts.items())
        text = markdown_table(["step", "found"], self.rows)
        self.table.write_text(f"{heading}\n\n{text}\n", "utf-8")
        print(f"{name}: {shown}", flush=True)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


# --- Steps -----------------------------------------------------------------------------------


def card_steps() -> list[Step]:
    """In the order of what they tell."""
    ours = {"shape": "1.3B", "what": "ours", "grid": UHD_81, "repeat": 2}
    real = {"dim": 96, "dtype": "bfloat16"}
    trained = {"window": (21, 30, 52)}
    return [
        Step("tests of the forward, bf16", 60, tests_in("bf16", CHOSEN)),
        Step("1.3B at 4K x 81", 60, case("attention", {**ours, "profile": True})),
        Step("its matrix products", 40, case("attention", {**ours, "what": "products"})),
        Step("the same, nothing fused", 40, case("attention", ours, ATLASVID_FUSED="0")),
        Step("chunks", 40, case("card", {"what": "chunks", "shape": "1.3B", "grid": UHD_81})),
        Step("tests of the forward, fp32", 75, tests_in("fp32", CHOSEN)),
        Step("capped at 12 GiB, tokens streamed", 60, case(
            "attention", {**ours, "repeat": 1, "grid": UHD_161, "cap_gib": 12, "budget": "2 GB"})),
        Step("capped at 16 GiB", 60, case(
            "attention", {**ours, "repeat": 1, "grid": UHD_161, "cap_gib": 16})),
        Step("compact sliding", 60, case("attention", {**ours, "overlap": "sliding"})),
        Step("trained size", 60, case("attention", {**ours, **trained, "repeat": 1})),
        Step("trained size, sliding", 60, case(
            "attention", {**ours, **trained, "repeat": 1, "overlap": "sliding"})),
        Step("one training step", 60, case("train", {"shape": "1.3B", "grid": (9, 48, 64)})),
        Step("decode at 4K", 60, case("decode", {"what": "ours", "size": (2, 270, 480), **real})),
        Step("FlashVSR at 768 x 1408", 60, case(
            "card", {"what": "flashvsr", "size": VSR_SIZE, "frames": 10})),
        Step("the demo graph through a server", 120, demo),
        Step("a training step through a server", 60, training_step),
        Step("stock, one block", 90, case(
            "attention", {"shape": "1.3B, one block", "what": "stock", "grid": UHD_81})),
    ]  # fmt: skip


def tiny_steps() -> list[Step]:
    """The same, small."""
    ours = {"shape": "tiny, one block", "what": "ours", "grid": TINY_GRID}
    return [
        Step("tests of the forward", 240, tests_in("", TINY_CHOSEN)),
        Step("ours", 120, case("attention", {**ours, "profile": True})),
        Step("its matrix products", 120, case("attention", {**ours, "what": "products"})),
        Step("the same, nothing fused", 120, case("attention", ours, ATLASVID_FUSED="0")),
        Step("chunks", 120, case("card", {"what": "chunks", "shape": ours["shape"],
                                          "grid": TINY_GRID, "sizes": (512, 1024)})),
        Step("tokens streamed", 120, case("attention", {**ours, "budget": "0.001 GB"})),
        Step("sliding", 120, case("attention", {**ours, "overlap": "sliding"})),
        Step("trained size, sliding", 120, case(
            "attention", {**ours, "overlap": "sliding", "window": (5, 8, 12)})),
        Step("one training step", 120, case("train", {"shape": "tiny", "grid": (5, 16, 16)})),
        Step("decode", 120, case("decode", {"what": "ours", "size": (2, 12, 16), "dim": 8})),
        Step("FlashVSR", 120, case(
            "card", {"what": "flashvsr", "size": (128, 128), "frames": 6, "shape": "tiny"})),
        Step("the demo graph through a server", 600, demo),
        Step("a training step through a server", 300, training_step),
    ]  # fmt: skip


def case(
    subcommand: str, given: dict[str, Any], **environment: str
) -> Callable[[float], dict[str, Any]]:
    """A step that is a case of a benchmark, with some environment variables."""
    return lambda seconds: run_case(subcommand, given, seconds, environment)


def tests_in(tier: str, chosen: str) -> Callable[[float], dict[str, Any]]:
    """A step that runs tests, on the card in a precision."""

    def run_tests(seconds: float) -> dict[str, Any]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        done = subprocess.run(
            [*command, "-k", chosen],
            cwd=ROOT,
            env={**os.environ, "ATLASVID_CARD": tier},
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
        lines = done.stdout.strip().splitlines() or [done.stderr[-1000:]]
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return {"tests": lines[-1], **({"failed": failed} if done.returncode else {})}

    return run_tests


def demo(seconds: float) -> dict[str, Any]:
    """The demo graph in a real server: its own start, loading and casting."""
    return served("atlasvid_demo", seconds, lambda prompt, base: prompt)


def training_step(seconds: float) -> dict[str, Any]:
    """One step of the tiny model's guide LoRA in a real server: autograd has a thread of its own
    there, and weights may be where dynamic VRAM keeps them."""

    def prepared(prompt: dict[str, Any], base: Path) -> dict[str, Any]:
        from screenshots import SHOWN, draw_video
        from twins import TRAINING, tiny_twin

        twin = tiny_twin(prompt, steps=1)
        (training,) = [node["inputs"] for node in twin.values() if node["class_type"] == TRAINING]
        folder = base / "input" / training["folder"]
        folder.mkdir(parents=True)
        draw_video(folder / "clip.mp4", SHOWN[0], 384, 224)
        (folder / "clip.txt").write_text(SHOWN[0], "utf-8")
        return twin

    return served("atlasvid_train_guide", seconds, prepared)


def served(
    graph: str, seconds: float, prepared: Callable[[dict[str, Any], Path], dict[str, Any]]
) -> dict[str, Any]:
    """A shipped graph through a server of its own.

    Args:
        prepared: the prompt to run, of the graph's and the server's folder.
    """
    import comfy_server
    from workflow import to_prompt

    workflow = json.loads((ROOT / "workflows" / f"{graph}.json").read_text("utf-8"))
    python, comfyui = Path(sys.executable), Path(os.environ["COMFYUI_PATH"])
    with tempfile.TemporaryDirectory(prefix="atlasvid-") as folder:
        base, page = Path(folder), Path(folder) / "page"
        page.mkdir()
        (page / "index.html").write_text("<html></html>", "utf-8")
        options = ["--front-end-root", str(page)]  # the front end's package may be missing
        if not comfy_server.has_accelerator(python):
            options.append("--cpu")
        begun = time.monotonic()
        with comfy_server.running(
            python, comfyui, base, options=tuple(options), timeout=seconds
        ) as server:
            up = time.monotonic() - begun
            with comfy_server.Session(server) as session:
                definitions = session.object_info()
                comfy_server.require_nodes(server, definitions, workflow)
                prompt = prepared(to_prompt(workflow, definitions), base)
                history = session.run(prompt, seconds - up)
            files = comfy_server.output_files(history, base / "output")
            sizes = [file.stat().st_size for file in files]
    return {"up_s": up, "run_s": time.monotonic() - begun - up, "files": sizes}


# --- Cases of its own ------------------------------------------------------------------------


def chunks(
    shape: str, grid: list[int], sizes: tuple[int, ...] = (8_192, 16_384, 32_768, 65_536, 131_072)
) -> dict[str, Any]:
    """Seconds of a forward over how many tokens are evaluated at a time."""
    import torch
    from atlasvid.engine.branch import forward
    from bench_attention import SHAPES, Forward

    found = {}
    with torch.inference_mode():
        bench = Forward(SHAPES[shape], tuple(grid))
        for size in sizes:
            forward.CPU_CHUNK = size
            forward.measured_chunk = lambda *_, size=size: size
            bench.ours()
            found[size] = measure(bench.ours)["seconds"]
    return {"seconds": found}


def flashvsr(size: list[int], frames: int, shape: str = "1.3B") -> dict[str, Any]:
    """FlashVSR's transformer with random weights over some latent frames."""
    import torch
    from atlasvid.engine.comfyui import management
    from atlasvid.engine.families import wan
    from atlasvid.engine.flashvsr.blocks import BlockGrid
    from atlasvid.engine.flashvsr.memory import CPU_CHUNK, CUDA_CHUNK, Sizes, choose_places
    from atlasvid.engine.flashvsr.noise import placed_noise
    from atlasvid.engine.flashvsr.schedule import Schedule
    from atlasvid.engine.flashvsr.selection import Sparsity
    from atlasvid.engine.flashvsr.transformer import OneStep
    from bench_attention import SHAPES

    patcher = SHAPES[shape].load()
    device = management.use_on_device(patcher)
    net = patcher.model.diffusion_model
    like = torch.empty(0, dtype=patcher.model.get_dtype_inference(), device=device)
    grid, sparsity = BlockGrid.of(*size), Sparsity()
    sizes = Sizes.of(grid, wan.shape(net), sparsity, like.element_size())
    most = CUDA_CHUNK if like.is_cuda else CPU_CHUNK
    free = management.free_memory(device, patcher) * 3 // 4
    places = choose_places(sizes, free, management.host_free_memory(), most)
    prompt, rows, columns = torch.randn(1, 512, 4096), grid.rows * 8, grid.columns * 8
    shown = torch.randn(rows, columns, wan.shape(net).dim).to(like)

    def clip() -> None:
        step = OneStep(net, prompt, like, grid, sparsity, places)
        noise = lambda frame: placed_noise(0, frame, grid)  # noqa: E731
        for _ in step(Schedule(4 * frames - 3).chunks(), noise, lambda _: shown):
            pass

    with torch.inference_mode():
        if like.is_cuda:
            clip()  # compiles
        result = measure(clip)
    return {**result, "latent_frames": frames, "frames_per_second": 4 * frames / result["seconds"]}
