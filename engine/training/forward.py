"""The forwards of both stages under autograd.

Stage guide runs the windows, guide stream and positions of inference; nothing is written in place,
and what a chunk of windows computes is computed again for the backward pass. So of the whole
target only each block's input is kept, and activations are bounded by the chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..branch.block_task import BlockTask
from ..branch.forward import DetailForward
from ..branch.guide import GuideStream
from ..branch.run import SamplingRun
from ..branch.settings import DetailSettings
from ..branch.shifted import ShiftedAttention
from ..comfyui import management, models
from ..device.chunks import ChunkSize
from ..device.tokens import DeviceTokens
from ..families import wan
from ..geometry.plan import Plan
from ..lora.view import with_layers

recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
CUDA_CHUNK, CPU_CHUNK = 8_192, 2_048
"""Past these sizes a larger chunk gains no speed."""


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


def guide_forward(
    model: Any,
    guide_model: Any,
    settings: DetailSettings,
    x: Tensor,
    timestep: Tensor,
    context: Tensor,
    chunk: ChunkSize,
) -> Tensor:
    """The detail branch on x [B, C, T, H, W] -> [B, C, T, H, W].

    Args:
        model: the frozen view that target tokens pass.
        guide_model: the view with adapters that guide tokens pass.
        settings: plan, window, guide noise and the clip's own proxy.
        chunk: target tokens whose activations are alive at a time.
    """
    return TrainedDetail(model, guide_model, settings, chunk)(x, timestep, context, None)


class TrainedDetail(DetailForward):
    """The detail branch of inference with nothing of the whole target written in place."""

    def __init__(self, model: Any, guide_model: Any, settings: DetailSettings, chunk: ChunkSize):
        super().__init__(model, settings, SamplingRun(seed=0), training_options())
        self.guide_model = guide_model
        self.chunk = chunk

    def __call__(
        self, x: Tensor, timestep: Tensor, context: Tensor, clip_fea: Tensor | None
    ) -> Tensor:
        with torch.no_grad():
            tokens = [DeviceTokens(item) for item in self._empty(x)]
            self._embed(x, list(tokens), self.chunk)
            e, e0 = models.time_embedding(self.model, timestep, x.dtype)
            text = self._text(context, clip_fea)
        guide = TrainedGuide(
            self.guide_model,
            self.settings,
            self.run,
            self.options,
            self._plan_memory(x),
            self.chunk,
            x,
            timestep,
            text,
        ).keys_of_blocks()
        for i, block in enumerate(self.model.blocks):
            keys, values = next(guide)
            for b, item in enumerate(tokens):
                new = self._item(i, block, item.values, e0[b], text.of(b), keys[b], values[b])
                tokens[b] = DeviceTokens(new)
        return self._head(list(tokens), e, x, self.chunk)

    def _empty(self, x: Tensor) -> Tensor:
        """Room for the target's tokens [B, F * h * w, C]."""
        return x.new_empty((len(x), self.plan.tokens.count, self.model.dim))

    def _item(
        self,
        index: int,
        block: Any,
        tokens: Tensor,
        e0: Tensor,
        text: wan.Text,
        guide_keys: Tensor,
        guide_values: Tensor,
    ) -> Tensor:
        """One block on one item's tokens [L, C], some windows at a time -> [L, C]."""
        management.raise_if_cancelled()
        attention = self.attention
        assert isinstance(attention, ShiftedAttention), "only disjoint windows are trained"
        order = attention.order(index, tokens.device, tokens.device)
        in_order = tokens[order.tokens]
        modulation = wan.Modulation.of(block, e0)
        results, start = [], 0
        while start < len(order.ends):
            stop = self.chunk.stop(start, order.ends)

            def compute(
                x: Tensor, keys: Tensor, values: Tensor, start: int = start, stop: int = stop
            ) -> Tensor:
                task = WindowTask(
                    block,
                    DeviceTokens(x),
                    self.plan.tokens,
                    modulation,
                    text,
                    (keys, values),
                    self.model.num_heads,
                    self.options,
                    self.chunk,
                    x.device,
                    guide_weight=self.settings.guide_weight,
                )
                attention.evaluate_windows(task, order, start, stop)
                return task.results[0]

            x = in_order[order.span(start, stop)]
            results.append(recompute(compute, x, guide_keys, guide_values))
            start = stop
        inverse = torch.empty_like(order.tokens)
        inverse[order.tokens] = torch.arange(len(inverse), device=inverse.device)
        return torch.cat(results)[inverse]


@dataclass(frozen=True)
class WindowTask(BlockTask):
    """A block on nothing but the windows under evaluation; the result is kept, not written back.

    `tokens` are those windows' [n, C], in their order.
    """

    results: list[Tensor] = field(default_factory=list)

    def read(self, index: Tensor) -> tuple[Tensor, wan.Modulation]:
        assert isinstance(self.tokens, DeviceTokens)
        return self.tokens.values[None], self.modulation_of(index)

    def finish(
        self, x: Tensor, attended: Tensor, modulation: wan.Modulation, index: Tensor
    ) -> None:
        out = wan.attention_output(self.block, x, attended, modulation)
        out = rest_of_block(self.block, out, modulation, self.text, self.options)
        self.results.append(out[0])


def rest_of_block(
    block: Any, x: Tensor, modulation: wan.Modulation, text: wan.Text, options: dict
) -> Tensor:
    """Cross-attention and feed-forward of tokens [1, n, C], as `wan.per_token` in place."""
    x = x + wan.cross_attention(block, x, text, options)
    return torch.addcmul(x, wan.feed_forward(block, x, modulation), modulation[5])


class TrainedGuide(GuideStream):
    """The guide stream of inference through the adapters, each block recomputed."""

    def keys_of_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Per block: unrotated keys and values [B, L_g, C]."""
        with torch.no_grad():
            timestep = self._timestep()
            tokens = self._embed(self._latent(timestep))
            _, e0 = models.time_embedding(self.model, timestep, self.x.dtype)
            freqs = self._own_positions(tokens.device)
        for block in self.model.blocks:
            tokens, keys, values = recompute(partial(self._block, block, e0, freqs), tokens)  # pyright: ignore[reportGeneralTypeIssues]
            yield keys, values

    def _block(
        self, block: Any, e0: Tensor, freqs: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One block on guide tokens [B, L_g, C] -> the block's output, and its keys and values."""
        heads, items = self.model.num_heads, []
        for b, x in enumerate(tokens.split(1)):
            modulation = wan.Modulation.of(block, e0[b])
            y = wan.attention_input(block, x, modulation)
            keys, values = wan.keys(block.self_attn, y), block.self_attn.v(y)
            attended = models.attention(
                wan.rotate(wan.queries(block.self_attn, y), heads, freqs),
                wan.rotate(keys, heads, freqs),
                values,
                heads,
                self.options,
            )
            out = wan.attention_output(block, x, attended, modulation)
            out = rest_of_block(block, out, modulation, self.text.of(b), self.options)
            items.append((out, keys, values))
        out, keys, values = (torch.cat(parts) for parts in zip(*items, strict=True))
        return out, keys, values
