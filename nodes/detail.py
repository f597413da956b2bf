"""The detail branch: its latent, its attention, its optional guidance."""

from comfy_api.latest import io

from ..engine.branch.apply import apply_detail_branch
from ..engine.branch.attention import BACKENDS
from ..engine.branch.settings import GUIDE_NOISE, preset_guide_noise, preset_window
from ..engine.device.budget import AUTO
from ..engine.geometry.layout import OVERLAPS
from ..engine.lora.guide import habits_of
from ..engine.proxy.latents import require_proxy, upscale_proxy
from ..engine.proxy.structure import apply_structure_guidance
from .limits import within_limits
from .types import (
    CATEGORY,
    GuideLoraType,
    PlanType,
    custom_window,
    memory_budget_input,
    window_input,
)


class AtlasVidDetailLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AtlasVidDetailLatent",
            display_name="AtlasVid Detail Latent",
            category=CATEGORY,
            description="The proxy resampled in space and time onto the target's grid. Sample "
            "from it with denoise below 1 to refine the proxy, or with denoise 1 for its shape.",
            search_aliases=["latent upscale video", "resample latent"],
            inputs=[
                PlanType.Input("plan", tooltip="The plan that the proxy was made from."),
                io.Latent.Input("proxy", tooltip="The sampled proxy."),
            ],
            outputs=[io.Latent.Output("latent", tooltip="Latent of the target's size.")],
        )

    @classmethod
    @within_limits
    def execute(cls, plan, proxy) -> io.NodeOutput:
        require_proxy(proxy["samples"], plan)
        return io.NodeOutput({"samples": upscale_proxy(proxy["samples"], plan)})


class AtlasVidHierarchicalAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AtlasVidHierarchicalAttention",
            display_name="AtlasVid Hierarchical Attention",
            category=CATEGORY,
            description="Lets the model sample the plan's large, long target: every token attends "
            "to its own window and to the part of the proxy that shows the same place and time.",
            search_aliases=["window attention", "detail branch", "4k sampling"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The Wan model that samples the target, without AtlasVid RoPE.",
                ),
                PlanType.Input("plan", tooltip="The plan of the video."),
                window_input(
                    "auto: what the guide LoRA was trained with, trained size without one. "
                    "compact: 4 x 16 x 16 tokens, fastest, for use with a guide LoRA. "
                    "trained size: the proxy's own grid, for the model as it is. "
                    "custom: your own sizes."
                ),
                io.Combo.Input(
                    "overlap",
                    options=list(OVERLAPS),
                    default="shifted",
                    tooltip="shifted: windows move by half their size on every other block, so "
                    "that no border stays; fastest. sliding: every tile reads a window centred on "
                    "it, for trained size windows without a LoRA; slower.",
                ),
                io.Combo.Input(
                    "guide_noise",
                    options=["auto", *GUIDE_NOISE],
                    default="auto",
                    tooltip="auto: clean with a guide LoRA, matched without one. "
                    "matched: the proxy is noised to the step's level, for the model as "
                    "it is. clean: the proxy as it is, for use with a guide LoRA. joint: the guide "
                    "is denoised beside the target, from the proxy noised to the first step's "
                    "level.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the sampling at which this begins. Before it the model's own "
                    "full attention runs, which is slow at large sizes.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the sampling at which this ends. After it the model's own "
                    "full attention runs, which is slow at large sizes.",
                ),
                memory_budget_input(
                    "Card memory that sampling may use beside the weights. auto: three quarters of "
                    "what is free. With less, work is done in smaller pieces and, if need be, "
                    "tokens stream from the computer's memory: slower, same result."
                ),
                io.Combo.Input(
                    "attention",
                    options=list(BACKENDS),
                    default=BACKENDS[0],
                    optional=True,
                    advanced=True,
                    tooltip="auto: what ComfyUI was started with. The others when installed; "
                    "sage is checked against PyTorch's at first use.",
                ),
                io.Int.Input(
                    "keep_blocks",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Blocks of 128 keys that a window reads, the most relevant ones; "
                    "saves time in large windows. 0 reads all: exact.",
                ),
                io.String.Input(
                    "guide_weight",
                    default=AUTO,
                    optional=True,
                    tooltip="How much the target follows the proxy: each of the guide's keys "
                    "counts so many times. auto: what the guide LoRA was trained with; without "
                    "one, 16 times the window's own keys for all of them together. 1 is plain "
                    "attention, 0 leaves the proxy out.",
                ),
                io.Int.Input(
                    "guide_margin",
                    default=0,
                    min=0,
                    max=512,
                    optional=True,
                    advanced=True,
                    tooltip="Guide tokens that a window reads on every side beside those that "
                    "show its own place and time. A large number reads the whole proxy: slower.",
                ),
                io.Latent.Input(
                    "proxy",
                    optional=True,
                    tooltip="The sampled proxy that guides the target. Without it, windows only.",
                ),
                GuideLoraType.Input(
                    "guide_lora",
                    optional=True,
                    tooltip="A LoRA that acts on the guide only; the target keeps the model's own "
                    "weights and LoRAs.",
                ),
                GuideLoraType.Input(
                    "target_lora",
                    optional=True,
                    tooltip="A LoRA that acts on the target's tokens only, trained in stage "
                    "target; the guide keeps the model's own weights, or its own LoRA.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model, ready to sample the target.")],
        )

    @classmethod
    @within_limits
    def execute(
        cls,
        model,
        plan,
        window,
        overlap,
        guide_noise,
        start_percent,
        end_percent,
        memory_budget="auto",
        attention="auto",
        keep_blocks=0,
        guide_weight=AUTO,
        guide_margin=0,
        proxy=None,
        guide_lora=None,
        target_lora=None,
    ) -> io.NodeOutput:
        habits, sizes = habits_of(guide_lora, target_lora), custom_window(window)
        patched = apply_detail_branch(
            model,
            plan,
            None if proxy is None else proxy["samples"],
            window=preset_window(window["window"], plan, custom=sizes, habits=habits),
            overlap=overlap,
            guide_noise=preset_guide_noise(guide_noise, habits),
            start_percent=start_percent,
            end_percent=end_percent,
            memory_budget=memory_budget,
            attention=attention,
            keep_blocks=keep_blocks,
            guide_weight=guide_weight,
            guide_margin=guide_margin,
            guide_lora=guide_lora,
            target_lora=target_lora,
        )
        return io.NodeOutput(patched)


class AtlasVidStructureGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AtlasVidStructureGuidance",
            display_name="AtlasVid Structure Guidance",
            category=CATEGORY,
            description="Keeps the target's coarse structure and motion on the proxy's, most of "
            "all while noise is high. Details finer than the proxy are left alone.",
            search_aliases=["low pass guidance", "keep composition"],
            inputs=[
                io.Model.Input("model", tooltip="The model that samples the target."),
                PlanType.Input("plan", tooltip="The plan of the video."),
                io.Latent.Input("proxy", tooltip="The sampled proxy to follow."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How far the coarse structure is moved to the proxy's at the highest "
                    "noise; it fades out as a cosine. 0 turns it off.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the sampling at which the pull has faded out; after it the "
                    "target is left to itself.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model with structure guidance.")],
        )

    @classmethod
    @within_limits
    def execute(cls, model, plan, proxy, strength, end_percent) -> io.NodeOutput:
        guided = apply_structure_guidance(
            model, plan, proxy["samples"], strength=strength, end_percent=end_percent
        )
        return io.NodeOutput(guided)
