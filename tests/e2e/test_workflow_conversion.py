"""tools/workflow.py against the front end's own converter, in a real browser."""

import json
from pathlib import Path

import pytest
from comfy_server import Server, Session
from playwright.sync_api import Page
from workflow import WorkflowError, to_prompt

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "workflows").glob("*.json"))
GRAPHS = sorted(Path(__file__).with_name("graphs").glob("*.json"))

CONVERT = """async (workflow) => {
    await app.loadGraphData(workflow)
    await new Promise((done) => setTimeout(done, 500))  // primitives take their type in a frame
    return (await app.graphToPrompt()).output
}"""


def test_equals_the_front_end(page: Page, server: Server) -> None:
    with Session(server) as session:
        definitions = session.object_info()
    for file in [*GRAPHS, *SHIPPED]:
        workflow = json.loads(file.read_text("utf-8"))
        expected = page.evaluate(CONVERT, workflow)
        assert to_prompt(workflow, definitions) == expected, file.name


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("CLIPTextEncode", ["a {red|blue} boat"], "random choice"),
        ("SaveImage", ["%date:yyyy%/clip"], "only the browser"),
        ("no-such-node", [], "'no-such-node' \\(node 1\\)"),
    ],
)
def test_refuses_what_needs_a_browser(
    server: Server, kind: str, values: list[str], message: str
) -> None:
    with Session(server) as session:
        definitions = session.object_info()
    node = {"id": 1, "type": kind, "inputs": [], "widgets_values": values}
    with pytest.raises(WorkflowError, match=message):
        to_prompt({"nodes": [node], "links": []}, definitions)
