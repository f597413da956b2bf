"""Sets up what the tests need, checks the style and the types, and runs the tests.

Arguments go to pytest: `python tools/test.py tests/engine -k windows`. With `--card` before them
the tests of the forward and of sampling run on the graphics card: `python tools/test.py --card`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import browser
from environment import (
    COMFYUI,
    COMFYUI_OLDEST,
    ROOT,
    Setup,
    SetupError,
    missing_venv_package,
    prepare,
    say,
    sharing_cores,
    stop_on_errors,
)

CARD_TESTS = [
    *(f"tests/engine/families/test_{name}.py" for name in ("models", "fused", "kernels")),
    *(
        f"tests/engine/branch/test_{name}.py"
        for name in ("half", "detail", "weighted", "run", "compiled")
    ),
]


def provide_system_packages() -> None:
    """Installs what only the system's package manager has. Raises SetupError where it cannot."""
    wanted = [package] if (package := missing_venv_package()) else []
    if not browser.installed():
        wanted.append("chromium")
    if not wanted:
        return
    names = " ".join(wanted)
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise SetupError(
            f"the tests need {names}. On Debian and Ubuntu: sudo apt-get install {names}"
        )
    say(f"installing {names}")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for step in (["update"], ["install", "-y", "--no-install-recommends", *wanted]):
        done = subprocess.run(
            ["apt-get", "-q", *step], env=quiet, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SetupError(f"apt-get {step[0]} failed:\n{done.stderr.strip()}")


def run(*command: str | Path, **environment: str) -> int:
    say(" ".join(str(part) for part in command[2:]))
    return subprocess.run(
        command, cwd=ROOT, env={**sharing_cores(), **environment}, check=False
    ).returncode


def card_tests(setup: Setup, arguments: list[str]) -> int:
    """What can be wrong on a card alone: kernels, streams, the allocator."""
    found = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([setup.python, "-c", found], check=False).returncode:
        raise SetupError(
            "PyTorch finds no CUDA card here. Without --card the tests run on the CPU."
        )
    return run(
        setup.python,
        "-m",
        "pytest",
        *(arguments or CARD_TESTS),
        COMFYUI_PATH=os.environ.get("COMFYUI_PATH") or str(setup.comfyui[COMFYUI]),
        ATLASVID_CARD="1",
    )


def main() -> int:
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if sys.argv[1:2] == ["--card"]:
        return card_tests(prepare((COMFYUI,), tests=True), sys.argv[2:])
    provide_system_packages()
    setup = prepare((COMFYUI, COMFYUI_OLDEST), tests=True, evaluation=True)
    python = setup.python
    checks = [
        run(python, "-m", "ruff", "check", "."),
        run(python, "-m", "ruff", "format", "--check", "."),
        run(python, "-m", "basedpyright", "--pythonpath", str(python), "engine", "nodes"),
    ]
    tested = run(
        python,
        "-m",
        "pytest",
        *sys.argv[1:],
        COMFYUI_PATH=os.environ.get("COMFYUI_PATH") or str(setup.comfyui[COMFYUI]),
        COMFYUI_OLDEST_PATH=str(setup.comfyui[COMFYUI_OLDEST]),
    )
    return tested or max(checks)


if __name__ == "__main__":
    stop_on_errors(main)
