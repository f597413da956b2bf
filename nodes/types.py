"""Socket types and inputs that several nodes share."""

from comfy_api.latest import io

from ..engine.device.budget import AUTO, BUDGETS

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
