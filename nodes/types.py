"""Socket types of the pack."""

from comfy_api.latest import io

PlanType = io.Custom("ATLASVID_PLAN")
GuideLoraType = io.Custom("ATLASVID_GUIDE_LORA")

CATEGORY = "AtlasVid"
