"""LoRAs of the guide stream, and training."""

from comfy_api.latest import io

from ..engine.comfyui import server
from ..engine.lora.guide import load_guide_lora
from .limits import within_limits
from .types import CATEGORY, GuideLoraType


class AtlasVidGuideLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AtlasVidGuideLoRA",
            display_name="AtlasVid Guide LoRA",
            category=CATEGORY,
            description="Loads a LoRA that acts on one stream only, while the other keeps the "
            "model's own weights. For the guide_lora or target_lora input of AtlasVid "
            "Hierarchical Attention.",
            search_aliases=["lora loader", "detail lora"],
            inputs=[
                io.Combo.Input(
                    "lora",
                    options=server.lora_names(),
                    tooltip="A .safetensors file in ComfyUI's loras folder, in peft, diffusers or "
                    "ComfyUI layout.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How strongly it changes its stream. 0 turns it off.",
                ),
            ],
            outputs=[
                GuideLoraType.Output(
                    "guide_lora", tooltip="The LoRA, for AtlasVid Hierarchical Attention."
                )
            ],
        )

    @classmethod
    @within_limits
    def execute(cls, lora, strength) -> io.NodeOutput:
        return io.NodeOutput(load_guide_lora(server.lora_path(lora), strength=strength))
