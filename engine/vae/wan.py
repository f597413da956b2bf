"""The Wan 2.1 and 2.2 coders split where their spatial context ends.

Only the middle block's attention sees the whole frame. So a decoder is a *stage* on whole
frames at latent resolution (`middle`) followed by a spatially local chain of layers
(`pixels`), and an encoder is a local chain (`features`) followed by a stage on whole frames
(`middle`). Frames pass in the core's own chunks with its causal feature cache, so each core
version is followed exactly.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .cpu import fast_on_cpu
from .layers import (
    Bypass,
    Chain,
    Step,
    conv_macs,
    conv_step,
    convolutions,
    frame_factor,
    is_resample,
    layer_step,
)
from .middle import Cache, Stage
from .regions import Down, Even, Region, Same, Up

FRAMES_PER_LATENT = 4


def frame_count(latents: int) -> int:
    """Image frames of `latents` latent frames: the first makes one, each other four."""
    return FRAMES_PER_LATENT * (latents - 1) + 1


def latent_count(frames: int) -> int:
    """Latent frames that `frames` image frames make; an incomplete last group is dropped."""
    return (frames - 1) // FRAMES_PER_LATENT + 1


def new_cache(module: nn.Module, streamed: bool) -> Cache:
    """A feature cache with room for every causal layer, or None for a single image."""
    return [None] * (2 * len(convolutions(module))) if streamed else None


def cached_conv(conv: nn.Module, x: Tensor, cache: Cache, index: list[int]) -> Tensor:
    """A causal convolution over a chunk, with the two frames before it from the cache."""
    if cache is None:
        return conv(x)
    before = cache[index[0]]
    kept = x[:, :, -2:].clone()
    if kept.shape[2] < 2 and before is not None:
        kept = torch.cat([before[:, :, -1:], kept], dim=2)
    x = conv(x, before)
    cache[index[0]] = kept
    index[0] += 1
    return x


def _run(layer: nn.Module, x: Tensor, cache: Cache, index: list[int]) -> Tensor:
    return layer(x) if cache is None else layer(x, cache, index)


def _head(layers: Sequence[nn.Module], x: Tensor, cache: Cache, index: list[int]) -> Tensor:
    *norms, conv = layers
    for layer in norms:
        x = layer(x)
    return cached_conv(conv, x, cache, index)


def _middle_macs(coder: nn.Module) -> int:
    convs = convolutions(coder.middle)  # type: ignore[arg-type]
    return sum(map(conv_macs, convs))


class WanDecoder:
    """A Wan VAE's decoder: whole-frame features, then tiles of pixels.

    Shapes: latents [1, C, t, h, w]; features [1, D, t, h, w]; pixels [1, 3, frames, H, W] with
    H = h * scale, in [-1, 1] and the model's dtype.
    """

    def __init__(self, model: nn.Module, patch: int) -> None:
        """`patch` is the pixel-shuffle after the last layer: 1 for Wan 2.1, 2 for Wan 2.2."""
        self.model = model
        self.coder: Any = model.decoder
        self.patch = patch
        self.chain = _decoder_chain(self.coder, blocks=self._in_blocks)
        self.scale = 8 * patch
        self.feature_channels: int = self.coder.conv1.out_channels
        self.latent_channels: int = self.coder.conv1.in_channels
        self.out_channels: int = self.coder.head[-1].out_channels // patch**2
        self.whole_macs = conv_macs(self.coder.conv1) + _middle_macs(self.coder)

    @property
    def _in_blocks(self) -> bool:
        return self.patch == 2

    def chunks(self, latents: int) -> list[slice]:
        """Latent frames per call, as the core cuts them: 1, then 2 (Wan 2.1) or 1 (Wan 2.2)."""
        step = 1 if self._in_blocks else 2
        starts = range(1, latents, step)
        return [slice(0, 1), *(slice(s, min(s + step, latents)) for s in starts)]

    def cache(self, latents: int) -> Cache:
        """A new feature cache; the core runs a single Wan 2.1 frame without one."""
        return new_cache(self.coder, streamed=latents > 1 or self._in_blocks)

    @property
    def middle(self) -> Stage:
        """The whole-frame stage: `conv2`, `conv1` and the middle block, latents to features."""
        first, attention, last = self.coder.middle

        def before(latent: Tensor, cache: Cache, index: list[int]) -> Tensor:
            with fast_on_cpu(self.model, latent):
                x = self.model.conv2(latent)  # type: ignore[operator]
                x = cached_conv(self.coder.conv1, x, cache, index)
                return _run(first, x, cache, index)

        def after(x: Tensor, cache: Cache, index: list[int]) -> Tensor:
            with fast_on_cpu(last, x):
                return _run(last, x, cache, index)

        return Stage(before, attention, after, 3, 2, (self.coder.conv1, first, last))

    def pixels(self, x: Tensor, cache: Cache, regions: Sequence[Region], first: bool) -> Tensor:
        """The local stage of one chunk and tile: features of `regions[0]` to its pixels."""
        with fast_on_cpu(self.coder, x), self.chain.cropping(regions):
            out = self._up_blocks(x, cache, first) if self._in_blocks else self._run_up(x, cache)
        if self.patch == 1:
            return out
        return rearrange(out, "b (c r q) f h w -> b c f (h q) (w r)", q=self.patch, r=self.patch)

    def _run_up(self, x: Tensor, cache: Cache) -> Tensor:
        chunks: list[Tensor] = []
        self.coder.run_up(0, [x], cache, [0], chunks)
        return torch.cat(chunks, dim=2)

    def _up_blocks(self, x: Tensor, cache: Cache, first: bool) -> Tensor:
        index = [0]
        for block in self.coder.upsamples:
            x = block(x, cache, index, first)
        return _head(self.coder.head, x, cache, index)


class WanEncoder:
    """A Wan VAE's encoder: tiles of local features, then whole-frame latents.

    Shapes: pixels [1, 3, frames, H, W] in [-1, 1]; features [1, D, t, h, w]; latents
    [1, C, t, h, w].
    """

    def __init__(self, model: nn.Module, patch: int) -> None:
        """`patch` is the pixel-unshuffle before the first layer: 1 or 2, as for the decoder."""
        self.model = model
        self.coder: Any = model.encoder
        self.patch = patch
        self.chain = _encoder_chain(self.coder, blocks=self._in_blocks)
        self.scale = 8 * patch
        self.feature_channels: int = self.coder.head[-1].in_channels
        self.whole_macs = conv_macs(self.coder.head[-1]) + _middle_macs(self.coder)

    @property
    def _in_blocks(self) -> bool:
        return self.patch == 2

    def chunks(self, group: Tensor) -> tuple[Tensor, ...]:
        """The frames of one latent frame, [1, 3, 1 or 4, H, W], cut as the core cuts them."""
        return group.split(4 if self._in_blocks else 2, dim=2)

    def cache(self, latents: int) -> Cache:
        """A new feature cache; the core runs a single Wan 2.1 frame without one."""
        return new_cache(self.coder, streamed=latents > 1 or self._in_blocks)

    def features(
        self, x: Tensor, cache: Cache, regions: Sequence[Region], final: bool
    ) -> Tensor | None:
        """The local stage of one chunk and tile, from pixels of `regions[0]`.

        Wan 2.1 returns None while it waits for the next chunk; `final` ends the waiting.
        """
        if self.patch > 1:
            x = rearrange(x, "b c f (h q) (w r) -> b (c r q) f h w", q=self.patch, r=self.patch)
        index = [0]
        with fast_on_cpu(self.coder, x), self.chain.cropping(regions):
            x = cached_conv(self.coder.conv1, x, cache, index)
            for layer in self.coder.downsamples:
                x = self._down(layer, x, cache, index, final)
                if x is None:
                    return None
        return x

    def _down(self, layer: nn.Module, x: Tensor, cache: Cache, index: list[int], final: bool):
        if cache is None:
            return layer(x)
        if self._in_blocks:
            return layer(x, cache, index)
        return layer(x, cache, index, final=final)

    @property
    def middle(self) -> Stage:
        """The whole-frame stage: the middle block, the head and `conv1`, features to latents."""
        first, attention, last = self.coder.middle

        def before(x: Tensor, cache: Cache, index: list[int]) -> Tensor:
            with fast_on_cpu(first, x):
                return _run(first, x, cache, index)

        def after(x: Tensor, cache: Cache, index: list[int]) -> Tensor:
            with fast_on_cpu(self.model, x):
                x = _run(last, x, cache, index)
                x = _head(self.coder.head, x, cache, index)
                return self.model.conv1(x).chunk(2, dim=1)[0]  # type: ignore[operator]

        return Stage(before, attention, after, 2, 3, (first, last, self.coder.head))


def _decoder_chain(coder: Any, blocks: bool) -> Chain:
    """Steps from the middle block's output to the last convolution."""
    if blocks:
        steps, bypasses, frames = _block_steps(coder.upsamples, "upsamples", frames=1)
        return Chain((*steps, conv_step(coder.head[-1], frames, frames)), bypasses)
    steps, frames = [], 1
    for layer in coder.upsamples:
        step = layer_step(layer, frames, chunk=2)
        if frame_factor(layer) == 2:
            # Its four output frames wait while two pass through the layers that follow.
            held = 4 * 4 * convolutions(layer.resample)[0].out_channels  # type: ignore[operator]
            step = replace(step, cached=step.cached + held)
        steps.append(step)
        frames *= frame_factor(layer)
    return Chain((*steps, conv_step(coder.head[-1], frames, chunk=2)))


def _encoder_chain(coder: Any, blocks: bool) -> Chain:
    """Steps from the first convolution to the middle block's input."""
    frames = FRAMES_PER_LATENT
    if blocks:
        steps, bypasses, _ = _block_steps(coder.downsamples, "downsamples", frames, offset=1)
        return Chain((conv_step(coder.conv1, frames, frames), *steps), bypasses)
    steps = [conv_step(coder.conv1, frames, chunk=2)]
    for layer in coder.downsamples:
        steps.append(layer_step(layer, frames, chunk=2))
        frames //= frame_factor(layer)
    return Chain(tuple(steps))


def _block_steps(
    blocks: Any, name: str, frames: int, offset: int = 0
) -> tuple[list[Step], tuple[Bypass, ...], int]:
    """Steps and shortcuts of Wan 2.2's blocks, whose chunk is one latent frame throughout."""
    steps: list[Step] = []
    bypasses: list[Bypass] = []
    for block in blocks:
        shortcut = block.avg_shortcut
        first = offset + len(steps)
        layers = getattr(block, name)
        # A block keeps its input for the shortcut while its layers run.
        entry = frames * int(convolutions(layers[0])[0].in_channels)  # type: ignore[arg-type]
        steps.append(Step(Even() if name == "downsamples" else Same(0), cached=entry))
        for layer in layers:
            steps.append(layer_step(layer, frames, frames))
            if is_resample(layer):
                factor = frame_factor(layer)
                frames = frames * factor if name == "upsamples" else frames // factor
        if shortcut is not None:
            rule = (Up() if name == "upsamples" else Down()) if shortcut.factor_s == 2 else Same(0)
            bypasses.append(Bypass(shortcut, rule, first, offset + len(steps)))
            # The shortcut repeats and reorders beside the main path, then both are added.
            steps.append(Step(Same(0), live=4 * frames * shortcut.out_channels))
    return steps, tuple(bypasses), frames
