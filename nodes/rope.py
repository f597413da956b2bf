"""Scaled positions for the proxy."""

from comfy_api.latest import io

from ..engine.proxy.frequencies import METHODS, apply_rope_method
from .limits import within_limits
from .types import CATEGORY, PlanType


class AtlasVidRoPE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AtlasVidRoPE",
            display_name="AtlasVid RoPE",
            category=CATEGORY,
            description="Tells the model that its frames lie further apart in time, so that a "
            "short clip shows a long event. For the proxy's sampler; the detail branch takes the "
            "model without it.",
            search_aliases=["rope scale", "ntk", "yarn", "riflex", "longer video"],
            inputs=[
                io.Model.Input("model", tooltip="The model that samples the proxy."),
                io.Float.Input(
                    "temporal_scale",
                    default=4.0,
                    min=0.05,
                    max=32.0,
                    step=0.05,
                    tooltip="Factor on positions in time. A connected plan's stride replaces it.",
                ),
                io.Float.Input(
                    "spatial_scale",
                    default=1.0,
                    min=0.05,
                    max=32.0,
                    step=0.05,
                    tooltip="Factor on positions in height and width; below 1 for images larger "
                    "than the model was trained on.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="linear",
                    tooltip="linear scales every frequency, as the stock ScaleROPE does; how the "
                    "paper scales them is not public, and this is inferred. ntk and yarn scale "
                    "the slow frequencies and keep the fast; riflex is linear with one slow "
                    "frequency lowered against repetition.",
                ),
                PlanType.Input(
                    "plan",
                    optional=True,
                    tooltip="Takes the temporal scale from this plan.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model with scaled positions.")],
        )

    @classmethod
    @within_limits
    def execute(cls, model, temporal_scale, spatial_scale, method, plan=None) -> io.NodeOutput:
        scaled = apply_rope_method(
            model,
            method,
            temporal_scale=temporal_scale,
            spatial_scale=spatial_scale,
            plan=plan,
        )
        return io.NodeOutput(scaled)
