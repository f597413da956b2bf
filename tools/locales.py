"""Writes locales/en/nodeDefs.json from the nodes' schemas, and lists what a translation lacks.

Run it after changing a name, a description or a tooltip; then translate what it names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCALES = ROOT / "locales"
Tree = dict[str, Any]


def node_definitions() -> Tree:
    """The English texts of every node, in the front end's layout."""
    from atlasvid.nodes import NODES

    return {node.GET_SCHEMA().node_id: _texts(node.GET_SCHEMA()) for node in NODES}


def _texts(schema: Any) -> Tree:
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": dict(_inputs(schema.inputs)),
        "outputs": {
            str(i): {"name": output.display_name or output.id, "tooltip": output.tooltip}
            for i, output in enumerate(schema.outputs)
        },
    }


def _inputs(inputs: list[Any], prefix: str = "") -> Iterator[tuple[str, Tree]]:
    """Inputs by key; those behind a choice carry its name, as the front end writes them."""
    for each in inputs:
        name = f"{prefix}{each.id}"
        yield name, {"name": each.display_name or each.id, "tooltip": each.tooltip}
        for option in getattr(each, "options", None) or ():
            if hasattr(option, "inputs"):
                yield from _inputs(option.inputs, f"{name}_")


def leaves(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every text of a tree with its path."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def read(language: str, name: str = "nodeDefs") -> Tree:
    return json.loads((LOCALES / language / f"{name}.json").read_text("utf-8"))


def write(language: str, tree: Tree, name: str = "nodeDefs") -> None:
    file = LOCALES / language / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", "utf-8")


def main() -> int:
    from pack_loader import load_comfyui, load_pack

    if not os.environ.get("COMFYUI_PATH"):
        raise SystemExit("set COMFYUI_PATH to a ComfyUI folder")
    load_comfyui(Path(os.environ["COMFYUI_PATH"]), "--cpu")
    load_pack()
    english = node_definitions()
    write("en", english)
    known = {path for path, _ in leaves(english)}
    for folder in sorted(LOCALES.iterdir()):
        translated = {path for path, _ in leaves(read(folder.name))}
        for path in sorted(known - translated):
            print(f"{folder.name} lacks {'.'.join(path)}")
        for path in sorted(translated - known):
            print(f"{folder.name} has {'.'.join(path)}, which no node has")
    return 0


if __name__ == "__main__":
    main()
