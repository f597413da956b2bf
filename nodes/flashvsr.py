"""FlashVSR: video super-resolution in one step."""

from comfy_api.latest import io

from ..engine.flashvsr.colour import METHODS
from ..engine.flashvsr.tc_decoder import decode_to_video
from .types import CATEGORY, FlashVSRType, memory_budget_input

STRIPE_MEMORY = (
    "Working memory of the decoder beside its weights and what it remembers of a frame. Less means "
    "narrower stripes: slower, same pixels."
)


class AtlasVidTCDecode(io.ComfyNode):
    """FlashVSR's small decoder, for any Wan 2.1 latent with a low-quality version of its video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        size = {"default": 0, "min": 0, "max": 16384, "optional": True, "advanced": True}
        return io.Schema(
            node_id="AtlasVidTCDecode",
            display_name="AtlasVid TC Decode",
            category=CATEGORY,
            description="Decodes a Wan 2.1 latent with FlashVSR's Tiny Conditional decoder: a "
            "fraction of the VAE's work, guided by the low-quality video that the latent was made "
            "from. The frames are decoded while Save Video writes them.",
            search_aliases=["flashvsr", "tiny conditional decoder", "vae decode", "taehv"],
            inputs=[
                io.Latent.Input("samples", tooltip="The Wan 2.1 video latent to decode."),
                io.MultiType.Input(
                    "low_quality",
                    types=[io.Image, io.Video],
                    tooltip="What the latent was made from: images, or a video of the same frames "
                    "at any size. A video's sound and frame rate are kept.",
                ),
                FlashVSRType.Input(
                    "flashvsr", tooltip="FlashVSR with its decoder, from AtlasVid FlashVSR Loader."
                ),
                io.Combo.Input(
                    "colour",
                    options=list(METHODS),
                    default="adain",
                    optional=True,
                    tooltip="Takes colours from the low-quality frames: adain mean and contrast of "
                    "every frame, wavelet all low frequencies, off nothing.",
                ),
                io.Float.Input(
                    "fps",
                    default=0.0,
                    min=0.0,
                    max=240.0,
                    step=1.0,
                    optional=True,
                    tooltip="Frames per second of the result. 0 keeps the video's own, for images "
                    "16.",
                ),
                io.Int.Input(
                    "width",
                    tooltip="Width of the result, where the latent is padded on the right. 0 is "
                    "the latent's whole width.",
                    **size,
                ),
                io.Int.Input(
                    "height",
                    tooltip="Height of the result, where the latent is padded at the bottom. 0 is "
                    "the latent's whole height.",
                    **size,
                ),
                memory_budget_input(STRIPE_MEMORY),
                io.Audio.Input(
                    "audio", optional=True, tooltip="Sound in place of the video's own."
                ),
                io.Int.Input(
                    "bit_depth",
                    optional=True,
                    default=8,
                    min=8,
                    max=10,
                    step=2,
                    advanced=True,
                    tooltip="10 keeps smoother gradients, but fewer players show it. Needs a "
                    "ComfyUI whose Create Video node offers it.",
                ),
            ],
            outputs=[
                io.Video.Output(
                    display_name="video",
                    tooltip="Connect to Save Video. Temporary disk space holds its frames while "
                    "this video is in use.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        samples,
        low_quality,
        flashvsr,
        colour="adain",
        fps=0.0,
        width=0,
        height=0,
        memory_budget="auto",
        audio=None,
        bit_depth=8,
    ) -> io.NodeOutput:
        video = decode_to_video(
            flashvsr,
            samples["samples"],
            low_quality,
            width=width,
            height=height,
            colour=colour,
            budget=memory_budget,
            fps=fps,
            audio=audio,
            bit_depth=bit_depth,
        )
        return io.NodeOutput(video)
