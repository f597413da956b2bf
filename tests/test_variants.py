"""The shipped graphs against tools/variants.py, and what it does to them."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))

import variants  # noqa: E402

SHIPPED = sorted(variants.WORKFLOWS.glob("*.json"))


@pytest.fixture(scope="module")
def made() -> dict[Path, Any]:
    return variants.made()


@pytest.mark.parametrize("file", [*SHIPPED, variants.BLUEPRINT], ids=lambda file: file.stem)
def test_shipped_graphs_are_the_made_ones(made: dict[Path, Any], file: Path) -> None:
    assert variants.read(file) == made[file], "run python tools/variants.py"


def test_every_variant_is_shipped(made: dict[Path, Any]) -> None:
    assert made.keys() == {*SHIPPED, variants.BLUEPRINT}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_models_are_those_to_download_and_to_read_of(file: Path) -> None:
    nodes = variants.read(file)["nodes"]
    (note,) = [node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote"]
    for node in nodes:
        for model in node["properties"].get("models", ()):
            assert model["name"] in node["widgets_values"]
            assert model["url"].endswith(f"/{model['name']}")
            assert f"[{model['name']}]({model['url']}) in `models/{model['directory']}`" in note


def forget(workflow: Any, kind: str, name: str) -> None:
    """Makes a workflow one from before its nodes of a kind had an input; what fed it goes."""
    for node in workflow["nodes"]:
        if node["type"] == kind:
            if name in (places := variants.places(node)):
                del node["widgets_values"][places[name]]
            slot = variants.slot_of(node, name)
            del node["inputs"][slot]
            into = [link for link in workflow["links"] if link[3] == node["id"]]
            for link in into:
                if link[4] == slot:
                    workflow["links"].remove(link)
                link[4] -= link[4] > slot


@pytest.mark.parametrize(
    ("graph", "kind", "name"),
    [
        ("atlasvid_t2v_4k", "AtlasVidHierarchicalAttention", "overlap"),
        ("atlasvid_t2v_4k", "AtlasVidHierarchicalAttention", "guide_lora"),
        ("atlasvid_wan22_4k", "AtlasVidHierarchicalAttention", "guide_margin"),
        ("atlasvid_demo", "AtlasVidTinyModels", "seed"),
        ("atlasvid_i2v_4k", "AtlasVidImageToVideo", "clip_vision_output"),
    ],
)
def test_a_graph_from_before_an_input_gets_it(graph: str, kind: str, name: str) -> None:
    shipped = variants.Graph(variants.read(variants.WORKFLOWS / f"{graph}.json"))
    old = variants.Graph(shipped.workflow)
    forget(old.workflow, kind, name)
    assert old.workflow != shipped.workflow
    old.set_all_current_inputs(variants.node_definitions())
    shipped.links[:] = [link for link in shipped.links if link in old.links]
    assert old.finished() == shipped.finished()


def test_inputs_behind_a_choice_are_kept() -> None:
    kind = "AtlasVidHierarchicalAttention"
    node = variants.Graph(variants.read(SHIPPED[0])).node(kind)
    end = variants.places(node)["window"].stop
    node["widgets_values"][:end] = ["custom", 5, 18, 33]
    sides = [{"name": f"window.{side}", "type": "INT"} for side in ("frames", "height", "width")]
    after = variants.slot_of(node, "window") + 1
    node["inputs"][after:after] = [
        {**side, "widget": {"name": side["name"]}, "link": None} for side in sides
    ]
    before = copy.deepcopy(node)
    variants.set_current_inputs(node, variants.node_definitions()[kind])
    assert node == before
