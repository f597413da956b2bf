"""Measures the pack: `python tools/bench.py attention`, `... pipeline`, `... --help`.

Every subcommand prints a table and writes JSON, Markdown and a plot into benchmarks/. It runs on
whatever ComfyUI would use: a CUDA card, at the real models' shapes, or else the CPU.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

SUBCOMMANDS = {
    "attention": "a forward against the stock one, its floor, and its growth over tokens",
    "pipeline": "text, proxy, detail and decode against stock sampling, by configuration",
    "cost": "the plan's estimate of time against the clock",
    "decode": "the decode against the untiled and the stock tiled one",
    "flashvsr": "FlashVSR's parts against what they stand in for",
    "card": "all that a first session on a card should know, in eight minutes",
    "train": "memory and time of a training step over target tokens",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {}
    for name, text in SUBCOMMANDS.items():
        modules[name] = importlib.import_module(f"bench_{name}")
        modules[name].add_arguments(commands.add_parser(name, help=text))
    args = parser.parse_args()

    comfyui = os.environ.get("COMFYUI_PATH")
    if not comfyui:
        return in_prepared_environment()
    import torch
    from pack_loader import load_comfyui, load_pack

    load_comfyui(Path(comfyui), *([] if torch.cuda.is_available() else ["--cpu"]))
    load_pack()
    modules[args.command].run(args)
    return 0


def in_prepared_environment(*, evaluation: bool = False) -> int:
    """Runs this command again in the environment that the demo and the tests use."""
    from environment import COMFYUI, prepare

    setup = prepare(tests=True, evaluation=evaluation)
    environment = {**os.environ, "COMFYUI_PATH": str(setup.comfyui[COMFYUI])}
    command = [str(setup.python), *sys.argv]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    from environment import stop_on_errors

    stop_on_errors(main)
