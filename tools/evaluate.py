"""Judges every way of making a large video from a proxy, on the tiny world whose truth is known.

    python tools/evaluate.py

Methods are compared on the same scenes and noise (paired), with 95 % confidence intervals. Each
video's scores are written as soon as they are there, so a run that was stopped goes on. Writes
benchmarks/quality.md with its plot and contact sheet. About two minutes a scene on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from bench import in_prepared_environment
from environment import cache_folder, stop_on_errors
from measure import RESULTS


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=32, help="scenes (32)")
    parser.add_argument("--first", type=int, default=0, help="the first of them, for several runs")
    parser.add_argument("--methods", nargs="*", metavar="NAME", help="some methods only")
    parser.add_argument(
        "--set", default="main", help="which comparison: main, settings, sizes, proxies"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=cache_folder() / "evaluation",
        metavar="FOLDER",
        help="for scores and pictures",
    )
    parser.add_argument("--family", type=Path, metavar="FOLDER", help="another trained family")
    parser.add_argument(
        "--go-on",
        action="store_true",
        help="add scenes to those in benchmarks/quality.jsonl, of the same models and code",
    )
    parser.add_argument(
        "--pictures",
        action="store_true",
        help="the quality report of every method on the first scenes too, as the node draws it, "
        "into the work folder",
    )
    parser.add_argument("--report", action="store_true", help="only write benchmarks/quality.md")
    return parser


class Ledger:
    """Scores by comparison, method and seed, one JSON line each, in a file that only grows."""

    def __init__(self, file: Path):
        self.file = file
        self.rows: dict[tuple[str, str, int], dict[str, float]] = {}
        if file.exists():
            for line in file.read_text("utf-8").splitlines():
                row = json.loads(line)
                self.rows[row["set"], row["method"], row["seed"]] = row["scores"]

    def add(self, key: tuple[str, str, int], scores: dict[str, float]) -> None:
        self.rows[key] = scores
        row = dict(zip(("set", "method", "seed"), key, strict=True)) | {"scores": scores}
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")


def main() -> int:
    options = arguments().parse_args()
    comfyui = os.environ.get("COMFYUI_PATH")
    if not comfyui:
        return in_prepared_environment(evaluation=True)
    import torch
    from pack_loader import load_comfyui, load_pack

    flags = [] if torch.cuda.is_available() else ["--cpu", "--use-pytorch-cross-attention"]
    load_comfyui(Path(comfyui), *flags)
    load_pack()
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from world import report
    from world.comparisons import COMPARISONS

    options.work.mkdir(parents=True, exist_ok=True)
    scores = options.work / "scores.jsonl"
    if options.go_on and not scores.exists():
        shutil.copy(RESULTS / "quality.jsonl", scores)
    ledger = Ledger(scores)
    if not options.report:
        from atlasvid.engine.families.tiny import WORLD, trained_family
        from world.studio import Studio

        studio = Studio(trained_family(options.family or WORLD))
        with torch.inference_mode():
            COMPARISONS[options.set](studio, ledger, options)
    report.save_contact_sheet(sorted(options.work.glob("main_[0-2].pt")))
    report.write(report.complete(ledger.rows))
    return 0


if __name__ == "__main__":
    sys.exit(stop_on_errors(main))
