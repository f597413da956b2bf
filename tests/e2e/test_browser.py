"""What an artist meets: shipped graphs, the plan's picture and errors, in a real browser.

Everything runs in both renderers, the canvas and "Nodes 2.0".
"""

import copy
import itertools
import json
import re
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser
import comfy_server
import pytest
import torch
from atlasvid.engine.resume import store
from playwright.sync_api import Page, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeout

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = {
    file.stem: json.loads(file.read_text("utf-8")) for file in ROOT.glob("workflows/*.json")
}
BLUEPRINT = json.loads((ROOT / "subgraphs" / "AtlasVid prompt to 4K.json").read_text("utf-8"))
RENDERERS = {"canvas": False, "nodes-2": True}
VUE_NODES = "Comfy.VueNodes.Enabled"
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Validation.Workflows": True}
THUMBNAIL_WIDTH = 800
# What the front end itself logs on a server without internet and without template packages.
EXPECTED_ERRORS = re.compile(
    "Content Security Policy|status of 404|Error loading (core workflow templates|fuse options)"
    "|graph accessed before initialization|Fetch API cannot load https://(huggingface|api.comfy)"
)
NEEDS_FILES = {
    "UNETLoader",
    "CLIPLoader",
    "VAELoader",
    "LoraLoaderModelOnly",
    "AtlasVidGuideLoRA",
    "CLIPVisionLoader",
    "LoadImage",
    "LoadVideo",
    "AtlasVidFlashVSRLoader",
    "FrameInterpolationModelLoader",
}
PLAN_NODE = "app.graph.nodes.find((node) => node.type === 'AtlasVidPlan')"
PICTURE = ".atlasvid-plan svg.atlasvid-picture"
SHOW_ADVANCED = """(shown) =>
    app.extensionManager.setting.set("Comfy.Node.AlwaysShowAdvancedWidgets", shown)"""
# What the open graph covers, each by its name: nodes with their title bars, and groups.
RECTANGLES = """async (inDocument) => {
    const { graph } = app.canvas
    await app.extensionManager.command.execute("Comfy.Canvas.FitView")
    for (let frame = 0; frame < 15; frame++)  // nodes grow to what they show
        await new Promise((done) => requestAnimationFrame(done))
    const ofElement = (element) => {
        const { e: left, f: top } = new DOMMatrix(getComputedStyle(element).transform)
        return [left, top, element.offsetWidth, element.offsetHeight]
    }
    const ofNode = (node) => [...(inDocument
        ? ofElement(document.querySelector(`[data-node-id="${node.id}"]`))
        : node.getBounding())]
    const nodes = graph.nodes.map((node) => [`${node.title} (${node.id})`, ofNode(node)])
    for (const end of ["inputNode", "outputNode"])
        if (graph[end]) nodes.push([end, [...graph[end].boundingRect]])
    const groups = graph.groups.map((group) => [group.title, [...group.boundingRect]])
    return { nodes: Object.fromEntries(nodes), groups: Object.fromEntries(groups) }
}"""

Rectangle = list[float]  # left, top, width, height


def shared(one: Rectangle, other: Rectangle) -> tuple[float, float]:
    """Width and height of what two rectangles have in common; negative where they are apart."""
    (x, y, width, height), (left, top, wide, high) = one, other
    return (
        min(x + width, left + wide) - max(x, left),
        min(y + height, top + high) - max(y, top),
    )


def overlaps(rectangles: dict[str, Rectangle]) -> list[str]:
    return [
        f"{one} and {other}"
        for (one, first), (other, second) in itertools.combinations(rectangles.items(), 2)
        if min(shared(first, second)) > 0
    ]


def standing_out(nodes: dict[str, Rectangle], groups: dict[str, Rectangle]) -> list[str]:
    """The nodes that lie partly in a group."""
    found = []
    for (name, node), (group, around) in itertools.product(nodes.items(), groups.items()):
        width, height = shared(node, around)
        outside = max(node[2] - width, node[3] - height)
        if min(width, height) > 0 and outside > 0.01:  # rectangles are computed in floating point
            found.append(f"{name} of {group}")
    return found


def has_plan(workflow: dict[str, Any]) -> bool:
    return any(node["type"] == "AtlasVidPlan" for node in workflow["nodes"])


class Desk:
    """A page with the front end, and what went wrong on it."""

    def __init__(self, page: Page, in_document: bool):
        self.page = page
        self.in_document = in_document  # whether nodes are elements, or drawn on the canvas
        self.errors: list[str] = []
        self.missing: list[str] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("response", self._on_response)

    def _on_console(self, message: Any) -> None:
        if message.type == "error" and not EXPECTED_ERRORS.search(message.text):
            self.errors.append(message.text)

    def _on_response(self, response: Any) -> None:
        if response.status >= 400 and "atlasvid" in response.url:
            self.missing.append(response.url)

    def open(self, workflow: dict[str, Any]) -> None:
        self.page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
        if has_plan(workflow):
            self.wait_for_plan()

    def browse_templates(self) -> None:
        """The pack's templates in the template browser.

        Opened again where it was closed: the front end does so once the graph that was opened from
        it before has settled, which may be late.
        """
        for last in (False, False, True):
            self.page.evaluate(
                "() => app.extensionManager.command.execute('Comfy.BrowseTemplates')"
            )
            entry = self.page.get_by_role("dialog").get_by_text("atlasvid", exact=True).first
            try:
                entry.click(timeout=30_000 if last else 10_000)
                return
            except PlaywrightTimeout:
                if last:
                    raise

    def wait_for_plan(self) -> dict[str, Any]:
        """The plan that the open graph's plan node shows."""
        return self.page.wait_for_function(f"() => {PLAN_NODE}?.atlasvidPlan?.plan").json_value()

    def set_plan(self, **values: float) -> None:
        """Changes widgets of the plan node as the front end's own controls do."""
        self.page.evaluate(
            f"""(values) => {{
                const node = {PLAN_NODE}
                const by = {{ e: new MouseEvent("click"), node, canvas: app.canvas }}
                for (const [name, value] of Object.entries(values)) {{
                    node.widgets.find((each) => each.name === name).setValue(value, by)
                }}
            }}""",
            values,
        )

    def disorder(self) -> list[str]:
        """The nodes and groups of the open graph that lie over each other."""
        found = self.page.evaluate(RECTANGLES, self.in_document)
        nodes, groups = found["nodes"], found["groups"]
        return overlaps(nodes) + overlaps(groups) + standing_out(nodes, groups)

    def disorder_of_all_inputs(self) -> list[str]:
        """As `disorder`, with the advanced inputs shown too."""
        self.page.evaluate(SHOW_ADVANCED, True)
        try:
            return self.disorder()
        finally:
            self.page.evaluate(SHOW_ADVANCED, False)

    def prompt(self) -> dict[str, Any]:
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")


@pytest.fixture(scope="module", params=RENDERERS)
def desk(
    request: pytest.FixtureRequest, start: Callable[[str], comfy_server.Server]
) -> Iterator[Desk]:
    """The front end in one renderer, kept open for all tests of this file."""
    server = start("COMFYUI_PATH")
    for name, value in {**SETTINGS, VUE_NODES: RENDERERS[request.param]}.items():
        comfy_server.request(f"{server.address}/settings/{name}", value)
    with sync_playwright() as playwright:
        chromium = browser.launch(playwright)
        opened = Desk(
            chromium.new_page(viewport={"width": 1600, "height": 1000}), RENDERERS[request.param]
        )
        browser.open_front_end(opened.page, server.address)
        opened.page.wait_for_timeout(1500)
        yield opened
        chromium.close()
    comfy_server.request(f"{server.address}/settings/{VUE_NODES}", False)


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_opens_from_the_template_browser(desk: Desk, name: str) -> None:
    page = desk.page
    desk.browse_templates()
    card = page.get_by_test_id(f"template-workflow-{name}")
    card.scroll_into_view_if_needed()  # pictures load when they are seen
    card.locator("img").first.wait_for()
    size = card.locator("img").first.evaluate("async (p) => (await p.decode(), p.naturalWidth)")
    assert size == THUMBNAIL_WIDTH
    # Graphs may have equally many nodes: the one shown until now must be gone.
    page.evaluate("() => app.graph.nodes.forEach((node) => (node.shownBefore = true))")
    card.click()
    page.wait_for_function(
        """(count) => app.graph.nodes.length === count
            && !app.graph.nodes.some((node) => node.shownBefore)""",
        arg=len(WORKFLOWS[name]["nodes"]),
    )
    plan = desk.wait_for_plan() if has_plan(WORKFLOWS[name]) else {}

    known = page.evaluate("() => Object.keys(LiteGraph.registered_node_types)")
    shipped = {node["type"] for node in WORKFLOWS[name]["nodes"]}
    assert shipped <= set(known) | {"MarkdownNote"}
    faulty = page.evaluate("() => app.graph.nodes.filter(n => n.has_errors).map(n => n.type)")
    assert set(faulty) <= NEEDS_FILES
    assert page.locator(".p-toast-message").all_inner_texts() == []
    assert plan.get("error") is None
    assert not desk.errors
    assert not desk.missing


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_no_node_lies_over_another(desk: Desk, name: str) -> None:
    desk.open(WORKFLOWS[name])
    assert desk.disorder() == []
    assert desk.disorder_of_all_inputs() == []


def test_no_node_of_the_blueprint_lies_over_another(desk: Desk) -> None:
    desk.page.evaluate("(workflow) => app.loadGraphData(workflow)", BLUEPRINT)
    desk.page.evaluate(
        """() => {
            const [box] = app.graph.nodes
            app.canvas.openSubgraph(box.subgraph, box)
        }"""
    )
    assert desk.disorder() == []
    assert desk.disorder_of_all_inputs() == []


def test_widgets_keep_their_values(desk: Desk) -> None:
    desk.open(WORKFLOWS["atlasvid_t2v_4k"])
    desk.set_plan(width=1280, height=704, seconds=3.5, fps=24, temporal_stride=2)
    desk.page.evaluate(
        """() => {
            const node = app.graph.nodes.find((n) => n.type === "AtlasVidHierarchicalAttention")
            const set = (name, value) => {
                const widget = node.widgets.find((each) => each.name === name)
                widget.value = value
                widget.callback?.(value)
            }
            set("window", "custom")
            set("window.frames", 5)
            set("window.width", 33)
            set("overlap", "sliding")
        }"""
    )
    before = desk.prompt()
    saved = json.loads(desk.page.evaluate("() => JSON.stringify(app.graph.serialize())"))
    desk.open(WORKFLOWS["atlasvid_t2v_8k"])
    desk.open(saved)
    after = desk.prompt()
    assert after == before
    window = next(n for n in after.values() if n["class_type"] == "AtlasVidHierarchicalAttention")
    assert window["inputs"]["window"] == "custom"
    assert window["inputs"]["window.frames"] == 5
    assert window["inputs"]["window.width"] == 33
    plan = next(n for n in after.values() if n["class_type"] == "AtlasVidPlan")
    assert "plan_view" not in plan["inputs"]


def test_a_graph_from_before_guide_weights_opens_with_their_defaults(desk: Desk) -> None:
    shipped = WORKFLOWS["atlasvid_t2v_4k"]
    desk.open(shipped)
    expected = desk.prompt()
    before = copy.deepcopy(shipped)
    (node,) = [n for n in before["nodes"] if n["type"] == "AtlasVidHierarchicalAttention"]
    assert [slot["name"] for slot in node["inputs"][-2:]] == ["guide_weight", "guide_margin"]
    del node["inputs"][-2:]
    del node["widgets_values"][-2:]
    desk.open(WORKFLOWS["atlasvid_t2v_8k"])
    desk.open(before)
    assert desk.prompt() == expected
    assert not desk.errors


def test_plan_is_redrawn_when_a_value_changes(desk: Desk) -> None:
    desk.open(WORKFLOWS["atlasvid_t2v_4k"])
    picture = desk.page.locator(PICTURE)
    picture.get_by_text("3840 x 2160").wait_for()
    frames = picture.locator(".cut").count()
    desk.set_plan(width=1920, height=1088)
    picture.get_by_text("1920 x 1088").wait_for()
    desk.set_plan(seconds=30)
    picture.get_by_text("481 frames").wait_for()
    assert picture.locator(".cut").count() > frames
    listed = desk.page.locator(".atlasvid-plan table").inner_text()
    assert "1920 x 1088 x 481, 987,360 tokens" in listed
    assert not desk.errors


def test_plan_follows_the_window_and_the_steps(desk: Desk) -> None:
    desk.open(WORKFLOWS["atlasvid_t2v_4k"])
    desk.page.locator(".atlasvid-plan").get_by_text("17,490 + 416 of the guide").wait_for()
    desk.page.evaluate(
        """() => {
            const node = app.graph.nodes.find((n) => n.type === "AtlasVidHierarchicalAttention")
            const widget = node.widgets.find((each) => each.name === "window")
            widget.value = "compact"
            widget.callback?.("compact")
            app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState()
        }"""
    )
    desk.page.locator(".atlasvid-plan").get_by_text("1,024 + 75 of the guide").wait_for()
    listed = desk.page.locator(".atlasvid-plan table")
    listed.get_by_text("6.5 GiB of it for kept steps").wait_for()


def test_plan_is_red_when_it_will_not_fit(desk: Desk) -> None:
    desk.open(WORKFLOWS["atlasvid_t2v_4k"])
    desk.set_plan(width=8192, height=8192, seconds=600)
    desk.page.locator(".atlasvid-plan.will-not-fit .problem").first.wait_for()
    problems = desk.page.locator(".atlasvid-plan .problem").all_inner_texts()
    assert any("se at most about" in text and "seconds at this size" in text for text in problems)


def test_missing_files_are_named(desk: Desk) -> None:
    workflow = WORKFLOWS["atlasvid_i2v_4k"]
    desk.open(workflow)
    desk.page.get_by_test_id("error-overlay-see-errors").dispatch_event("click")
    for node in workflow["nodes"]:
        for model in node["properties"].get("models", ()):
            desk.page.get_by_text(model["name"]).last.wait_for()
            assert model["url"].endswith(model["name"])


def test_demo_shows_its_video_in_the_node(desk: Desk) -> None:
    page = desk.page
    desk.open(WORKFLOWS["atlasvid_demo"])
    desk.set_plan(width=256, height=144, seconds=0.5, proxy_short_side=128)
    page.evaluate(  # a render that the server has made before says nothing new
        """() => app.graph.nodes.filter((node) => node.type === "KSampler").forEach((node) => {
            node.widgets.find((widget) => widget.name === "seed").value = Date.now() % 1e9
        })"""
    )
    ended = page.evaluate(
        """async () => {
            const end = new Promise((done) => {
                for (const kind of ["execution_success", "execution_error"])
                    app.api.addEventListener(kind, (event) => done([kind, event.detail]))
            })
            await app.queuePrompt(0)
            return await end
        }"""
    )
    assert ended[0] == "execution_success", ended
    for prefix in ("atlasvid_demo_proxy", "atlasvid_demo"):
        page.wait_for_function(
            """(prefix) => [...document.querySelectorAll("video, video source")].some(
                (video) => new RegExp(prefix + "_\\\\d").test(video.src))""",
            arg=prefix,
        )
    page.locator(".atlasvid-plan pre").get_by_text("Target 256 x 144").wait_for()
    listed = page.locator(".atlasvid-plan table")
    listed.get_by_text("AtlasVid Tiny Models").wait_for()
    said = re.compile(r"^(sampled; .* kept|all \d+ steps were kept.*)$")
    texts = page.evaluate(
        """() => app.graph.nodes.filter((node) => node.type === "AtlasVidResume")
            .flatMap((node) => node.widgets.map((widget) => String(widget.value)))"""
    )
    assert len([text for text in texts if said.match(text)]) == 2, texts
    assert desk.disorder() == []  # nodes grow with what they show
    assert not desk.errors


def plant_render(server: comfy_server.Server, number: int, name: str) -> store.Render:
    """A render of which a server kept step 14 of 20."""
    folder = server.log.parent / "output" / store.FOLDER / f"{number:032x}"
    planted = store.Render(folder)
    planted.set_facts(store.Facts(name, 20, (1, 16, 3, 8, 8)))
    planted.write(f"{1:032x}", 14, store.Answer(torch.zeros(300_000), 60.0))
    return planted


def test_kept_renders_are_listed_on_the_node_and_deleted(desk: Desk, server: Any) -> None:
    planted = plant_render(server, 7, "a <b>pier</b>")
    desk.page.evaluate("(workflow) => app.loadGraphData(workflow)", {"nodes": [], "links": []})
    desk.open(WORKFLOWS["atlasvid_t2v_4k"])
    for row in (desk.page.locator(".atlasvid-renders tr", has_text="pier").nth(i) for i in (0, 1)):
        assert re.fullmatch(
            r"a <b>pier</b>\s+step 14 of 20\s+2 MB\s+\d+ s\s+delete", row.inner_text()
        )
    desk.page.locator(".atlasvid-renders tr", has_text="pier").first.get_by_role("button").click()
    desk.page.locator(".atlasvid-renders tr", has_text="pier").first.wait_for(state="detached")
    assert not planted.folder.exists()
    assert desk.page.locator(".atlasvid-renders tr", has_text="pier").count() == 0
    assert "renders_view" not in str(desk.prompt())
    assert not desk.errors


def test_many_kept_renders_do_not_stretch_their_node(desk: Desk, server: Any) -> None:
    planted = [plant_render(server, 100 + i, f"pier {i}, in the rain, by night") for i in range(12)]
    desk.page.evaluate("(workflow) => app.loadGraphData(workflow)", {"nodes": [], "links": []})
    desk.open(WORKFLOWS["atlasvid_demo"])
    rows = desk.page.locator(".atlasvid-renders").first.locator("tr", has_text="in the rain")
    rows.nth(11).wait_for(state="attached")
    assert desk.disorder() == []
    rows.nth(11).scroll_into_view_if_needed()
    rows.nth(11).get_by_role("button").click(trial=True)  # it can be reached
    for render in planted:
        render.delete()
    assert not desk.errors


def test_blueprint_is_offered(desk: Desk) -> None:
    page = desk.page
    offered = page.evaluate("async () => (await app.api.fetchApi('/global_subgraphs')).json()")
    ours = [item for item in offered.values() if item["name"] == "AtlasVid prompt to 4K"]
    assert len(ours) == 1
    page.evaluate("(workflow) => app.loadGraphData(workflow)", BLUEPRINT)
    used = {node["class_type"] for node in desk.prompt().values()}
    assert {"AtlasVidPlan", "AtlasVidHierarchicalAttention", "AtlasVidDecodeToVideo"} <= used
    assert not desk.errors


def test_texts_and_help_are_served(server: comfy_server.Server) -> None:
    texts = comfy_server.request(f"{server.address}/i18n")
    assert texts["zh"]["nodeDefs"]["AtlasVidPlan"]["display_name"] == "AtlasVid 计划"
    for page in ("AtlasVidPlan.md", "AtlasVidPlan/zh.md", "images/AtlasVidPlan.png"):
        with urllib.request.urlopen(f"{server.address}/extensions/atlasvid/docs/{page}") as answer:
            assert answer.status == 200


def test_plan_is_answered_by_the_engine(server: comfy_server.Server) -> None:
    values = {"width": 3840, "height": 2160, "seconds": 10, "fps": 16}
    values |= {"proxy_short_side": 480, "temporal_stride": 4}
    address = f"{server.address}/atlasvid/plan?{urllib.parse.urlencode(values)}"
    plan = comfy_server.request(address)
    assert plan["target"]["frames"] == 161
    assert plan["proxy"] == {"width": 848, "height": 480, "frames": 41, "stride": 4}
    wrong = comfy_server.request(address.replace("width=3840", "width=12"))
    assert wrong == {"error": "width is 12; allowed is 128 to 8192."}
