"""A Wan forward with windowed attention guided by the proxy (method: stage 2).

The target tokens of a video are one tensor [F * h * w, C] that every block updates in place, on the
device or in host memory; nothing else has the grid's length.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from ..comfyui import management, models
from ..device.chunks import ChunkSize, in_chunks
from ..device.tokens import DeviceTokens, HostTokens, Tokens
from ..families import wan
from ..geometry.windows import ShiftedWindows, SlidingWindows
from ..proxy.latents import require_shape
from .attention import override_for, say_if_passed_over
from .block_task import BlockTask, WindowAttention
from .guide import GuideStream
from .memory import CPU_CHUNK, CUDA_CHUNK, MemoryPlan, Workload, plan_memory
from .ring import Ring
from .rotations import RopeAxes
from .run import SamplingRun
from .settings import DetailSettings
from .shifted import ShiftedAttention
from .sliding import SlidingAttention


def workload(
    settings: DetailSettings, model: Any, batch: int, itemsize: int, keep_guide: bool
) -> Workload:
    """The sizes of one forward over `batch` videos."""
    plan, window = settings.plan, settings.window
    guided = settings.proxy is not None
    ring = SlidingWindows(plan.tokens, window).ring.count if settings.overlap == "sliding" else 0
    return Workload(
        dim=model.dim,
        ffn_dim=model.ffn_dim,
        layers=len(model.blocks),
        itemsize=itemsize,
        tokens=batch * plan.tokens.count,
        guide_tokens=batch * plan.proxy_tokens.count if guided else 0,
        ring_tokens=ring,
        window_keys=sum(plan.keys_per_query(window, settings.guide_margin)),
        keep_guide=keep_guide and settings.guide_noise == "clean",
    )


class DetailForward:
    """One evaluation of the model: the target tokens by windows, the guide stream beside them."""

    def __init__(self, model: Any, settings: DetailSettings, run: SamplingRun, options: dict):
        self.model = model
        self.settings = settings
        self.run = run
        self.options = dict(options)
        self.plan = settings.plan
        self.attention = run.once(("attention", id(settings)), self._attention)

    def __call__(
        self, x: Tensor, timestep: Tensor, context: Tensor, clip_fea: Tensor | None
    ) -> Tensor:
        """x [B, C_in, T, H, W], timestep [B] or [B, T] -> the output [B, C_out, T, H, W].

        Raises:
            ValueError: the latent's size is not the plan's.
        """
        require_shape(
            x[:, : self.plan.space.channels],
            self.plan.latent,
            self.plan.space.channels,
            "target",
            "Start the detail sampler from the AtlasVid Detail Latent of the same plan; context "
            "windows and area conditioning, which cut the latent, cannot be used with it.",
        )
        self._set_options(x)
        memory = self.run.once(("memory", id(self.settings), len(x)), lambda: self._plan_memory(x))
        chunk = self.run.once(("chunk", id(self.settings), len(x)), lambda: ChunkSize(memory.chunk))
        e, e0 = models.time_embedding(self.model, timestep, x.dtype)
        text = self._text(context, clip_fea)
        with ExitStack() as stack:
            ring = self._ring(x, memory, stack)
            if ring is not None and ring.index_device != x.device:
                chunk.ahead = 1  # the keys that a chunk reads are many times its tokens
            tokens, whole = self._store(x, memory, stack)
            self._embed(x, tokens, chunk)
            guide = None
            if self.settings.proxy is not None:
                guide = GuideStream(
                    self.model,
                    self.settings,
                    self.run,
                    self.options,
                    memory,
                    chunk,
                    x,
                    timestep,
                    text,
                )
            keys_of_blocks = guide.keys_of_blocks() if guide else repeat(None)
            keys = None
            guide_phase = "guide" if guide and not guide.is_kept else "detail"
            progress = self._progress()
            for i in range(len(self.model.blocks)):
                self.options["block_index"] = i
                progress.at_block(i, guide_phase)
                del keys  # before those of the next block are made
                keys = next(keys_of_blocks)
                progress.at_block(i, "detail")
                if whole is not None and ("double_block", i) in self._replacements():
                    whole.copy_(self._replaced(i, whole, e0, text, keys, chunk, ring))
                else:
                    self._block(i, tokens, e0, text, keys, chunk, ring)
                if whole is not None:
                    self._patch(i, whole, x, e)
            return self._head(tokens, e, x, chunk)

    def _set_options(self, x: Tensor) -> None:
        """What the stock forward tells other nodes' patches."""
        self.options["grid_sizes"] = torch.Size(self.plan.tokens)
        self.options["total_blocks"] = len(self.model.blocks)
        self.options["block_type"] = "double"
        if self.settings.proxy is not None and self.settings.guide_weight != 1:
            say_if_passed_over(self.settings.attention, self.options)
        override = override_for(self.settings.attention, x.device)
        if override is not None:
            self.options.setdefault("optimized_attention_override", override)

    def _plan_memory(self, x: Tensor) -> MemoryPlan:
        """Decided in a run's first forward, before what it keeps is counted as taken."""
        work = workload(self.settings, self.model, len(x), x.element_size(), self.run.keep_guide)
        if len(self.options.get("cond_or_uncond", ())) == 1:  # the other one keeps a guide too
            work = replace(work, conditionings=2)
        free = management.free_memory(x.device, self.run.model)
        if self.settings.budget is not None:
            free = min(free, self.settings.budget)
        # Not all that is free: the allocator fragments, and other programs use the card too.
        share = free if self.settings.budget is not None else free * 3 // 4
        most = CUDA_CHUNK if x.is_cuda else CPU_CHUNK
        return plan_memory(work, share, management.host_free_memory(), most)

    def _store(
        self, x: Tensor, memory: MemoryPlan, stack: ExitStack
    ) -> tuple[list[Tokens], Tensor | None]:
        """The tokens of every video, and all of them as one tensor where that exists."""
        shape = len(x), self.plan.tokens.count, self.model.dim
        patched = self._replacements() or self._patches()
        whole = None
        if patched:  # other nodes' patches want one tensor
            whole = x.new_empty(shape)
        elif memory.tokens_on_device:
            whole = management.empty_if_it_fits(x, shape)
        if whole is not None:
            return [DeviceTokens(item) for item in whole], whole
        return self._in_host_memory(x, shape, stack), None

    def _ring(self, x: Tensor, memory: MemoryPlan, stack: ExitStack) -> Ring | None:
        """What sliding windows keep of a block's keys and values."""
        if not isinstance(self.attention, SlidingAttention):
            return None
        grid = self.attention.windows.ring
        shape = 2, grid.count, self.model.dim
        pair = management.empty_if_it_fits(x, shape) if memory.ring_on_device else None
        if pair is not None:
            return Ring(grid, DeviceTokens(pair[0]), DeviceTokens(pair[1]))
        return Ring(grid, *self._in_host_memory(x, shape, stack))

    def _in_host_memory(
        self, x: Tensor, shape: tuple[int, int, int], stack: ExitStack
    ) -> list[Tokens]:
        """A store [n, C] for each of the first axis of a shape."""
        stores: list[Tokens] = []
        for _ in range(shape[0]):
            store = HostTokens(shape[1], shape[2], x.dtype, x.device)
            stack.callback(store.close)
            stores.append(store)
        return stores

    def _replacements(self) -> dict:
        return self.options.get("patches_replace", {}).get("dit", {})

    def _patches(self) -> list:
        return self.options.get("patches", {}).get("double_block", [])

    def _progress(self) -> Any:
        sigmas, schedule = self.options.get("sigmas"), self.options.get("sample_sigmas")
        known = () if schedule is None else tuple(schedule.tolist())
        progress = self.run.progress(known, len(self.model.blocks), self.plan.tokens.count)
        progress.begin_forward(0.0 if sigmas is None else float(sigmas.max()))
        return progress

    def _rows(self, f: int, top: int, bottom: int, tokens: list[Tokens]) -> Tensor:
        """Raster indices of rows `top` to `bottom` of one latent frame's tokens."""
        _, h, w = self.plan.tokens
        first = (f * h + top) * w
        return torch.arange(first, first + (bottom - top) * w, device=tokens[0].index_device)

    def _embed(self, x: Tensor, tokens: list[Tokens], chunk: ChunkSize) -> None:
        """Fill the tokens from the latent [B, C_in, T, H, W], some rows of a frame at a time."""
        patch = self.plan.space.patch
        frames, h, w = self.plan.tokens
        for f in range(frames):
            frame = models.pad_to_patch(x[:, :, f : f + 1], patch)

            def embed(top: int, bottom: int, f: int = f, frame: Tensor = frame) -> None:
                rows = frame[..., top * patch[1] : bottom * patch[1], :]
                embedded = self.model.patch_embedding(rows.float()).to(x.dtype)
                index = self._rows(f, top, bottom, tokens)
                for store, values in zip(tokens, embedded.flatten(2).transpose(1, 2), strict=True):
                    store.write(index, values)

            in_chunks(range(w, h * w + 1, w), chunk, embed)
        for store in tokens:
            store.settle()

    def _head(self, tokens: list[Tokens], e: Tensor, x: Tensor, chunk: ChunkSize) -> Tensor:
        """The output latent [B, C_out, T, H, W], some rows of a frame at a time."""
        _, ph, pw = self.plan.space.patch
        frames, h, w = self.plan.tokens
        height, width = x.shape[-2:]
        channels = self.model.out_dim
        out = x.new_empty((len(x), channels, *x.shape[2:]))
        for f in range(frames):

            def head(top: int, bottom: int, f: int = f) -> None:
                index = self._rows(f, top, bottom, tokens)
                for item, store in enumerate(tokens):
                    rows = e[item : item + 1, f : f + 1] if e.shape[1] > 1 else e[item : item + 1]
                    patch = self.model.head(store.read(index)[None], rows)
                    patch = patch.view(bottom - top, w, ph, pw, channels).permute(4, 0, 2, 1, 3)
                    patch = patch.reshape(channels, (bottom - top) * ph, w * pw)
                    place = slice(top * ph, min(bottom * ph, height))
                    out[item, :, f, place] = patch[:, : height - top * ph, :width]

            in_chunks(range(w, h * w + 1, w), chunk, head)
        return out

    def _text(self, context: Tensor, clip_fea: Tensor | None) -> wan.Text:
        context = self.model.text_embedding(context)
        if clip_fea is None:
            return wan.Text(context, None)
        if self.model.img_emb is not None:
            context = torch.cat([self.model.img_emb(clip_fea), context], dim=1)
        return wan.Text(context, clip_fea.shape[-2])

    def _replaced(
        self,
        i: int,
        whole: Tensor,
        e0: Tensor,
        text: wan.Text,
        guide_keys: tuple[Tensor, Tensor] | None,
        chunk: ChunkSize,
        ring: Ring | None,
    ) -> Tensor:
        """A block that another node replaced, with ours as the original that it may call."""

        def original(args: dict) -> dict:
            out = args["img"].clone()
            own = wan.Text(args["txt"], text.image_tokens)
            tokens: list[Tokens] = [DeviceTokens(item) for item in out]
            self._block(i, tokens, args["vec"], own, guide_keys, chunk, ring)
            return {"img": out}

        args = {
            "img": whole.clone(),
            "txt": text.tokens,
            "vec": e0,
            "pe": None,
            "transformer_options": self.options,
        }
        return self._replacements()["double_block", i](args, {"original_block": original})["img"]

    def _patch(self, i: int, whole: Tensor, x: Tensor, e: Tensor) -> None:
        """Other nodes' patches after a block, in place on the tokens [B, L, C]."""
        for patch in self._patches():
            args = {
                "img": whole,
                "x": x,
                "vec": e,
                "block_index": i,
                "img_offset": 0,
                "transformer_options": self.options,
            }
            result = patch(args)["img"]
            if result is not whole:
                whole.copy_(result)

    def _block(
        self,
        index: int,
        tokens: list[Tokens],
        e0: Tensor,
        text: wan.Text,
        guide_keys: tuple[Tensor, Tensor] | None,
        chunk: ChunkSize,
        ring: Ring | None,
    ) -> None:
        """One block in place on the tokens of every video."""
        block = self.model.blocks[index]
        for item, store in enumerate(tokens):
            task = BlockTask(
                block,
                store,
                self.plan.tokens,
                wan.Modulation.of(block, e0[item]),
                text.of(item),
                None if guide_keys is None else (guide_keys[0][item], guide_keys[1][item]),
                self.model.num_heads,
                self.options,
                chunk,
                e0.device,
                self.settings.keep_blocks,
                self.run.parts,
                ring,
                self.settings.guide_weight,
            )
            self.attention.evaluate(task, index)
            store.settle()

    def _attention(self) -> WindowAttention:
        """The way of cutting the grid that the artist chose."""
        plan, window = self.plan, self.settings.window
        rope = RopeAxes(self.model.rope_embedder, self.options.get("rope_options") or {})
        alignment = None
        if self.settings.proxy is not None:
            alignment = plan.alignment(window, self.settings.guide_margin)
        if self.settings.overlap == "sliding":
            return SlidingAttention(SlidingWindows(plan.tokens, window), alignment, rope)
        return ShiftedAttention(ShiftedWindows(plan.tokens, window), alignment, rope)
