"""Draws the floors of the house: rooms of the pack, and who imports whom.

    python tools/floors.py

Floors are the layers that pyproject.toml lets imports run down. Writes docs/floors.png.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import in_prepared_environment
from environment import ROOT, stop_on_errors

PICTURE = ROOT / "docs" / "floors.png"
HOLDS = {
    "nodes": "schemas and executes",
    "resume": "kept renders, what tells them apart",
    "estimate": "cost, calibration, overview",
    "flashvsr": "super-resolution that streams",
    "training": "trainer, dataset, adapters",
    "vae": "exact decode and encode",
    "quality": "measures of a render",
    "branch": "evaluation, forward, guide, windows, run",
    "proxy": "scaled positions, latents, structure",
    "families": "what a Wan block is; tiny models",
    "lora": "files, recipe, guide LoRA",
    "device": "copies, tokens, chunks, budget",
    "geometry": "grid, plan, windows, alignment",
    "comfyui": "the adapter: models, memory, media",
}


def floors() -> list[list[str]]:
    """Rooms by floor, the top one first, as the import contract has them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    layers = next(c["layers"] for c in contracts["contracts"] if c["type"] == "layers")
    return [[room.strip() for room in layer.split("|")] for layer in layers]


@contextmanager
def importable() -> Iterator[Path]:
    """A folder in which the pack is a package of its own name, whatever its checkout is called."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "atlasvid").symlink_to(ROOT, target_is_directory=True)
        yield Path(folder)


def arrows(rooms: list[str]) -> Counter[tuple[str, str]]:
    """How many imports run from one room to another."""
    import grimp

    found: Counter[tuple[str, str]] = Counter()
    with importable() as folder:
        sys.path.insert(0, str(folder))
        graph = grimp.build_graph("atlasvid", cache_dir=None)
        sys.path.pop(0)
    inside = {
        module: room
        for module in graph.modules
        for room in rooms
        if f"{module}.".startswith(f"atlasvid.{room}.")
    }
    for module, room in inside.items():
        for other in graph.find_modules_directly_imported_by(module):
            if inside.get(other, room) != room:
                found[room, inside[other]] += 1
    return found


def draw(levels: list[list[str]], imports: Counter[tuple[str, str]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    width, height = 3.6, 0.8
    figure, axis = plt.subplots(figsize=(11.5, 1.25 * len(levels)))
    centres = {}
    for level, rooms in enumerate(levels):
        y = 1.6 * (len(levels) - level)
        axis.axhspan(y - 0.65, y + 0.65, color="#f3eef7" if level % 2 else "#faf8fc", zorder=0)
        for i, room in enumerate(rooms):
            x = (i - (len(rooms) - 1) / 2) * (width + 0.8)
            centres[room] = x, y
            box = FancyBboxPatch(
                (x - width / 2, y - height / 2), width, height,
                boxstyle="round,pad=0.05", facecolor="white", edgecolor="#6b3fa0", zorder=3,
            )  # fmt: skip
            axis.add_patch(box)
            name = room.rpartition(".")[2]
            axis.text(x, y + 0.13, f"{name}/", ha="center", fontsize=11, weight="bold", zorder=4)
            axis.text(x, y - 0.25, HOLDS[name], ha="center", fontsize=7.5, zorder=4)
    for (start, stop), count in imports.items():
        (x0, y0), (x1, y1) = centres[start], centres[stop]
        far = abs(y0 - y1) > 2
        side = -1 if x0 + x1 <= 0 else 1
        arrow = FancyArrowPatch(
            (x0 + side * (0.3 if far else 0), y0 - height / 2 - 0.06),
            (x1 + side * (0.3 if far else 0), y1 + height / 2 + 0.06),
            connectionstyle=f"arc3,rad={side * -0.28 if far and x0 == x1 else 0}",
            arrowstyle="-|>", mutation_scale=9, linewidth=0.5 + 0.12 * count, color="#6b3fa0",
            alpha=0.35, zorder=2,
        )  # fmt: skip
        axis.add_patch(arrow)
    axis.set_xlim(-7.2, 7.2)
    axis.set_ylim(0.7, 1.6 * len(levels) + 0.9)
    axis.axis("off")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=90, bbox_inches="tight")
    plt.close(figure)


def main() -> int:
    if importlib.util.find_spec("grimp") is None:
        return in_prepared_environment()
    levels = floors()
    imports = arrows([room for rooms in levels for room in rooms])
    draw(levels, imports)
    rooms = sum(map(len, levels))
    print(
        f"{rooms} rooms, {len(levels)} floors, {len(imports)} arrows: {PICTURE.relative_to(ROOT)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(stop_on_errors(main))
