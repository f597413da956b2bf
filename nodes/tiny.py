"""Small models to try every workflow without downloads."""

from comfy_api.latest import io

from ..engine.families.tiny import random_family, trained_family
from ..engine.flashvsr.tiny import random_flashvsr, trained_flashvsr
from .limits import within_limits
from .types import CATEGORY, FlashVSRType, GuideLoraType


class AtlasVidTinyModels(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AtlasVidTinyModels",
            display_name="AtlasVid Tiny Models",
            category=CATEGORY,
            description="A Wan of 8 million parameters with its text encoder, VAE and LoRAs, "
            "trained on drawings of hot-air balloons: they run every AtlasVid workflow in minutes "
            "on any computer. A toy to show the method, not Wan's quality.",
            search_aliases=["test models", "demo models"],
            inputs=[
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    tooltip="Seed of the random weights; the trained ones do not need it.",
                ),
                io.Combo.Input(
                    "weights",
                    options=["trained", "random"],
                    default="trained",
                    optional=True,
                    tooltip="trained: knows prompts such as: wide view of a red balloon drifting "
                    "left over hills at noon. Colours: red, yellow, green, purple, white. Lands: "
                    "hills, desert, snow. Times: noon, dusk, night. random: makes noise.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="A small Wan 2.1 text-to-video model."),
                io.Clip.Output("clip", tooltip="A small stand-in for the UMT5 text encoder."),
                io.Vae.Output("vae", tooltip="A small Wan 2.1 VAE."),
                GuideLoraType.Output(
                    "guide_lora",
                    tooltip="A LoRA for the guide_lora input of AtlasVid Hierarchical Attention; "
                    "nothing with random weights.",
                ),
                io.Model.Output(
                    "proxy_model", tooltip="The model with the LoRA that samples proxies."
                ),
                FlashVSRType.Output(
                    "flashvsr",
                    tooltip="A small FlashVSR for AtlasVid FlashVSR, trained on the same drawings.",
                ),
            ],
        )

    @classmethod
    @within_limits
    def execute(cls, seed, weights="trained") -> io.NodeOutput:
        if weights == "trained":
            return io.NodeOutput(*trained_family(), trained_flashvsr())
        return io.NodeOutput(*random_family(seed), random_flashvsr(seed))
