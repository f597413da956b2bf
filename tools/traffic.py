"""What one block of the detail branch moves, counted on simulated CUDA tensors: no card is needed.

Counted are operations that launch work on a card, and the bytes that those other than matrix
products and attention read and write, as vectors (one number per channel) for each target token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CARD = torch.device("cuda", 0)
PRODUCTS = ("addmm", "mm", "bmm", "baddbmm", "_addmm_activation", "linear", "convolution")
ATTENTION = ("attention",)
KINDS = {
    "GELU": ("gelu",),
    "LayerNorm": ("layer_norm",),
    "RMSNorm": ("rms_norm",),
    "RoPE": ("rope",),
    "norm and RoPE": ("norm_rotate",),
    "gates and residuals": ("addcmul", "add", "mul", "lerp", "gate"),
    "gather and scatter": ("index", "gather", "scatter", "embedding"),
    "joining and copies": ("cat", "copy", "clone", "stack"),
}
NO_WORK = (
    "empty",
    "detach",
    "view",
    "alias",
    "_unsafe_view",
    "lift",
    "sym_",
    "new_empty",
    "device",
)
ROWS_ONLY = ("index_select", "index", "gather", "embedding")
"""These read as much as they return, not all of what they read from."""
INTO_ROWS = ("index_copy_", "index_put_", "scatter_")
"""These write as much as they are given."""


class Traffic(TorchDispatchMode):
    """Counts what operations on simulated CUDA tensors launch and move while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()
        """Bytes by kind of operation."""
        self.launched: Counter[str] = Counter()
        """Operations by name."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _on_card((args, kwargs))
        result = func(*args, **kwargs)
        made, name = _on_card(result), func.overloadpacket.__name__
        from_host = name == "copy_" and len(given) == 1 and args[1].device != CARD
        if from_host:  # a weight that is brought
            return result
        if (given or made) and not func.is_view and not name.startswith(NO_WORK):
            self.launched[name] += 1
            if not any(w in name for w in ATTENTION) and name not in PRODUCTS:
                self.moved[kind_of(name)] += _bytes_moved(name, func, args, given, made)
        return result


def kind_of(name: str) -> str:
    return next((k for k, words in KINDS.items() if any(w in name for w in words)), name)


def _on_card(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and x.device == CARD]


def _bytes_moved(name: str, func: Any, args: Any, given: list, made: list) -> int:
    if name in ROWS_ONLY:
        return 2 * sum(map(_size, made))
    if name in INTO_ROWS:
        return 2 * _size(given[-1])
    if name in ("copy_", "fill_", "zero_"):
        return sum(map(_size, given)) if name == "copy_" else _size(given[0])
    written = sum(map(_size, made))
    return written + sum(map(_size, given))


def _size(tensor: torch.Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextmanager
def simulated_card(fused_rope: bool, kernels: bool) -> Iterator[None]:
    """Simulated CUDA tensors, with what asks a driver or has no simulation replaced.

    Args:
        fused_rope: rotations in one pass, as comfy-kitchen has them for CUDA 13; else in steps.
        kernels: norms and rotations by our own kernel.
    """
    import comfy.ldm.flux.math
    from atlasvid.engine.branch import weighted
    from atlasvid.engine.comfyui import management, models
    from atlasvid.engine.device import copies
    from atlasvid.engine.families import fused

    mark = type("Mark", (), {"wait": lambda self: None})
    flash = torch.ops.aten._scaled_dot_product_flash_attention

    def rope(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return _rope(x)

    with ExitStack() as stack:
        for owner, name, value in (
            (copies, "Mark", lambda _: mark()),
            (copies, "upload", lambda buffer, device: buffer.to(device, non_blocking=True)),
            (management, "raise_if_cancelled", lambda: None),
            (models, "apply_rope", rope if fused_rope else comfy.ldm.flux.math._apply_rope1),
            (fused, "agree", lambda *_: True),
            (fused, "_kernels", lambda: fused if kernels else None),
            (fused, "_agreed", {}),
            (weighted, "_attention_with_sums", lambda *_: lambda q, k, v: flash(q, k, v)[:2]),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


@torch.library.custom_op("atlasvid_bench::rope", mutates_args=())
def _rope(x: torch.Tensor) -> torch.Tensor:
    """A fused rotation: one pass."""
    return x.clone()


_rope.register_fake(torch.empty_like)


def _flash_attention(_: Any, q: Any, k: Any, v: Any, heads: int, **__: Any) -> torch.Tensor:
    """A fused attention, as cards use it (an override)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return out.transpose(1, 2).flatten(2)


def count_block(
    overlap: str,
    window: tuple[int, int, int],
    grid: tuple[int, int, int],
    *,
    dim: int = 1536,
    ffn_dim: int = 8960,
    chunk: int = 65_536,
    weight: float = 1.0,
    fused_rope: bool = True,
    kernels: bool = True,
) -> dict[str, Any]:
    """One block on all tokens of a grid; each parameter is one thing that it depends on.

    Returns:
        vectors per token by kind and in all, operations and chunks, and how often each weight was
        brought to the device where weights live elsewhere.
    """
    from atlasvid.engine.branch.block_task import BlockTask
    from atlasvid.engine.branch.compiled import parts_of
    from atlasvid.engine.branch.evaluation import Evaluation
    from atlasvid.engine.branch.forward import attention_of
    from atlasvid.engine.branch.memory import MemoryPlan
    from atlasvid.engine.branch.ring import Ring
    from atlasvid.engine.branch.run import SamplingRun
    from atlasvid.engine.branch.settings import DetailSettings
    from atlasvid.engine.comfyui import models
    from atlasvid.engine.device.chunks import ChunkSize
    from atlasvid.engine.device.tokens import DeviceTokens
    from atlasvid.engine.families import wan
    from atlasvid.engine.families.rotations import RopeAxes
    from atlasvid.engine.geometry.grid import Grid
    from atlasvid.engine.geometry.layout import Layout
    from atlasvid.engine.geometry.space import LatentSpace
    from atlasvid.engine.geometry.windows import SlidingWindows
    from bench_attention import plan_of

    plan = plan_of(grid, LatentSpace(channels=16, spatial=8, temporal=4, patch=(1, 2, 2)))
    layout = Layout(plan, Grid(*window), overlap)
    size = ChunkSize(chunk)
    with simulated_card(fused_rope, kernels):

        def vectors(*shape: int) -> torch.Tensor:
            return torch.empty((*shape, dim), dtype=torch.bfloat16, device=CARD)

        net: Any = models.build_wan(dim=dim, ffn_dim=ffn_dim, num_heads=dim // 128, num_layers=1)
        for module in net.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = torch.empty(parameter.shape, dtype=torch.bfloat16, device=CARD)
                    module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
        settings = DetailSettings(layout, "clean", proxy=vectors(1), guide_weight=weight)
        attention = attention_of(layout, True, RopeAxes(net.rope_embedder, {}))
        ring, windows = None, attention.windows
        if isinstance(windows, SlidingWindows):
            kept = vectors(windows.ring.count + plan.proxy_tokens.count).repeat(1, 2)
            ring = Ring(windows.ring, DeviceTokens(kept))
        ev = Evaluation(
            net=net,
            base=net,
            family=wan,
            settings=settings,
            run=SamplingRun(seed=0),
            options={"optimized_attention_override": _flash_attention},
            x=vectors(1),
            timestep=vectors(1),
            text=wan.Text(vectors(1, 512), None),
            parts=parts_of(wan, None),
            memory=MemoryPlan(chunk, True, True, "device"),
            chunk=size,
        )
        tokens = plan.tokens.count
        task = BlockTask(
            ev,
            net.blocks[0],
            DeviceTokens(vectors(tokens)),
            wan.Modulation(tuple(vectors(1) for _ in range(6))),
            ev.text,
            (vectors(plan.proxy_tokens.count), vectors(plan.proxy_tokens.count)),
            ring,
        )
        chunks: Counter[str] = Counter()
        with torch.no_grad(), counted_calls(BlockTask, "finish", chunks):
            attention.evaluate(task, 0)  # makes what depends on geometry alone
            chunks.clear()
            held = models.held_weights
            with Traffic() as traffic, offloaded(net) as touched, held(task.block, ev.x):
                text = wan.text_of_block(task.block, task.text)
                attention.evaluate(replace(task, text=text), 0)
    vector = 2 * dim * tokens
    kinds = {kind: count / vector for kind, count in traffic.moved.most_common()}
    return {
        "vectors": sum(kinds.values()),
        "kinds": {kind: count for kind, count in kinds.items() if count >= 0.05},
        "dispatches": sum(traffic.launched.values()),
        "chunks": chunks["finish"],
        "touched": max(touched.values(), default=0),
        "tokens": tokens,
        "launched": dict(traffic.launched.most_common()),
    }


@contextmanager
def counted_calls(owner: Any, name: str, into: Counter[str]) -> Iterator[None]:
    """Counts calls of a method while open."""
    stock = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        into[name] += 1
        return stock(*args, **kwargs)

    with mock.patch.object(owner, name, counted):
        yield


@contextmanager
def offloaded(net: Any) -> Iterator[Counter[int]]:
    """How often each layer's weights are brought to the device, as if they lived elsewhere."""
    import comfy.ops

    touched: Counter[int] = Counter()
    stock = comfy.ops.cast_bias_weight

    def counted(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.weight is not None and layer.weight.device != CARD:
            touched[id(layer)] += 1
        return stock(layer, *args, **kwargs)

    layers: list[Any] = [x for x in net.modules() if hasattr(x, "comfy_cast_weights")]
    for layer in layers:
        layer.comfy_cast_weights = True
        for name, weight in layer._parameters.items():
            if weight is not None:
                layer._parameters[name] = torch.empty(weight.shape, dtype=weight.dtype)
    try:
        with mock.patch.object(comfy.ops, "cast_bias_weight", counted):
            yield touched
    finally:
        for layer in layers:
            layer.comfy_cast_weights = False


def table(rows: list[dict[str, Any]]) -> str:
    """The counts as Markdown."""
    from measure import markdown_table

    names = sorted({kind for row in rows for kind in row["kinds"]})
    header = ["counted on one block", *(row["what"] for row in rows)]
    lines = [[name, *(f"{row['kinds'].get(name, 0):.1f}" for row in rows)] for name in names]
    lines.append(["vectors per token", *(f"{row['vectors']:.1f}" for row in rows)])
    lines.append(["operations", *(f"{row['dispatches']:,}" for row in rows)])
    lines.append(["chunks", *(f"{row['chunks']:,}" for row in rows)])
    lines.append(
        ["operations per chunk", *(f"{row['dispatches'] / row['chunks']:.1f}" for row in rows)]
    )
    lines.append(["times a weight is fetched", *(str(row["touched"]) for row in rows)])
    return markdown_table(header, lines)
