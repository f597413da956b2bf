"""The plan of a video."""

from comfy_api.latest import io

from ..engine.estimate.overview import shape_record
from ..engine.families.family import latent_space
from ..engine.geometry.plan import (
    MAX_FPS,
    MAX_SECONDS,
    MAX_SIDE,
    MAX_STRIDE,
    MIN_FPS,
    MIN_SECONDS,
    MIN_SIDE,
    make_plan,
)
from ..engine.proxy.latents import empty_latent
from .limits import within_limits
from .types import CATEGORY, PlanType


class AtlasVidPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AtlasVidPlan",
            display_name="AtlasVid Plan",
            category=CATEGORY,
            description="Rounds a size and a length to what the model can make, and plans the "
            "small, slow proxy video that guides the large one.",
            search_aliases=["4k video", "long video", "ultra high resolution", "wan 4k"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The Wan model that will make the video."),
                io.Int.Input(
                    "width",
                    default=3840,
                    min=MIN_SIDE,
                    max=MAX_SIDE,
                    step=16,
                    tooltip="Width of the finished video in pixels.",
                ),
                io.Int.Input(
                    "height",
                    default=2160,
                    min=MIN_SIDE,
                    max=MAX_SIDE,
                    step=16,
                    tooltip="Height of the finished video in pixels.",
                ),
                io.Float.Input(
                    "seconds",
                    default=10.0,
                    min=MIN_SECONDS,
                    max=MAX_SECONDS,
                    step=0.1,
                    tooltip="Length of the finished video.",
                ),
                io.Float.Input(
                    "fps",
                    default=16.0,
                    min=MIN_FPS,
                    max=MAX_FPS,
                    step=1.0,
                    tooltip="Frames per second of the finished video. Wan 2.1 was trained at 16.",
                ),
                io.Int.Input(
                    "proxy_short_side",
                    default=480,
                    min=MIN_SIDE,
                    max=MAX_SIDE,
                    step=16,
                    tooltip="Shorter side of the proxy: the size that the model was trained at.",
                ),
                io.Int.Input(
                    "temporal_stride",
                    default=4,
                    min=1,
                    max=MAX_STRIDE,
                    tooltip="Frames of the finished video per frame of the proxy.",
                ),
            ],
            outputs=[
                PlanType.Output("plan", tooltip="The plan, for the other AtlasVid nodes."),
                io.Latent.Output("proxy_latent", tooltip="Empty latent to sample the proxy from."),
                io.Int.Output("width", tooltip="Width of the finished video."),
                io.Int.Output("height", tooltip="Height of the finished video."),
                io.Int.Output("frames", tooltip="Frames of the finished video."),
                io.Int.Output("proxy_width", tooltip="Width of the proxy."),
                io.Int.Output("proxy_height", tooltip="Height of the proxy."),
                io.Int.Output("proxy_frames", tooltip="Frames of the proxy."),
            ],
        )

    @classmethod
    @within_limits
    def execute(
        cls, model, width, height, seconds, fps, proxy_short_side, temporal_stride
    ) -> io.NodeOutput:
        space = latent_space(model)
        plan = make_plan(
            space,
            width=width,
            height=height,
            seconds=seconds,
            fps=fps,
            proxy_short_side=proxy_short_side,
            temporal_stride=temporal_stride,
        )
        return io.NodeOutput(
            plan,
            {"samples": empty_latent(space.channels, plan.proxy_latent)},
            plan.width,
            plan.height,
            plan.frames,
            plan.proxy_width,
            plan.proxy_height,
            plan.proxy_frames,
            ui={"text": (plan.describe(),), "model_shape": (shape_record(model),)},
        )
