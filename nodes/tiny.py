"""Small models to try every workflow without downloads."""

from comfy_api.latest import io

from ..engine.tiny import tiny_models
from .types import CATEGORY


class AtlasVidTinyModels(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AtlasVidTinyModels",
            display_name="AtlasVid Tiny Models",
            category=CATEGORY,
            description="A small Wan, text encoder and VAE with random weights: they run every "
            "AtlasVid workflow in minutes on any computer and make coloured noise.",
            search_aliases=["test models", "demo models"],
            inputs=[
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    tooltip="Seed of the random weights.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="A small Wan 2.1 text-to-video model."),
                io.Clip.Output("clip", tooltip="A small stand-in for the UMT5 text encoder."),
                io.Vae.Output("vae", tooltip="A small Wan 2.1 VAE."),
            ],
        )

    @classmethod
    def execute(cls, seed) -> io.NodeOutput:
        return io.NodeOutput(*tiny_models(seed))
