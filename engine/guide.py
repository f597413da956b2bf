"""The guide stream: the proxy's tokens through the model's own blocks (AtlasVid section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import blocks, host
from .latents import shrink_condition
from .memory import MemoryPlan
from .rope import RopeAxes, join_axes
from .run import SamplingRun
from .settings import DetailSettings

TIMESTEPS = 1000.0
"""Wan's timestep is 1000 sigma."""


class GuideStream:
    """The proxy's tokens through the same blocks: full attention among themselves.

    They never read target tokens, so with `clean` noise their keys and values are the same in
    every step.
    """

    def __init__(
        self,
        model: Any,
        settings: DetailSettings,
        run: SamplingRun,
        options: dict,
        memory: MemoryPlan,
        chunk: host.ChunkSize,
        x: Tensor,
        timestep: Tensor,
        text: blocks.Text,
    ):
        lora = settings.guide_lora
        self.base = model
        self.model = model if lora is None else lora.view(model)
        self.settings = settings
        self.run = run
        self.options = options
        self.memory = memory
        self.chunk = chunk
        self.x = x
        self.timestep = timestep
        self.text = text
        self.plan = settings.plan
        self.clean = settings.guide_noise == "clean"

    @property
    def _key(self) -> tuple:
        """What the keys and values depend on within a run."""
        return (id(self.base), id(self.settings), *self.options.get("uuids", ()))

    @property
    def is_kept(self) -> bool:
        """Whether an earlier step left the keys and values."""
        return self._key in self.run.guide_keys

    def keys_of_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Per block: unrotated keys and values [B, L_g, C].

        With `clean` noise they are computed in the run's first step and kept for its other steps,
        where the memory plan has room for them.
        """
        key = self._key
        kept = self.run.guide_keys.get(key)
        device = self.x.device
        if kept is not None:
            for keys, values in kept:
                yield keys.to(device, non_blocking=True), values.to(device, non_blocking=True)
            return
        keep = self.clean and self.run.keep_guide and self.memory.guide != "recompute"
        fresh: list[tuple[Tensor, Tensor]] = []
        for keys, values in self._evaluate():
            if keep:
                fresh.append((self._place(keys), self._place(values)))
                if len(fresh) == len(self.model.blocks):  # only a whole stream is worth keeping
                    self.run.guide_keys[key] = fresh
            yield keys, values

    def _place(self, tensor: Tensor) -> Tensor:
        """Where the memory plan keeps a tensor between steps."""
        if self.memory.guide == "device":
            return tensor
        buffer = host.host_buffer(tuple(tensor.shape), tensor.dtype, tensor.device)
        return buffer.copy_(tensor)

    def _evaluate(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Per block: keys and values, computed."""
        grid, model, options = self.plan.proxy_tokens, self.model, self.options
        heads = model.num_heads
        timestep = self._timestep()
        tokens = self._embed(self._latent(timestep))
        _, e0 = host.time_embedding(model, timestep, self.x.dtype)
        freqs = self._own_positions(tokens.device)
        frame_of_token = torch.arange(grid.frames, device=tokens.device)
        frame_of_token = frame_of_token.repeat_interleave(grid.height * grid.width)
        chunk = self.chunk
        for i, block in enumerate(model.blocks):
            modulations = [
                blocks.Modulation.of(block, item).of_tokens(frame_of_token) for item in e0
            ]
            y = torch.cat(
                [
                    blocks.attention_input(block, item[None], m)
                    for item, m in zip(tokens, modulations, strict=True)
                ]
            )
            keys, values = blocks.keys(block.self_attn, y), block.self_attn.v(y)
            yield keys, values
            if i == len(model.blocks) - 1:
                return
            attended = host.attention(
                blocks.rotate(blocks.queries(block.self_attn, y), heads, freqs),
                blocks.rotate(keys, heads, freqs),
                values,
                heads,
                options,
            )
            del y, keys, values
            for item, modulation in enumerate(modulations):
                one = slice(item, item + 1)
                tokens[one] = blocks.attention_output(block, tokens[one], attended[one], modulation)
                blocks.per_token(block, tokens[one], modulation, self.text.of(item), options, chunk)

    def _timestep(self) -> Tensor:
        """The guide's timestep [B] or [B, F_g]: 0 when clean, the target's when matched."""
        if self.clean:
            return self.timestep.new_zeros(len(self.timestep))
        if self.timestep.ndim == 1 or self.timestep.shape[1] == 1:
            return self.timestep
        stride = self.plan.temporal_stride
        return self.timestep[:, ::stride]

    def _latent(self, timestep: Tensor) -> Tensor:
        """The guide's input [B, C_in, F_g, H_g, W_g], noised and with image conditioning."""
        proxy = self.settings.proxy
        assert proxy is not None
        x, batch = self.x, len(self.x)
        latent = proxy
        if not self.clean:
            noise = self.run.noise_like(proxy)
            # One item of the proxy per item of a conditioning's batch, as below.
            latent, noise = _repeat(proxy, batch).to(x.device), _repeat(noise, batch).to(x.device)
            sigma = (timestep / TIMESTEPS).reshape(batch, 1, -1, 1, 1)
            latent = (1 - sigma) * latent + sigma * noise
        latent = _repeat(latent, batch).to(x)
        condition = x[:, self.plan.space.channels :]
        if condition.shape[1]:
            grid = self.plan.proxy_latent
            condition = shrink_condition(condition, grid, self.plan.temporal_stride)
            latent = torch.cat([latent, condition], dim=1)
        return latent

    def _embed(self, latent: Tensor) -> Tensor:
        """Guide latent -> tokens [B, L_g, C]."""
        padded = host.pad_to_patch(latent, self.plan.space.patch)
        embedded = self.model.patch_embedding(padded.float()).to(latent.dtype)
        return embedded.flatten(2).transpose(1, 2).contiguous()

    def _own_positions(self, device: torch.device) -> Tensor:
        """The proxy's own rotations: temporal index times the stride, as in stage 1."""
        time, height, width = (torch.arange(n, device=device) for n in self.plan.proxy_tokens)
        axes = (self.plan.temporal_stride * time, height, width)
        rope = RopeAxes(self.model.rope_embedder, {})
        return join_axes([rope.tables(i, positions[None]) for i, positions in enumerate(axes)])


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
