"""Does everything to a server that could go wrong, again and again, and writes down what survived.

    python tools/soak.py                 about ten minutes on two cores
    python tools/soak.py --times 10      ten times as many tries
    python tools/soak.py --only cancel   only what has this in its name; other rows are kept

A real ComfyUI runs as a child process on small random models: it is killed, cancelled, given broken
files and impossible numbers, and its disk and memory run out. After each fault the next render has
to work and no partial file may lie under a final name. The table goes to benchmarks/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import in_prepared_environment
from environment import say, stop_on_errors, threads

MIB = 2**20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=1, help="how often everything is tried")
    parser.add_argument("--renders", type=int, default=50, help="renders in a row (50)")
    parser.add_argument("--only", default="", metavar="WORD", help="rows to try again")
    parser.add_argument("--seed", type=int, help="of the random moments (default: the time)")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    comfyui = os.environ.get("COMFYUI_PATH")
    if not comfyui:
        return in_prepared_environment()
    sys.path.append(comfyui)  # for its version
    from faults import files, trials
    from faults.host import Host, small_disk

    chosen = options.seed if options.seed is not None else int(time.time())
    random.seed(chosen)
    say(f"seed {chosen}, PyTorch on up to {threads()} threads")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which unmounts and stops the server
    rows = []
    with tempfile.TemporaryDirectory(prefix="atlasvid-soak-") as scratch:
        base = Path(scratch)
        with small_disk(base / "output", 64 * MIB) as mounted:
            host = Host(Path(sys.executable), Path(comfyui), base)
            try:
                files.prepare(host)
                for name, run in plan(host, trials, options, mounted):
                    if options.only in name:
                        begun = time.monotonic()
                        outcome = run()
                        rows.append(outcome)
                        say(
                            f"{outcome.fault}: {outcome.survived} of {outcome.tried} survived, "
                            f"slowest {outcome.slowest or 0:.2f} s, {outcome.growth or ''} "
                            f"({time.monotonic() - begun:.0f} s in all)"
                        )
                        for lost in outcome.lost:
                            say(f"  {lost}")
            finally:
                host.stop()
    save([asdict(row) for row in rows], chosen, keep=bool(options.only))
    return int(any(row.lost for row in rows))


def plan(
    host: object, trials: object, options: argparse.Namespace, mounted: bool
) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, what to run) for every row of the table."""
    t, n = trials, options.times
    yield "renders in a row", lambda: t.renders_in_a_row(host, options.renders)
    for phase in t.PHASES:
        yield f"cancel {phase.name}", lambda phase=phase: t.cancels(host, phase, 5 * n)
    yield "memory", lambda: t.out_of_memory(host, 6 * n)
    yield "disk saving", lambda: t.file_limits(host, 3 * n)
    if mounted:
        yield "disk full", lambda: t.full_disks(host, host.output, 3 * n)
    yield "disk training", lambda: t.full_disk_in_training(host, n)
    yield "broken files", lambda: t.broken_files(host)
    yield "wrong numbers", lambda: t.wrong_numbers(host)
    yield "plan", lambda: t.plan_queries(host)
    for phase in t.PHASES[:-1]:
        yield f"kill {phase.name}", lambda phase=phase: t.kills(host, phase, n)
    yield "kill training", lambda: t.killed_training(host, n)


def save(rows: list[dict[str, Any]], chosen: int, keep: bool) -> None:
    """benchmarks/reliability.md and .json; with `keep` beside the other rows of the last run."""
    from measure import RESULTS, markdown_table, save_results

    conditions = {"seed": chosen, "threads": threads(), "load": round(os.getloadavg()[1], 1)}
    rows = [row | {"run": conditions} for row in rows]
    file = RESULTS / "reliability.json"
    if keep and file.exists():
        new = {row["fault"]: row for row in rows}
        rows = [new.pop(row["fault"], row) for row in json.loads(file.read_text())["rows"]]
        rows += new.values()
    lines = [line_of(row) for row in rows]
    tried, survived = (sum(row[name] for row in rows) for name in ("tried", "survived"))
    lines.append(["all", str(tried), str(survived), *[""] * 6])
    header = ["fault", "tried", "survived", "slowest", "memory", "files", "threads", "scratch"]
    table = markdown_table([*header, "seed, load"], lines)
    save_results("reliability", rows, table + "\n\n" + NOTE)


def line_of(row: dict[str, Any]) -> list[str]:
    grown = list((row["growth"] or {}).values())
    run = row.get("run")
    return [
        row["fault"],
        str(row["tried"]),
        str(row["survived"]),
        "" if row["slowest"] is None else f"{row['slowest']:.2f} s",
        f"{grown[0] / MIB:.0f} MiB" if grown else "",
        *(str(number) if grown else "" for number in grown[1:] or [""] * 3),
        f"{run['seed']}, {run['load']}" if run else "",
    ]


NOTE = (
    "Made by `python tools/soak.py`. Survived: the next render works and no partial file lies "
    "under a final name. Slowest: from a cancel to the end of the execution, or from queueing a "
    "wrong prompt to its error. Growth over the level before, at rest: the server's memory, open "
    "files, threads and temporary files. Load: processes that wanted a core, those of other "
    "programs too; above the number of cores, times are longer than on a quiet machine."
)


if __name__ == "__main__":
    stop_on_errors(main)
