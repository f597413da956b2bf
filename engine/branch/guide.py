"""The guide stream: the proxy's tokens through the model's own blocks (AtlasVid section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..comfyui import models
from ..device import copies
from ..device.chunks import ChunkSize, in_chunks
from ..families import wan
from ..proxy.latents import shrink_condition
from .memory import MemoryPlan
from .rotations import RopeAxes, join_axes
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
        chunk: ChunkSize,
        x: Tensor,
        timestep: Tensor,
        text: wan.Text,
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
        """What the keys and values depend on within a run: the branch, and the conditionings."""
        return id(self.base), id(self.settings), tuple(self.options.get("uuids", ()))

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
                if keys.device == device:
                    yield keys, values
                else:
                    yield copies.upload(keys, device), copies.upload(values, device)
            return
        keep = self.clean and self.run.keep_guide and self.memory.guide != "recompute"
        fresh: list[tuple[Tensor, Tensor]] = []
        for keys, values in self._evaluate():
            if keep:
                fresh.append((self._place(keys), self._place(values)))
                if len(fresh) == len(self.model.blocks):  # only a whole stream is worth keeping
                    self.run.keep_guide_keys(key, fresh)
            yield keys, values
            del keys, values  # before those of the next block are made

    def _place(self, tensor: Tensor) -> Tensor:
        """Where the memory plan keeps a tensor between steps."""
        if self.memory.guide == "device":
            return tensor
        buffer = copies.host_buffer(tuple(tensor.shape), tensor.dtype, tensor.device)
        return buffer.copy_(tensor)

    def _evaluate(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Per block: keys and values, computed."""
        grid, model = self.plan.proxy_tokens, self.model
        heads = model.num_heads
        timestep = self._timestep()
        tokens = self._embed(self._latent(timestep))
        _, e0 = models.time_embedding(model, timestep, self.x.dtype)
        freqs = self._own_positions(tokens.device)
        frame_of_token = torch.arange(grid.frames, device=tokens.device)
        frame_of_token = frame_of_token.repeat_interleave(
            grid.height * grid.width, output_size=len(tokens[0])
        )
        for i, block in enumerate(model.blocks):
            rows = [wan.Modulation.of(block, item).of_tokens(frame_of_token) for item in e0]
            keys, values = torch.empty_like(tokens), torch.empty_like(tokens)
            for item in range(len(tokens)):
                self._fill_keys(block, tokens[item], rows[item], keys[item], values[item])
            yield keys, values
            if i == len(model.blocks) - 1:
                return
            keys = wan.rotate(keys, heads, freqs)
            for item in range(len(tokens)):
                one = slice(item, item + 1)
                self._update(
                    block,
                    tokens[one],
                    rows[item],
                    keys[one],
                    values[one],
                    freqs,
                    self.text.of(item),
                )
            del keys, values

    def _fill_keys(
        self, block: Any, x: Tensor, rows: wan.Modulation, keys: Tensor, values: Tensor
    ) -> None:
        """Fill unrotated keys and values [L_g, C] of one item's tokens x [L_g, C]."""

        def compute(start: int, stop: int) -> None:
            y = wan.attention_input(block, x[None, start:stop], rows.part(start, stop))
            keys[start:stop] = self.run.parts.keys(block.self_attn, y)[0]
            values[start:stop] = block.self_attn.v(y)[0]

        in_chunks(range(1, len(x) + 1), self.chunk, compute)

    def _update(
        self,
        block: Any,
        x: Tensor,
        rows: wan.Modulation,
        keys: Tensor,
        values: Tensor,
        freqs: Tensor,
        text: wan.Text,
    ) -> None:
        """One block in place on one item's tokens x [1, L_g, C], with rotated keys."""
        heads = self.model.num_heads

        def attend(start: int, stop: int) -> None:
            part, own = x[:, start:stop], rows.part(start, stop)
            y = wan.attention_input(block, part, own)
            q = self.run.parts.queries(block.self_attn, y)
            q = wan.rotate(q, heads, freqs[:, start:stop])
            attended = models.attention(q, keys, values, heads, self.options)
            part.copy_(wan.attention_output(block, part, attended, own))

        in_chunks(range(1, x.shape[1] + 1), self.chunk, attend)
        wan.per_token(block, x, rows, text, self.options, self.chunk, self.run.parts)

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
        padded = models.pad_to_patch(latent, self.plan.space.patch)
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
