"""Renders that go on after a crash, a pause or a full disk."""

from comfy_api.latest import io

from ..engine.resume.ending import KEEP, WHEN_DONE
from ..engine.resume.run import MIN_LIMIT_GB, apply_resume
from .limits import within_limits
from .types import CATEGORY


class AtlasVidResume(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AtlasVidResume",
            display_name="AtlasVid Resume",
            category=CATEGORY,
            description="Keeps every step of a render on the disk. After a crash, a cancel or a "
            "failed decode, queue the same graph again: it goes on where it was, bit by bit. "
            "Works with any model and any sampler.",
            search_aliases=["resume", "checkpoint", "pause", "continue", "crash", "recover"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that samples, before or after other AtlasVid nodes.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    optional=True,
                    tooltip="What the render is called in the list below. Empty: the title of the "
                    "sampler.",
                ),
                io.Float.Input(
                    "disk_limit_gb",
                    default=20.0,
                    min=MIN_LIMIT_GB,
                    max=100_000.0,
                    step=1.0,
                    optional=True,
                    tooltip="Room for all kept renders together, in output/atlasvid_renders. "
                    "Finished ones go first, the oldest first. A step of 4K x 161 frames takes "
                    "0.34 GB.",
                ),
                io.Combo.Input(
                    "when_done",
                    options=list(WHEN_DONE),
                    default=KEEP,
                    optional=True,
                    tooltip="What becomes of the steps once the video is saved. keep: decoding "
                    "again needs no sampling, while there is room. delete: the room is free at "
                    "once.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model, for the sampler or further nodes.")
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    @within_limits
    def execute(cls, model, name="", disk_limit_gb=20.0, when_done=KEEP) -> io.NodeOutput:
        kept = apply_resume(
            model,
            name=name,
            disk_limit_gb=disk_limit_gb,
            when_done=when_done,
            node_id=cls.hidden.unique_id,
            prompt=cls.hidden.prompt,
        )
        return io.NodeOutput(kept)
