"""A clip to FlashVSR's clean latent, in one evaluation of the model, streamed into a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..branch.progress import duration
from ..comfyui import management, models, server
from ..device import copies
from ..device.budget import AUTO, parse_budget
from ..families import wan
from . import cost
from .blocks import BlockGrid
from .bundle import FlashVSR
from .memory import CPU_CHUNK, CUDA_CHUNK, Places, Sizes, choose_places
from .noise import placed_noise
from .projection import CLIP, ProjectionStream
from .schedule import Schedule
from .selection import Sparsity
from .source import Footage, LowQuality, Upscale
from .store import LatentFile
from .transformer import OneStep

PROJECTION_ROWS = 16
"""Rows of tokens to convolve at a time."""
PREVIEW = 64
"""Latent pixels of a preview's longer side."""
SHARE = 0.75
"""Of what is free: the allocator fragments, and other programs use the card too."""


@dataclass(frozen=True)
class Job:
    """What is made of what.

    Args:
        bit_depth: of the video.
        noise: of a latent frame [16, h, w], float32; None: by seed and place.
    """

    footage: Footage
    upscale: Upscale
    sparsity: Sparsity
    seed: int = 0
    budget: str = AUTO
    bit_depth: int = 8
    noise: Callable[[int], Tensor] | None = None

    @property
    def grid(self) -> BlockGrid:
        return BlockGrid.of(*self.upscale.padded)

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.footage.frames)

    @property
    def disk(self) -> int:
        """Temporary bytes of the latent, and of the frames when they are decoded."""
        frames = cost.frame_bytes(self.footage.frames, self.upscale.scaled, self.bit_depth)
        return cost.latent_bytes(self.schedule, self.grid) + frames

    @property
    def purpose(self) -> str:
        """In words, for an error."""
        height, width = self.upscale.scaled
        return f"Up-scaling {self.footage.frames} frames to {width} x {height}"

    def noise_of(self, frame: int) -> Tensor:
        if self.noise is not None:
            return self.noise(frame)
        return placed_noise(self.seed, frame, self.grid)


@torch.inference_mode()
def upscaled_latent(flashvsr: FlashVSR, job: Job) -> Tensor:
    """The whole clip's latent [1, 16, T, h, w], as a ComfyUI latent, in a file that is mapped.

    Its pages are read when they are used and can be given up by the system at any time, so that a
    clip of any length takes no memory.
    """
    schedule = job.schedule
    height, width = (side // 8 for side in job.upscale.padded)
    shape = (1, 16, schedule.latent_frames, height, width)
    with LatentFile(server.temp_directory(), shape) as file:
        progress = Progress(flashvsr, schedule)
        for first, latent in denoised(flashvsr, job, progress):
            file.write(first, models.process_latent_out(flashvsr.model, latent))
            progress.show(latent)
        progress.end()
        return file.tensor()


def denoised(flashvsr: FlashVSR, job: Job, progress: Progress) -> Iterator[tuple[int, Tensor]]:
    """The clean latent, normalised: number of its first frame, [1, 16, 2, h, w], float32.

    Raises:
        ValueError: the host's memory cannot hold what it has to.
    """
    net = flashvsr.model.model.diffusion_model
    dtype = flashvsr.model.model.get_dtype_inference()
    sizes = sizes_for(flashvsr, job, dtype)
    wanted = min(sizes.wanted(CUDA_CHUNK), parse_budget(job.budget) or sizes.wanted(CUDA_CHUNK))
    device = management.load_together([flashvsr.model, flashvsr.projection], wanted)
    like = torch.empty(0, dtype=dtype, device=device)
    places = places_for(flashvsr, job, like, sizes)
    progress.head = need_of(flashvsr, job, sizes, places).lines(like.is_cpu)
    stream = ProjectionStream(flashvsr.projection.model, flashvsr.version, PROJECTION_ROWS)
    low_quality = LowQuality(job.footage, job.upscale)

    def frames(first: int, stop: int) -> Tensor:
        return low_quality.frames(first, stop).movedim(1, 0).to(like)

    def conditioning(t: int) -> Tensor:
        if t == 0:
            stream.begin(frames(0, 1))
        return stream.tokens(frames(CLIP * t + 1, CLIP * (t + 1) + 1))

    step = OneStep(net, flashvsr.prompt, like, job.grid, job.sparsity, places, progress.at_block)
    yield from step(job.schedule.chunks(), job.noise_of, conditioning)


def sizes_for(flashvsr: FlashVSR, job: Job, dtype: torch.dtype) -> Sizes:
    """Bytes of what an up-scaling in a dtype handles."""
    shape = wan.shape(flashvsr.model.model.diffusion_model)
    return Sizes.of(job.grid, shape, job.sparsity, dtype.itemsize)


def places_for(flashvsr: FlashVSR, job: Job, like: Tensor, sizes: Sizes) -> Places:
    """Where tensors live and in which order work is done, by the budget and what is free.

    Raises:
        ValueError: the host's memory cannot hold what it has to.
    """
    free = int(SHARE * management.free_memory(like.device, flashvsr.model))
    budget = parse_budget(job.budget)
    host = management.host_free_memory()
    most = CUDA_CHUNK if like.is_cuda else CPU_CHUNK
    free = free if budget is None else min(free, budget)
    places = choose_places(sizes, free, host, most, job.schedule.count)
    cost.require_host_memory(
        sizes.on_host(places, job.schedule.count),
        management.total_memory(copies.cpu()),
        cost.frames_at_a_time(sizes, host),
    )
    return places


def need_of(flashvsr: FlashVSR, job: Job, sizes: Sizes, places: Places) -> cost.Need:
    """What an up-scaling takes, its decode by the Tiny Conditional decoder included."""
    grid, schedule = job.grid, job.schedule
    shape = wan.shape(flashvsr.model.model.diffusion_model)
    tokens = cost.token_count(schedule, grid)
    decoder = flashvsr.tc_decoder and flashvsr.tc_decoder.model
    latents = schedule.latent_frames
    return cost.Need(
        frames=job.footage.frames,
        size=job.upscale.scaled,
        tokens=tokens,
        work=cost.Work(
            cost.transformer_flops(shape, tokens, flashvsr.prompt.shape[1]),
            cost.attention_flops(shape, grid, schedule, job.sparsity),
            cost.projection_flops(flashvsr.projection.model.widths, grid, latents),
            cost.decoder_flops(decoder.widths, grid, latents) if decoder else 0.0,
        ),
        device=sizes.on_device(places),
        decoder=cost.decoder_bytes(decoder.widths, grid, decoder.dtype.itemsize) if decoder else 0,
        host=sizes.on_host(places, schedule.count),
        disk=job.disk,
        order=places.order,
    )


class Progress:
    """Shows how far an up-scaling is: a bar over blocks, a line with the time left, a picture.

    Above that line stands `head`, what the whole takes.
    """

    def __init__(self, flashvsr: FlashVSR, schedule: Schedule) -> None:
        self.head = ""
        self._picture = models.latent_previewer(flashvsr.model)
        blocks = len(flashvsr.model.model.diffusion_model.blocks)
        self.total = blocks * schedule.count
        self.done = 0
        self._bar = server.preview_bar(self.total, 512)
        self._begun = self._spoken = time.monotonic()

    def at_block(self) -> None:
        """A block of a chunk begins."""
        management.raise_if_cancelled()
        now = time.monotonic()
        if not self.done:
            self._say("up-scaling")
        if self.done and now - self._spoken > 0.5:
            self._spoken = now
            left = (now - self._begun) * (self.total - self.done) / self.done
            share = f"{100 * self.done // self.total} %"
            self._say(f"up-scaling, {share}, about {duration(left)} left")
            self._bar(self.done, None)
        self.done += 1

    def show(self, latent: Tensor) -> None:
        """A slot [1, 16, 2, h, w] is done."""
        step = max(1, max(latent.shape[-2:]) // PREVIEW)  # a previewer may be a whole decoder
        self._bar(self.done, self._picture(latent[:, :, :1, ::step, ::step]))

    def end(self) -> None:
        """Everything is up-scaled: what it took, in place of the time left."""
        spent = duration(time.monotonic() - self._begun)
        self._say(f"up-scaled in {spent}; Save Video decodes")

    def _say(self, line: str) -> None:
        server.show_progress(f"{self.head}\n{line}")
