"""Training LoRAs for the proxy and for the guide."""

from comfy_api.latest import io, ui
from comfy_execution.graph import ExecutionBlocker
from safetensors.torch import load_file

from ..engine.branch.settings import preset_window
from ..engine.comfyui import server
from ..engine.geometry.windows import COMPACT
from ..engine.lora.guide import load_guide_lora
from ..engine.lora.recipe import STAGES
from ..engine.training.adapters import TARGETS
from ..engine.training.clips import clips_given, folder_state, named_folder
from ..engine.training.curve import LossPreview, as_image, draw_losses
from ..engine.training.job import comfyui_job, train
from ..engine.training.objective import NoiseLevels
from ..engine.training.selection import Selection
from ..engine.training.trainer import OPTIMIZERS, PRECISIONS, TrainSettings
from .limits import within_limits
from .types import CATEGORY, GuideLoraType, PlanType

FROM_NOTHING = "none"
NOT_A_GUIDE = "Stage proxy makes an ordinary LoRA: use the lora output, or LoraLoaderModelOnly."
NOT_A_PROXY = (
    "Stages guide and target make LoRAs for the detail branch: use the guide_lora output, or "
    "AtlasVid Guide LoRA."
)


def ranged(kind, name, default, low, high, step, tooltip):
    """A number input."""
    return kind.Input(name, default=default, min=low, max=high, step=step, tooltip=tooltip)


class AtlasVidTrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AtlasVidTrainLoRA",
            display_name="AtlasVid Train LoRA",
            category=CATEGORY,
            description="Trains a LoRA on your clips: for the proxy (an ordinary LoRA), or for the "
            "guide or the target (for AtlasVid Guide LoRA). A stopped run goes on where it was.",
            search_aliases=["lora training", "finetune", "peft"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The Wan text-to-video model to train for."),
                io.Clip.Input("clip", tooltip="Its text encoder, for the captions."),
                io.Vae.Input("vae", tooltip="Its VAE, for the clips."),
                PlanType.Input(
                    "plan",
                    tooltip="Sizes and lengths to train at: the clips' as the target, the proxy's "
                    "beside it. 1280 x 720, 5 s for the guide; keep the ratio of target to proxy "
                    "that you will sample with. 20 s for the proxy.",
                ),
                io.Combo.Input(
                    "stage",
                    options=["guide", *(stage for stage in STAGES if stage != "guide")],
                    default="guide",
                    tooltip="guide: the detail branch learns to read its guide. proxy: the model "
                    "learns to make slow proxies. target: as guide, but the target's tokens learn "
                    "and the guide's pass the model as it is.",
                ),
                io.String.Input(
                    "name",
                    default="atlasvid_guide",
                    tooltip="Name of the LoRA in the loras folder and of this run.",
                ),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="Folder of clips with a .txt caption beside each; a plain name is one "
                    "in ComfyUI's input folder. Empty: the videos and captions inputs.",
                ),
                ranged(io.Int, "steps", 1000, 1, 1_000_000, 1, "Steps in all, resumed ones too."),
                io.Combo.Input(
                    "window",
                    options=["compact", "trained size"],
                    default="compact",
                    tooltip="Windows of stages guide and target. compact: 4 x 16 x 16 tokens.",
                ),
                ranged(io.Int, "rank", 16, 1, 1024, 1, "Rank of the LoRA. More learns more."),
                ranged(
                    io.Float, "alpha", 16.0, 0.01, 4096.0, 0.01, "Its scale is alpha / rank."
                ),
                io.Combo.Input(
                    "targets", options=list(TARGETS), tooltip="Which layers the LoRA changes."
                ),
                io.Combo.Input(
                    "optimizer",
                    options=list(OPTIMIZERS),
                    tooltip="AdamW, or Prodigy (package prodigyopt), which finds its own rate.",
                ),
                ranged(
                    io.Float, "learning_rate", 0.0, 0.0, 10.0, 0.00001,
                    "0 is the usual one: 0.0001 with AdamW, 1 with Prodigy.",
                ),
                ranged(
                    io.Float, "shift", 5.0, 0.1, 100.0, 0.1,
                    "Shift of the noise levels, as Wan's: higher trains more on high noise.",
                ),
                ranged(
                    io.Float, "sigma_min", 0.0, 0.0, 1.0, 0.001,
                    "Lowest noise level. 0.875 for the high noise expert of Wan 2.2 A14B.",
                ),
                ranged(
                    io.Float, "sigma_max", 1.0, 0.0, 1.0, 0.001,
                    "Highest noise level. 0.875 for the low noise expert of Wan 2.2 A14B.",
                ),
                ranged(
                    io.Float, "caption_dropout", 0.1, 0.0, 1.0, 0.01,
                    "Share of steps that learn without words, so that cfg above 1 works.",
                ),
                ranged(io.Int, "accumulate", 1, 1, 256, 1, "Clips per step."),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    tooltip="What the model computes in. The LoRA is always trained in fp32.",
                ),
                ranged(
                    io.Int, "cuts_per_clip", 4, 1, 1000, 1, "At most so many cuts of one clip."
                ),
                ranged(
                    io.Int, "save_every", 250, 1, 100_000, 1,
                    "Steps between checkpoints, kept in output/atlasvid_training.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,  # a run resumes with the seed that it began with
                    tooltip="Of the LoRA's first weights, the clips' order and the noise.",
                ),
                io.Boolean.Input(
                    "resume",
                    default=True,
                    tooltip="Go on from a stopped run of this name, exactly as if it had not "
                    "stopped. The same settings are needed; steps may grow.",
                ),
                io.Float.Input(
                    "guide_weight",
                    default=1.0,
                    min=0.01,
                    max=10_000.0,
                    step=0.01,
                    optional=True,
                    tooltip="Stages guide and target: how many times each of the guide's keys "
                    "counts. The LoRA names it, and sampling then uses it. 1 is plain attention.",
                ),
                io.Video.Input(
                    "videos",
                    optional=True,
                    tooltip="Clips from ComfyUI's dataset nodes, instead of a folder.",
                ),
                io.String.Input(
                    "captions",
                    optional=True,
                    force_input=True,
                    tooltip="Their captions, from the same node.",
                ),
                io.Combo.Input(
                    "init",
                    options=[FROM_NOTHING, *server.lora_names()],
                    default=FROM_NOTHING,
                    optional=True,
                    advanced=True,
                    tooltip="A LoRA to start from, of the same stage and rank: trained at 720P, "
                    "say, to be tuned at a larger size.",
                ),
                io.Float.Input(
                    "min_motion",
                    default=0.0,
                    min=0.0,
                    max=255.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="Leave out cuts in which less moves: change from frame to frame in "
                    "grey levels. 0 takes all; the report lists what each has.",
                ),
                io.Float.Input(
                    "min_sharpness",
                    default=0.0,
                    min=0.0,
                    max=255.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="Leave out softer cuts: detail that the proxy cannot hold (in stage "
                    "proxy half the size) in grey levels. 0 takes all.",
                ),
                io.Boolean.Input(
                    "weighted",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Learn up to four times as often from cuts with more motion and "
                    "sharpness than others.",
                ),
            ],
            outputs=[
                GuideLoraType.Output(
                    "guide_lora",
                    tooltip="The trained LoRA at strength 1, in stages guide and target.",
                ),
                io.Custom("LORA_MODEL").Output(
                    "lora", tooltip="The trained LoRA for Load LoRA Model, in stage proxy."
                ),
                io.Image.Output("loss_curve", tooltip="The loss over the steps."),
                io.String.Output("file", tooltip="Where the LoRA was saved."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, folder, **_):
        return folder_state(named_folder(folder[0])) if folder[0] else ""

    @classmethod
    @within_limits
    def execute(
        cls, model, clip, vae, plan, window, shift, sigma_min, sigma_max, folder, name,
        cuts_per_clip, resume, videos=(), captions=(), init=(FROM_NOTHING,), min_motion=(0.0,),
        min_sharpness=(0.0,), weighted=(False,), **chosen,
    ) -> io.NodeOutput:  # fmt: skip
        settings = TrainSettings(
            window=preset_window(window[0], plan[0], custom=COMPACT),
            noise=NoiseLevels(shift=shift[0], low=sigma_min[0], high=sigma_max[0]),
            init="" if init[0] == FROM_NOTHING else server.lora_path(init[0]),
            **{key: values[0] for key, values in chosen.items()},
        )
        result, dataset = train(
            comfyui_job(name[0]),
            model=model[0],
            text_encoder=clip[0],
            vae=vae[0],
            plan=plan[0],
            settings=settings,
            clips=clips_given(folder[0], videos=videos, captions=captions),
            resume=resume[0],
            selection=Selection(
                min_motion=min_motion[0], min_sharpness=min_sharpness[0], weighted=weighted[0]
            ),
            cuts_per_clip=cuts_per_clip[0],
            on_clip=lambda done, total, clip: server.show_progress(f"clip {done}/{total}: {clip}"),
            on_step=LossPreview(settings.steps).show,
        )
        curve = as_image(draw_losses(result.losses))
        detail = settings.is_detail
        return io.NodeOutput(
            load_guide_lora(result.path, strength=1.0) if detail else ExecutionBlocker(NOT_A_GUIDE),
            ExecutionBlocker(NOT_A_PROXY) if detail else load_file(result.path),
            curve,
            str(result.path),
            ui={
                **ui.PreviewImage(curve, cls=cls).as_dict(),
                **ui.PreviewText(f"{result.path}\n{dataset.report()}").as_dict(),
            },
        )
