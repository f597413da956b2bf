"""The pack's nodes, one file per family."""

from comfy_api.latest import ComfyExtension, io

from . import routes
from .decode import AtlasVidDecode, AtlasVidDecodeToVideo
from .detail import (
    AtlasVidDetailLatent,
    AtlasVidHierarchicalAttention,
    AtlasVidStructureGuidance,
)
from .encode import AtlasVidEncode, AtlasVidImageToVideo
from .lora import AtlasVidGuideLoRA
from .plan import AtlasVidPlan
from .report import AtlasVidReport
from .rope import AtlasVidRoPE
from .tiny import AtlasVidTinyModels
from .train import AtlasVidTrainLoRA

NODES: list[type[io.ComfyNode]] = [
    AtlasVidPlan,
    AtlasVidRoPE,
    AtlasVidDetailLatent,
    AtlasVidHierarchicalAttention,
    AtlasVidStructureGuidance,
    AtlasVidGuideLoRA,
    AtlasVidTrainLoRA,
    AtlasVidTinyModels,
    AtlasVidDecode,
    AtlasVidDecodeToVideo,
    AtlasVidEncode,
    AtlasVidImageToVideo,
    AtlasVidReport,
]


class AtlasVidExtension(ComfyExtension):
    """Lists the node classes for ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> AtlasVidExtension:
    routes.register()
    return AtlasVidExtension()
