"""Measures how fast this machine is, once, and remembers it.

A second on a card, a few on a processor. The measurement uses the shapes of the model's own
layers, because small matrices run far below a device's best rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..comfyui import management, media, models
from ..device import tuning
from ..vae.cpu import residual_block
from .cost import ModelShape, Rates

VERSION = 3
HEAD = 128
"""Channels of one attention head, in every Wan."""
ROUNDS = 3
BUDGET_FLOPS = {"cpu": 1.5e9}
"""Size of one measurement; a card needs a larger one to be busy at all."""
CARD_FLOPS = 4e11


def rates_of(shape: ModelShape, file: Path | None = None) -> Rates:
    """This machine's rates for a model, measured at the first call and kept in `file`."""
    if (rates := known_rates(shape, file)) is not None:
        return rates
    device = management.compute_device()
    rates = measure(shape, device, management.compute_dtype(device))
    tuning.remember(_key(shape), asdict(rates), file)
    if device.type == "cuda":
        sweep = chunk_sweep(shape, device, management.compute_dtype(device))
        tuning.remember(tuning.chunk_key(device, shape.dim), {"tokens": best_chunk(sweep)}, file)
    return rates


def known_rates(shape: ModelShape, file: Path | None = None) -> Rates | None:
    """The rates measured before, or None."""
    found = tuning.read(file).get(_key(shape))
    try:
        rates = Rates(**found)  # type: ignore[arg-type]
        usable = all(0 < rate < math.inf for rate in asdict(rates).values())
    except TypeError:  # never measured, or written by something else
        return None
    return rates if usable else None


def _key(shape: ModelShape) -> str:
    device = management.compute_device()
    dtype = management.compute_dtype(device)
    return f"{VERSION}, {management.device_name(device)}, {dtype}, {shape.dim} x {shape.ffn_dim}"


@torch.no_grad()
def measure(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Rates:
    """Time one layer of each kind, at the model's sizes."""
    budget = BUDGET_FLOPS.get(device.type, CARD_FLOPS)

    def rand(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    dim, ffn = shape.dim, shape.ffn_dim
    rows = max(64, int(budget / shape.block_parameters))
    x, wide = rand(rows, dim), rand(rows, ffn)
    square, up, down = rand(dim, dim), rand(ffn, dim), rand(dim, ffn)

    def matrices() -> None:
        """Those of a block: eight of its attentions and two of the feed-forward."""
        for _ in range(8):
            F.linear(x, square)
        F.linear(x, up)
        F.linear(wide, down)

    matmul = _best(device, matrices)

    # The size of a compact window with its guide.
    queries, keys = 1024, 1104
    windows = max(1, int(budget / (4 * queries * keys * dim)))
    options = {"optimized_attention_override": models.fused_on_cpu} if device.type == "cpu" else {}
    q, k, v = rand(windows, queries, dim), rand(windows, keys, dim), rand(windows, keys, dim)
    attention = _best(device, lambda: models.attention(q, k, v, dim // HEAD, options))

    tokens = 4_096 if device.type == "cpu" else 16_384  # a chunk as the forward evaluates it
    some, wider, scale = rand(1, tokens, dim), rand(1, tokens, ffn), rand(dim)
    freqs = rand(1, tokens, 1, HEAD // 2, 2, 2).float()  # as a forward's are
    index = torch.randperm(tokens, device=device)

    def pointwise() -> None:
        """The kinds of operation that surround a block's matrices: 44 passes and 2 wide ones."""
        for _ in range(3):
            torch.addcmul(scale, F.layer_norm(some, (dim,)), scale)
        for _ in range(2):
            models.apply_rope(F.rms_norm(some, (dim,)).unflatten(-1, (-1, HEAD)), freqs)
        for _ in range(3):
            torch.addcmul(some, some, scale)
        some[0, index] = some[0, index]
        F.gelu(wider, approximate="tanh")

    moved = tokens * dtype.itemsize * (44 * dim + 2 * ffn)
    passes = _best(device, pointwise)

    convolution = _convolution_rate(shape.vae_channels, device, dtype)

    side, channels = int((budget / (4 * 4 * shape.vae_channels)) ** 0.5), 4 * shape.vae_channels
    frame = rand(1, 1, side, channels)
    wide_attention = _best(device, lambda: F.scaled_dot_product_attention(frame, frame, frame))

    block = torch.empty(64 * 2**20, dtype=torch.uint8)
    transfer = _best(device, lambda: block.to(device, copy=True))

    return Rates(
        matmul=2 * rows * shape.block_parameters / matmul,
        attention=4 * windows * queries * keys * dim / attention,
        pointwise=moved / passes,
        convolution=convolution,
        transfer=block.numel() / transfer,
        wide_attention=4 * side**2 * channels / wide_attention,
    )


CHUNKS = (8_192, 16_384, 32_768, 65_536, 131_072)
GAIN = 0.02
"""What a larger chunk must gain to be worth its memory."""


@torch.no_grad()
def chunk_sweep(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, chunks: tuple[int, ...] = CHUNKS
) -> dict[int, float]:
    """Seconds per token of a block's widest part over how many tokens are computed at a time."""
    up = torch.randn((shape.ffn_dim, shape.dim), device=device, dtype=dtype)
    down = torch.randn((shape.dim, shape.ffn_dim), device=device, dtype=dtype)
    found: dict[int, float] = {}
    for tokens in chunks:
        try:
            x = torch.randn((tokens, shape.dim), device=device, dtype=dtype)

            def part(x: Tensor = x) -> None:
                y = F.layer_norm(x, (shape.dim,))
                y = F.linear(F.gelu(F.linear(y, up), approximate="tanh"), down)
                torch.addcmul(x, y, x)

            found[tokens] = _best(device, part) / tokens
        except Exception as error:
            if not management.is_out_of_memory(error):
                raise
            break
    return found


def best_chunk(sweep: dict[int, float]) -> int:
    """The smallest chunk that is nearly as fast as the fastest."""
    fastest = min(sweep.values())
    return min(tokens for tokens, seconds in sweep.items() if seconds <= fastest * (1 + GAIN))


def _convolution_rate(channels: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a VAE's 3x3x3 convolutions.

    On a CPU those of a whole residual block, whose norms take a good part of the time there.
    """
    flops = 2 * 27 * channels**2
    if device.type != "cpu":
        picture = torch.randn((1, channels, 3, 256, 256), device=device, dtype=dtype)
        layer = media.conv3d(channels).to(device, dtype)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=channels**-0.5)
        return flops * 256**2 / _best(device, lambda: layer(picture))
    block = media.wan_residual_block(channels)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=channels**-0.5)
    frames = torch.randn(1, 2, 256, 256, channels).movedim(-1, 1)  # channels last, as in a decode
    cache = [None, None]
    seconds = _best(device, lambda: residual_block(block, frames, cache, [0]))
    return 2 * 2 * flops * 256**2 / seconds  # two convolutions, two frames


def _best(device: torch.device, compute: Callable[[], object]) -> float:
    """Seconds of the fastest of some rounds, after one that warms up."""
    compute()
    found = []
    for _ in range(ROUNDS):
        _finish(device)
        start = time.perf_counter()
        compute()
        _finish(device)
        found.append(time.perf_counter() - start)
    return min(found)


def _finish(device: torch.device) -> None:
    """Wait for a device that runs behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
