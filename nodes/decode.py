"""Latents to pixels: exact tiles, bounded memory."""

from fractions import Fraction

from comfy_api.latest import io

from ..engine.vae.decode import TiledDecoder, decode_images
from ..engine.vae.video import StreamedVideo
from .limits import within_limits
from .types import CATEGORY, bit_depth_input, memory_budget_input

TILE_MEMORY = (
    "Working memory for one tile. auto takes tiles that lose under 10 % to their overlap and fit "
    "the free memory. Less memory means smaller tiles: slower, same pixels."
)


class AtlasVidDecode(io.ComfyNode):
    """The untiled decode's pixels, in tiles."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtlasVidDecode",
            display_name="AtlasVid Decode",
            category=CATEGORY,
            description="Decodes a Wan latent in tiles whose result equals an untiled decode: "
            "nothing is blended. For a video file, AtlasVid Decode to Video needs far less memory.",
            search_aliases=["vae decode", "tiled decode", "4k decode"],
            inputs=[
                io.Latent.Input("samples", tooltip="The video latent to decode."),
                io.Vae.Input("vae", tooltip="A Wan 2.1 or Wan 2.2 VAE."),
                memory_budget_input(TILE_MEMORY),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    tooltip="All frames as one image batch; a batch of videos one after another.",
                )
            ],
        )

    @classmethod
    @within_limits
    def execute(cls, samples, vae, memory_budget="auto") -> io.NodeOutput:
        return io.NodeOutput(decode_images(vae, samples["samples"], budget=memory_budget))


class AtlasVidDecodeToVideo(io.ComfyNode):
    """A VIDEO that decodes while it is saved."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtlasVidDecodeToVideo",
            display_name="AtlasVid Decode to Video",
            category=CATEGORY,
            description="Turns a Wan latent into a video that is decoded while Save Video writes "
            "it, so its frames never fill the memory. Pixels equal an untiled decode.",
            search_aliases=["vae decode", "create video", "4k video", "stream"],
            inputs=[
                io.Latent.Input("samples", tooltip="The video latent to decode."),
                io.Vae.Input("vae", tooltip="A Wan 2.1 or Wan 2.2 VAE."),
                io.Float.Input(
                    "fps",
                    default=16.0,
                    min=1.0,
                    max=120.0,
                    step=1.0,
                    tooltip="Frames per second of the video.",
                ),
                memory_budget_input(TILE_MEMORY),
                io.Audio.Input("audio", optional=True, tooltip="Sound to add to the video."),
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
        cls, samples, vae, fps, memory_budget="auto", audio=None, bit_depth=8
    ) -> io.NodeOutput:
        tiled = TiledDecoder(vae, samples["samples"], budget=memory_budget)
        video = StreamedVideo(tiled, frame_rate=Fraction(fps), audio=audio, bit_depth=bit_depth)
        return io.NodeOutput(video)
