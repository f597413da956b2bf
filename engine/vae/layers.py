"""Reads a Wan coder's modules into a chain of steps, and crops while they run.

The modules themselves are called, as the core calls them, so offloaded or quantised weights
and each core version's own chunking keep working; only a forward hook stands behind each
module, for the duration of one call, and cuts its output to what the next step needs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from .regions import Down, Region, Rule, Same, Up, trace_box


@dataclass(frozen=True)
class Step:
    """One module of the chain and its cost.

    `macs` counts multiply-adds per input position and latent frame. `cached` counts channels x
    frames that stay alive per input position between chunks. `live` counts channels x frames
    alive per input position at the step's peak.
    """

    rule: Rule
    module: nn.Module | None = None
    macs: float = 0.0
    cached: int = 0
    live: int = 0


@dataclass(frozen=True)
class Bypass:
    """A shortcut around the steps first <= i < last, whose output is cropped like theirs."""

    module: nn.Module
    rule: Rule
    first: int
    last: int


@dataclass(frozen=True)
class Chain:
    """The spatially local part of a coder: steps in order, shortcuts beside them."""

    steps: tuple[Step, ...]
    bypasses: tuple[Bypass, ...] = ()

    @property
    def rules(self) -> tuple[Rule, ...]:
        return tuple(step.rule for step in self.steps)

    def regions(self, box: Region, height: int, width: int) -> list[Region]:
        """Input box of every step, then `box`, for a chain input of height x width."""
        return trace_box(self.rules, box, height, width)

    @contextmanager
    def cropping(self, regions: Sequence[Region]) -> Iterator[None]:
        """While open, each module's output is cropped to the next step's input box."""
        handles = []
        try:
            for index, step in enumerate(self.steps):
                if step.module is not None:
                    given = _gives(step.rule, regions[index])
                    handles.append(_crop_output(step.module, given, regions[index + 1]))
            for bypass in self.bypasses:
                given = _gives(bypass.rule, regions[bypass.first])
                handles.append(_crop_output(bypass.module, given, regions[bypass.last]))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _gives(rule: Rule, box: Region) -> Region:
    return Region(rule.gives(box.rows), rule.gives(box.cols))


def _crop_output(module: nn.Module, given: Region, wanted: Region):
    rows, cols = wanted.within(given)

    def crop(_module: nn.Module, _args: object, output: torch.Tensor | None):
        return None if output is None else output[..., rows, cols]

    return module.register_forward_hook(crop)


def convolutions(module: nn.Module) -> list[nn.Module]:
    """Every convolution inside `module`, in order."""
    return [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]


def conv_macs(conv: nn.Module) -> int:
    """Multiply-adds of one output position of a convolution."""
    return prod(conv.kernel_size) * conv.in_channels * conv.out_channels  # type: ignore[operator]


def _is_temporal(conv: nn.Module) -> bool:
    return isinstance(conv, nn.Conv3d) and conv.kernel_size[0] > 1


def cached_channels(module: nn.Module) -> int:
    """Channels x frames that a module's causal convolutions keep: two frames each."""
    return sum(2 * c.in_channels for c in convolutions(module) if _is_temporal(c))  # type: ignore[misc]


def residual_step(block: nn.Module, per_latent: int, chunk: int) -> Step:
    """A residual block: two 3x3 convolutions, so two positions on each side."""
    convs = convolutions(block)
    macs = per_latent * sum(map(conv_macs, convs))
    widest = max(c.in_channels for c in convs)  # type: ignore[type-var]
    # The block's input and shortcut, the normalised frames, the same behind two cached
    # frames (concatenated), and the convolution's output.
    live = chunk * (2 * convs[0].in_channels + 2 * widest) + (chunk + 2) * widest  # type: ignore[operator]
    return Step(Same(2), block, macs, cached_channels(block), int(live))


def resample_step(resample: nn.Module, per_latent: int, chunk: int) -> Step:
    """An up- or down-sampling by two; `per_latent` and `chunk` count its input frames."""
    mode = str(resample.mode)
    conv = convolutions(resample.resample)[0]  # type: ignore[arg-type]
    time = conv_macs(resample.time_conv) if mode.endswith("3d") else 0  # type: ignore[arg-type]
    c_in, c_out = conv.in_channels, conv.out_channels
    cached = cached_channels(resample)
    if mode.startswith("upsample"):
        frames = 2 if mode.endswith("3d") else 1
        macs = per_latent * (time + 4 * frames * conv_macs(conv))
        live = chunk * frames * (c_in + 4 * c_in + 4 * c_out)  # type: ignore[operator]
        return Step(Up(), resample, macs, cached, int(live))
    if mode.startswith("downsample"):
        macs = per_latent * (conv_macs(conv) + time / 2) / 4
        # The padded copy of the input, the output, and one more frame for the time convolution.
        live = 2 * chunk * c_in + (2 * chunk + 1) * c_out / 4  # type: ignore[operator]
        return Step(Down(), resample, macs, cached + c_out // 2, int(live))  # type: ignore[operator]
    raise ValueError(f"This VAE has a '{mode}' layer, which the exact tiles do not know.")


def conv_step(conv: nn.Module, per_latent: int, chunk: int) -> Step:
    """A single 3x3x3 convolution at the chain's full resolution (first or last layer)."""
    c_in, c_out = conv.in_channels, conv.out_channels
    live = chunk * (2 * c_in + c_out) + (chunk + 2) * c_in  # type: ignore[operator]
    return Step(Same(1), conv, per_latent * conv_macs(conv), cached_channels(conv), int(live))  # type: ignore[arg-type]


def frame_factor(module: nn.Module) -> int:
    """2 where the module changes the frame count by two, else 1."""
    return 2 if str(getattr(module, "mode", "")).endswith("3d") else 1


def is_residual(module: nn.Module) -> bool:
    return hasattr(module, "residual")


def is_resample(module: nn.Module) -> bool:
    return hasattr(module, "resample")


def layer_step(module: nn.Module, per_latent: int, chunk: int) -> Step:
    """The step of one residual or resampling module.

    Raises:
        ValueError: the module is neither, so its spatial context is unknown.
    """
    if is_residual(module):
        return residual_step(module, per_latent, chunk)
    if is_resample(module):
        return resample_step(module, per_latent, chunk)
    raise ValueError(
        f"This VAE has a '{type(module).__name__}' layer, which the exact tiles do not know. "
        "Use the stock VAE Decode or VAE Encode node with it."
    )
