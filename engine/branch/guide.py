"""The guide stream: the proxy's tokens through the model's own blocks (docs/method.md: stage 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..comfyui import models
from ..device import copies
from ..device.chunks import in_chunks
from ..families.family import Modulation
from ..families.rotations import join_axes
from ..proxy.latents import shrink_condition
from .evaluation import Evaluation, per_token
from .weighted import Pair


@dataclass(frozen=True)
class GuideInput:
    """What enters the first block."""

    tokens: Tensor
    """[B, L_g, C]"""
    e0: Tensor
    """The projected time embedding, per item."""
    freqs: Tensor
    """The proxy's own rotations, as in stage 1: temporal index times the stride."""


def guide_input(ev: Evaluation, net: Any) -> GuideInput:
    """The proxy as the guide stream reads it.

    Args:
        net: the diffusion model as the guide sees it.
    """
    timestep = _timestep(ev)
    latent = models.pad_to_patch(_latent(ev, timestep), ev.plan.space.patch)
    grid = ev.plan.proxy_tokens
    time, height, width = (torch.arange(n, device=ev.device)[None] for n in grid)
    rope = ev.family.rotations(net, {})
    axes = (ev.plan.temporal_stride * time, height, width)
    return GuideInput(
        ev.family.embed(net, latent).contiguous(),
        ev.family.time_embedding(net, timestep, ev.x.dtype)[1],
        join_axes([rope.tables(i, positions) for i, positions in enumerate(axes)]),
    )


def _timestep(ev: Evaluation) -> Tensor:
    """The guide's timestep [B] or [B, F_g]: 0 when clean, the target's when matched."""
    if ev.settings.guide_is_clean:
        return ev.timestep.new_zeros(len(ev.timestep))
    if ev.timestep.ndim == 1 or ev.timestep.shape[1] == 1:
        return ev.timestep
    return ev.timestep[:, :: ev.plan.temporal_stride]


def _latent(ev: Evaluation, timestep: Tensor) -> Tensor:
    """The guide's input [B, C_in, F_g, H_g, W_g], noised and with image conditioning."""
    proxy = ev.settings.proxy
    assert proxy is not None
    x, batch = ev.x, len(ev.x)
    latent = proxy
    if not ev.settings.guide_is_clean:
        noise = ev.run.noise_like(proxy)
        # One item of the proxy per item of a conditioning's batch, as below.
        latent, noise = _repeat(proxy, batch).to(x.device), _repeat(noise, batch).to(x.device)
        sigma = (timestep / ev.family.TIMESTEPS).reshape(batch, 1, -1, 1, 1)
        latent = (1 - sigma) * latent + sigma * noise
    latent = _repeat(latent, batch).to(x)
    condition = x[:, ev.plan.space.channels :]
    if condition.shape[1]:
        condition = shrink_condition(condition, ev.plan.proxy_latent, ev.plan.temporal_stride)
        latent = torch.cat([latent, condition], dim=1)
    return latent


def _repeat(latent: Tensor, batch: int) -> Tensor:
    """A latent's batch repeated over the conditionings that are evaluated together.

    Raises:
        ValueError: the proxy has more videos than, or not a divisor of, what is sampled.
    """
    if batch % len(latent):
        raise ValueError(
            f"The proxy latent holds {len(latent)} videos, the target {batch}. Give both the same "
            "batch size, or one proxy for all."
        )
    return latent.repeat(batch // len(latent), 1, 1, 1, 1)


class GuideStream:
    """The proxy's tokens through the same blocks: full attention among themselves.

    They never read target tokens, so with `clean` noise their keys and values are the same in
    every step.
    """

    def __init__(self, ev: Evaluation):
        lora = ev.settings.guide_lora
        self.ev = ev
        self.net = ev.net
        if lora is not None:  # its factors stay on the device for the run
            key = "guide", id(ev.net), id(lora)
            self.net = ev.run.once(key, lambda: lora.view(ev.net, ev.x))

    @property
    def _key(self) -> tuple:
        """What the keys and values depend on within a run: the branch, and the conditionings."""
        ev = self.ev
        return id(ev.net), id(ev.settings), tuple(ev.options.get("uuids", ()))

    @property
    def is_kept(self) -> bool:
        """Whether an earlier step left the keys and values."""
        return self._key in self.ev.run.guide_keys

    def keys_of_blocks(self) -> Iterator[Pair]:
        """Per block: unrotated keys and values [B, L_g, C].

        With `clean` noise they are computed in the run's first step and kept for its other steps,
        where the memory plan has room for them.
        """
        ev, key = self.ev, self._key
        kept = ev.run.guide_keys.get(key)
        if kept is not None:
            for keys, values in kept:
                if keys.device == ev.device:
                    yield keys, values
                else:
                    yield copies.upload(keys, ev.device), copies.upload(values, ev.device)
            return
        keep = ev.settings.guide_is_clean and ev.run.keep_guide and ev.memory.guide != "recompute"
        fresh: list[Pair] = []
        for keys, values in self._evaluate():
            if keep:
                fresh.append((self._place(keys), self._place(values)))
                if len(fresh) == len(ev.family.blocks(self.net)):  # only a whole one is worth it
                    ev.run.keep_guide_keys(key, fresh)
            yield keys, values
            del keys, values  # before those of the next block are made

    def _place(self, tensor: Tensor) -> Tensor:
        """Where the memory plan keeps a tensor between steps."""
        if self.ev.memory.guide == "device":
            return tensor
        return copies.host_buffer(tuple(tensor.shape), tensor.dtype, tensor.device).copy_(tensor)

    def _evaluate(self) -> Iterator[Pair]:
        """Per block: keys and values, computed."""
        ev, family = self.ev, self.ev.family
        given = guide_input(ev, self.net)
        tokens, grid = given.tokens, ev.plan.proxy_tokens
        frame_of_token = torch.arange(grid.frames, device=tokens.device)
        frame_of_token = frame_of_token.repeat_interleave(
            grid.height * grid.width, output_size=len(tokens[0])
        )
        blocks = family.blocks(self.net)
        for i, block in enumerate(blocks):
            rows = [family.modulation(block, item).of_tokens(frame_of_token) for item in given.e0]
            keys, values = torch.empty_like(tokens), torch.empty_like(tokens)
            for item in range(len(tokens)):
                self._fill_keys(block, tokens[item], rows[item], (keys[item], values[item]))
            # All of the block at once: its weights are here now.
            if i < len(blocks) - 1:
                rotated = family.rotate(keys, ev.heads, given.freqs)
                for item in range(len(tokens)):
                    one = slice(item, item + 1)
                    x, text = tokens[one], ev.text.of(item)
                    self._attend(block, x, rows[item], (rotated[one], values[one]), given.freqs)
                    per_token(ev, block, x, rows[item], text)
                del rotated
            yield keys, values
            del keys, values

    def _fill_keys(self, block: Any, x: Tensor, rows: Modulation, pair: Pair) -> None:
        """Fill unrotated keys and values [L_g, C] of one item's tokens x [L_g, C]."""
        family, (keys, values) = self.ev.family, pair

        def compute(start: int, stop: int) -> None:
            y = family.attention_input(block, x[None, start:stop], rows.part(start, stop))
            keys[start:stop] = self.ev.parts.keys(block, y)[0]
            values[start:stop] = family.values(block, y)[0]

        in_chunks(range(1, len(x) + 1), self.ev.chunk, compute)

    def _attend(self, block: Any, x: Tensor, rows: Modulation, pair: Pair, freqs: Tensor) -> None:
        """Self-attention in place on one item's tokens x [1, L_g, C], to rotated keys."""
        ev, family = self.ev, self.ev.family

        def compute(start: int, stop: int) -> None:
            part, own = x[:, start:stop], rows.part(start, stop)
            q = ev.parts.queries(block, family.attention_input(block, part, own))
            q = family.rotate(q, ev.heads, freqs[:, start:stop])
            attended = models.attention(q, *pair, ev.heads, ev.options)
            part.copy_(family.attention_output(block, part, attended, own))

        in_chunks(range(1, x.shape[1] + 1), ev.chunk, compute)
