"""The texts that ComfyUI shows, against the nodes' own schemas."""

import sys
from pathlib import Path

import pytest
from atlasvid.nodes import NODES

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))

import locales  # noqa: E402

LANGUAGES = sorted(folder.name for folder in locales.LOCALES.iterdir())
NAMES_ALIKE = {"CLIP", "VAE", "LoRA", "AtlasVid RoPE"}
SCHEMAS = {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in NODES)}


def test_english_is_the_schemas() -> None:
    assert locales.read("en") == locales.node_definitions(), "run python tools/locales.py"


@pytest.mark.parametrize("language", [each for each in LANGUAGES if each != "en"])
def test_translations_cover_the_schemas(language: str) -> None:
    english = dict(locales.leaves(locales.node_definitions()))
    translated = dict(locales.leaves(locales.read(language)))
    assert translated.keys() == english.keys()
    same = {text for path, text in translated.items() if text == english[path]}
    assert same <= NAMES_ALIKE
    assert locales.read(language, "main").keys() == locales.read("en", "main").keys()


@pytest.mark.parametrize("node", SCHEMAS)
def test_everything_is_explained(node: str) -> None:
    texts = locales.node_definitions()[node]
    assert all(text for _, text in locales.leaves(texts)), "a name, tooltip or description is empty"
    assert SCHEMAS[node].search_aliases
    assert SCHEMAS[node].category == "AtlasVid"


@pytest.mark.parametrize("page", ["{}.md", "{}/zh.md"])
@pytest.mark.parametrize("node", SCHEMAS)
def test_help_names_every_input_and_output(node: str, page: str) -> None:
    docs = ROOT / "web" / "docs"
    text = (docs / page.format(node)).read_text("utf-8")
    schema = SCHEMAS[node]
    shown = [each.id for each in schema.inputs]
    shown += [each.display_name or each.id for each in schema.outputs]
    assert [name for name in shown if f"`{name}`" not in text] == []
    picture = f"images/{node}.png"
    assert f"({picture})" in text
    assert (docs / picture).stat().st_size > 1000
