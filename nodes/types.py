"""Socket types and inputs that several nodes share."""

from typing import Any

from comfy_api.latest import io

from ..engine.device.budget import AUTO, BUDGETS
from ..engine.geometry.grid import Grid

PlanType = io.Custom("ATLASVID_PLAN")
FlashVSRType = io.Custom("ATLASVID_FLASHVSR")
GuideLoraType = io.Custom("ATLASVID_GUIDE_LORA")

CATEGORY = "AtlasVid"


def memory_budget_input(tooltip: str) -> io.Combo.Input:
    """A choice of `auto` or a size; what it limits is the node's to say."""
    return io.Combo.Input(
        "memory_budget",
        options=list(BUDGETS),
        default=AUTO,
        optional=True,
        advanced=True,
        tooltip=tooltip,
    )


def bit_depth_input() -> io.Int.Input:
    """Of the video that a node gives."""
    return io.Int.Input(
        "bit_depth",
        optional=True,
        default=8,
        min=8,
        max=10,
        step=2,
        advanced=True,
        tooltip="10 keeps smoother gradients, but fewer players show it. Needs a ComfyUI whose "
        "Create Video node offers it.",
    )


def window_input(tooltip: str) -> io.DynamicCombo.Input:
    """A choice of the presets of windows, or of sizes of one's own."""
    sides = (
        ("frames", 4, "time axis (one token is one latent frame)"),
        ("height", 16, "height (one token is 16 pixels)"),
        ("width", 16, "width (one token is 16 pixels)"),
    )
    sizes = [
        io.Int.Input(
            name,
            default=default,
            min=1,
            max=512,
            tooltip=f"Tokens of a window along the {axis}.",
        )
        for name, default, axis in sides
    ]
    options = {AUTO: [], "compact": [], "trained size": [], "custom": sizes}
    return io.DynamicCombo.Input(
        "window",
        options=[io.DynamicCombo.Option(key, inputs) for key, inputs in options.items()],
        tooltip=tooltip,
    )


def custom_window(chosen: dict[str, Any]) -> Grid:
    """The sizes that a window input brings along; 1 for those that it does not."""
    return Grid(*(chosen.get(side, 1) for side in ("frames", "height", "width")))
