"""tools/demo.py as a newcomer runs it, on a quick workflow."""

import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "tools" / "demo.py"
CLIP = Path(__file__).with_name("graphs") / "clip.json"


@pytest.fixture
def demo(tmp_path: Path) -> list[str]:
    """The command, with the ComfyUI under test as the newcomer's own."""
    options = ["--python", sys.executable, "--output", str(tmp_path / "videos")]
    return [sys.executable, str(DEMO), *options, "--workflow", str(CLIP)]


def test_says_where_the_video_lies_and_what_each_stage_took(
    demo: list[str], tmp_path: Path
) -> None:
    done = subprocess.run(demo, capture_output=True, text=True, check=True)
    video = tmp_path / "videos" / "clips" / "converted_00001_.mp4"
    assert video.is_file()
    assert f"finished: {video}" in done.stdout
    assert "192 x 96, 9 frames at 12.5 fps" in done.stdout
    for stage in ("A blue clip", "Create Video", "Save Video", "all"):
        assert any(
            line.startswith(f"  {stage} ") and line.endswith(" s")
            for line in done.stdout.splitlines()
        )


def as_in_a_terminal() -> None:
    """A test run in the background ignores interrupts, and its children would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_serve_leaves_comfyui_up_until_it_is_told_to_end(demo: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "ATLASVID_CACHE": str(tmp_path / "cache"), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*demo, "--serve"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=as_in_a_terminal,  # noqa: PLW1509  (this test runs no threads)
    )
    assert process.stdout
    line = next(line for line in process.stdout if "in a browser" in line)
    address = next(word for word in line.split() if word.startswith("http"))
    assert urllib.request.urlopen(address, timeout=10).status == 200
    process.send_signal(signal.SIGINT)
    assert "ComfyUI has ended" in process.communicate(timeout=30)[0]
    assert process.returncode == 0
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address, timeout=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--comfyui", "/nowhere"], "/nowhere is not a ComfyUI folder: it has no main.py"),
        (["--workflow", "/nowhere.json"], "there is no workflow /nowhere.json"),
        (["--python", "/bin/false"], "/bin/false cannot run ComfyUI"),
    ],
)
def test_errors_say_what_to_change(demo: list[str], options: list[str], message: str) -> None:
    done = subprocess.run([*demo, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert message in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_help_explains_the_options(demo: list[str]) -> None:
    shown = subprocess.run([*demo, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(
        option in shown for option in ("--serve", "--comfyui", "COMFYUI_PATH", "cache folder")
    )


def test_uses_the_comfyui_that_the_pack_sits_in(tmp_path: Path) -> None:
    comfyui = tmp_path / "ComfyUI"
    pack = comfyui / "custom_nodes" / "some-clone"
    shutil.copytree(ROOT / "tools", pack / "tools")
    (comfyui / "main.py").touch()
    python = comfyui / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    script = (
        "import demo; found = demo.own_comfyui(None); print(found, demo.own_python(found, None))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "COMFYUI_PATH"}
    shown = subprocess.run(
        [sys.executable, "-c", script],
        cwd=pack / "tools",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split() == [str(comfyui), str(python)]
