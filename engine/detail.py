"""The detail branch: a Wan forward with windowed attention guided by the proxy.

Method: stage 2 (AtlasVid section 3.3). Target tokens stay in one tensor [B, F, h, w, C] that every
block updates in place, box by box; no other tensor has the grid's length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import blocks, host
from .grid import Grid
from .latents import require_proxy, require_shape, shrink_condition
from .plan import Plan
from .rope import RopeAxes, join_axes
from .run import KEY, SamplingRun, open_run, run_of
from .windows import COMPACT, Box, GuideAlignment, ShiftedWindows, flat_index, trained_size

GUIDE_NOISE = ("matched", "clean")
TIMESTEPS = 1000.0
"""Wan's timestep is 1000 sigma."""


@dataclass(frozen=True)
class DetailSettings:
    """What the artist chose for the detail branch."""

    plan: Plan
    window: Grid
    guide_noise: str
    proxy: Tensor | None
    """The proxy latent as the model sees it (process_in applied), or None for windows alone."""
    sigma_start: float
    sigma_end: float


def preset_window(preset: str, plan: Plan, custom: Grid) -> Grid:
    """The window of a preset: `compact`, `trained size`, or `custom`, which gives its own sizes.

    Raises:
        ValueError: unknown preset, or a custom size below 1.
    """
    presets = {"compact": COMPACT, "trained size": trained_size(plan.proxy_tokens)}
    if preset == "custom":
        if min(custom) < 1:
            raise ValueError(f"The custom window is {custom}; every side must be at least 1 token.")
        return custom
    if preset not in presets:
        raise ValueError(f"window is {preset!r}; allowed are {', '.join(presets)}, custom.")
    return presets[preset]


def apply_detail_branch(
    model: Any,
    plan: Plan,
    proxy: Tensor | None,
    window: Grid,
    guide_noise: str,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
) -> Any:
    """A clone of `model` that samples the plan's target with the detail branch.

    Args:
        proxy: ComfyUI latent [B, C, F_g, H_g, W_g], or None for windowed attention alone.
        window: tokens per window.
        guide_noise: `matched` (re-noised to every step's sigma) or `clean` (timestep 0).
        start_percent, end_percent: part of the sampling in which the branch is active.

    Raises:
        ValueError: unsupported model, another latent space than the plan's, or a proxy that does
            not match the plan.
    """
    space = host.latent_space(model)
    if space != plan.space:
        raise ValueError(
            f"The plan was made for a model with {plan.space.channels}-channel latents at 1/"
            f"{plan.space.spatial} size; this model has {space.channels} channels at 1/"
            f"{space.spatial}. Connect the same model to the plan."
        )
    if guide_noise not in GUIDE_NOISE:
        raise ValueError(f"guide_noise is {guide_noise!r}; allowed are {', '.join(GUIDE_NOISE)}.")
    if start_percent > end_percent:
        raise ValueError(
            f"start_percent {start_percent} is after end_percent {end_percent}; swap them."
        )
    if proxy is not None:
        require_proxy(proxy, plan)
        proxy = host.process_latent_in(model, proxy.cpu().float())
    settings = DetailSettings(
        plan=plan,
        window=window.clipped(plan.tokens),
        guide_noise=guide_noise,
        proxy=proxy,
        sigma_start=host.percent_to_sigma(model, start_percent),
        sigma_end=host.percent_to_sigma(model, end_percent),
    )

    def forward(executor: Any, x: Tensor, timestep: Tensor, context: Tensor, *args: Any, **kw: Any):
        clip_fea, time_dim_concat, options, extra = _split(args, kw)
        if not _is_active(settings, options):
            return executor(x, timestep, context, *args, **kw)
        _require_plain(time_dim_concat, extra)
        branch = DetailForward(executor.class_obj, settings, run_of(options), options)
        return branch(x, timestep, context, clip_fea)

    clone = model.clone()
    for kind, wrapper in (
        (host.Wrappers.DIFFUSION_MODEL, forward),
        (host.Wrappers.OUTER_SAMPLE, open_run),
    ):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def _split(args: tuple, kwargs: dict) -> tuple[Any, Any, dict, dict]:
    """clip_fea, time_dim_concat, transformer_options and the rest of WanModel.forward's inputs."""
    named = dict(zip(("clip_fea", "time_dim_concat", "transformer_options"), args, strict=False))
    extra = {**kwargs, **named}
    return (
        extra.pop("clip_fea", None),
        extra.pop("time_dim_concat", None),
        extra.pop("transformer_options", {}),
        extra,
    )


def _is_active(settings: DetailSettings, options: dict) -> bool:
    sigmas = options.get("sigmas")
    if sigmas is None:
        return True
    return settings.sigma_end <= float(sigmas.max()) <= settings.sigma_start


def _require_plain(time_dim_concat: Tensor | None, extra: dict) -> None:
    given = [k for k in ("reference_latent", "context_latents") if extra.get(k) is not None]
    if time_dim_concat is not None:
        given.append("time_dim_concat")
    if given:
        raise ValueError(
            f"The detail branch does not know the conditioning {', '.join(given)}. Use plain text "
            "or WanImageToVideo conditioning, or give that conditioning to the proxy only."
        )


def chunk_tokens(model: Any, like: Tensor) -> int:
    """Tokens to evaluate at a time, so that their activations fit into what is free."""
    per_token = like.element_size() * (14 * model.dim + 3 * model.ffn_dim)
    most = 65_536 if like.is_cuda else 4_096  # past these, larger chunks gain no speed
    return max(1_024, min(most, int(0.5 * host.free_memory(like.device)) // per_token))


class DetailForward:
    """One evaluation of the model: the target tokens by windows, the guide stream beside them."""

    def __init__(self, model: Any, settings: DetailSettings, run: SamplingRun, options: dict):
        self.model = model
        self.settings = settings
        self.run = run
        self.options = dict(options)
        self.heads = model.num_heads
        self.plan = settings.plan
        self.windows = ShiftedWindows(self.plan.tokens, settings.window)
        self.alignment = GuideAlignment(
            self.plan.tokens, self.plan.proxy_tokens, self.plan.temporal_stride, settings.window
        )
        self.rope = RopeAxes(model.rope_embedder, options.get("rope_options") or {})
        self._group_cache: dict[int, list[WindowGroup]] = {}

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
            guide = GuideStream(self, x, timestep, text).keys_of_blocks()
        chunk = chunk_tokens(self.model, tokens)

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
            chunk = chunk_tokens(self.model, out)
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
            windows = BlockWindows(
                self,
                block,
                tokens[item].flatten(0, 2),
                blocks.Modulation.of(block, e0[item]),
                text.of(item),
                None if guide_keys is None else (guide_keys[0][item], guide_keys[1][item]),
                chunk,
            )
            for group in self._groups(index % 2, tokens.device):
                host.in_chunks(
                    len(group.tokens),
                    max(1, chunk // group.size.count),
                    partial(windows.evaluate, group),
                )

    def _groups(self, parity: int, device: torch.device) -> list[WindowGroup]:
        """The windows of even or odd blocks with everything that depends on geometry alone."""
        if parity not in self._group_cache:
            self._group_cache[parity] = [
                self._group(boxes, device) for boxes in self.windows.by_size(parity).values()
            ]
        return self._group_cache[parity]

    def _group(self, boxes: list[Box], device: torch.device) -> WindowGroup:
        guide, tables = None, ()
        if self.settings.proxy is not None:
            alignment = self.alignment
            guide = flat_index(alignment.guide, [alignment.box(box) for box in boxes], device)
            offsets = [[alignment.offsets(axis, box) for box in boxes] for axis in range(3)]
            tables = tuple(
                self.rope.tables(axis, torch.tensor(rows, device=device))
                for axis, rows in enumerate(offsets)
            )
        return WindowGroup(
            boxes[0].size,
            flat_index(self.windows.grid, boxes, device),
            self.rope.box(boxes[0].size, device),
            guide,
            tables,
        )


@dataclass(frozen=True)
class WindowGroup:
    """Windows of one size: which tokens they hold, which of the guide they read, and rotations.

    Positions count from each window's first token, so windows of one size share them.
    """

    size: Grid
    tokens: Tensor
    """Index [windows, tokens] into the target's raster order."""
    freqs: Tensor
    """Rotations [1, tokens, 1, d/2, 2, 2] of the window's own tokens."""
    guide: Tensor | None
    """Index [windows, guide tokens] into the guide's raster order."""
    guide_axes: tuple[Tensor, ...]
    """Per axis, rotations [windows, n, d_axis/2, 2, 2] of the guide tokens at positions P."""


class GuideStream:
    """The proxy's tokens through the same blocks: full attention among themselves.

    They never read target tokens, so with `clean` noise their keys and values are the same in
    every step.
    """

    def __init__(self, forward: DetailForward, x: Tensor, timestep: Tensor, text: blocks.Text):
        self.forward = forward
        self.x = x
        self.timestep = timestep
        self.text = text
        self.plan = forward.plan
        self.clean = forward.settings.guide_noise == "clean"

    def keys_of_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Per block: unrotated keys and values [B, L_g, C]."""
        forward, grid = self.forward, self.plan.proxy_tokens
        model, options = forward.model, forward.options
        timestep = self._timestep()
        tokens = self._embed(self._latent(timestep))
        _, e0 = host.time_embedding(model, timestep, self.x.dtype)
        freqs = self._own_positions(tokens.device)
        frame_of_token = torch.arange(grid.frames, device=tokens.device)
        frame_of_token = frame_of_token.repeat_interleave(grid.height * grid.width)
        chunk = chunk_tokens(model, tokens)
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
                blocks.rotate(blocks.queries(block.self_attn, y), forward.heads, freqs),
                blocks.rotate(keys, forward.heads, freqs),
                values,
                forward.heads,
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
        proxy = self.forward.settings.proxy
        assert proxy is not None
        x, batch = self.x, len(self.x)
        latent = proxy
        if not self.clean:
            noise = self.forward.run.noise_like(proxy)
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
        embedded = self.forward.model.patch_embedding(padded.float()).to(latent.dtype)
        return embedded.flatten(2).transpose(1, 2).contiguous()

    def _own_positions(self, device: torch.device) -> Tensor:
        """The proxy's own rotations: temporal index times the stride, as in stage 1."""
        time, height, width = (torch.arange(n, device=device) for n in self.plan.proxy_tokens)
        axes = (self.plan.temporal_stride * time, height, width)
        rope = RopeAxes(self.forward.rope.embedder, {})
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


@dataclass(frozen=True)
class BlockWindows:
    """Evaluates windows of one block and one batch item in place.

    Args:
        tokens: [F * h * w, C], a view of the item's target tokens.
        guide: unrotated guide keys and values [L_g, C], or None.
        chunk: tokens that cross-attention and feed-forward take at a time.
    """

    forward: DetailForward
    block: Any
    tokens: Tensor
    modulation: blocks.Modulation
    text: blocks.Text
    guide: tuple[Tensor, Tensor] | None
    chunk: int

    def evaluate(self, group: WindowGroup, start: int, stop: int) -> None:
        """Read windows start to stop of a group, evaluate the block on them, write them back."""
        index = group.tokens[start:stop].flatten()
        x = self.tokens[index][None]
        frames = None
        if self.modulation.per_frame:
            grid = self.forward.windows.grid
            frames = index // (grid.height * grid.width)
        modulation = self.modulation.of_tokens(frames)
        attended = self._attend(x, group, slice(start, stop), modulation)
        x = blocks.attention_output(self.block, x, attended, modulation)
        del attended
        options = self.forward.options
        blocks.per_token(self.block, x, modulation, self.text, options, self.chunk)
        self.tokens[index] = x[0]

    def _attend(
        self, x: Tensor, group: WindowGroup, windows: slice, modulation: blocks.Modulation
    ) -> Tensor:
        """One softmax over the keys of the window and its aligned guide keys: [1, n, C]."""
        attention, heads = self.block.self_attn, self.forward.heads
        options = self.forward.options
        y = blocks.attention_input(self.block, x, modulation)
        y = y.unflatten(1, (-1, group.size.count))[0]
        q = blocks.rotate(blocks.queries(attention, y), heads, group.freqs)
        k = blocks.rotate(blocks.keys(attention, y), heads, group.freqs)
        v = attention.v(y)
        if self.guide is not None:
            guide_k, guide_v = self._aligned_guide(group, windows)
            k, v = torch.cat([k, guide_k], dim=1), torch.cat([v, guide_v], dim=1)
        out = host.attention(q, k, v, heads, options)
        for patch in options.get("patches", {}).get("attn1_patch", ()):
            out = patch({"x": out, "q": q, "k": k, "transformer_options": options})
        return out.reshape(x.shape)

    def _aligned_guide(self, group: WindowGroup, windows: slice) -> tuple[Tensor, Tensor]:
        """Keys and values [windows, L, C] of the aligned guide tokens, keys rotated by P."""
        assert self.guide is not None
        assert group.guide is not None
        keys, values = self.guide
        index = group.guide[windows]
        freqs = join_axes([table[windows] for table in group.guide_axes])
        # One row of batch 1: rotation kernels take one set of rotations for all of a batch.
        rotated = blocks.rotate(
            keys[index].flatten(0, 1)[None], self.forward.heads, freqs.flatten(0, 1)[None]
        )
        return rotated[0].unflatten(0, index.shape), values[index]
