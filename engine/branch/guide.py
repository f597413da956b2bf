"""The guide stream: the proxy's tokens through the model's own blocks (docs/method.md: stage 2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
from .joint import COND, JointGuide
from .weighted import Pair


@dataclass(frozen=True)
class GuideInput:
    """What enters the first block."""

    tokens: Tensor
    """[B, L_g, C]"""
    e: Tensor
    """The time embedding [B, 1 or F_g, C], which the head reads."""
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
    latent = models.pad_to_patch(_latent(ev), ev.plan.space.patch)
    grid = ev.plan.proxy_tokens
    time, height, width = (torch.arange(n, device=ev.device)[None] for n in grid)
    rope = ev.family.rotations(net, {})
    axes = (ev.plan.temporal_stride * time, height, width)
    return GuideInput(
        ev.family.embed(net, latent).contiguous(),
        *ev.family.time_embedding(net, timestep, ev.x.dtype),
        join_axes([rope.tables(i, positions) for i, positions in enumerate(axes)]),
    )


def _timestep(ev: Evaluation) -> Tensor:
    """The guide's timestep [B] or [B, F_g]: 0 when clean, else the target's."""
    if ev.settings.guide_is_clean:
        return ev.timestep.new_zeros(len(ev.timestep))
    if ev.timestep.ndim == 1 or ev.timestep.shape[1] == 1:
        return ev.timestep
    return ev.timestep[:, :: ev.plan.temporal_stride]


def _latent(ev: Evaluation) -> Tensor:
    """The guide's input [B, C_in, F_g, H_g, W_g], noised and with image conditioning."""
    proxy = ev.settings.proxy
    assert proxy is not None
    x, batch = ev.x, len(ev.x)
    latent = proxy
    if not ev.settings.guide_is_clean:
        if ev.settings.guide_is_joint:
            latent = _joint(ev).at(_levels(ev))
        else:  # one item of the proxy per item of a conditioning's batch, as below
            latent = _noised(ev, _sigma(ev, batch))
    latent = _repeat(latent, batch).to(x)
    condition = x[:, ev.plan.space.channels :]
    if condition.shape[1]:
        condition = shrink_condition(condition, ev.plan.proxy_latent, ev.plan.temporal_stride)
        latent = torch.cat([latent, condition], dim=1)
    return latent


def _sigma(ev: Evaluation, items: int) -> Tensor:
    """The guide's noise level in the first items: [items, 1, 1 or F_g, 1, 1]."""
    timestep = _timestep(ev)[:items]
    return (timestep / ev.family.TIMESTEPS).reshape(items, 1, -1, 1, 1)


def _noised(ev: Evaluation, sigma: Tensor) -> Tensor:
    """The proxy noised to `sigma` [B, 1, 1 or F_g, 1, 1] by the run's noise, float32."""
    proxy = ev.settings.proxy
    assert proxy is not None
    clean, noise = (
        _repeat(each, len(sigma)).to(ev.device) for each in (proxy, ev.run.noise_like(proxy))
    )
    return (1 - sigma) * clean + sigma * noise


def _kinds(ev: Evaluation) -> Sequence[int]:
    """The conditionings that are evaluated together, as ComfyUI numbers them."""
    return ev.options.get("cond_or_uncond") or (COND,)


def _levels(ev: Evaluation) -> Tensor:
    """The noise level of every video, which all conditionings share."""
    return _sigma(ev, len(ev.x) // len(_kinds(ev)))


def _joint(ev: Evaluation) -> JointGuide:
    """The run's guide; where it has none yet, the proxy noised to the first level."""

    def start() -> JointGuide:
        sigma = _levels(ev)
        return JointGuide(_noised(ev, sigma), sigma, ev.run.cfg)

    return ev.run.once(("joint", id(ev.settings)), start)


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
        self.net = ev.base
        if lora is not None:  # its factors stay on the device for the run
            key = "guide", id(ev.base), id(lora)
            self.net = ev.run.once(key, lambda: lora.view(ev.base, ev.x))

    @property
    def _key(self) -> tuple:
        """What the keys and values depend on within a run: the branch, and the conditionings."""
        ev = self.ev
        return id(ev.base), id(ev.settings), tuple(ev.options.get("uuids", ()))

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

    def finish(self, keys_of_blocks: Iterable[Pair | None]) -> None:
        """After the target's last block: what the guide itself still has to compute."""
        for _ in keys_of_blocks:
            pass

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
            if i < len(blocks) - 1 or ev.settings.guide_is_joint:
                rotated = family.rotate(keys, ev.heads, given.freqs)
                for item in range(len(tokens)):
                    one = slice(item, item + 1)
                    x, text = tokens[one], family.text_of_block(block, ev.text.of(item))
                    self._attend(block, x, rows[item], (rotated[one], values[one]), given.freqs)
                    per_token(ev, block, x, rows[item], text)
                del rotated
            yield keys, values
            del keys, values
        if ev.settings.guide_is_joint:
            self._record(tokens, given.e)

    def _record(self, tokens: Tensor, e: Tensor) -> None:
        """Give the joint guide the velocity [B, C, F_g, H_g, W_g] that its own tokens predict."""
        ev, grid, latent = self.ev, self.ev.plan.proxy_tokens, self.ev.plan.proxy_latent
        in_frames = tokens.unflatten(1, (grid.frames, -1))
        frames = []
        for f in range(grid.frames):
            own = e[:, f : f + 1] if e.shape[1] > 1 else e
            items = zip(in_frames[:, f].split(1), own.split(1), strict=True)
            pixels = [ev.family.head(self.net, x, row, grid.width) for x, row in items]
            frames.append(torch.stack(pixels)[..., : latent.height, : latent.width])
        _joint(ev).record(torch.stack(frames, 2), _kinds(ev))

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
