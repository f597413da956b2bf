"""Imports run down: the contracts in pyproject.toml, and what shows them."""

import subprocess
import sys

from floors import HOLDS, ROOT, floors, importable


def lint(config):
    with importable() as folder:
        command = "from importlinter.cli import lint_imports_command as lint; lint()"
        return subprocess.run(
            [sys.executable, "-c", command, str(config), "--no-cache"],
            cwd=folder,
            env={"PYTHONPATH": str(folder), "PATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )


def test_imports_run_down():
    result = lint(ROOT / "pyproject.toml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_import_that_runs_up_is_found(tmp_path):
    upside_down = tmp_path / "pyproject.toml"
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    upside_down.write_text(text.replace('  "nodes",\n', "").replace(
        '  "engine.comfyui",\n', '  "engine.comfyui",\n  "nodes",\n'
    ))  # fmt: skip
    result = lint(upside_down)
    assert result.returncode == 1, result.stderr
    assert "atlasvid.nodes" in result.stdout


def test_every_room_stands_on_a_floor():
    rooms = {room.removeprefix("engine.") for level in floors() for room in level}
    folders = {path.parent.name for path in (ROOT / "engine").glob("*/__init__.py")}
    assert rooms == folders | {"nodes"} == set(HOLDS)
