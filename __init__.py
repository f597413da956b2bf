"""AtlasVid for ComfyUI: long ultra-high-resolution video from any Wan model."""

import logging
import re

OLDEST_COMFYUI = (0, 18, 0)


def _comfyui_version() -> tuple[int, ...]:
    """The running ComfyUI's version; zeros where it is too old to have one."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return (0, 0, 0)
    return tuple(int(part) for part in re.findall(r"\d+", __version__)[:3])


WEB_DIRECTORY = "./web"

if _comfyui_version() >= OLDEST_COMFYUI:
    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
else:
    NODE_CLASS_MAPPINGS: dict = {}  # without it ComfyUI would add a warning of its own
    logging.error(
        "AtlasVid needs ComfyUI %s or newer, this is %s: update ComfyUI to use its nodes.",
        ".".join(map(str, OLDEST_COMFYUI)),
        ".".join(map(str, _comfyui_version())),
    )
