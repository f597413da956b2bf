"""A forward with windowed attention guided by the proxy (method: stage 2).

The target tokens of a video are one tensor [F * h * w, C] that every block updates in place, on the
device or in host memory; nothing else has the grid's length.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from ..comfyui import management, models
from ..device.chunks import ChunkSize
from ..device.tokens import DeviceTokens, HostTokens, Tokens
from ..device.tuning import measured_chunk
from ..families.family import Family
from ..families.rotations import RopeAxes
from ..geometry.layout import Layout
from ..geometry.windows import SlidingWindows
from ..proxy.latents import require_shape
from .attention import override_for, say_if_passed_over
from .block_task import BlockTask, WindowAttention
from .compiled import parts_of
from .ends import embed, head
from .evaluation import Evaluation
from .guide import GuideStream
from .memory import CPU_CHUNK, CUDA_CHUNK, MemoryPlan, plan_memory
from .ring import Ring
from .run import SamplingRun
from .settings import DetailSettings
from .shifted import ShiftedAttention
from .sliding import SlidingAttention
from .weighted import Pair


def attention_of(layout: Layout, guided: bool, rope: RopeAxes) -> WindowAttention:
    """The way of cutting the grid that the artist chose."""
    windows, alignment = layout.windows, layout.alignment if guided else None
    if isinstance(windows, SlidingWindows):
        return SlidingAttention(windows, alignment, rope)
    return ShiftedAttention(windows, alignment, rope)


class DetailForward:
    """Evaluates the model for a run: the target tokens by windows, the guide stream beside them."""

    def __init__(
        self, net: Any, family: Family, settings: DetailSettings, run: SamplingRun, options: dict
    ):
        self.base = self.net = net
        self.family = family
        self.settings = settings
        self.run = run
        self.options = dict(options)
        self.attention = run.once(
            ("attention", id(settings)),
            lambda: attention_of(
                settings.layout,
                settings.guided,
                family.rotations(net, self.options.get("rope_options") or {}),
            ),
        )

    def __call__(self, x: Tensor, timestep: Tensor, given: Any) -> Tensor:
        """x [B, C_in, T, H, W], timestep [B] or [B, T] -> the output [B, C_out, T, H, W].

        Args:
            given: the family's conditioning.

        Raises:
            ValueError: the latent's size is not the plan's.
        """
        plan = self.settings.plan
        require_shape(
            x[:, : plan.space.channels],
            plan.latent,
            plan.space.channels,
            "target",
            "Start the detail sampler from the AtlasVid Detail Latent of the same plan; context "
            "windows and area conditioning, which cut the latent, cannot be used with it.",
        )
        if lora := self.settings.target_lora:  # its factors stay on the device for the run
            key = "target", id(self.base), id(lora)
            self.net = self.run.once(key, lambda: lora.view(self.base, x))
        self._set_options(x)
        ev = self._evaluation(x, timestep, given)
        e, e0 = self.family.time_embedding(self.net, timestep, x.dtype)
        blocks = self.family.blocks(self.net)
        ahead = models.weights_ahead(blocks, x.device, self.options)
        ring = self._ring(ev)
        if ring is not None and ring.index_device != x.device:
            ev.chunk.stay_close()  # the keys that a chunk reads are many times its tokens
        tokens, whole = self._store(ev)
        embed(ev, tokens)
        guide = GuideStream(ev) if self.settings.guided else None
        keys_of_blocks = guide.keys_of_blocks() if guide else repeat(None)
        guide_phase = "guide" if guide and not guide.is_kept else "detail"
        progress = self._progress()
        for i, block in enumerate(blocks):
            self.options["block_index"] = i
            progress.at_block(i, guide_phase)
            keys = tasks = None  # before those of the next block are made
            ahead(block)
            with models.held_weights(block, x):  # for all of its chunks
                keys = next(keys_of_blocks)
                progress.at_block(i, "detail")
                tasks = self._tasks(ev, i, tokens, e0, keys, ring)
                if whole is not None and ("double_block", i) in self._replacements():
                    whole.copy_(self._replaced(i, whole, e0, tasks))
                else:
                    self._block(i, tasks)
            if whole is not None:
                self._patch(i, whole, x, e)
        keys = tasks = None
        if guide:
            guide.finish(keys_of_blocks)
        ahead(None)
        return head(ev, tokens, e)

    def _set_options(self, x: Tensor) -> None:
        """What the stock forward tells other nodes' patches."""
        settings = self.settings
        self.options["grid_sizes"] = torch.Size(settings.plan.tokens)
        self.options["total_blocks"] = len(self.family.blocks(self.net))
        self.options["block_type"] = "double"
        if settings.guided and settings.guide_weight != 1:
            say_if_passed_over(settings.attention, self.options)
        override = override_for(settings.attention, x.device)
        if override is not None:
            self.options.setdefault("optimized_attention_override", override)

    def _evaluation(self, x: Tensor, timestep: Tensor, given: Any) -> Evaluation:
        settings, once = self.settings, self.run.once
        memory = once(("memory", id(settings), len(x)), lambda: self._plan_memory(x))
        return Evaluation(
            net=self.net,
            base=self.base,
            family=self.family,
            settings=settings,
            run=self.run,
            options=self.options,
            x=x,
            timestep=timestep,
            text=self.family.text(self.net, given),
            parts=once(("parts",), lambda: parts_of(self.family, self.run.compile_choices)),
            memory=memory,
            chunk=once(("chunk", id(settings), len(x)), lambda: ChunkSize(memory.chunk)),
        )

    def _plan_memory(self, x: Tensor) -> MemoryPlan:
        """Decided in a run's first forward, before what it keeps is counted as taken."""
        shape = self.family.shape(self.net)
        work = self.settings.workload(shape, x.element_size(), len(x), self.run.keep_guide)
        if len(self.options.get("cond_or_uncond", ())) == 1:  # the other one keeps a guide too
            work = replace(work, conditionings=2)
        free = management.free_memory(x.device, self.run.model)
        if self.settings.budget is not None:
            free = min(free, self.settings.budget)
        # Not all that is free: the allocator fragments, and other programs use the card too.
        share = free if self.settings.budget is not None else free * 3 // 4
        most = measured_chunk(x.device, shape.dim, CUDA_CHUNK) if x.is_cuda else CPU_CHUNK
        return plan_memory(work, share, management.host_free_memory(), most)

    def _store(self, ev: Evaluation) -> tuple[list[Tokens], Tensor | None]:
        """The tokens of every video, and all of them as one tensor where that exists."""
        shape = len(ev.x), ev.plan.tokens.count, self.family.shape(self.net).dim
        patched = self._replacements() or self._patches()
        whole = None
        if patched:  # other nodes' patches want one tensor
            whole = ev.x.new_empty(shape)
        elif ev.memory.tokens_on_device:
            whole = management.empty_if_it_fits(ev.x, shape)
        if whole is not None:
            return [DeviceTokens(item) for item in whole], whole
        return self._in_host_memory(ev.x, shape, "tokens"), None

    def _ring(self, ev: Evaluation) -> Ring | None:
        """What sliding windows keep of a block's keys and values."""
        if not isinstance(self.attention, SlidingAttention):
            return None
        grid = self.attention.windows.ring
        guide = self.settings.plan.proxy_tokens.count if self.settings.guided else 0
        shape = 1, grid.count + guide, 2 * self.family.shape(self.net).dim
        fits = ev.memory.ring_on_device
        tokens = management.empty_if_it_fits(ev.x, shape) if fits else None
        if tokens is not None:
            return Ring(grid, DeviceTokens(tokens[0]))
        return Ring(grid, *self._in_host_memory(ev.x, shape, "ring"))

    def _in_host_memory(self, x: Tensor, shape: tuple[int, int, int], what: str) -> list[Tokens]:
        """A store [n, C] for each of the first axis of a shape.

        The run's: memory that is new to the process is slow to write to, and takes as much again.
        """
        stores: list[Tokens] = []
        for number in range(shape[0]):
            key = what, number, *shape[1:], x.dtype, x.device
            make = partial(HostTokens, shape[1], shape[2], x.dtype, x.device)
            stores.append(self.run.once(key, make))
        return stores

    def _replacements(self) -> dict:
        return self.options.get("patches_replace", {}).get("dit", {})

    def _patches(self) -> list:
        return self.options.get("patches", {}).get("double_block", [])

    def _progress(self) -> Any:
        sigmas, schedule = self.options.get("sigmas"), self.options.get("sample_sigmas")
        known = () if schedule is None else tuple(schedule.tolist())
        blocks = len(self.family.blocks(self.net))
        progress = self.run.progress(known, blocks, self.settings.plan.tokens.count)
        progress.begin_forward(0.0 if sigmas is None else float(sigmas.max()))
        return progress

    def _tasks(
        self,
        ev: Evaluation,
        i: int,
        tokens: list[Tokens],
        e0: Tensor,
        keys: Pair | None,
        ring: Ring | None,
    ) -> list[BlockTask]:
        """Block number i on every item. Six parameters: each is one thing that a block reads."""
        block = self.family.blocks(self.net)[i]
        return [
            BlockTask(
                ev,
                block,
                store,
                self.family.modulation(block, e0[item]),
                self.family.text_of_block(block, ev.text.of(item)),
                None if keys is None else (keys[0][item], keys[1][item]),
                ring,
            )
            for item, store in enumerate(tokens)
        ]

    def _block(self, i: int, tasks: list[BlockTask]) -> None:
        """Block number i in place on the tokens of every video."""
        for task in tasks:
            self.attention.evaluate(task, i)
            task.tokens.settle()

    def _replaced(self, i: int, whole: Tensor, e0: Tensor, tasks: list[BlockTask]) -> Tensor:
        """A block that another node replaced, with ours as the original that it may call."""
        ev, block = tasks[0].ev, tasks[0].block

        def original(args: dict) -> dict:
            out, text = args["img"].clone(), ev.text.with_tokens(args["txt"])
            own = [
                replace(
                    task,
                    tokens=DeviceTokens(item),
                    modulation=self.family.modulation(block, args["vec"][n]),
                    text=self.family.text_of_block(block, text.of(n)),
                )
                for n, (task, item) in enumerate(zip(tasks, out, strict=True))
            ]
            self._block(i, own)
            return {"img": out}

        args = {
            "img": whole.clone(),
            "txt": ev.text.tokens,
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
