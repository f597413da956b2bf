"""What a plan costs: work, memory and time, from sizes alone.

Everything here is arithmetic on the model's shape and the plan's geometry; `calibration` measures
the rates that turn work into seconds. FLOPs count a multiplication and an addition as two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from ..branch.memory import CHUNK, Workload, wanted_bytes
from ..device.budget import size
from ..families.wan import TEXT_WIDTH
from ..geometry.grid import Grid
from ..geometry.layout import Layout
from ..geometry.plan import Plan
from ..geometry.shape import BaseShape
from ..geometry.windows import SlidingWindows, cuts
from ..vae.needs import least_decode_bytes

TEXT_TOKENS = 512
"""The length that Wan pads its text to."""

VAE_FLOPS_PER_PIXEL = {8: 8.0e6, 16: 17.4e6}
"""Decoding one pixel, by the VAE's spatial factor: Wan 2.1 at 96 channels, Wan 2.2."""
VAE_CHANNELS = 96
VAE_MIDDLE_CHANNELS = {8: 384, 16: 1024}
"""Of the attention over a whole latent frame, by the VAE's spatial factor."""
STREAMED_FRAMES = 8
"""Frames in float32 that a streamed decode holds: a latent frame's four and the next four."""
TOKEN_PASSES = 70
"""Times that a block reads or writes a token between its matrices, counted on a real forward:
norms, rotations, modulation, residuals, gather, scatter. A feed-forward's activation adds four.
With a guide weight two results are merged, but keys and values need not be joined: no more."""
OVERHEAD = 1.15
"""A forward takes longer than its layers alone: launches, smaller boxes at borders, less in cache.
The middle of what `python tools/bench.py cost` showed without it."""
SCRATCH_BYTES = 6
"""A pixel's three colours at 16 bits, as a streamed decode keeps them until it is saved."""
VIDEO_BITS_PER_PIXEL = 0.2
"""H.264 at the quality of the stock SaveVideo, for pictures with detail; it varies by half."""
LATENT_COPIES = 8
"""Latents in float32 that a stock sampler holds in a step: the noise, the sample, predictions."""


@dataclass(frozen=True)
class ModelShape(BaseShape):
    """The sizes of a model that its cost depends on."""

    name: str = ""
    out_dim: int = 16
    """Channels of its latents."""
    weight_bytes: int = 0
    """All weights as they are stored; 0 means two bytes per parameter."""
    text_tokens: int = TEXT_TOKENS
    vae_channels: int = VAE_CHANNELS

    @property
    def block_parameters(self) -> int:
        """Matrices of one block: eight of attention and two of the feed-forward."""
        return 8 * self.dim**2 + 2 * self.dim * self.ffn_dim

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.weight_bytes or 2 * self.layers * self.block_parameters


WAN_1_3B = ModelShape(name="Wan 2.1 1.3B", dim=1536, layers=30, ffn_dim=8960)
TINY = ModelShape(
    name="AtlasVid Tiny Models",
    dim=256,
    layers=6,
    ffn_dim=896,
    weight_bytes=4 * 7_600_000,
    text_tokens=16,
    vae_channels=8,
)
TINY_RANDOM = replace(
    TINY, name=f"{TINY.name}, random", layers=4, ffn_dim=1024, weight_bytes=4 * 6_000_000
)


@dataclass(frozen=True)
class Work:
    """What one or several evaluations do, by what limits it."""

    matmul: float = 0.0
    """FLOPs of linear layers."""
    attention: float = 0.0
    """FLOPs of attention."""
    pointwise: float = 0.0
    """Bytes read and written between them: norms, rotations, activations, gathers."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.pointwise + other.pointwise,
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.matmul * times, self.attention * times, self.pointwise * times)

    @property
    def flops(self) -> float:
        return self.matmul + self.attention


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, in one dtype. Measured by `calibration`."""

    matmul: float
    """FLOP/s of linear layers."""
    attention: float
    """FLOP/s of attention over windows."""
    pointwise: float
    """Bytes/s of norms, rotations and activations."""
    convolution: float
    """FLOP/s of a VAE's 3D convolutions, with what stands around them on a CPU."""
    transfer: float
    """Bytes/s from host to device memory."""
    wide_attention: float
    """FLOP/s of the VAE's attention, whose head is too wide for the fastest kernels."""

    def seconds(self, work: Work) -> float:
        layers = work.matmul / self.matmul + work.attention / self.attention
        return OVERHEAD * (layers + work.pointwise / self.pointwise)


@dataclass(frozen=True)
class Machine:
    """The memory that a plan has to fit into, in bytes."""

    card: int
    host: int
    disk: int
    element_bytes: int = 2
    """Of the dtype that the model computes in."""
    shared: bool = False
    """The device computes in the host's memory, as a CPU does."""


@dataclass(frozen=True)
class Settings:
    """How a plan is sampled, as far as the graph tells."""

    window: Grid
    overlap: str = "shifted"
    guide_noise: str = "matched"
    proxy_evaluations: int = 60
    """Evaluations of the model: steps times conditionings."""
    detail_evaluations: int = 40
    streamed_decode: bool = True
    guide_margin: int = 0
    kept_proxy_steps: int = 0
    """Steps of the proxy whose answers AtlasVid Resume keeps."""
    kept_detail_steps: int = 0

    def layout(self, plan: Plan) -> Layout:
        """How the detail branch cuts the plan's target."""
        return Layout(plan, self.window, self.overlap, self.guide_margin)


# --- Work ------------------------------------------------------------------------------------


def window_pairs(layout: Layout) -> float:
    """Pairs (query, key of its own window) of one block, averaged over even and odd blocks."""
    grid, windows = layout.plan.tokens, layout.windows
    if isinstance(windows, SlidingWindows):
        return float(grid.count * layout.window.count)

    def pairs(shifted: bool) -> int:
        lengths = (
            [b - a for a, b in pairwise(cuts(n, w, shifted))]
            for n, w in zip(grid, layout.window, strict=True)
        )
        return math.prod(sum(length**2 for length in axis) for axis in lengths)

    return (pairs(False) + pairs(True)) / 2


def forward_work(
    shape: ModelShape, tokens: int, pairs: float, element_bytes: int, calls: float = 1
) -> Work:
    """One evaluation for one conditioning.

    Args:
        tokens: how many pass through the blocks.
        pairs: (query, key) pairs of one block's self-attention.
        element_bytes: of the dtype computed in.
        calls: chunks in which a block is evaluated; each projects the text anew.
    """
    dim, ffn, text = shape.dim, shape.ffn_dim, shape.text_tokens
    # q, k, v, o of self-attention, q and o of cross-attention; k and v of the text.
    linear = tokens * (6 * dim**2 + 2 * dim * ffn) + calls * 2 * text * dim**2
    ends = tokens * 4 * dim * (shape.in_dim + shape.out_dim)
    ends += text * (TEXT_WIDTH * dim + dim**2)
    attention = dim * (pairs + tokens * text)
    moved = tokens * element_bytes * (TOKEN_PASSES * dim + 4 * ffn)
    return Work(
        matmul=2.0 * (shape.layers * linear + ends),
        attention=4.0 * shape.layers * attention,
        pointwise=float(shape.layers * moved),
    )


def proxy_work(shape: ModelShape, plan: Plan, element_bytes: int) -> Work:
    """One evaluation of the proxy (also of the guide stream): full attention."""
    tokens = plan.proxy_tokens.count
    return forward_work(shape, tokens, float(tokens**2), element_bytes)


def detail_work(shape: ModelShape, plan: Plan, settings: Settings, element_bytes: int) -> Work:
    """One evaluation of the target's tokens, without the guide stream."""
    tokens, layout = plan.tokens.count, settings.layout(plan)
    pairs = window_pairs(layout) + tokens * layout.keys[1]
    return forward_work(shape, tokens, pairs, element_bytes, math.ceil(tokens / CHUNK))


def full_attention_work(shape: ModelShape, plan: Plan, element_bytes: int) -> Work:
    """One evaluation of the target with the model's own attention over all tokens."""
    tokens = plan.tokens.count
    return forward_work(shape, tokens, float(tokens) ** 2, element_bytes)


def decode_flops(shape: ModelShape, plan: Plan) -> float:
    """FLOPs of decoding the target; they grow with the square of the VAE's channels."""
    per_pixel = VAE_FLOPS_PER_PIXEL.get(plan.space.spatial, VAE_FLOPS_PER_PIXEL[8])
    pixels = plan.width * plan.height * plan.frames
    return pixels * per_pixel * (shape.vae_channels / VAE_CHANNELS) ** 2


def decode_attention_flops(shape: ModelShape, plan: Plan) -> float:
    """FLOPs of the decoder's attention: every latent frame over itself."""
    channels = VAE_MIDDLE_CHANNELS.get(plan.space.spatial, VAE_MIDDLE_CHANNELS[8])
    frames, height, width = plan.latent
    pairs = frames * float(height * width) ** 2
    return 4.0 * pairs * channels * shape.vae_channels / VAE_CHANNELS


# --- Memory ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes that a plan needs."""

    card: int
    """On the card with all weights on it."""
    card_least: int
    """On the card with tokens, a ring and all weights but two blocks' in host memory, or in a
    decode of the smallest pieces: what has to fit."""
    host: int
    disk: int


def memory(shape: ModelShape, plan: Plan, settings: Settings, machine: Machine) -> Memory:
    """Memory of the detail stage, of the decode where that is larger, and of the decoded video."""
    work = Workload.of(
        settings.layout(plan),
        shape,
        itemsize=machine.element_bytes,
        keep_guide=settings.guide_noise == "clean",
    )
    latent = plan.latent.count * plan.space.channels * 4
    card = wanted_bytes(work, latent) + shape.weights
    least = LATENT_COPIES * latent + work.least_chunk_bytes + 2 * shape.weights // shape.layers
    decode = least_decode_bytes(
        plan.space.spatial, shape.vae_channels, plan.latent[1:], machine.element_bytes
    )
    least = max(least, decode)
    streamed = 0 if card <= machine.card else work.token_bytes + work.guide_bytes
    if least + work.ring_bytes > machine.card:
        streamed += work.ring_bytes
    frame = plan.width * plan.height * 3 * 4
    pixels = plan.width * plan.height * plan.frames
    # The stock decode holds the whole video twice: its result and the tiles that make it.
    decoded = STREAMED_FRAMES * frame if settings.streamed_decode else 2 * frame * plan.frames
    return Memory(
        card=card,
        card_least=least,
        host=shape.weights + latent + max(streamed, decoded),
        disk=video_disk(pixels, settings.streamed_decode) + answers_disk(plan, settings),
    )


def video_disk(pixels: int, streamed: bool = True) -> int:
    """Bytes on the disk of a video of so many pixels, with the frames of its streamed decode."""
    return int(pixels * (VIDEO_BITS_PER_PIXEL / 8 + (SCRATCH_BYTES if streamed else 0)))


def answers_disk(plan: Plan, settings: Settings) -> int:
    """Bytes of the answers that AtlasVid Resume keeps: one latent in float32 for each step."""
    latents = plan.proxy_latent.count * settings.kept_proxy_steps
    latents += plan.latent.count * settings.kept_detail_steps
    return latents * plan.space.channels * 4


def offloaded_bytes(need: Memory, machine: Machine) -> int:
    """Bytes of weights that do not stay on the card and move again in every evaluation."""
    return 0 if machine.shared else max(0, need.card - machine.card)


# --- Time ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seconds:
    """Time of each stage."""

    proxy: float
    detail: float
    decode: float

    @property
    def total(self) -> float:
        return self.proxy + self.detail + self.decode


def seconds(
    shape: ModelShape, plan: Plan, settings: Settings, machine: Machine, rates: Rates
) -> Seconds:
    """Estimated time of the stages; loading files and encoding the video are not in it."""
    element = machine.element_bytes
    proxy = proxy_work(shape, plan, element)
    detail = detail_work(shape, plan, settings, element) * settings.detail_evaluations
    # A clean guide is the same in every step: one evaluation for each conditioning.
    guides = 2 if settings.guide_noise == "clean" else settings.detail_evaluations
    need = memory(shape, plan, settings, machine)
    moved = offloaded_bytes(need, machine) * math.ceil(plan.tokens.count / CHUNK)
    return Seconds(
        proxy=rates.seconds(proxy * settings.proxy_evaluations),
        detail=rates.seconds(detail + proxy * guides)
        + settings.detail_evaluations * moved / rates.transfer,
        decode=decode_flops(shape, plan) / rates.convolution
        + decode_attention_flops(shape, plan) / rates.wide_attention,
    )


# --- Whether it fits -------------------------------------------------------------------------


def problems(plan: Plan, need: Memory, machine: Machine) -> list[str]:
    """What will not fit, each with what to change. Empty when the plan fits."""
    found = []
    if need.card_least > machine.card and not machine.shared:
        share = machine.card / need.card_least * 0.9
        found.append(
            f"Needs {size(need.card_least)} of card memory, {size(machine.card)} are there. "
            + _smaller(plan, share)
        )
    host = need.host + (need.card_least if machine.shared else 0)
    if host > machine.host:
        found.append(
            f"Needs {size(host)} of host memory, {size(machine.host)} are there. "
            + (
                _smaller(plan, machine.host / host * 0.9)
                if need.host < machine.host
                else "Decode with AtlasVid Decode to Video, which streams, or "
                + _smaller(plan, machine.host / host * 0.9).replace("Use", "use")
            )
        )
    if need.disk > machine.disk:
        found.append(
            f"Needs about {size(need.disk)} on the disk of the output folder, "
            f"{size(machine.disk)} are free. Make room there."
        )
    return found


def _smaller(plan: Plan, share: float) -> str:
    """A length, or a size, that takes `share` of this plan's memory."""
    length = plan.frames / plan.fps * share
    width, height = (int(side * share**0.5) // 16 * 16 for side in (plan.width, plan.height))
    return f"Use at most about {length:.1f} seconds at this size, or {width} x {height}."
