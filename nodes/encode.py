"""Pixels to latents: exact tiles, bounded memory."""

from comfy_api.latest import io

from ..engine.comfyui import models
from ..engine.geometry.grid import Grid
from ..engine.proxy.latents import empty_latent
from ..engine.vae.encode import encode_frames, start_image_latents
from ..engine.vae.sources import frame_source
from ..engine.vae.wan import latent_count
from .decode import TILE_MEMORY
from .limits import within_limits
from .types import CATEGORY, memory_budget_input


class AtlasVidEncode(io.ComfyNode):
    """The untiled encode's latent, in tiles, from images or straight from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtlasVidEncode",
            display_name="AtlasVid Encode",
            category=CATEGORY,
            description="Encodes a clip in tiles whose result equals an untiled encode. A video "
            "from a file is read a few frames at a time, so a 4K clip needs little memory.",
            search_aliases=["vae encode", "tiled encode", "video to latent"],
            inputs=[
                io.MultiType.Input(
                    "pixels",
                    types=[io.Image, io.Video],
                    tooltip="Images, or a video. Its length is cut to 1 + 4n frames, its sides to "
                    "multiples of 8 (Wan 2.1 VAE) or 16 (Wan 2.2 VAE), around the centre.",
                ),
                io.Vae.Input("vae", tooltip="A Wan 2.1 or Wan 2.2 VAE."),
                memory_budget_input(TILE_MEMORY),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The clip as a latent.")],
        )

    @classmethod
    @within_limits
    def execute(cls, pixels, vae, memory_budget="auto") -> io.NodeOutput:
        latent = encode_frames(vae, frame_source(pixels), budget=memory_budget)
        return io.NodeOutput({"samples": latent})


class AtlasVidImageToVideo(io.ComfyNode):
    """What the stock WanImageToVideo gives, without its full-length image tensor."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        size = {"min": 16, "max": 16384, "step": 16}
        return io.Schema(
            node_id="AtlasVidImageToVideo",
            display_name="AtlasVid Image to Video",
            category=CATEGORY,
            description="Conditions a Wan image-to-video model on a start image, as the stock "
            "WanImageToVideo does, at sizes where that node runs out of memory.",
            search_aliases=["wan image to video", "i2v", "start frame"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the video should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.Vae.Input("vae", tooltip="The Wan 2.1 VAE."),
                io.Int.Input("width", default=832, **size, tooltip="Width of the video, pixels."),
                io.Int.Input("height", default=480, **size, tooltip="Height of the video, pixels."),
                io.Int.Input(
                    "frames",
                    default=81,
                    min=1,
                    max=16384,
                    step=4,
                    tooltip="Length of the video: 1 + 4n frames.",
                ),
                io.Image.Input(
                    "start_image",
                    tooltip="The first frame or frames; scaled and cropped to the video's size.",
                ),
                memory_budget_input(TILE_MEMORY),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    optional=True,
                    tooltip="The start image as CLIP Vision sees it, for Wan 2.1 I2V models.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="positive, with the start image."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="negative, with the start image."
                ),
                io.Latent.Output(
                    display_name="latent", tooltip="An empty latent of the video's size."
                ),
            ],
        )

    @classmethod
    @within_limits
    def execute(
        cls,
        positive,
        negative,
        vae,
        width,
        height,
        frames,
        start_image,
        memory_budget="auto",
        clip_vision_output=None,
    ) -> io.NodeOutput:
        empty = empty_latent(16, Grid(latent_count(frames), height // 8, width // 8))
        image, mask = start_image_latents(
            vae, start_image, width=width, height=height, frames=frames, budget=memory_budget
        )
        shown = {"concat_latent_image": image, "concat_mask": mask}
        if clip_vision_output is not None:
            shown["clip_vision_output"] = clip_vision_output
        return io.NodeOutput(
            models.set_conditioning(positive, shown),
            models.set_conditioning(negative, shown),
            {"samples": empty},
        )
