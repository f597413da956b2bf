"""A plan in figures for the artist's eyes: its picture's geometry and its list of costs."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..branch.progress import duration
from ..branch.settings import GUIDE_NOISE, preset_guide_noise, preset_window, require_choice
from ..comfyui import management, models, server
from ..device import copies
from ..device.budget import AUTO
from ..families.family import family_of
from ..geometry import space
from ..geometry.grid import Grid
from ..geometry.layout import OVERLAPS
from ..geometry.plan import Plan, make_plan
from ..geometry.windows import cuts
from ..lora.guide import Habits
from . import calibration, cost
from .calibration import HEAD
from .cost import ModelShape, Settings

WAN21_SPACE = space.LatentSpace(channels=16, spatial=8, temporal=4, patch=(1, 2, 2))
WAN22_SPACE = space.LatentSpace(channels=48, spatial=16, temporal=4, patch=(1, 2, 2))
WAN22_CHANNELS = 48
TINY_NODE = "AtlasVidTinyModels"
MOST_LINES = 48
"""Of windows along one axis that the picture draws; of more, every second or third is drawn."""
MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    StopIteration,
    TypeError,
    ValueError,
)
"""What reading sizes out of somebody's JSON can raise."""
SHAPE_RANGES = {
    "dim": (HEAD, 8_192),
    "ffn_dim": (1, 32_768),
    "layers": (1, 256),
    "in_dim": (1, 1_024),
    "out_dim": (1, 1_024),
    "weight_bytes": (0, 2**44),
    "text_tokens": (1, 8_192),
    "vae_channels": (1, 1_024),
}
"""Sizes of any model that there could be: what lies outside is no model's shape."""


def overview(query: Mapping[str, str]) -> dict[str, Any]:
    """What the plan widget shows.

    Args:
        query: the plan node's values by name; `model`, the file or node that the model comes from;
            optional `shape`, what `shape_record` said of a model that was executed; and the
            sampling found in the graph (`window`, `overlap`, `guide_noise`, `guide_lora`, ...).

    Raises:
        ValueError: a value is missing or outside its range.
    """
    shape, assumed = _shape(query)
    space = WAN22_SPACE if shape.out_dim == WAN22_CHANNELS else WAN21_SPACE
    plan = make_plan(
        space,
        _whole(query, "width"),
        _whole(query, "height"),
        _number(query, "seconds"),
        _number(query, "fps"),
        _whole(query, "proxy_short_side"),
        _whole(query, "temporal_stride"),
    )
    settings = _settings(query, plan)
    rates = calibration.known_rates(shape)
    return {
        **picture(plan, settings),
        **figures(shape, assumed, plan, settings, this_machine(), rates),
        "notes": list(plan.notes),
        "measured": rates is not None,
    }


def calibrate(query: Mapping[str, str]) -> None:
    """Measure this machine with the model that the query names, unless that was done before."""
    try:
        calibration.rates_of(_shape(query)[0])
    except BaseException as error:
        if not management.is_cancelled(error):
            raise
        management.cancel()  # meant for the job beside this, which would not hear of it


def this_machine() -> cost.Machine:
    """The memory of the machine that ComfyUI runs on."""
    device = management.compute_device()
    return cost.Machine(
        card=management.total_memory(device),
        host=management.total_memory(copies.cpu()),
        disk=server.free_disk(),
        element_bytes=management.compute_dtype(device).itemsize,
        shared=device.type == "cpu",
    )


def picture(plan: Plan, settings: Settings) -> dict[str, Any]:
    """Sizes and cuts to draw, in pixels and seconds; a few hundred numbers for any plan."""
    unit = plan.space.spatial * plan.space.patch[1]
    window = settings.layout(plan).window
    frames, rows, columns = (
        [_drawn(cuts(n, w, shifted)) for shifted in (False, True)]
        for n, w in zip(plan.tokens, window, strict=True)
    )
    return {
        "target": {
            "width": plan.width,
            "height": plan.height,
            "frames": plan.frames,
            "seconds": plan.frames / plan.fps,
            "fps": plan.fps,
        },
        "proxy": {
            "width": plan.proxy_width,
            "height": plan.proxy_height,
            "frames": plan.proxy_frames,
            "stride": plan.temporal_stride,
        },
        "windows": {
            "columns": [[c * unit for c in axis] for axis in columns],
            "rows": [[r * unit for r in axis] for axis in rows],
            "frames": frames,
            "latent_frames": plan.tokens.frames,
        },
    }


def _drawn(borders: Sequence[int]) -> list[int]:
    """The borders of an axis, from its first to its last, with few enough between them to see."""
    every = -(-len(borders) // MOST_LINES)
    return [*borders[:-1:every], borders[-1]]


def figures(
    shape: ModelShape,
    assumed: bool,
    plan: Plan,
    settings: Settings,
    machine: cost.Machine,
    rates: cost.Rates | None,
) -> dict[str, Any]:
    """Rows (label, value) and what will not fit."""
    element = machine.element_bytes
    own, guide = settings.layout(plan).keys
    detail = cost.detail_work(shape, plan, settings, element)
    full = cost.full_attention_work(shape, plan, element)
    need = cost.memory(shape, plan, settings, machine)
    rows = [
        ("Model", f"{shape.name}, assumed until it runs" if assumed else shape.name),
        ("Target", f"{plan.width} x {plan.height} x {plan.frames}, {plan.tokens.count:,} tokens"),
        (
            "Proxy",
            f"{plan.proxy_width} x {plan.proxy_height} x {plan.proxy_frames}, "
            f"{plan.proxy_tokens.count:,} tokens",
        ),
        ("Keys per query", f"{own:,} + {guide:,} of the guide"),
        (
            "Attention work",
            f"{full.attention / detail.attention:.1f} x less than full attention "
            f"(a step: {full.flops / detail.flops:.1f} x less)",
        ),
        (
            "Memory" if machine.shared else "Card memory",
            f"{cost.size(need.card)}, at least {cost.size(need.card_least)}, "
            f"of {cost.size(machine.card)}",
        ),
        ("Host memory", f"{cost.size(need.host)} of {cost.size(machine.host)}"),
        ("Disk", _disk(plan, settings, machine, need)),
        ("Time", _time(shape, plan, settings, machine, rates)),
    ]
    found = cost.problems(plan, need, machine)
    return {"rows": rows, "problems": found, "fits": not found}


def _disk(plan: Plan, settings: Settings, machine: cost.Machine, need: cost.Memory) -> str:
    text = f"about {cost.size(need.disk)} of {cost.size(machine.disk)} free"
    kept = cost.answers_disk(plan, settings)
    return f"{text}; {cost.size(kept)} of it for kept steps" if kept else text


def _time(
    shape: ModelShape,
    plan: Plan,
    settings: Settings,
    machine: cost.Machine,
    rates: cost.Rates | None,
) -> str:
    if rates is None:
        return "being measured on this machine"
    took = cost.seconds(shape, plan, settings, machine, rates)
    return (
        f"about {duration(took.total)}: proxy {duration(took.proxy)}, "
        f"detail {duration(took.detail)}, decode {duration(took.decode)}"
    )


# --- Which model -----------------------------------------------------------------------------


def shape_record(model: Any) -> str:
    """The shape of a loaded model, as `overview` takes it back in `shape`."""
    return json.dumps(asdict(shape_of_model(model)))


def shape_of_model(model: Any) -> ModelShape:
    """The sizes of a loaded model.

    Raises:
        ValueError: the model is of no supported family.
    """
    family = family_of(model)
    sizes = asdict(family.shape(model.model.diffusion_model))
    channels = family.latent_space(model).channels
    name, weights = models.model_name(model), int(model.model_size())
    return _named(ModelShape(**sizes, name=name, out_dim=channels, weight_bytes=weights))


def shape_of_file(file: Path) -> ModelShape | None:
    """The sizes of a Wan from the head of its safetensors file, or None for another file."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            head = opened.read(length) if length < 100 * 2**20 else b""
        header = json.loads(head) if len(head) == length else {}
        return _named(_shape_of_header(header, file))
    except (OSError, struct.error, *MALFORMED):
        return None


def _shape_of_header(header: Any, file: Path) -> ModelShape:
    """Raises one of MALFORMED for the header of another file, or one that lies."""
    sizes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    mark = next(name for name in sizes if name.endswith("head.modulation"))
    prefix = mark.removesuffix("head.modulation")
    layers = {name.split(".")[prefix.count(".") + 1] for name in sizes if ".ffn.0.weight" in name}
    return checked_shape(
        dim=sizes[mark][-1],
        ffn_dim=sizes[f"{prefix}blocks.0.ffn.0.weight"][0],
        layers=len(layers),
        in_dim=sizes[f"{prefix}patch_embedding.weight"][1],
        name=file.stem,
        out_dim=sizes[f"{prefix}head.head.weight"][0] // 4,
        weight_bytes=file.stat().st_size,
    )


def checked_shape(name: str = "", **sizes: int) -> ModelShape:
    """A shape that some model could have.

    Raises:
        TypeError: a size is missing, unknown or no whole number.
        ValueError: a size is outside of SHAPE_RANGES.
    """
    for key, value in sizes.items():
        low, high = SHAPE_RANGES.get(key, (0, 0))
        if type(value) is not int or not isinstance(name, str):
            raise TypeError(f"{key} is no whole number")
        if not low <= value <= high:
            raise ValueError(f"{key} is outside of {low} to {high}")
    shape = ModelShape(name=name[:100], **sizes)
    if shape.dim % HEAD:
        raise ValueError(f"dim is no multiple of {HEAD}")
    return shape


def _named(shape: ModelShape) -> ModelShape:
    """The tiny models are told by their sizes; they have a small text and VAE too."""
    for tiny in (cost.TINY, cost.TINY_RANDOM):
        if (shape.dim, shape.layers, shape.ffn_dim) == (tiny.dim, tiny.layers, tiny.ffn_dim):
            return tiny
    return shape


def _shape(query: Mapping[str, str]) -> tuple[ModelShape, bool]:
    """The model's shape, and whether it had to be assumed."""
    if record := query.get("shape"):
        try:
            return checked_shape(**json.loads(record)), False
        except MALFORMED:
            raise ValueError(f"shape is not a model's shape: {record[:80]}") from None
    name = query.get("model", "")
    if name == TINY_NODE:
        return cost.TINY, False
    file = server.model_file(name) if name else None
    found = shape_of_file(file) if file else None
    return (found, False) if found else (cost.WAN_1_3B, True)


# --- How it is sampled -----------------------------------------------------------------------


def _settings(query: Mapping[str, str], plan: Plan) -> Settings:
    """How the graph samples; `auto` as for a guide LoRA of the usual kind, whose file is unread."""
    habits = Habits() if query.get("guide_lora") == "1" else None
    custom = Grid(*(_whole(query, f"window.{side}", 1) for side in Grid._fields))
    window = preset_window(query.get("window", AUTO), plan, custom, habits)
    standard = Settings(window)
    overlap = query.get("overlap", standard.overlap)
    guide_noise = preset_guide_noise(query.get("guide_noise", AUTO), habits)
    require_choice("overlap", overlap, OVERLAPS)
    require_choice("guide_noise", guide_noise, GUIDE_NOISE)
    return Settings(
        window,
        overlap,
        guide_noise,
        _whole(query, "proxy_evaluations", standard.proxy_evaluations),
        _whole(query, "detail_evaluations", standard.detail_evaluations),
        query.get("streamed", "1") == "1",
        _whole(query, "guide_margin", 0),
        _whole(query, "kept_proxy_steps", 0),
        _whole(query, "kept_detail_steps", 0),
    )


def _whole(query: Mapping[str, str], name: str, standard: int | None = None) -> int:
    """A count; none of the query's is negative."""
    value = int(_number(query, name, standard))
    if value < 0:
        raise ValueError(f"{name} is {value}; it must be 0 or more.")
    return value


def _number(query: Mapping[str, str], name: str, standard: float | None = None) -> float:
    given = query.get(name, standard)
    try:
        value = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {str(given)[:60]!r}; it must be a number.") from None
    if not math.isfinite(value) or abs(value) > 1e9:
        raise ValueError(f"{name} is {given}; it must be a finite number.")
    return value
