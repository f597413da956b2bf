"""A server that may be killed: started again in the same folders, and measured from outside."""

from __future__ import annotations

import random
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psutil
from comfy_server import Event, PromptFailed, Session, request, running

from .graphs import Prompt

INJECTOR = Path(__file__).with_name("injector")
TIMEOUT = 300.0


@dataclass(frozen=True)
class Level:
    """What a server holds when it has nothing to do."""

    memory: int
    """Bytes."""
    files: int
    threads: int
    scratch: int
    """Temporary files on disk."""

    def __sub__(self, other: Level) -> Level:
        return Level(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def largest(self, other: Level) -> Level:
        """The larger of both, one by one."""
        return Level(*(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


NOTHING = Level(0, 0, 0, 0)


@dataclass(frozen=True)
class Run:
    """How a prompt ended."""

    ending: str
    """`execution_success`, `execution_error`, `execution_interrupted`, or `killed`."""
    message: str
    """Of an error."""
    seconds: float
    """From the fault, or else from the queueing, to the end."""
    prompt_id: str


class Host:
    """A ComfyUI with the pack and the injector on folders of its own."""

    def __init__(self, python: Path, comfyui: Path, base: Path):
        self.python, self.comfyui, self.base = python, comfyui, base
        self._stack = ExitStack()
        self.starts = 0
        link = base / "custom_nodes" / "faults"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(INJECTOR, target_is_directory=True)
        for folder in (self.output, self.temp, self.input, self.loras):
            folder.mkdir(parents=True, exist_ok=True)
        self.start()

    output = property(lambda self: self.base / "output")
    temp = property(lambda self: self.base / "temp")
    input = property(lambda self: self.base / "input")
    loras = property(lambda self: self.base / "models" / "loras")
    models = property(lambda self: self.base / "models" / "diffusion_models")

    def start(self) -> None:
        options = ("--cpu", "--cache-classic")
        started = running(self.python, self.comfyui, self.base, options=options)
        self.server = self._stack.enter_context(started)
        self.session = self._stack.enter_context(Session(self.server))
        self.starts += 1

    def stop(self) -> None:
        self._stack.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    @property
    def alive(self) -> bool:
        return self.server.process.poll() is None

    def ask(self, path: str, body: Any = None) -> Any:
        return request(f"{self.server.address}{path}", body)

    # --- Running ----------------------------------------------------------------------------

    def run(
        self,
        prompt: Prompt,
        *,
        when: Callable[[Event], bool] = lambda event: False,
        delay: float = 0.0,
        fault: Callable[[str], None] = lambda prompt_id: None,
    ) -> Run:
        """Runs a prompt; `delay` seconds after the first event that `when` accepts comes the fault.

        Raises PromptRejected or TimeoutError.
        """
        begun, happened = time.monotonic(), []
        prompt_id, ending, message, timer = self.session.queue(prompt), "", "", None

        def strike() -> None:
            happened.append(time.monotonic())
            fault(prompt_id)

        try:
            for event in self.session.events(prompt_id, TIMEOUT):
                kind, data = event
                if kind.startswith("execution_") and kind != "execution_start":
                    if kind != "execution_cached":
                        ending, message = kind, str(data.get("exception_message", ""))
                elif timer is None and when(event):
                    timer = threading.Timer(delay, strike)
                    timer.start()
        except OSError:  # the server is gone
            ending = "killed"
        finally:
            if timer is not None:
                timer.cancel()
                timer.join()
        since = happened[0] if happened else begun
        return Run(ending, message, time.monotonic() - since, prompt_id)

    def succeed(self, prompt: Prompt) -> None:
        """Raises PromptFailed where a prompt does not run to its end."""
        ended = self.run(prompt)
        if ended.ending != "execution_success":
            raise PromptFailed({"exception_message": f"{ended.ending} {ended.message}"})

    def kill(self, _: str = "") -> None:
        """As the system does when memory is short: at once, with no word."""
        self.server.process.kill()
        self.server.process.wait()

    # --- What is left -----------------------------------------------------------------------

    def scratch_files(self) -> list[Path]:
        """Temporary files of the pack's own."""
        found = []
        for folder in (self.output, self.temp, self.loras):
            for pattern in ("atlasvid-*", ".atlasvid-*", ".*.part"):
                found += folder.rglob(pattern)
        return found

    def files(self) -> dict[Path, tuple[int, int]]:
        """Size and time of every file below the folders that nodes write to."""
        folders = (self.output, self.temp, self.loras, self.base / "user")
        every = (file for folder in folders for file in folder.rglob("*") if file.is_file())
        return {f: (f.stat().st_size, f.stat().st_mtime_ns) for f in every if f.suffix != ".log"}

    def level(self) -> Level:
        """What the server holds once models and caches are dropped."""
        process, before = psutil.Process(self.server.process.pid), NOTHING
        for _ in range(15):
            # Again each time: asked between two prompts, the server can miss it.
            self.ask("/free", {"unload_models": True, "free_memory": True})
            time.sleep(1)
            self.ask("/faults/settle", {})
            level = Level(
                process.memory_info().rss,
                process.num_fds(),
                process.num_threads(),
                len(self.scratch_files()),
            )
            if level.scratch == 0 and abs(level.memory - before.memory) < 2**20:
                break
            before = level
        return level

    # --- Too small a disk -------------------------------------------------------------------

    @contextmanager
    def largest_file(self, size: int) -> Iterator[None]:
        """No file of the server grows over `size` bytes: a full disk that needs no privileges."""
        pid, unlimited = self.server.process.pid, resource.RLIM_INFINITY
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, unlimited))
        try:
            yield
        finally:
            if self.alive:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of `size` bytes at `folder`; False where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = (
        shutil.which("mount")
        and not subprocess.run(command, capture_output=True, check=False).returncode
    )
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def filled(folder: Path, leave: int) -> Path:
    """Fills the disk of `folder` with one file, but for `leave` bytes; returns the file."""
    filler = folder / "filler.bin"
    free = shutil.disk_usage(folder).free
    filler.write_bytes(random.randbytes(max(0, free - leave)))
    return filler
