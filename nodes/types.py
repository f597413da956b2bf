"""Socket types of the pack."""

from comfy_api.latest import io

PlanType = io.Custom("ATLASVID_PLAN")

CATEGORY = "AtlasVid"
