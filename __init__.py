"""AtlasVid for ComfyUI: long ultra-high-resolution video from any Wan model."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
