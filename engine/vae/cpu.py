"""The slow layers of a Wan coder, computed faster on a CPU.

PyTorch computes a small 3D convolution on a CPU as one matrix product after the other, at a tenth
of oneDNN's speed, and walks through channels with a stride to normalise them. Here convolutions go
to oneDNN with channels last, which its fastest kernels want, and a residual block runs through
bands of rows, so that what lies between its layers stays in the cores' caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..comfyui import media, models

SMALLEST_NORM = 1e-12  # F.normalize divides by at least this
# float32 numbers in one vector register.
LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
# A band's size for each thread: small enough for the caches, but of enough positions that a large
# layer's weights, which oneDNN reorders at every call, do not count.
BAND_VALUES = 2**18
BAND_POSITIONS = 2**12

ONEDNN = torch.backends.mkldnn.is_available()
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


@contextmanager
def fast_on_cpu(model: nn.Module, x: Tensor) -> Iterator[None]:
    """While open, the model's layers compute as below for inputs such as x: float32 on a CPU.

    Half precision keeps the core's layers: there a sum in another order is rounded differently
    now and then, which thirty layers turn into several steps of a pixel.

    Only methods of single layers are replaced, for the time being; weights still come from the
    layers' own casts. Residual blocks cache their activations with channels last.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        yield
        return
    with ExitStack() as stack:
        found: dict[tuple[nn.Module, str], Callable] = {}
        for module in model.modules():  # a head's norm comes after the head, which has replaced it
            found = _replacements(module) | found
        for (layer, method), replacement in found.items():
            stack.enter_context(_replaced(layer, method, replacement))
        yield


@contextmanager
def _replaced(layer: Any, method: str, replacement: Callable) -> Iterator[None]:
    setattr(layer, method, replacement)
    try:
        yield
    finally:
        delattr(layer, method)


def _replacements(module: Any) -> dict[tuple[nn.Module, str], Callable]:
    """Layers and their methods that compute in another way, as far as `module` knows them."""
    if hasattr(module, "residual"):
        return {(module, "forward"): partial(residual_block, module)}
    if media.is_rms_norm(module):
        return {(module, "forward"): partial(rms_norm, module)}
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return {(module, "_conv_forward"): partial(conv_forward, module)}
    layers = list(module) if isinstance(module, nn.Sequential) else []
    if len(layers) == 2 and isinstance(layers[0], nn.Upsample):
        return {(module, "forward"): partial(upsample, module)}
    if len(layers) == 3 and media.is_rms_norm(layers[0]) and isinstance(layers[1], nn.SiLU):
        norm, silu, conv = layers
        forwards = {norm: _same, silu: _same, conv: partial(head, norm, conv)}
        return {(layer, "forward"): forward for layer, forward in forwards.items()}
    return {}


def _same(x: Tensor) -> Tensor:
    return x


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """A 2D or 3D convolution of x [N, C, (T,) H, W], by oneDNN where it can."""
    if not ONEDNN:
        compute: Any = F.conv2d if x.ndim == 4 else F.conv3d
        return compute(x, weight, bias, stride, padding, dilation, groups)
    layout = LAYOUTS[x.ndim]
    x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
    compute = torch.ops.aten.mkldnn_convolution
    return compute(x, weight, bias, padding, stride, dilation, groups)


def conv_forward(
    conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None, autopad: str | None = None
) -> Tensor:
    """What a convolution layer computes with its cast weights: x [N, C, (T,) H, W]."""
    if autopad == "causal_zero":  # the taps before the only frame meet zeros
        weight = weight[:, :, -x.shape[2] :]
    return _convolve(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class Kernel:
    """Weights [O, C, (T,) R, 3] and bias [O] of a convolution with stride 1.

    Where few output channels would leave much of a vector empty, `side` neighbouring columns are
    computed as further channels: with channels last, that is the same memory.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.channels = weight.shape[0]
        fits = [n for n in (2, 4) if n * self.channels <= LANES and ONEDNN]
        self.side = max(fits, default=1)
        shifted = [F.pad(weight, (i, self.side - 1 - i)) for i in range(self.side)]
        self._weight = torch.cat(shifted).contiguous(memory_format=LAYOUTS[weight.ndim])
        self._bias = None if bias is None else bias.repeat(self.side)

    def width(self, columns: int) -> int:
        """Columns that `convolve` wants for so many; the last ones have to be zeros."""
        return columns + -columns % self.side

    def convolve(self, x: Tensor, padding: int) -> Tensor:
        """x [N, (T,) rows, columns, C] -> [N, (T',) rows', columns, O].

        `padding` counts rows on both sides; columns are padded by one on both sides.
        """
        before = (1,) * (x.ndim - 4)  # the frames' axis, where there is one
        stride = (*before, 1, self.side)
        padded = (0,) * len(before) + (padding, 1)
        x = x.movedim(-1, 1)
        y = _convolve(x, self._weight, self._bias, stride, padded, (*before, 1, 1), 1)
        y = y.movedim(1, -1)
        return y.reshape(*y.shape[:-2], -1, self.channels)


def upsample(layers: Any, x: Tensor) -> Tensor:
    """Nearest up-sampling by two and a 3x3 convolution: x [N, C, h, w] -> [N, O, 2h, 2w].

    Rows and columns of one parity see two of the three taps on the same input, so x is never
    repeated.
    """
    rows = x.movedim(1, -1)
    items, height, width, _ = rows.shape
    with models.weights(layers[1], x) as (weight, bias):
        channels = weight.shape[0]
        out = x.new_empty((items, 2 * height, 2 * width, channels))
        for row, taps in enumerate(_parities(weight, 2)):
            even, odd = _parities(taps, 3)
            both = Kernel(
                torch.cat([F.pad(even, (0, 1)), F.pad(odd, (1, 0))]),
                None if bias is None else bias.repeat(2),
            )
            padded = F.pad(rows, (0, 0, 0, both.width(width) - width))
            y = both.convolve(padded, padding=1)[:, row : row + height, :width]
            out[:, row::2] = y.reshape(items, height, 2 * width, channels)
    return out.movedim(-1, 1)


def _parities(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three taps along `dim` as the two that even and odd positions of a doubled axis see."""
    first, second, third = weight.unbind(dim)
    even = torch.stack([first, second + third], dim)
    return even, torch.stack([first + second, third], dim)


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """The core's RMS norm over the channels of x [N, C, ...]."""
    out = torch.empty_like(x, memory_format=LAYOUTS[x.ndim])
    normalise(norm, x.movedim(1, -1), out.movedim(1, -1))
    return out


def normalise(norm: Any, x: Tensor, out: Tensor) -> None:
    """Writes the core's RMS norm over the last axis of x [..., C] into `out`, of its shape."""
    channels = x.shape[-1]
    total = torch.mul(x, x).reshape(-1, channels).mm(x.new_ones((channels, 1)))
    factor = total.clamp_min_(SMALLEST_NORM**2).rsqrt_().view(*x.shape[:-1], 1)
    torch.mul(x, factor, out=out)
    # As a row, it is as long as what it is multiplied with: one loop, not one per position.
    gain = (norm.gamma.to(x).flatten() * norm.scale).repeat(x.shape[-2])
    out.mul_(gain.view(x.shape[-2:]))
    if norm.bias is not None:
        out.add_(norm.bias.to(x).flatten())


class NormedConv:
    """RMS norm, SiLU and a causal 3x3x3 convolution over frames that come in bands of rows.

    Layout of everything here: [N, frames, rows, columns, C].
    """

    def __init__(
        self, norm: Any, weight: Tensor, bias: Tensor | None, before: Tensor | None, size: Any
    ) -> None:
        """`size` is that of all rows that will come.

        `before` are the activations [N, 1 or 2, ...] of the frames before; `kept` will be those
        for the next frames, in their place.
        """
        items, frames, self._height, self._width, channels = size
        self._norm = norm
        self._before = before
        self._known = 0 if before is None else before.shape[1]
        # A single frame with nothing before it meets the last of three taps only.
        self._lead = 0 if frames == 1 and before is None else 2
        self._kernel = Kernel(weight if self._lead else weight[:, :, -1:], bias)
        keep = min(2, self._known + frames)
        if before is not None and keep == self._known:
            self.kept = before  # a row is read before it is replaced
        else:
            self.kept = weight.new_empty((items, keep, self._height, self._width, channels))
        width = self._kernel.width(self._width)
        self._above = weight.new_zeros((items, self._lead + frames, 1, width, channels))
        self._window = weight.new_empty(0)
        self._next = 0

    def push(self, rows: Tensor) -> Tensor:
        """Adds the next rows [N, frames, rows, columns, C]; returns those that follow from them.

        They are one fewer than have come, until the last come.
        """
        count, above = rows.shape[2], self._above.shape[2]
        band = slice(self._next, self._next + count)
        self._next += count
        last = self._next == self._height
        window = self._new_window(above + count + last)
        window[:, :, :above] = self._above
        window[:, :, above:, self._width :] = 0
        if last:
            window[:, :, -1] = 0
        new = window[:, :, above : above + count, : self._width]
        new[:, : self._lead - self._known] = 0
        if self._before is not None:
            new[:, self._lead - self._known : self._lead] = self._before[:, :, band]
        activation = new[:, self._lead :]
        normalise(self._norm, rows, activation)
        F.silu(activation, inplace=True)
        self.kept[:, :, band] = new[:, -self.kept.shape[1] :]
        self._above = window[:, :, -2:].clone()
        return self._kernel.convolve(window, padding=0)[..., : self._width, :]

    def _new_window(self, rows: int) -> Tensor:
        """Memory for so many rows, which the next call uses again."""
        shape = (*self._above.shape[:2], rows, *self._above.shape[3:])
        size = math.prod(shape)
        if self._window.numel() < size:
            self._window = self._window.new_empty(size)
        return self._window[:size].view(shape)


def residual_block(
    block: Any, x: Tensor, cache: list[Any] | None = None, index: Any = (0,), **_: Any
) -> Tensor:
    """A core's residual block: x [N, C, T, h, w] -> [N, O, T, h, w].

    `cache` keeps the last two activations [N, C, 1 or 2, h, w] before each convolution, from
    `index[0]` on, with channels last in memory.
    """
    norms = [layer for layer in block.residual if media.is_rms_norm(layer)]
    convs = [layer for layer in block.residual if isinstance(layer, nn.Conv3d)]
    kept = [None, None] if cache is None else cache[index[0] : index[0] + 2]
    before = [None if each is None else each.movedim(1, -1) for each in kept]
    x = _channels_last(x)
    rows = x.movedim(1, -1)
    with ExitStack() as stack:
        stages = []
        for norm, conv, kept in zip(norms, convs, before, strict=True):
            weight, bias = stack.enter_context(models.weights(conv, x))
            size = (*rows.shape[:-1], weight.shape[1])
            stages.append(NormedConv(norm, weight, bias, kept, size))
        out = x.new_empty((*rows.shape[:-1], convs[-1].out_channels))
        done = 0
        for band in _bands(rows):
            y = stages[1].push(stages[0].push(band))
            part = slice(done, done + y.shape[2])
            same = block.shortcut(x[..., part, :]).movedim(1, -1)
            torch.add(y, same, out=out[:, :, part])
            done = part.stop
    if cache is not None:
        cache[index[0] : index[0] + 2] = [stage.kept.movedim(-1, 1) for stage in stages]
        index[0] += 2
    return out.movedim(-1, 1)


def head(norm: Any, conv: Any, x: Tensor, before: Tensor | None = None) -> Tensor:
    """The last layers of a coder: x [N, C, T, h, w] -> [N, O, T, h, w].

    `before` are the frames [N, C, 1 or 2, h, w] before x, not normalised either.
    """
    rows = _channels_last(x).movedim(1, -1)
    if before is not None:
        before = F.silu(rms_norm(norm, before), inplace=True).movedim(1, -1)
    with models.weights(conv, x) as (weight, bias):
        stage = NormedConv(norm, weight, bias, before, rows.shape)
        out = x.new_empty((*rows.shape[:-1], weight.shape[0]))
        done = 0
        for band in _bands(rows):
            y = stage.push(band)
            out[:, :, done : done + y.shape[2]] = y
            done += y.shape[2]
    return out.movedim(-1, 1)


def _channels_last(x: Tensor) -> Tensor:
    """x [N, C, ...] with its channels side by side in memory; a crop of such a tensor is one."""
    return x if x.stride(1) == 1 else x.contiguous(memory_format=LAYOUTS[x.ndim])


def _bands(rows: Tensor) -> tuple[Tensor, ...]:
    """[N, T, rows, columns, C] in bands of rows."""
    items, frames, _, width, channels = rows.shape
    values = max(BAND_VALUES * torch.get_num_threads(), BAND_POSITIONS * channels)
    return rows.split(max(4, values // (items * frames * width * channels)), dim=2)
