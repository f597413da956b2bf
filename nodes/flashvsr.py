"""FlashVSR: video super-resolution in one step."""

from comfy_api.latest import io

from ..engine.flashvsr.colour import METHODS
from ..engine.flashvsr.files import choices, load_flashvsr
from ..engine.flashvsr.projection import VERSIONS
from ..engine.flashvsr.selection import Sparsity
from ..engine.flashvsr.tc_decoder import decode_to_video
from ..engine.flashvsr.video import DECODERS, upscaled_video
from .limits import within_limits
from .types import CATEGORY, FlashVSRType, bit_depth_input, memory_budget_input

VSR_MEMORY = (
    "Memory of the card beside the model's weights. Less means that keys and tokens wait in the "
    "computer's memory: slower, same result."
)
STRIPE_MEMORY = (
    "Working memory of the decoder beside its weights and what it remembers of a frame. Less means "
    "narrower stripes: slower, same pixels."
)


class AtlasVidFlashVSRLoader(io.ComfyNode):
    """The parts of FlashVSR, checked against each other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtlasVidFlashVSRLoader",
            display_name="AtlasVid FlashVSR Loader",
            category=CATEGORY,
            description="Loads FlashVSR, one-step video super-resolution, from models/FlashVSR: "
            "its Wan transformer, LQ projection, prompt and Tiny Conditional decoder.",
            search_aliases=["flashvsr", "super resolution", "upscale video", "load flashvsr"],
            inputs=[
                io.Combo.Input(
                    "transformer",
                    options=choices("transformer"),
                    tooltip="diffusion_pytorch_model_streaming_dmd.safetensors, from "
                    "models/FlashVSR or models/diffusion_models.",
                ),
                io.Combo.Input(
                    "projection",
                    options=choices("projection"),
                    tooltip="LQ_proj_in.ckpt, or a safetensors copy of it.",
                ),
                io.Combo.Input(
                    "prompt",
                    options=choices("prompt"),
                    tooltip="posi_prompt.pth: the one text that the model was trained with. It "
                    "lies beside FlashVSR's code, not beside its weights.",
                ),
                io.Combo.Input(
                    "tc_decoder",
                    options=choices("tc_decoder"),
                    tooltip="TCDecoder.ckpt. none: decode with the Wan VAE instead.",
                ),
                io.Combo.Input(
                    "version",
                    options=list(VERSIONS),
                    default="v1.1",
                    tooltip="Which version transformer and projection are of. Nothing in the files "
                    "tells; a mixed or wrong pair shows ghosts.",
                ),
            ],
            outputs=[
                FlashVSRType.Output(
                    display_name="flashvsr",
                    tooltip="For AtlasVid FlashVSR and AtlasVid TC Decode.",
                )
            ],
        )

    @classmethod
    @within_limits
    def execute(cls, transformer, projection, prompt, tc_decoder, version) -> io.NodeOutput:
        return io.NodeOutput(
            load_flashvsr(
                transformer=transformer,
                projection=projection,
                prompt=prompt,
                tc_decoder=tc_decoder,
                version=version,
            )
        )


class AtlasVidFlashVSR(io.ComfyNode):
    """One-step super-resolution of a clip of any size and length."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        size = {"default": 0, "min": 0, "max": 16384, "optional": True, "advanced": True}
        return io.Schema(
            node_id="AtlasVidFlashVSR",
            display_name="AtlasVid FlashVSR",
            category=CATEGORY,
            description="Makes a clip larger in one step, with the detail that FlashVSR has "
            "learnt. Any size, any length, no frame lost; what does not fit the card is worked "
            "on in pieces, with the same result.",
            search_aliases=["flashvsr", "super resolution", "upscale video", "vsr", "4k"],
            inputs=[
                FlashVSRType.Input("flashvsr", tooltip="From AtlasVid FlashVSR Loader."),
                io.MultiType.Input(
                    "video",
                    types=[io.Image, io.Video],
                    tooltip="What to make larger: images, or a video, which is read a few frames "
                    "at a time. Its sound, frame rate and rotation are kept.",
                ),
                io.Float.Input(
                    "scale",
                    default=4.0,
                    min=1.0,
                    max=16.0,
                    step=0.1,
                    tooltip="How many times as large. FlashVSR was trained for 4; 3 to 4 is best.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise. A longer clip begins with the same noise.",
                ),
                io.Combo.Input(
                    "decoder",
                    options=list(DECODERS),
                    default=DECODERS[0],
                    tooltip="tiny conditional: fast, made for this. Wan VAE: the exact decode of "
                    "this pack, slower; connect vae.",
                ),
                io.Combo.Input(
                    "colour",
                    options=list(METHODS),
                    default="adain",
                    tooltip="Takes colours from the clip: adain mean and contrast of every frame, "
                    "wavelet all low frequencies, off nothing.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="The Wan 2.1 VAE, for the decoder Wan VAE."
                ),
                io.Int.Input(
                    "width",
                    tooltip="Width of the result in place of scale. 0 follows height, or scale.",
                    **size,
                ),
                io.Int.Input(
                    "height",
                    tooltip="Height of the result in place of scale. 0 follows width, or scale.",
                    **size,
                ),
                io.Float.Input(
                    "sparse_ratio",
                    default=2.0,
                    min=0.1,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="How much every part of the picture attends to: 60 blocks times this. "
                    "1.5 is faster; more is slower and steadier.",
                ),
                io.Float.Input(
                    "kv_ratio",
                    default=3.0,
                    min=1.0,
                    max=32.0,
                    step=1.0,
                    optional=True,
                    advanced=True,
                    tooltip="How much of the past is remembered, in steps of eight frames.",
                ),
                io.Int.Input(
                    "local_range",
                    default=11,
                    min=1,
                    max=129,
                    optional=True,
                    advanced=True,
                    tooltip="How far attention reaches, in blocks of 128 pixels. 9 is sharper, 11 "
                    "steadier.",
                ),
                memory_budget_input(VSR_MEMORY),
                io.Float.Input(
                    "fps",
                    default=0.0,
                    min=0.0,
                    max=240.0,
                    step=1.0,
                    optional=True,
                    advanced=True,
                    tooltip="Frames per second of the result. 0 keeps the video's own, for images "
                    "16.",
                ),
                bit_depth_input(),
            ],
            outputs=[
                io.Video.Output(
                    display_name="video",
                    tooltip="Connect to Save Video, which decodes it while it writes. Temporary "
                    "disk space holds its frames while this video is in use.",
                ),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The same as a latent, with the padding to multiples of 128 pixels at "
                    "the right and the bottom, and that of the length.",
                ),
            ],
        )

    @classmethod
    @within_limits
    def execute(
        cls,
        flashvsr,
        video,
        scale,
        seed,
        decoder,
        colour,
        vae=None,
        width=0,
        height=0,
        sparse_ratio=2.0,
        kv_ratio=3.0,
        local_range=11,
        memory_budget="auto",
        fps=0.0,
        bit_depth=8,
    ) -> io.NodeOutput:
        result, latent = upscaled_video(
            flashvsr,
            video,
            scale=scale,
            width=width,
            height=height,
            sparsity=Sparsity(sparse_ratio, kv_ratio, local_range),
            colour=colour,
            seed=seed,
            decoder=decoder,
            vae=vae,
            budget=memory_budget,
            fps=fps,
            bit_depth=bit_depth,
        )
        return io.NodeOutput(result, {"samples": latent})


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
                bit_depth_input(),
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
    @within_limits
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
