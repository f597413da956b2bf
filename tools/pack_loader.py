"""Loads ComfyUI's modules and this pack into the running Python, as a server would."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACK = "atlasvid"


def load_comfyui(folder: Path, *options: str) -> None:
    """Makes `comfy` importable, started with ComfyUI's own command line `options`."""
    sys.path.insert(0, str(folder))
    argv, sys.argv = sys.argv, ["main.py", *options]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # parses sys.argv at import

    sys.argv = argv
    # As in a server: before ComfyUI 0.18's nodes.py puts comfy/, with its utils.py, first.
    importlib.import_module("utils.install_util")


def load_pack() -> None:
    """Imports this checkout as the package `atlasvid`, whatever its folder is called."""
    spec = importlib.util.spec_from_file_location(
        PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)
