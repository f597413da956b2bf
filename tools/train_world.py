"""Trains the small family of `models/tiny_world` again, from nothing but its drawn world.

    python tools/train_world.py

Stages, each resumed where it was stopped: `code` (the latent space), `clips` and `pairs` (rendered
once), `model` beside `decoder`, `encoder` and `tune` (the VAE), `files` (what stock loaders take),
`proxy` and `guide` (LoRAs, by the pack's own trainer) beside `student` and `tc-decoder` (FlashVSR),
and `pack` (into models/tiny_world, what was trained). Sample pictures appear in the work folder as
it goes. About five hours on two cores, of one of which FlashVSR's stages take 75 to 85 minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from comfy_server import has_accelerator
from environment import COMFYUI, ROOT, SetupError, cache_folder, prepare, say, stop_on_errors

WORKER = Path(__file__).with_name("world_worker.py")
PHASES = (
    (("code",),),
    (("clips",), ("pairs",)),
    (("model",), ("decoder", "encoder", "tune")),
    (("files", "proxy", "guide"), ("student", "tc-decoder")),
    (("pack",),),
)
"""One after the other; of each, lanes of stages that may run side by side."""
STAGES = tuple(stage for phase in PHASES for lane in phase for stage in lane)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stages", nargs="*", metavar="stage", help=f"some of {', '.join(STAGES)} (default: all)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="FOLDER",
        help=f"for clips, checkpoints and pictures ({cache_folder() / 'world'})",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        default=ROOT / "models" / "tiny_world",
        help="where the finished files go (models/tiny_world)",
    )
    parser.add_argument("--cpu", action="store_true", help="even where there is a card")
    parser.add_argument("--steps", type=int, help="of the stages named, instead of the recipe's")
    parser.add_argument(
        "--data",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of the drawn clips, pictures, pairs and videos (1; with --steps 2, 0.02 tries all "
        "stages in five minutes)",
    )
    parser.add_argument(
        "--start",
        type=Path,
        metavar="FOLDER",
        help="begin with the weights of a finished family, such as models/tiny_world",
    )
    return parser


def command(options: argparse.Namespace, python: Path, stage: str, cpu: bool) -> list[str]:
    """What runs one stage."""
    made = [str(python), str(WORKER), stage, "--work", str(options.work)]
    made += ["--output", str(options.output.resolve()), "--data", str(options.data)]
    if options.steps:
        made += ["--steps", str(options.steps)]
    if options.start:
        made += ["--start", str(options.start.resolve())]
    return [*made, "--cpu"] if cpu else made


def together(stages: list[str], cpu: bool) -> list[list[list[str]]]:
    """The stages in order as steps of lanes: what may run side by side on a CPU with two cores."""
    if not cpu or (os.cpu_count() or 1) < 2:
        return [[[stage]] for stage in stages]
    phases = [[[s for s in lane if s in stages] for lane in phase] for phase in PHASES]
    return [lanes for phase in phases if (lanes := [lane for lane in phase if lane])]


def run_lanes(lanes: list[list[list[str]]], environment: dict[str, str]) -> int:
    """Run lanes of commands side by side, one after the other in each; the first failure's code."""
    waiting = [list(lane) for lane in lanes]
    running: dict[int, subprocess.Popen] = {}
    try:
        while True:
            for i, lane in enumerate(waiting):
                if i not in running and lane:
                    running[i] = subprocess.Popen(lane.pop(0), env=environment)
            if not running:
                return 0
            for i, process in list(running.items()):
                try:
                    code = process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    continue
                del running[i]
                if code:
                    return code
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def main() -> int:
    options = arguments().parse_args()
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        raise SetupError(f"unknown stages {', '.join(unknown)}; allowed are {', '.join(STAGES)}")
    options.work = (options.work or cache_folder() / "world").expanduser().resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    setup = prepare(training=True)
    cpu = options.cpu or not has_accelerator(setup.python)
    environment = {**os.environ, "COMFYUI_PATH": str(setup.comfyui[COMFYUI])}
    stages = [s for s in STAGES if s in options.stages or not options.stages]
    say(f"training {', '.join(stages)} in {options.work}" + (" on the CPU" if cpu else ""))
    for lanes in together(stages, cpu):
        threads = {"OMP_NUM_THREADS": "1"} if len(lanes) > 1 else {}
        commands = [[command(options, setup.python, s, cpu) for s in lane] for lane in lanes]
        if code := run_lanes(commands, environment | threads):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(stop_on_errors(main))
