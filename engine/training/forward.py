"""The forwards of all stages under autograd.

The detail branch runs the windows, guide stream and positions of inference; nothing is written in
place, and what a chunk of windows computes is computed again for the backward pass. So of the whole
target only each block's input is kept, and activations are bounded by the chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..branch.block_task import BlockTask
from ..branch.compiled import parts_of
from ..branch.ends import embed, head
from ..branch.evaluation import Evaluation
from ..branch.guide import GuideInput, guide_input
from ..branch.memory import MemoryPlan
from ..branch.run import SamplingRun
from ..branch.settings import DetailSettings
from ..branch.shifted import ShiftedAttention, WindowOrder
from ..branch.weighted import Pair
from ..comfyui import management, models
from ..device.chunks import ChunkSize
from ..device.tokens import DeviceTokens, Tokens
from ..families.family import Family, Modulation, Text
from ..geometry.plan import Plan
from ..geometry.windows import ShiftedWindows
from ..lora.view import with_layers

recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
CARD_CHUNK, HOST_CHUNK = 8_192, 2_048
"""Past these sizes a larger chunk gains no speed."""
NOTHING_KEPT = MemoryPlan(0, tokens_on_device=True, ring_on_device=True, guide="recompute")


def proxy_forward(view: Any, plan: Plan, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    """The stock forward with temporally scaled positions, each block recomputed.

    x [B, C, F_g, H_g, W_g], timestep [B] -> [B, C, F_g, H_g, W_g].
    """
    stride = float(plan.temporal_stride)
    options = training_options() | {"rope_options": {"scale_t": stride}}
    layers = {f"blocks.{i}": RecomputedBlock(block) for i, block in enumerate(view.blocks)}
    return with_layers(view, layers)(x, timestep, context, transformer_options=options)


class RecomputedBlock(nn.Module):
    """A block that keeps its input only."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        return recompute(self.block, x, **inputs)  # pyright: ignore[reportReturnType]


def training_options() -> dict[str, Any]:
    """Transformer options: the attention that has a backward, whatever the start flags chose."""
    return {"optimized_attention_override": models.differentiable_attention}


@dataclass(frozen=True)
class Nets:
    """The two views of the model in the detail branch: one has the adapters, one is frozen."""

    target: Any
    """What target tokens pass."""
    guide: Any
    """What guide tokens pass."""


def guide_forward(
    nets: Nets,
    family: Family,
    settings: DetailSettings,
    given: tuple[Tensor, Tensor, Tensor],
    chunk: ChunkSize,
) -> Tensor:
    """The detail branch of inference with nothing of the whole target written in place.

    Args:
        settings: layout, guide noise and the clip's own proxy.
        given: x [B, C, T, H, W], timestep [B] and the text's context.
        chunk: target tokens whose activations are alive at a time.

    Returns:
        [B, C, T, H, W].
    """
    x, timestep, context = given
    net, options = nets.target, training_options()
    with torch.no_grad():
        ev = Evaluation(
            net=net,
            base=nets.guide,
            family=family,
            settings=settings,
            run=SamplingRun(seed=0),
            options=options,
            x=x,
            timestep=timestep,
            text=family.text(net, family.conditioning(context, (), {})),
            parts=parts_of(family, None),
            memory=NOTHING_KEPT,
            chunk=chunk,
        )
        tokens: list[Tokens] = [
            DeviceTokens(item)
            for item in x.new_empty((len(x), ev.plan.tokens.count, family.shape(net).dim))
        ]
        embed(ev, tokens)
        e, e0 = family.time_embedding(net, timestep, x.dtype)
    windows = settings.layout.windows
    assert isinstance(windows, ShiftedWindows), "only disjoint windows are trained"
    rope = family.rotations(net, {})
    attention = ShiftedAttention(windows, settings.layout.alignment, rope)
    keys_of_blocks = guide_keys(ev, nets.guide)
    for i, block in enumerate(family.blocks(net)):
        keys, values = next(keys_of_blocks)
        order = attention.order(i, x.device, x.device)
        for b, store in enumerate(tokens):
            management.raise_if_cancelled()
            rows, pair = family.modulation(block, e0[b]), (keys[b], values[b])
            task = BlockTask(ev, block, store, rows, ev.text.of(b), pair)
            tokens[b] = DeviceTokens(evaluated(attention, order, task))
    return head(ev, tokens, e)


def evaluated(attention: ShiftedAttention, order: WindowOrder, task: BlockTask) -> Tensor:
    """One block on one item's tokens, some windows at a time -> [L, C]."""
    ev, block, guide = task.ev, task.block, task.guide
    assert guide is not None
    in_order = task.tokens.read(order.tokens)
    results, start = [], 0
    while start < len(order.ends):
        stop = ev.chunk.stop(start, order.ends)
        span = order.span(start, stop)

        def compute(
            x: Tensor,
            keys: Tensor,
            values: Tensor,
            windows: tuple[int, int] = (start, stop),
            index: Tensor = order.tokens[span],
        ) -> Tensor:
            rows, own = task.modulation_of(index), replace(task, guide=(keys, values))
            y = ev.family.attention_input(block, x[None], rows)
            attended = attention.attended(own, order, *windows, y)
            x = ev.family.attention_output(block, x[None], attended, rows)
            return rest_of_block(ev, block, x, rows, task.text)[0]

        results.append(recompute(compute, in_order[span], *guide))
        start = stop
    inverse = torch.empty_like(order.tokens)
    inverse[order.tokens] = torch.arange(len(inverse), device=inverse.device)
    return torch.cat(results)[inverse]


def rest_of_block(ev: Evaluation, block: Any, x: Tensor, rows: Modulation, text: Text) -> Tensor:
    """Cross-attention and feed-forward of tokens [1, n, C], as `per_token` in place."""
    x = x + ev.family.cross_attention(block, x, text, ev.options)
    return torch.addcmul(x, ev.family.feed_forward(block, x, rows), rows.gate)


def guide_keys(ev: Evaluation, net: Any) -> Iterator[Pair]:
    """Per block: unrotated keys and values [B, L_g, C] through the adapters, recomputed."""
    with torch.no_grad():
        given = guide_input(ev, net)
    tokens = given.tokens
    for block in ev.family.blocks(net):
        tokens, keys, values = recompute(partial(guide_block, ev, block, given), tokens)  # pyright: ignore[reportGeneralTypeIssues]
        yield keys, values


def guide_block(
    ev: Evaluation, block: Any, given: GuideInput, tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One block on guide tokens [B, L_g, C] -> the block's output, and its keys and values."""
    family, items = ev.family, []
    for b, x in enumerate(tokens.split(1)):
        rows = family.modulation(block, given.e0[b])
        y = family.attention_input(block, x, rows)
        keys, values = family.keys(block, y), family.values(block, y)
        q, k = (
            family.rotate(each, ev.heads, given.freqs) for each in (family.queries(block, y), keys)
        )
        attended = models.attention(q, k, values, ev.heads, ev.options)
        out = family.attention_output(block, x, attended, rows)
        items.append((rest_of_block(ev, block, out, rows, ev.text.of(b)), keys, values))
    out, keys, values = (torch.cat(parts) for parts in zip(*items, strict=True))
    return out, keys, values
