"""The middle of a Wan coder, whose attention sees whole frames: in bands of rows, then queries.

What stands before and after the attention is local, so a band of rows with a few more on both
sides gives its own rows exactly. Between the two, a chunk's queries, keys and values lie on the
device or, where they do not fit there, in host memory, as do the frames that convolutions keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..comfyui import management, media
from ..device import copies
from ..device.chunks import ChunkSize, in_chunks
from .cpu import fast_on_cpu
from .layers import cached_channels
from .regions import Span

Cache = list[Any] | None
Local = Callable[[Tensor, Cache, list[int]], Tensor]

CHUNK_FRAMES = 2
"""Latent frames in a chunk, at most."""
KEPT = 4
"""Features of a chunk between the layers before the attention and those after: x, q, k, v."""
BAND_LIVE = 18
"""Features of a band's positions at the peak of its layers, counted on the real shapes."""
FEWEST_ROWS = 16
"""A lower band is nearly all halo."""
ATTENTION_SCORE_BYTES = 64 * 2**20
SLICE_FLOPS = {"cpu": 5e10}
CARD_SLICE_FLOPS = 8e12
"""One call of the attention: enough queries to fill a card, few enough to cancel soon."""


@dataclass(frozen=True)
class Stage:
    """The part of a coder around its middle block's attention.

    `before` and `after` are local; `see_before` and `see_after` say how many rows they read beyond
    what they return. Both take [1, C, t, rows, w], a feature cache and the place in it.
    """

    before: Local
    attention: Any
    after: Local
    see_before: int
    see_after: int
    layers: tuple[nn.Module, ...]
    """All that keep frames between chunks."""

    @property
    def channels(self) -> int:
        return self.attention.dim

    @property
    def cached(self) -> int:
        """Channels x frames kept for each position between chunks."""
        return sum(map(cached_channels, self.layers))


@dataclass(frozen=True)
class Room:
    """How the stage is computed within some memory: pure arithmetic on sizes."""

    bands: int
    on_device: bool
    """Where a chunk's queries, keys, values and kept frames lie."""
    peak: int
    """Bytes on the device."""


def room(stage: Stage, height: int, width: int, element_bytes: int, limit: int) -> Room:
    """The fewest bands that fit `limit` bytes, on the device if it can be; else the least."""
    places = [
        Room(n, on_device, _peak(stage, height, width, element_bytes, n, on_device))
        for on_device in (True, False)
        for n in range(1, max(1, height // FEWEST_ROWS) + 1)
    ]
    return next((each for each in places if each.peak <= limit), min(places, key=lambda r: r.peak))


def _peak(
    stage: Stage, height: int, width: int, element_bytes: int, bands: int, on_device: bool
) -> int:
    """Bytes on the device. Six parameters: each is a size of its own."""
    frame = height * width * stage.channels
    kept = CHUNK_FRAMES * KEPT * frame + stage.cached * height * width
    rows = min(height, -(-height // bands) + 2 * max(stage.see_before, stage.see_after))
    band = BAND_LIVE * rows * width * stage.channels
    if on_device:
        return element_bytes * (kept + band) + 3 * ATTENTION_SCORE_BYTES
    # Keys and values of one frame for all of its queries.
    return max(element_bytes * band, element_bytes * 2 * frame) + 3 * ATTENTION_SCORE_BYTES


@dataclass
class Band:
    """Rows that are computed together, and the frames that their layers keep, with halos."""

    rows: Span
    before: Cache
    after: Cache


class WholeFrames:
    """Runs a stage over the chunks of one video, one after the other.

    Args:
        new_cache: makes an empty feature cache for `before` and `after`, or None.
        room: how to compute it.
    """

    def __init__(
        self,
        stage: Stage,
        size: tuple[int, int],
        new_cache: Callable[[], Cache],
        room: Room,
        device: torch.device,
    ) -> None:
        self.stage = stage
        self.height, self.width = size
        self.device = device
        self.place = device if room.on_device else copies.cpu()
        edges = [i * self.height // room.bands for i in range(room.bands + 1)]
        spans = [Span(a, b) for a, b in pairwise(edges)]
        self.bands = [Band(span, new_cache(), new_cache()) for span in spans]
        self._kept: dict[str, Tensor] = {}

    def __call__(self, chunk: Tensor) -> Tensor:
        """What the stage makes of a chunk [1, C, t, h, w], in host memory."""
        frames, channels = chunk.shape[2], self.stage.channels
        positions = self.height * self.width
        like = chunk.new_empty(0, device=self.place)
        self._kept = {"x": like.new_empty(1, channels, frames, self.height, self.width)}
        for name in ("q", "k", "v"):
            self._kept[name] = like.new_empty(frames, positions, channels)
        self._in_bands(lambda band: self._before(band, chunk))
        for frame in range(frames):
            self._attend(frame)
        out: list[Tensor] = []
        self._in_bands(lambda band: self._after(band, out))
        self._kept = {}
        return out[0]

    def _in_bands(self, compute: Callable[[Band], None]) -> None:
        """`compute` for every band, less memory for one that runs out of it."""
        waiting = list(reversed(self.bands))
        pace, self.bands = ChunkSize(1), []
        pace.stay_close()
        while waiting:
            management.raise_if_cancelled()
            band = waiting.pop()
            try:
                compute(band)
            except Exception as error:
                if not management.is_out_of_memory(error):
                    raise
                small = self.place != self.device or self.device.type == "cpu"
                if small and band.rows.size < 2:
                    raise
            else:
                self.bands.append(band)
                pace.keep_pace(1)
                continue
            # Outside the handler, where the error no longer holds on to the band's tensors.
            waiting.append(band)
            if small:
                waiting[-1:] = reversed(self._halves(band))
            else:
                self._to_host(waiting)
            management.empty_cache()

    def _to_host(self, waiting: Sequence[Band]) -> None:
        """Everything that is kept gives its place on the device to what is computed."""
        self.place = copies.cpu()
        self._kept = {name: tensor.to(self.place) for name, tensor in self._kept.items()}
        for band in (*self.bands, *waiting):
            band.before, band.after = self._placed(band.before), self._placed(band.after)

    def _placed(self, cache: Cache) -> Cache:
        """A cache where the memory plan keeps it; marks between tensors stay."""
        if cache is None:
            return None
        return [x.to(self.place) if isinstance(x, Tensor) else x for x in cache]

    def _halves(self, band: Band) -> tuple[Band, Band]:
        middle = (band.rows.start + band.rows.stop) // 2
        spans = Span(band.rows.start, middle), Span(middle, band.rows.stop)
        first, second = (
            Band(
                span,
                self._cropped(band.before, band.rows, span, self.stage.see_before),
                self._cropped(band.after, band.rows, span, self.stage.see_after),
            )
            for span in spans
        )
        return first, second

    def _cropped(self, cache: Cache, old: Span, new: Span, see: int) -> Cache:
        if cache is None:
            return None
        rows = new.grow(see, self.height).within(old.grow(see, self.height))
        return [x[..., rows, :].clone() if isinstance(x, Tensor) else x for x in cache]

    @torch.inference_mode()
    def _before(self, band: Band, chunk: Tensor) -> None:
        """x, and queries, keys and values, of a band's rows."""
        rows, attention = band.rows, self.stage.attention
        read = rows.grow(self.stage.see_before, self.height)
        cache = self._on_device(band.before)
        x = self.stage.before(chunk[..., read.start : read.stop, :].to(self.device), cache, [0])
        x = x[..., rows.within(read), :]
        with fast_on_cpu(attention, x):
            y = attention.to_qkv(attention.norm(rearrange(x, "1 c t h w -> t c h w")))
        self._kept["x"][..., rows.start : rows.stop, :] = x
        places = slice(rows.start * self.width, rows.stop * self.width)
        for name, part in zip("qkv", y.chunk(3, dim=1), strict=True):
            self._kept[name][:, places] = rearrange(part, "t c h w -> t (h w) c")
        band.before = self._placed(cache)

    def _on_device(self, cache: Cache) -> Cache:
        """A copy of a cache's list, so that a band which fails can be repeated."""
        if cache is None:
            return None
        return [x.to(self.device) if isinstance(x, Tensor) else x for x in cache]

    @torch.inference_mode()
    def _attend(self, frame: int) -> None:
        """A frame's queries become what they read."""
        q, k, v = (self._kept[name][frame] for name in "qkv")
        k, v = k.to(self.device), v.to(self.device)
        attend = attention_of(self.stage.attention, self.device, q.dtype)

        def compute(start: int, stop: int) -> None:
            q[start:stop] = attend(q[start:stop].to(self.device), k, v)

        flops = SLICE_FLOPS.get(self.device.type, CARD_SLICE_FLOPS)
        chunk = ChunkSize(max(1, int(flops / (4 * k.numel()))))
        chunk.stay_close()
        in_chunks(range(1, len(q) + 1), chunk, compute)

    @torch.inference_mode()
    def _after(self, band: Band, out: list[Tensor]) -> None:
        """The stage's result in a band's rows, from what its queries read."""
        rows, attention = band.rows, self.stage.attention
        read = rows.grow(self.stage.see_after, self.height)
        places = slice(read.start * self.width, read.stop * self.width)
        cache = self._on_device(band.after)
        attended = self._kept["q"][:, places].to(self.device)
        x = self._kept["x"][..., read.start : read.stop, :].to(self.device)
        with fast_on_cpu(attention, x):
            y = attention.proj(rearrange(attended, "t (h w) c -> t c h w", w=self.width))
        del attended
        x = x + rearrange(y, "t c h w -> 1 c t h w")
        del y
        y = self.stage.after(x, cache, [0])[..., rows.within(read), :]
        if not out:
            shape = (*y.shape[:3], self.height, self.width)
            out.append(y.new_empty(shape, device=copies.cpu()))
        out[0][..., rows.start : rows.stop, :] = y
        band.after = self._placed(cache)


# --- Attention -------------------------------------------------------------------------------


def attention_of(
    block: Any, device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The attention of some queries [n, C] to a frame's keys and values [L, C] -> [n, C].

    Plain where the core's is, so that half precision is rounded as there; but in slices, and in
    float32 on a CPU by PyTorch's fused one.
    """
    plain = block.optimized_attention is media.plain_attention
    exact_on_cpu = device.type == "cpu" and dtype == torch.float32
    return sliced_attention if plain and not exact_on_cpu else fused_attention


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(C)) v by PyTorch's fused attention: q [n, C], k, v [L, C]."""
    return F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0, 0]


def sliced_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(C)) v with all scores of a slice of queries: q [n, C], k, v [L, C]."""
    scale, out = q.shape[1] ** -0.5, torch.empty_like(q)
    rows = max(1, ATTENTION_SCORE_BYTES // (len(k) * k.element_size()))
    for start in range(0, len(q), rows):
        weights = (q[start : start + rows] @ k.T * scale).softmax(dim=1)
        out[start : start + rows] = weights @ v
    return out
