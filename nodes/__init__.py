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
from .flashvsr import AtlasVidFlashVSR, AtlasVidFlashVSRLoader, AtlasVidTCDecode
from .lora import AtlasVidGuideLoRA
from .plan import AtlasVidPlan
from .report import AtlasVidReport
from .resume import AtlasVidResume
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
    AtlasVidResume,
    AtlasVidTrainLoRA,
    AtlasVidTinyModels,
    AtlasVidDecode,
    AtlasVidDecodeToVideo,
    AtlasVidEncode,
    AtlasVidImageToVideo,
    AtlasVidFlashVSRLoader,
    AtlasVidFlashVSR,
    AtlasVidTCDecode,
    AtlasVidReport,
]


class AtlasVidExtension(ComfyExtension):
    """Lists the node classes for ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> AtlasVidExtension:
    routes.register()
    return AtlasVidExtension()
