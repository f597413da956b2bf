"""The Tiny Conditional decoder: latents to pixels, guided by the low-quality frames.

A fraction of the Wan VAE's work: 3x3 convolutions frame by frame, each block with the frame before
as its memory. Whole frames pass from block to block, latent frame by latent frame; within a block
they are computed in stripes of rows, which bounds the memory and changes no value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..comfyui import management, models, server
from ..device import copies
from ..device.budget import AUTO, parse_budget
from ..device.chunks import ChunkSize, in_chunks
from ..vae.cpu import fast_on_cpu
from ..vae.frames import Piece, whole_images
from ..vae.regions import Region, Span
from ..vae.sources import frame_source, sound_and_rate
from ..vae.video import StreamedVideo
from ..vae.wan import frame_count
from .bundle import FlashVSR
from .colour import colour_method
from .schedule import Schedule
from .source import Footage, LowQuality, Upscale

LATENT_CHANNELS = 16
FRAMES = 4
"""Video frames per latent frame."""
SCALE = 8
"""Pixels per latent along a side."""
CONDITION_CHANNELS = 3 * FRAMES * SCALE * SCALE
# decoder.N of the parts that hold weights.
ENTRY = (1, 3)
BLOCKS = ((5, 6, 7), (11, 12, 13), (17, 18, 19))
GROWS = (9, 15, 21)
UPS = (10, 16, 22)
TAIL = (24, 26)
GROWTH = (1, 2, 2)
"""Frames that each TGrow makes of one."""
BLOCK_HALO, TAIL_HALO = 3, 3
"""Rows beyond a stripe that its result depends on: one per 3x3 convolution."""
BLOCK_LIVE, CONV_LIVE = 5, 1.5
"""Features alive in a stripe: of a MemBlock in its widths, of a convolution in its channels."""
WAN_RATE = Fraction(16)
MEMORY_SHARE = 0.7
AUTO_STRIPE = 2**30
"""Bytes: of 4K frames 90 rows in float32, of whose work the halos are 7 %. The rest is left."""
CORRECTED = 6
"""Frames in float32 that are alive while the colours of one are corrected."""


class MemBlock(nn.Module):
    """relu(x + convolutions([x | the frame before x]))."""

    def __init__(self, width: int, conv: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv(2 * width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            conv(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            conv(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Both [n, C, H, W]."""
        return self.conv(torch.cat([x, before], dim=1)).add_(x).relu_()


class TGrow(nn.Module):
    """Makes `frames` consecutive frames of one by a 1x1 convolution."""

    def __init__(self, width: int, frames: int, conv: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.frames = frames
        self.conv = conv(width, width * frames, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, H, W] -> [n * frames, C, H, W]"""
        grown = self.conv(x)
        return grown.unflatten(1, (self.frames, -1)).flatten(0, 1)


@dataclass(frozen=True)
class Widths:
    """Channels at the four resolutions, from the coarsest on (published: 512, 256, 128, 128)."""

    coarse: int
    second: int
    third: int
    fine: int

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Widths:
        """Read off the shapes of a file's weights."""
        return cls(*(state[f"decoder.{n}.weight"].shape[0] for n in (ENTRY[0], *UPS)))

    @classmethod
    def named(cls, text: str) -> Widths:
        """Of a text such as "512,256,128,128".

        Raises:
            ValueError: it is no four numbers above 0.
        """
        numbers = [int(part) for part in text.split(",") if part.strip().isdecimal()]
        if len(numbers) != 4 or min(numbers) < 1:
            raise ValueError(f"widths is {text!r}; write four numbers, such as 512,256,128,128.")
        return cls(*numbers)

    @property
    def levels(self) -> tuple[int, int, int]:
        """Of the levels that have blocks."""
        return self.coarse, self.second, self.third

    @property
    def after(self) -> tuple[int, int, int]:
        """Of the level that follows each of these."""
        return self.second, self.third, self.fine


class TCDecoder(nn.Module):
    """The weights under their published names; `TCRun` computes with them."""

    def __init__(
        self,
        widths: Widths,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """`dtype` is that of the weights and of what is computed with them."""
        super().__init__()
        self.widths = widths
        self.dtype = dtype

        def conv(*sizes: int, **more: Any) -> nn.Module:
            return models.conv2d(*sizes, dtype=dtype, device=device, **more)

        parts: dict[int, nn.Module] = {
            ENTRY[0]: conv(CONDITION_CHANNELS + LATENT_CHANNELS, widths.coarse, 3, padding=1),
            ENTRY[1]: conv(widths.coarse, widths.coarse, 3, padding=1, bias=False),
            TAIL[0]: conv(widths.fine, widths.fine, 3, padding=1, bias=False),
            TAIL[1]: conv(widths.fine, 3, 3, padding=1),
        }
        for level, width in enumerate(widths.levels):
            parts |= {number: MemBlock(width, conv) for number in BLOCKS[level]}
            parts[GROWS[level]] = TGrow(width, GROWTH[level], conv)
            parts[UPS[level]] = conv(width, widths.after[level], 3, padding=1, bias=False)
        self.decoder = nn.ModuleDict({str(number): parts[number] for number in sorted(parts)})

    def __getitem__(self, number: int) -> Any:
        """The part decoder.N."""
        return self.decoder[str(number)]

    def enter(self, x: Tensor) -> Tensor:
        """Conditions and latents [n, 784, h, w] to features of the coarsest level."""
        x = torch.tanh(x / 3) * 3
        return self[ENTRY[1]](self[ENTRY[0]](x).relu_()).relu_()

    def rise(self, level: int, x: Tensor) -> Tensor:
        """More frames, twice the rows and columns, the next level's channels.

        TGrow comes before the enlarging, not after it: equal, and a quarter of the work.
        """
        grown = self[GROWS[level]](x)
        return self[UPS[level]](F.interpolate(grown, scale_factor=2.0, mode="nearest"))

    def finish(self, x: Tensor) -> Tensor:
        """The last rise and the pixels [2 n, 3, H, W] in [-1, 1], unclamped."""
        x = self[TAIL[0]](self.rise(2, x).relu_()).relu_()
        return self[TAIL[1]](x).mul_(2).sub_(1)


def load_tc_decoder(state: Mapping[str, Tensor], dtype: torch.dtype) -> TCDecoder:
    """A decoder from the weights of its file; keys that it does not have are ignored.

    Files of the wider TAEHV family have taller TGrow weights, of which the last rows count.

    Raises:
        ValueError: weights are missing or have other shapes; names them.
    """
    needed = (f"decoder.{number}.weight" for number in (ENTRY[0], *UPS))
    _require_keys(state, needed)
    decoder = TCDecoder(Widths.of(state), dtype, device="meta")
    shapes = {name: tensor.shape for name, tensor in decoder.state_dict().items()}
    _require_keys(state, shapes)
    grows = {f"decoder.{number}.conv.weight" for number in GROWS}
    weights = {}
    for name, shape in shapes.items():
        weight = state[name][-shape[0] :] if name in grows else state[name]
        if weight.shape != shape:
            raise ValueError(
                f"{name} has the shape {list(state[name].shape)}; a Tiny Conditional decoder of "
                f"these widths has {list(shape)}. Choose FlashVSR's TCDecoder file."
            )
        layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        weights[name] = weight.to(dtype).contiguous(memory_format=layout)
    decoder.load_state_dict(weights, assign=True)
    return decoder.requires_grad_(False).eval()


def _require_keys(state: Mapping[str, Tensor], names: Any) -> None:
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(
            f"This is no Tiny Conditional decoder: {len(missing)} of its weights are missing, "
            f"{', '.join(missing[:3])} among them. Choose FlashVSR's TCDecoder file."
        )


def unshuffled(frames: Tensor) -> Tensor:
    """The four frames [4, 3, H, W] of a latent frame as its condition [1, 768, H/8, W/8]."""
    return rearrange(frames, "f c (h r) (w q) -> 1 (c f r q) h w", r=SCALE, q=SCALE)


class TCRun:
    """The decoding of one clip, latent frame after latent frame, with what it remembers of them."""

    def __init__(self, decoder: TCDecoder, device: torch.device, stripe: ChunkSize) -> None:
        """`stripe` is in bytes of a stripe's features; it is halved where they do not fit."""
        self.decoder = decoder
        self.device = device
        self.stripe = stripe
        self.done = 0
        self._memory: dict[int, Tensor] = {}

    def decode(self, latents: Tensor, low_quality: LowQuality) -> Iterator[Tensor]:
        """The next latent frames of the clip, to the frames [1 or 4, 3, H, W] of each in [-1, 1].

        Args:
            latents: [1, 16, t, H/8, W/8], normalised.
            low_quality: H x W with its padding; frame 0, and 4 j - 3 to 4 j for latent frame j.
        """
        for latent in latents.unbind(2):
            newest = FRAMES * self.done
            if self.done == 0:
                condition = low_quality.frames(0, 1).expand(FRAMES, -1, -1, -1)
            else:
                condition = low_quality.frames(newest - FRAMES + 1, newest + 1)
            yield self.step(latent, condition)

    @torch.inference_mode()
    def step(self, latent: Tensor, condition: Tensor) -> Tensor:
        """One latent frame [1, 16, h, w] with its four low-quality frames [4, 3, 8 h, 8 w].

        -> frames [4, 3, 8 h, 8 w], of the clip's first latent frame [1, 3, 8 h, 8 w].
        """
        given = (unshuffled(condition), latent)
        placed = [part.to(self.device, self.decoder.dtype) for part in given]
        x = torch.cat(placed, dim=1).contiguous(memory_format=torch.channels_last)
        del placed
        with fast_on_cpu(self.decoder, x):
            frames = self._frames(x)
        self.done += 1
        return frames if self.done > 1 else frames[-1:]

    def _frames(self, x: Tensor) -> Tensor:
        decoder, widths = self.decoder, self.decoder.widths
        features = self._empty(x, 1, widths.coarse)
        self._striped(decoder.enter, (x,), features, halo=2, live=x.shape[1])
        for level in range(3):
            for number in BLOCKS[level]:
                features = self._remember(number, features)
            features = self._rise(level, features)
        return features

    def _rise(self, level: int, x: Tensor) -> Tensor:
        """The next level's features, or after the last level the pixels."""
        decoder, finer = self.decoder, self.decoder.widths.after[level]
        last = level == len(BLOCKS) - 1
        channels = 3 if last else finer
        out = self._empty(x, GROWTH[level], channels, scale=2)
        compute = decoder.finish if last else partial(decoder.rise, level)
        live = CONV_LIVE * (x.shape[1] + max(finer, x.shape[1]))
        for frame, into in zip(x.split(1), out.split(GROWTH[level]), strict=True):
            self._striped(compute, (frame,), into, halo=TAIL_HALO if last else 1, live=live)
        return out

    def _remember(self, number: int, x: Tensor) -> Tensor:
        """A MemBlock over frames [n, C, H, W], which follow those that it saw before."""
        out = self._empty(x, 1, x.shape[1])
        before = self._memory.get(number)
        for frame, into in zip(x.split(1), out.split(1), strict=True):
            before = torch.zeros_like(frame) if before is None else before
            block, live = self.decoder[number], BLOCK_LIVE * x.shape[1]
            self._striped(block, (frame, before), into, halo=BLOCK_HALO, live=live)
            before = frame
        self._memory[number] = x[-1:].clone() if len(x) > 1 else x
        return out

    def _empty(self, x: Tensor, growth: int, channels: int, scale: int = 1) -> Tensor:
        count, _, height, width = x.shape
        shape = count * growth, channels, scale * height, scale * width
        make = partial(torch.empty, dtype=x.dtype, memory_format=torch.channels_last)
        try:
            return make(shape, device=self.device)
        except Exception as error:
            if not management.is_out_of_memory(error):
                raise
        management.empty_cache()
        return make(shape, device=copies.cpu())

    def _striped(
        self,
        compute: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        out: Tensor,
        *,
        halo: int,
        live: float,
    ) -> None:
        """Local layers over frames [n, C, H, W] into `out`, a stripe of rows at a time.

        Frames that the device has no room for are in host memory.

        Args:
            halo: rows of `out` beyond a stripe that it depends on.
            live: numbers per position of `out` that are in use while it is computed.
        """
        height, (count, _, rows, columns) = inputs[0].shape[2], out.shape
        scale = rows // height

        def stripe(first: int, stop: int) -> None:
            low = max(0, first - halo) // scale
            high = min(height, -(-(stop + halo) // scale))
            part = compute(*(x[:, :, low:high].to(self.device) for x in inputs))
            out[:, :, first:stop] = part[:, :, first - low * scale : stop - low * scale]

        row = int(live * count * columns * out.element_size())
        in_chunks(range(row, row * rows + 1, row), self.stripe, stripe)


def held_bytes(widths: Widths, positions: int, itemsize: int) -> int:
    """What whole frames take at the peak, beside weights and a stripe.

    Each of three blocks of every level remembers a frame. The last level's blocks are the largest:
    two frames in, two out, and one that is remembered anew.

    Args:
        positions: of a latent frame.
    """
    frames = [width * positions * itemsize * 4**i for i, width in enumerate(widths.levels)]
    return 3 * sum(frames) + 5 * frames[-1]


def load(patcher: Any, budget: str = AUTO, working_bytes: int = 0) -> TCRun:
    """Loads the decoder's weights and begins a clip whose stripes fit the budget and what is free.

    Args:
        patcher: ModelPatcher of a TCDecoder.
        budget: "auto" or gibibytes such as "4 GB", for the features of a stripe.
        working_bytes: that whole frames take beside a stripe.
    """
    stripe = parse_budget(budget) or AUTO_STRIPE
    device = management.use_on_device(patcher, working_bytes + stripe)
    free = int(MEMORY_SHARE * management.free_memory(device, patcher))
    limit = min(stripe, free)
    return TCRun(patcher.model, device, ChunkSize(max(1, limit)))


class ConditionedClip:
    """A latent video with its low-quality frames, decoded when it is read: a FrameStream."""

    def __init__(
        self,
        patcher: Any,
        latents: Tensor,
        footage: Footage,
        size: tuple[int, int] | None = None,
        colour: str = "adain",
        budget: str = AUTO,
        normalised: Callable[[Tensor], Tensor] = lambda latent: latent,
    ) -> None:
        """A clip of as many frames as the footage has.

        Args:
            patcher: ModelPatcher of a TCDecoder.
            latents: [1, 16, T, h, w].
            footage: what the latents were made from.
            size: height and width of the result, the rest of the latents is padding; None: all.
            colour: "adain", "wavelet" or "off".
            normalised: makes of some latent frames what the decoder reads.

        Raises:
            ValueError: latents and footage do not belong together.
        """
        _require_latents(latents)
        _require_length(latents.shape[2], footage.frames)
        padded = latents.shape[-2] * SCALE, latents.shape[-1] * SCALE
        self.footage = footage
        self.upscale = Upscale(footage.size, size or padded, padded)
        self.frames = min(footage.frames, frame_count(latents.shape[2]))
        self.latents = latents[:, :, : -(-(self.frames - 1) // FRAMES) + 1]
        self.height, self.width = self.upscale.scaled
        self._correct = colour_method(colour)
        self._patcher = patcher
        self._normalised = normalised
        self._budget = budget

    def plan(self) -> TCRun:
        """Loads the decoder."""
        decoder, (height, width) = self._patcher.model, self.upscale.padded
        frames = held_bytes(decoder.widths, height * width // SCALE**2, decoder.dtype.itemsize)
        return load(self._patcher, self._budget, frames + CORRECTED * 3 * 4 * height * width)

    def scratch_bytes(self, plan: TCRun) -> int:
        """Nothing but the frames goes to the disk."""
        return 0

    def pieces(self, plan: TCRun, folder: Path) -> Iterator[Piece]:
        """The frames in order, those of one latent frame at a time."""
        advance = server.progress_bar(self.latents.shape[2])
        low_quality = LowQuality(self.footage, self.upscale)
        box = Region(Span(0, self.height), Span(0, self.width))
        start = 0
        for frames in self._decoded(plan, low_quality):
            management.raise_if_cancelled()
            images = self._images(frames, low_quality, start)
            yield Piece(box, start, images, completes=True)
            start += len(images)
            advance(1)

    def _decoded(self, plan: TCRun, low_quality: LowQuality) -> Iterator[Tensor]:
        """Only one latent frame is normalised at a time: the others may lie in a file."""
        for t in range(self.latents.shape[2]):
            latent = self._normalised(self.latents[:, :, t : t + 1])
            yield from plan.decode(latent, low_quality)

    @torch.inference_mode()
    def _images(self, frames: Tensor, low_quality: LowQuality, start: int) -> Tensor:
        """Decoded frames, of which the first is frame `start`, as images [n, height, width, 3]."""
        wanted = frames[: self.frames - start]
        reference = low_quality.pictures(start, start + len(wanted))
        images = []
        for frame, given in zip(wanted.split(1), reference.split(1), strict=True):
            picture = self.upscale.crop(frame).float()
            corrected = self._correct(picture, given.to(picture.device))
            images.append(((corrected + 1) / 2).clamp(0, 1).movedim(1, -1).cpu())
        return torch.cat(images)

    def all_images(self) -> Tensor:
        """All frames [frames, height, width, 3] in [0, 1]."""
        return whole_images(self, server.temp_directory())


def _require_latents(latents: Tensor) -> None:
    if latents.ndim != 5 or latents.shape[:2] != (1, LATENT_CHANNELS):
        raise ValueError(
            "The Tiny Conditional decoder takes one Wan 2.1 video, samples of shape "
            f"[1, {LATENT_CHANNELS}, frames, height, width]; these have {list(latents.shape)}."
        )


def _require_length(latents: int, frames: int) -> None:
    """Latents of FlashVSR cover the frames, those of a VAE may drop up to three of them."""
    least = (frames - 1) // FRAMES + 1
    if not least <= latents <= max(Schedule(frames).latent_frames, least + 1):
        raise ValueError(
            f"The latent has {latents} frames, which make {frame_count(latents)} of video, but "
            f"there are {frames} low-quality frames. Connect the clip that the latent was made "
            "from, at the same frame rate."
        )


def conditioned_clip(
    flashvsr: FlashVSR,
    samples: Tensor,
    footage: Footage,
    size: tuple[int, int],
    colour: str,
    budget: str,
) -> ConditionedClip:
    """The clip of a ComfyUI latent [1, 16, T, h, w], which may lie in a file."""
    normalised = partial(models.process_latent_in, flashvsr.model)
    return ConditionedClip(flashvsr.tc_decoder, samples, footage, size, colour, budget, normalised)


def decode_to_video(
    flashvsr: FlashVSR,
    samples: Tensor,
    low_quality: Any,
    *,
    width: int = 0,
    height: int = 0,
    colour: str = "adain",
    budget: str = AUTO,
    fps: float = 0.0,
    audio: dict[str, Any] | None = None,
    bit_depth: int = 8,
) -> StreamedVideo:
    """A VIDEO that the Tiny Conditional decoder makes while it is saved.

    Args:
        samples: [1, 16, T, h, w], of a ComfyUI LATENT.
        low_quality: IMAGE or VIDEO that the latent was made from.
        width, height: of the result in pixels, the rest of the latent is padding; 0: all of it.
        fps: frames per second; 0: the video's own, or 16.
        audio: in place of the video's own sound.

    Raises:
        ValueError: there is no such decoder, or latent and frames do not belong together.
    """
    if flashvsr.tc_decoder is None:
        raise ValueError(
            "FlashVSR was loaded without its Tiny Conditional decoder. Choose the TCDecoder file "
            "in the loader, or decode with AtlasVid Decode to Video and the Wan 2.1 VAE."
        )
    _require_latents(samples)
    whole_height, whole_width = (side * SCALE for side in samples.shape[-2:])
    sound, rate = sound_and_rate(low_quality)
    clip = conditioned_clip(
        flashvsr,
        samples,
        Footage.of(frame_source(low_quality)),
        (height or whole_height, width or whole_width),
        colour,
        budget,
    )
    frame_rate = Fraction(fps) if fps else rate or WAN_RATE
    return StreamedVideo(clip, frame_rate, sound if audio is None else audio, bit_depth)
