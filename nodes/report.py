"""What a finished video looks like, in numbers, curves and words."""

from comfy_api.latest import io, ui

from ..engine.branch.settings import preset_window
from ..engine.geometry.layout import OVERLAPS
from ..engine.quality.report import measure_video
from ..engine.quality.report_picture import as_image, draw_report
from ..engine.vae.sources import EachFrame
from .limits import within_limits
from .types import CATEGORY, PlanType, custom_window, window_input


class AtlasVidReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AtlasVidReport",
            display_name="AtlasVid Quality Report",
            category=CATEGORY,
            description="Looks at a finished video for what windows may do to it: borders that "
            "show, flicker, colours that drift, a picture that leaves the proxy, missing detail. "
            "Says in one line what is seen first and what to change.",
            search_aliases=["quality", "seams", "flicker", "metrics"],
            is_output_node=True,
            inputs=[
                PlanType.Input("plan", tooltip="The plan that the video was made by."),
                io.MultiType.Input(
                    "video",
                    types=[io.Image, io.Video],
                    tooltip="The finished video, or its images. It may have been cut at its end. "
                    "A video is read frame by frame and never held in memory.",
                ),
                window_input(
                    "The windows that it was sampled with, whose borders are looked at. auto is "
                    "the trained size; with a guide LoRA choose compact."
                ),
                io.Combo.Input(
                    "overlap",
                    options=list(OVERLAPS),
                    default="shifted",
                    tooltip="The overlap that it was sampled with.",
                ),
                io.MultiType.Input(
                    "proxy",
                    types=[io.Image, io.Video],
                    optional=True,
                    tooltip="The proxy's own video or images. Without it, colours, fidelity and "
                    "detail are not measured, and borders less surely.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="Every measure over time, and a map of the worst frame.",
                ),
                io.String.Output(
                    display_name="text", tooltip="The verdict in one line, then every measure."
                ),
            ],
        )

    @classmethod
    @within_limits
    def execute(cls, plan, video, window, overlap, proxy=None) -> io.NodeOutput:
        report = measure_video(
            EachFrame(video),
            plan,
            window=preset_window(window["window"], plan, custom=custom_window(window)),
            overlap=overlap,
            proxy=None if proxy is None else EachFrame(proxy),
        )
        image, text = as_image(draw_report(report)), report.text()
        shown = ui.PreviewImage(image, cls=cls).as_dict() | ui.PreviewText(text).as_dict()
        return io.NodeOutput(image, text, ui=shown)
