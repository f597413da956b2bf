"""On a ComfyUI below the supported version the pack says so in one line and offers no nodes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOAD = """
import sys
sys.path[:0] = sys.argv[1:]
import pack_loader
pack_loader.load_pack()
import atlasvid
print(sorted({"comfy_entrypoint", "NODE_CLASS_MAPPINGS"} & set(vars(atlasvid))))
"""


@pytest.mark.parametrize("version", ["0.3.64", "0.17.9", None])
def test_old_comfyui_gets_one_line(tmp_path: Path, version: str | None) -> None:
    if version:
        (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n', "utf-8")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path), str(ROOT / "tools")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "['NODE_CLASS_MAPPINGS']"
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert f"AtlasVid needs ComfyUI 0.18.0 or newer, this is {version or '0.0.0'}" in lines[0]
