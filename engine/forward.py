"""A Wan forward with windowed attention guided by the proxy (method: stage 2).

Target tokens stay in one tensor [B, F, h, w, C] that every block updates in place; no other tensor
has the grid's length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import blocks, host
from .block_task import BlockTask, WindowAttention
from .guide import GuideStream
from .latents import require_shape
from .rope import RopeAxes
from .run import SamplingRun
from .settings import DetailSettings
from .shifted import ShiftedAttention
from .sliding import SlidingAttention
from .windows import GuideAlignment, ShiftedWindows, SlidingWindows


class DetailForward:
    """One evaluation of the model: the target tokens by windows, the guide stream beside them."""

    def __init__(self, model: Any, settings: DetailSettings, run: SamplingRun, options: dict):
        self.model = model
        self.settings = settings
        self.run = run
        self.options = dict(options)
        self.heads = model.num_heads
        self.plan = settings.plan
        self.attention = run.attention_of(settings, self._attention)

    def __call__(
        self, x: Tensor, timestep: Tensor, context: Tensor, clip_fea: Tensor | None
    ) -> Tensor:
        """x [B, C_in, T, H, W], timestep [B] or [B, T] -> the output [B, C_out, T, H, W]."""
        plan = self.plan
        require_shape(
            x[:, : plan.space.channels],
            plan.latent,
            plan.space.channels,
            "target",
            "Start the detail sampler from the AtlasVid Detail Latent of the same plan.",
        )
        grid = plan.tokens
        options = self.options
        options["grid_sizes"] = torch.Size(grid)
        options["total_blocks"] = len(self.model.blocks)
        options["block_type"] = "double"
        if x.device.type == "cpu":
            options.setdefault("optimized_attention_override", host.fused_on_cpu)

        tokens = self._embed(x)
        e, e0 = host.time_embedding(self.model, timestep, x.dtype)
        text = self._text(context, clip_fea)
        guide = None
        if self.settings.proxy is not None:
            guide = GuideStream(
                self.model, self.settings, self.run, options, x, timestep, text
            ).keys_of_blocks()
        chunk = host.chunk_tokens(self.model, tokens)

        replace = options.get("patches_replace", {}).get("dit", {})
        patches = options.get("patches", {}).get("double_block", ())
        for i, block in enumerate(self.model.blocks):
            options["block_index"] = i
            guide_keys = next(guide) if guide is not None else None
            if ("double_block", i) in replace:
                tokens = self._replaced(replace["double_block", i], i, tokens, e0, text, guide_keys)
            else:
                self._block(i, block, tokens, e0, text, guide_keys, chunk)
            for patch in patches:
                flat = tokens.flatten(1, 3)
                out = patch(
                    {
                        "img": flat,
                        "x": x,
                        "vec": e,
                        "block_index": i,
                        "img_offset": 0,
                        "transformer_options": options,
                    }
                )
                tokens = out["img"].unflatten(1, grid)
        return self._head(tokens, e, x)

    def _embed(self, x: Tensor) -> Tensor:
        """Latent [B, C_in, T, H, W] -> tokens [B, F, h, w, C], a few frames at a time."""
        grid = self.plan.tokens
        tokens = x.new_empty((x.shape[0], *grid, self.model.dim))
        for f in range(grid.frames):
            frame = host.pad_to_patch(x[:, :, f : f + 1], self.plan.space.patch)
            embedded = self.model.patch_embedding(frame.float())
            tokens[:, f] = embedded[:, :, 0].permute(0, 2, 3, 1)
        return tokens

    def _head(self, tokens: Tensor, e: Tensor, x: Tensor) -> Tensor:
        """Tokens [B, F, h, w, C] -> output latent [B, C_out, T, H, W], frame by frame."""
        _, ph, pw = self.plan.space.patch
        _, h, w = self.plan.tokens
        height, width = x.shape[-2:]
        out = x.new_empty((x.shape[0], self.model.out_dim, *x.shape[2:]))
        for f in range(len(tokens[0])):
            e_frame = e[:, f : f + 1] if e.shape[1] > 1 else e
            patch = self.model.head(tokens[:, f].flatten(1, 2), e_frame)
            frame = patch.view(-1, h, w, ph, pw, self.model.out_dim).permute(0, 5, 1, 3, 2, 4)
            frame = frame.reshape(-1, self.model.out_dim, h * ph, w * pw)
            out[:, :, f] = frame[..., :height, :width]
        return out

    def _text(self, context: Tensor, clip_fea: Tensor | None) -> blocks.Text:
        context = self.model.text_embedding(context)
        if clip_fea is None:
            return blocks.Text(context, None)
        if self.model.img_emb is not None:
            context = torch.cat([self.model.img_emb(clip_fea), context], dim=1)
        return blocks.Text(context, clip_fea.shape[-2])

    def _replaced(
        self,
        replacement: Any,
        i: int,
        tokens: Tensor,
        e0: Tensor,
        text: blocks.Text,
        guide_keys: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """A block that another node replaced, with ours as the original that it may call."""
        grid = self.plan.tokens

        def original(args: dict) -> dict:
            out = args["img"].clone().unflatten(1, grid)
            own = blocks.Text(args["txt"], text.image_tokens)
            chunk = host.chunk_tokens(self.model, out)
            self._block(i, self.model.blocks[i], out, args["vec"], own, guide_keys, chunk)
            return {"img": out.flatten(1, 3)}

        args = {
            "img": tokens.flatten(1, 3),
            "txt": text.tokens,
            "vec": e0,
            "pe": None,
            "transformer_options": self.options,
        }
        return replacement(args, {"original_block": original})["img"].unflatten(1, grid)

    def _block(
        self,
        index: int,
        block: Any,
        tokens: Tensor,
        e0: Tensor,
        text: blocks.Text,
        guide_keys: tuple[Tensor, Tensor] | None,
        chunk: int,
    ) -> None:
        """One block in place on tokens [B, F, h, w, C]."""
        for item in range(len(tokens)):
            task = BlockTask(
                block,
                tokens[item].flatten(0, 2),
                self.plan.tokens,
                blocks.Modulation.of(block, e0[item]),
                text.of(item),
                None if guide_keys is None else (guide_keys[0][item], guide_keys[1][item]),
                self.heads,
                self.options,
                chunk,
            )
            self.attention.evaluate(task, index)

    def _attention(self) -> WindowAttention:
        """The way of cutting the grid that the artist chose."""
        plan, window = self.plan, self.settings.window
        rope = RopeAxes(self.model.rope_embedder, self.options.get("rope_options") or {})
        alignment = None
        if self.settings.proxy is not None:
            alignment = GuideAlignment(plan.tokens, plan.proxy_tokens, plan.temporal_stride, window)
        if self.settings.overlap == "sliding":
            return SlidingAttention(SlidingWindows(plan.tokens, window), alignment, rope)
        return ShiftedAttention(ShiftedWindows(plan.tokens, window), alignment, rope)
