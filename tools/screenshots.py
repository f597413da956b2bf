"""Makes the pictures of the help pages and the README, and the icon, in a real browser.

python tools/screenshots.py nodes       one picture per node, into web/docs/images
python tools/screenshots.py workflows   a thumbnail per workflow, into workflows
python tools/screenshots.py readme      the README's pictures, into web/docs/images
python tools/screenshots.py demo        frames of what the demo makes, into web/docs/images
python tools/screenshots.py report      a quality report on the demo, into web/docs/images
python tools/screenshots.py art         icon and banner, from their SVG
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import html
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import browser
import comfy_server
from environment import COMFYUI, ROOT, prepare
from twins import PROMPT, TINY, TRAINING, pass_by, tiny_twin
from workflow import to_prompt

IMAGES = ROOT / "web" / "docs" / "images"
WORKFLOWS = ROOT / "workflows"
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # texts stay, however small the graph is shown
}
THUMBNAIL = {"width": 800, "height": 450}
TRAINED_STEPS = 30
SHOWN = (
    "wide view of a red balloon drifting left over hills at noon",
    "wide view of a yellow balloon drifting right over snow at dusk",
    "wide view of a purple balloon drifting left over desert at noon",
    "wide view of a green balloon drifting right over snow at noon",
    "wide view of a red balloon drifting right over snow at night",
    "wide view of a yellow balloon drifting left over hills at night",
    "wide view of a purple balloon drifting right over hills at dusk",
)
OF_ITS_OWN = {
    "atlasvid_few_steps_4k": "wide view of a yellow balloon drifting left over hills at night",
    "atlasvid_t2v_4k": "wide view of a yellow balloon drifting right over hills at noon",
}
"""Prompts of graphs that, with their own seed, show little of another."""

ONE_NODE = """async (kind) => {
    app.graph.clear()
    const node = LiteGraph.createNode(kind)
    node.id = Math.floor(Math.random() * 1e9)  // the front end keeps widgets' values by id
    node.pos = [200, 200]
    app.graph.add(node)
    await new Promise((done) => setTimeout(done, 4000))
    app.canvas.ds.scale = 1
    app.canvas.ds.offset = [0, 0]
    app.canvas.setDirty(true, true)
    await new Promise((done) => setTimeout(done, 500))
    const [x, y, width, height] = node.getBounding()
    return { x, y, width, height }
}"""
# Before a picture, what overlays the graph goes: messages, and the menus of the front end.
ONLY_GRAPH = """
    .p-toast, .p-dialog-mask, .comfyui-body-top, .comfyui-body-left, .comfyui-body-right,
    .comfyui-body-bottom, .graph-canvas-panel, [class*="splitter-overlay"],
    #graph-canvas-container > .pointer-events-none {
        display: none !important
    }
"""
FIT = """async (workflow) => {
    await app.loadGraphData(workflow)
    await new Promise((done) => setTimeout(done, 1000))
    const groups = app.graph.groups.map((group) => group.boundingRect ?? group._bounding)
    const left = Math.min(...groups.map((g) => g[0])), top = Math.min(...groups.map((g) => g[1]))
    const right = Math.max(...groups.map((g) => g[0] + g[2]))
    const bottom = Math.max(...groups.map((g) => g[1] + g[3]))
    const edge = 20
    const width = app.canvas.canvas.clientWidth - 2 * edge
    const height = app.canvas.canvas.clientHeight - 2 * edge
    const scale = Math.min(width / (right - left), height / (bottom - top))
    app.canvas.ds.scale = scale
    app.canvas.ds.offset = [edge / scale - left, edge / scale - top]
    app.canvas.show_info = false
    app.canvas.setDirty(true, true)
    await new Promise((done) => setTimeout(done, 700))
    return {
        x: 0,
        y: 0,
        width: scale * (right - left) + 2 * edge,
        height: scale * (bottom - top) + 2 * edge,
    }
}"""


@contextlib.contextmanager
def opened(width: int, height: int, scale: float = 1.0) -> Iterator[Any]:
    """A page with the front end of a real ComfyUI."""
    from playwright.sync_api import sync_playwright

    comfyui = Path(os.environ["COMFYUI_PATH"])
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for model in models_of_workflows():  # so that no loader is marked in red
            file = base / "models" / model["directory"] / model["name"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        server = comfy_server.running(Path(sys.executable), comfyui, base, options=("--cpu",))
        address = stack.enter_context(server).address
        for name, value in SETTINGS.items():
            comfy_server.request(f"{address}/settings/{name}", value)
        playwright = stack.enter_context(sync_playwright())
        page = launched(playwright, width, height, scale)
        browser.open_front_end(page, address)
        page.wait_for_timeout(2000)
        yield page


def models_of_workflows() -> Iterator[dict[str, str]]:
    """Name and folder of every model file that the workflows name."""
    for file in WORKFLOWS.glob("*.json"):
        for node in json.loads(file.read_text("utf-8"))["nodes"]:
            yield from node["properties"].get("models", ())


def launched(playwright: Any, width: int, height: int, scale: float) -> Any:
    """An empty page of the system's browser."""
    size = {"width": width, "height": height}
    return browser.launch(playwright).new_page(viewport=size, device_scale_factor=scale)


def nodes(only: str) -> None:
    """One picture per node of the pack."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with opened(1000, 1300) as page:
        known = page.evaluate("() => Object.keys(LiteGraph.registered_node_types)")
        kinds = [kind for kind in known if kind.startswith("AtlasVid") and only in kind]
        page.add_style_tag(content=ONLY_GRAPH)
        for kind in kinds:
            box = page.evaluate(ONE_NODE, kind)
            clip = {
                "x": box["x"] - 12,
                "y": box["y"] - 30,
                "width": box["width"] + 24,
                "height": box["height"] + 42,
            }
            page.screenshot(path=IMAGES / f"{kind}.png", clip=clip)


def workflows(only: str) -> None:
    """A thumbnail beside every workflow: a frame, or the loss curve, of what its tiny twin makes.

    An image-to-video graph has no tiny twin that was trained; it is drawn.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        page = launched(playwright, **THUMBNAIL, scale=1.0)
        base = Path(folder)
        comfyui = Path(os.environ["COMFYUI_PATH"])
        server = comfy_server.running(Path(sys.executable), comfyui, base, options=("--cpu",))
        with server as running, comfy_server.Session(running) as session:
            for file, prompt in zip(sorted(WORKFLOWS.glob("*.json")), cycle(SHOWN), strict=False):
                if only not in file.stem:
                    continue
                workflow = json.loads(file.read_text("utf-8"))
                shown = OF_ITS_OWN.get(file.stem, prompt)
                frame = twin_frame(session, workflow, shown, base)
                page.set_content(framed(workflow, frame) if frame else graph_drawing(workflow))
                page.screenshot(path=file.with_suffix(".jpg"), type="jpeg", quality=85)


def twin_frame(
    session: comfy_server.Session, workflow: dict[str, Any], prompt: str, base: Path
) -> bytes | None:
    """The most colourful frame, as PNG, of what a workflow's tiny twin makes of a prompt.

    With the tiny LoRAs and, for the detail, cfg 1: as the demo does.
    """
    given = to_prompt(workflow, session.object_info())
    if any(node["class_type"] == TRAINING for node in given.values()):
        return curve_of(session, tiny_twin(given, width=256, steps=TRAINED_STEPS), base)
    twin = tiny_twin(given, width=576, steps=12)
    if any(node["class_type"] == "UNETLoader" for node in twin.values()):
        return None
    pass_by(twin, ("FrameInterpolate",), "images")  # of which there is no tiny model
    for name in [n for n, each in twin.items() if each["class_type"].startswith("FrameInterp")]:
        del twin[name]
    for node in twin.values():
        inputs = node["inputs"]
        if inputs.get("text") == PROMPT:
            inputs["text"] = prompt
        if node["class_type"] == "LoadVideo":
            draw_video(base / "input" / inputs["file"], prompt)
        if node["class_type"] == "AtlasVidHierarchicalAttention":
            inputs["guide_lora"] = [TINY, 3]
        if node["class_type"] == "AtlasVidRoPE":
            inputs["model"] = [TINY, 4]
        if inputs.get("denoise", 1.0) < 1:
            inputs["cfg"] = 1.0
    videos = videos_made(session, twin, base)
    frames = max(videos, key=lambda video: video[0].width)  # the proxy is saved too
    out = io.BytesIO()
    max(frames, key=colourful).save(out, "PNG")
    return out.getvalue()


def colourful(frame: Any) -> float:
    """How much saturation differs in a picture: most where its balloon is whole."""
    from PIL import ImageStat

    return ImageStat.Stat(frame.convert("HSV").getchannel("S")).stddev[0]


def curve_of(session: comfy_server.Session, twin: dict[str, Any], base: Path) -> bytes:
    """The loss curve, as PNG, of a training on clips of the tiny world."""
    (training,) = [node["inputs"] for node in twin.values() if node["class_type"] == TRAINING]
    folder = base / "input" / training["folder"]
    folder.mkdir(exist_ok=True)
    for i, prompt in enumerate(SHOWN):
        draw_video(folder / f"{i}.mp4", prompt, 288, 192)
        (folder / f"{i}.txt").write_text(prompt, "utf-8")
    history = session.run(twin, 1800)
    (shown,) = [each for each in history["outputs"].values() if "images" in each]
    return (base / "temp" / shown["images"][0]["filename"]).read_bytes()


def videos_made(
    session: comfy_server.Session, prompt: dict[str, Any], base: Path
) -> list[list[Any]]:
    """The frames, as pictures, of every video that a prompt saves."""
    import av

    videos = []
    for file in comfy_server.output_files(session.run(prompt, 1800), base / "output"):
        with av.open(str(file)) as container:
            videos.append([frame.to_image() for frame in container.decode(video=0)])
    return videos


def demo(only: str) -> None:
    """Frames of the demo's proxy, and of its video at the same moments below."""
    from PIL import Image

    comfyui, (width, height) = Path(os.environ["COMFYUI_PATH"]), (288, 192)
    workflow = json.loads((WORKFLOWS / "atlasvid_demo.json").read_text("utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        server = comfy_server.running(Path(sys.executable), comfyui, base, options=("--cpu",))
        with server as running, comfy_server.Session(running) as session:
            videos = videos_made(session, to_prompt(workflow, session.object_info()), base)
    sheet = Image.new("RGB", (4 * width, 2 * height))
    for row, video in enumerate(sorted(videos, key=lambda video: video[0].width)):
        for column in range(4):
            frame = video[round(column / 3 * (len(video) - 1))]
            sheet.paste(frame.resize((width, height)), (column * width, row * height))
    sheet.save(IMAGES / "demo.jpg", quality=88)


def report(only: str) -> None:
    """The quality report that the demo shows."""
    workflow = json.loads((WORKFLOWS / "atlasvid_demo.json").read_text("utf-8"))
    comfyui = Path(os.environ["COMFYUI_PATH"])
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        server = comfy_server.running(Path(sys.executable), comfyui, base, options=("--cpu",))
        with server as running, comfy_server.Session(running) as session:
            prompt = to_prompt(workflow, session.object_info())
            (name,) = [n for n, node in prompt.items() if node["class_type"] == "AtlasVidReport"]
            shown = session.run(prompt, 1800)["outputs"][name]["images"][0]["filename"]
            (IMAGES / "report.png").write_bytes((base / "temp" / shown).read_bytes())


def draw_video(file: Path, prompt: str, width: int = 192, height: int = 128) -> None:
    """A short video of the tiny world, of the proxy's size unless another is given."""
    import numpy as np
    from world.scenes import FPS, View, render, scene_of
    from world_worker import write_video

    clip = render(scene_of(prompt, 1), View(width, height), 2.0 + np.arange(17) / FPS)
    write_video(file, clip * 2 - 1)


def framed(workflow: dict[str, Any], frame: bytes) -> str:
    """A page with a frame, the workflow's title, and what the frame is."""
    from PIL import Image

    data = base64.b64encode(frame).decode()
    width, height = Image.open(io.BytesIO(frame)).size
    fit = "contain" if width > 2.5 * height else "cover"  # both of two videos side by side
    return (
        "<body style='margin:0;background:#1b1720;color:#fff;font-family:sans-serif'>"
        f"<img src='data:image/png;base64,{data}' "
        f"style='width:800px;height:450px;object-fit:{fit}'>"
        "<div style='position:absolute;left:0;right:0;bottom:0;padding:10px 20px;"
        "background:linear-gradient(transparent,#000c)'>"
        f"<div style='font-size:30px;font-weight:700'>{html.escape(title_of(workflow))}</div>"
        "<div style='font-size:16px'>shown on a toy model trained on drawings</div></div></body>"
    )


def title_of(workflow: dict[str, Any]) -> str:
    note = next(n for n in workflow["nodes"] if n["type"] == "MarkdownNote")
    return note["widgets_values"][0].splitlines()[0].removeprefix("## ")


def graph_drawing(workflow: dict[str, Any]) -> str:
    """A page with the workflow's title, its groups, nodes and links, to scale."""
    title = title_of(workflow)
    nodes = {n["id"]: n for n in workflow["nodes"] if n["type"] != "MarkdownNote"}
    groups = [group["bounding"] for group in workflow["groups"]]
    left, top = min(g[0] for g in groups), min(g[1] for g in groups)
    right, bottom = max(g[0] + g[2] for g in groups), max(g[1] + g[3] for g in groups)
    parts = [
        f"<rect x='{x}' y='{y}' width='{w}' height='{h}' rx='20' fill='{group['color']}' "
        f"fill-opacity='.22' stroke='{group['color']}' stroke-width='4'/>"
        for group, (x, y, w, h) in zip(workflow["groups"], groups, strict=True)
    ]
    for _, source, output, target, slot, _ in workflow["links"]:
        (x1, y1), (x2, y2) = nodes[source]["pos"], nodes[target]["pos"]
        x1, y1, y2 = x1 + nodes[source]["size"][0], y1 + 20 * output + 10, y2 + 20 * slot + 10
        bend = max(60, (x2 - x1) / 2)
        parts.append(
            f"<path d='M{x1},{y1} C{x1 + bend},{y1} {x2 - bend},{y2} {x2},{y2}' fill='none' "
            "stroke='#9ab' stroke-width='5' stroke-opacity='.5'/>"
        )
    for node in nodes.values():
        (x, y), (width, height) = node["pos"], node["size"]
        colour = node.get("bgcolor", "#444")
        words = node.get("title") or node["type"].replace("AtlasVid", "")
        parts.append(
            f"<rect x='{x}' y='{y - 30}' width='{width}' height='{height + 30}' rx='12' "
            f"fill='{colour}'/><text x='{x + 14}' y='{y + 8}' font-size='34' fill='#fff' "
            f"textLength='{min(width - 28, 17 * len(words))}' lengthAdjust='spacingAndGlyphs'>"
            f"{html.escape(words)}</text>"
        )
    view = f"{left - 20} {top - 20} {right - left + 40} {bottom - top + 40}"
    return (
        "<body style='margin:0;background:#1b1720;color:#fff;font-family:sans-serif'>"
        "<div style='font-size:32px;font-weight:700;white-space:nowrap;padding:18px 24px 6px'>"
        f"{html.escape(title)}"
        "</div><svg xmlns='http://www.w3.org/2000/svg' style='width:800px;height:375px' "
        f"viewBox='{view}' font-family='sans-serif'>{''.join(parts)}</svg></body>"
    )


def readme(only: str) -> None:
    """The whole 4K graph."""
    with opened(2000, 1400) as page:
        page.add_style_tag(content=ONLY_GRAPH)
        workflow = json.loads((WORKFLOWS / "atlasvid_t2v_4k.json").read_text("utf-8"))
        clip = page.evaluate(FIT, workflow)
        page.screenshot(path=IMAGES / "workflow_t2v_4k.jpg", type="jpeg", quality=80, clip=clip)


def art(only: str) -> None:
    """Icon and banner as PNG, from the SVG beside them."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        for name, width, height in (("icon", 400, 400), ("banner", 1344, 576)):
            page = launched(playwright, width, height, 1.0)
            drawing = (IMAGES / f"{name}.svg").read_text("utf-8")
            page.set_content(f"<body style='margin:0'>{drawing}</body>")
            page.screenshot(path=IMAGES / f"{name}.png", omit_background=True)


def main() -> int:
    kinds = {
        "nodes": nodes,
        "workflows": workflows,
        "readme": readme,
        "demo": demo,
        "report": report,
        "art": art,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", nargs="*", help="of the above; everything when left out")
    parser.add_argument("--only", default="", help="nodes or workflows whose name holds this")
    options = parser.parse_args()
    wanted = options.what or list(kinds)
    if not os.environ.get("COMFYUI_PATH"):
        setup = prepare(tests=True)
        environment = {**os.environ, "COMFYUI_PATH": str(setup.comfyui[COMFYUI])}
        os.execve(setup.python, [str(setup.python), *sys.argv], environment)
    for name in wanted:
        kinds[name](options.only)
    return 0


if __name__ == "__main__":
    from environment import stop_on_errors

    stop_on_errors(main)
