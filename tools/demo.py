"""Makes a short guided video in a real ComfyUI and says where it lies.

The first run fetches a ComfyUI and an environment for it (about 7 GB, in a user cache folder);
later ones start in seconds. It runs workflows/atlasvid_demo.json, on a toy model of 8 million
parameters that was trained on drawings of hot-air balloons.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import comfy_server
from environment import (
    COMFYUI,
    ROOT,
    SetupError,
    cache_folder,
    digest,
    make_folder,
    prepare,
    say,
    stop_on_errors,
    threads,
)
from workflow import WorkflowError, to_prompt

WORKFLOW = ROOT / "workflows" / "atlasvid_demo.json"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--comfyui",
        type=Path,
        metavar="PATH",
        help="use this ComfyUI instead of fetching one (so do COMFYUI_PATH and a clone in its "
        "custom_nodes folder)",
    )
    parser.add_argument(
        "--python",
        type=Path,
        metavar="PATH",
        help="the Python that your ComfyUI runs with (default: its venv, .venv or python_embeded "
        "folder, else this Python)",
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        help="leave ComfyUI running afterwards, to open in a browser",
    )
    parser.add_argument("--port", type=int, default=0, help="ComfyUI's port (default: a free one)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where the video goes (default: output/ in the cache folder)",
    )
    parser.add_argument(
        "--workflow", type=Path, metavar="FILE", default=WORKFLOW, help="another workflow to run"
    )
    return parser.parse_args()


# --- Which ComfyUI --------------------------------------------------------------------------


def own_comfyui(named: Path | None) -> Path | None:
    """The user's own ComfyUI: as named, from COMFYUI_PATH, or the one this pack sits in."""
    if named or os.environ.get("COMFYUI_PATH"):
        comfyui = Path(named or os.environ["COMFYUI_PATH"]).expanduser().resolve()
        if not (comfyui / "main.py").is_file():
            raise SetupError(f"{comfyui} is not a ComfyUI folder: it has no main.py")
        return comfyui
    pack = Path(os.path.abspath(__file__)).parent.parent
    around = pack.parent.parent
    return around if pack.parent.name == "custom_nodes" and (around / "main.py").is_file() else None


def own_python(comfyui: Path, named: Path | None) -> Path:
    """The Python that runs the user's own ComfyUI."""
    if named:
        return named.expanduser().absolute()
    candidates = [
        comfyui / folder / interpreter
        for folder in ("venv", ".venv")
        for interpreter in ("bin/python", "Scripts/python.exe")
    ]
    candidates.append(comfyui.parent / "python_embeded" / "python.exe")
    return next((each for each in candidates if each.is_file()), Path(sys.executable))


# --- Running the workflow -------------------------------------------------------------------


class Stopwatch:
    """Prints each node's time as the server moves to the next one, and its steps on a terminal."""

    def __init__(self, prompt: comfy_server.Prompt):
        self.titles = {node: content["_meta"]["title"] for node, content in prompt.items()}
        self.node: str | None = None
        self.since = self.start = time.monotonic()

    def hear(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "executing":
            self.move_to(data["node"])
        elif kind == "progress" and sys.stdout.isatty():
            print(f"\r{self._name()} {data['value']}/{data['max']}   ", end="", flush=True)

    def move_to(self, node: str | None) -> None:
        now = time.monotonic()
        if self.node:
            print(
                f"{chr(13) if sys.stdout.isatty() else ''}{self._name()} {now - self.since:7.1f} s"
            )
        self.node, self.since = node, now

    def _name(self) -> str:
        return f"  {self.titles.get(self.node or '', self.node or '')[:44]:<44}"


def run_workflow(server: comfy_server.Server, file: Path) -> dict[str, Any]:
    """Runs a saved workflow to its end, showing the time of each node; returns its history."""
    workflow = json.loads(file.read_text("utf-8"))
    with comfy_server.Session(server) as session:
        definitions = session.object_info()
        comfy_server.require_nodes(server, definitions, workflow)
        prompt = to_prompt(workflow, definitions)
        prompt_id = session.queue(prompt, workflow)
        watch = Stopwatch(prompt)
        for kind, data in session.events(prompt_id, timeout=24 * 3600):
            if kind == "execution_error":
                raise comfy_server.PromptFailed(data)
            watch.hear(kind, data)
        watch.move_to(None)
        print(f"  {'all':<44} {time.monotonic() - watch.start:7.1f} s")
        return session.history(prompt_id)


def report(python: Path, file: Path) -> None:
    """Prints where a video lies and what it holds."""
    script = Path(__file__).with_name("video_facts.py")
    asked = subprocess.run([python, script, file], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise SetupError(f"{file} cannot be read as a video: {asked.stderr.strip()}")
    facts = json.loads(asked.stdout)
    size = file.stat().st_size / 2**20
    say(f"finished: {file}")
    say(
        f"{facts['width']} x {facts['height']}, {facts['frames']} frames at {facts['fps']:g} fps, "
        f"{size:.2f} MiB"
    )


def demo() -> int:
    options = arguments()
    if not options.workflow.is_file():
        raise SetupError(f"there is no workflow {options.workflow}")
    output = (options.output or cache_folder() / "output").expanduser().resolve()
    make_folder(output)
    flags = ["--output-directory", str(output)]
    comfyui = own_comfyui(options.comfyui)
    if comfyui:
        python = own_python(comfyui, options.python)
    else:
        setup = prepare()
        python, comfyui = setup.python, setup.comfyui[COMFYUI]
    if not comfy_server.has_accelerator(python):
        flags.append("--cpu")
        say("no GPU found: ComfyUI runs on the CPU")
    with tempfile.TemporaryDirectory(prefix="atlasvid-") as scratch:
        base = Path(scratch)
        if options.serve:  # what is saved in the browser is kept
            base = cache_folder() / f"serve-{digest(str(ROOT))}"
            make_folder(base)
        if own_comfyui(options.comfyui):
            flags += comfy_server.share_models(base, comfyui)
        say(f"starting ComfyUI ({comfyui}) with {python}, PyTorch on up to {threads()} threads")
        begun = time.monotonic()
        with comfy_server.running(
            python, comfyui, base, port=options.port, options=tuple(flags)
        ) as server:
            say(f"ComfyUI is up after {time.monotonic() - begun:.1f} s at {server.address}")
            history = run_workflow(server, options.workflow)
            for file in comfy_server.output_files(history, output):
                report(python, file)
            if options.serve:
                with contextlib.suppress(KeyboardInterrupt):  # as soon as it is told how to
                    say(f"open {server.address} in a browser; Ctrl+C ends it")
                    server.process.wait()
                say("ComfyUI has ended")
    return 0


def main() -> int:
    try:
        return demo()
    except (comfy_server.PromptRejected, comfy_server.PromptFailed, WorkflowError) as error:
        say(f"the workflow did not run: {error}")
        return 1


if __name__ == "__main__":
    stop_on_errors(main)
