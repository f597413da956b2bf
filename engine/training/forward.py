"""The forwards of both stages under autograd.

Stage guide runs the windows, guide stream and positions of inference; nothing is written in place,
and what a chunk of windows computes is computed again for the backward pass. So of the whole
target only each block's input is kept, and activations are bounded by the chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import blocks, host
from ..detail import BlockWindows, DetailForward, DetailSettings, GuideStream, WindowGroup
from ..lora import with_layers
from ..plan import Plan
from ..run import SamplingRun

recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
CHUNK_TOKENS = {"cuda": 8_192, "cpu": 2_048}
"""Target tokens whose activations are alive at a time."""


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
    return {"optimized_attention_override": host.differentiable_attention}


def guide_forward(
    model: Any,
    guide_model: Any,
    settings: DetailSettings,
    x: Tensor,
    timestep: Tensor,
    context: Tensor,
) -> Tensor:
    """The detail branch on x [B, C, T, H, W] -> [B, C, T, H, W].

    Args:
        model: the frozen view that target tokens pass.
        guide_model: the view with adapters that guide tokens pass.
        settings: plan, window, guide noise and the clip's own proxy.
    """
    return TrainedDetail(model, guide_model, settings)(x, timestep, context, None)


class TrainedDetail(DetailForward):
    """The detail branch of inference with nothing written in place."""

    def __init__(self, model: Any, guide_model: Any, settings: DetailSettings):
        super().__init__(model, settings, SamplingRun(seed=0), training_options())
        self.guide_model = guide_model

    def __call__(
        self, x: Tensor, timestep: Tensor, context: Tensor, clip_fea: Tensor | None
    ) -> Tensor:
        with torch.no_grad():
            tokens = self._embed(x)
            e, e0 = host.time_embedding(self.model, timestep, x.dtype)
            text = self._text(context, clip_fea)
        guide = TrainedGuide(self, x, timestep, text).keys_of_blocks()
        for i, block in enumerate(self.model.blocks):
            keys, values = next(guide)
            tokens = torch.stack(
                [
                    self._item(i, block, tokens[b], e0[b], text.of(b), keys[b], values[b])
                    for b in range(len(x))
                ]
            )
        return self._head(tokens, e, x)

    def _item(
        self,
        index: int,
        block: Any,
        tokens: Tensor,
        e0: Tensor,
        text: blocks.Text,
        guide_keys: Tensor,
        guide_values: Tensor,
    ) -> Tensor:
        """One block on one item's tokens [F, h, w, C], window by window -> [F, h, w, C]."""
        host.raise_if_cancelled()
        groups = self._groups(index % 2, tokens.device)
        order = torch.cat([group.tokens.flatten() for group in groups])
        in_order = tokens.flatten(0, 2)[order]
        modulation = blocks.Modulation.of(block, e0)
        most = CHUNK_TOKENS.get(tokens.device.type, CHUNK_TOKENS["cuda"])
        results, first = [], 0
        for group in groups:
            step = max(1, most // group.size.count)
            for start in range(0, len(group.tokens), step):
                windows = slice(start, start + step)
                count = group.tokens[windows].numel()
                x = in_order[first : first + count]
                compute = partial(self._windows, block, modulation, text, group, windows)
                results.append(recompute(compute, x, guide_keys, guide_values))
                first += count
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return torch.cat(results)[inverse].unflatten(0, tuple(self.plan.tokens))

    def _windows(
        self,
        block: Any,
        modulation: blocks.Modulation,
        text: blocks.Text,
        group: WindowGroup,
        windows: slice,
        x: Tensor,
        guide_keys: Tensor,
        guide_values: Tensor,
    ) -> Tensor:
        """Some windows' tokens [n, C], in window order, through a block -> [n, C]."""
        branch = BlockWindows(self, block, x, modulation, text, (guide_keys, guide_values), 0)
        attended = branch._attend(x[None], group, windows, modulation)
        out = blocks.attention_output(block, x[None], attended, modulation)
        return blocks.per_token(block, out, modulation, text, self.options)[0]


class TrainedGuide(GuideStream):
    """The guide stream of inference through the adapters, each block recomputed."""

    def __init__(self, forward: TrainedDetail, x: Tensor, timestep: Tensor, text: blocks.Text):
        super().__init__(forward, x, timestep, text)
        self.model = forward.guide_model

    def keys_of_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Per block: unrotated keys and values [B, L_g, C]."""
        with torch.no_grad():
            timestep = self._timestep()
            tokens = self._embed(self._latent(timestep))
            _, e0 = host.time_embedding(self.model, timestep, self.x.dtype)
            freqs = self._own_positions(tokens.device)
        for block in self.model.blocks:
            tokens, keys, values = recompute(partial(self._block, block, e0, freqs), tokens)  # pyright: ignore[reportGeneralTypeIssues]
            yield keys, values

    def _block(
        self, block: Any, e0: Tensor, freqs: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One block on guide tokens [B, L_g, C] -> the block's output, and its keys and values."""
        forward = self.forward
        items = []
        for b, x in enumerate(tokens.split(1)):
            modulation = blocks.Modulation.of(block, e0[b])
            y = blocks.attention_input(block, x, modulation)
            keys, values = blocks.keys(block.self_attn, y), block.self_attn.v(y)
            attended = host.attention(
                blocks.rotate(blocks.queries(block.self_attn, y), forward.heads, freqs),
                blocks.rotate(keys, forward.heads, freqs),
                values,
                forward.heads,
                forward.options,
            )
            out = blocks.attention_output(block, x, attended, modulation)
            out = blocks.per_token(block, out, modulation, self.text.of(b), forward.options)
            items.append((out, keys, values))
        out, keys, values = (torch.cat(parts) for parts in zip(*items, strict=True))
        return out, keys, values
