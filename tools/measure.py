"""Time and memory of one call, and what it was measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks"


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident memory of this process now (VmRSS) or at its highest (VmHWM). Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def measure(call: Callable[[], Any], repeat: int = 1) -> dict[str, float]:
    """The fastest of `repeat` calls in seconds, and memory at the peak: in all, grown, on the host.

    Device memory on a CUDA card, the process's resident memory elsewhere.
    """
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident_bytes()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM")
    return {
        "seconds": min(times),
        "grown_bytes": peak - before,
        "peak_bytes": peak,
        "host_bytes": resident_bytes("VmHWM"),
    }


def anonymous_peak(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a call, and the peak of the process's anonymous memory while it runs.

    What is mapped from files can be given up at any time and does not count. Linux only.
    """
    before = peak = resident_bytes("RssAnon")
    stopped = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stopped.wait(0.02):
            peak = max(peak, resident_bytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        call()
    finally:
        seconds = time.perf_counter() - start
        stopped.set()
        watcher.join()
    return {"seconds": seconds, "anonymous_bytes": peak, "anonymous_grown": peak - before}


def run_case(
    subcommand: str,
    case: dict[str, Any],
    seconds: float | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Measures one case in a fresh process, so that peaks do not hide each other.

    Args:
        environment: variables of that process beside its own.

    Raises RuntimeError with the process's output when it fails, subprocess.TimeoutExpired when it
    takes longer than `seconds`.
    """
    command = [sys.executable, str(ROOT / "tools" / "bench.py"), subcommand]
    command += ["--case", json.dumps(case)]
    variables = {**os.environ, **environment}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=seconds, env=variables
    )
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr[-2000:]}")
    result = {**case, **json.loads(done.stdout.splitlines()[-1])}
    print(
        "  "
        + ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()
        ),
        flush=True,
    )
    return result


def conditions() -> dict[str, str]:
    """Hardware, versions and date of a run."""
    import torch

    return {
        "date": date.today().isoformat(),
        "hardware": _hardware(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "comfyui": _comfyui_version(),
    }


def _hardware() -> str:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def _comfyui_version() -> str:
    import comfyui_version

    return comfyui_version.__version__


def save_results(name: str, rows: list[dict[str, Any]], table: str) -> Path:
    """Writes benchmarks/<name>.json and benchmarks/<name>.md, the table with its conditions."""
    RESULTS.mkdir(exist_ok=True)
    facts = conditions()
    data = RESULTS / f"{name}.json"
    data.write_text(json.dumps({"conditions": facts, "rows": rows}, indent=1) + "\n")
    heading = ", ".join(f"{k} {v}" for k, v in facts.items())
    (RESULTS / f"{name}.md").write_text(f"{heading}\n\n{table}\n")
    print(f"\n{heading}\n\n{table}\n\nwritten to benchmarks/{name}.json and .md")
    return data


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
