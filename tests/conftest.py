"""Loads the pack as ComfyUI does, inside this process, on the CPU.

COMFYUI_PATH names the ComfyUI to test against; `tools/test.py` sets it.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACK = "atlasvid"


def _load_comfyui() -> None:
    comfyui = os.environ.get("COMFYUI_PATH")
    if not comfyui or not (Path(comfyui) / "comfy").is_dir():
        pytest.exit("COMFYUI_PATH does not name a ComfyUI folder: run `python tools/test.py`", 2)
    sys.path.insert(0, comfyui)
    argv, sys.argv = sys.argv, ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # parses sys.argv at import

    sys.argv = argv


def _load_pack() -> None:
    spec = importlib.util.spec_from_file_location(
        PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)


_load_comfyui()
_load_pack()
