"""ComfyUI's VAEs and videos."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import comfy.ldm.modules.diffusionmodules.model
import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from av.error import FFmpegError, InvalidDataError
from comfy_api.latest import Input, InputImpl, Types
from torch import Tensor


def build_wan_vae(dim: int) -> torch.nn.Module:
    """An uninitialised stock Wan 2.1 VAE with `dim` base channels (the real one has 96)."""
    return comfy.ldm.wan.vae.WanVAE(dim=dim, z_dim=16, temperal_downsample=[False, True, True])


def build_wan22_vae() -> torch.nn.Module:
    """An uninitialised stock Wan 2.2 VAE."""
    return comfy.ldm.wan.vae2_2.WanVAE(
        dim=160, dec_dim=256, z_dim=48, temperal_downsample=[False, True, True]
    )


def conv3d(channels: int) -> torch.nn.Module:
    """An uninitialised 3x3x3 convolution of a VAE, with ComfyUI's ways around bugs of libraries."""
    return comfy.ops.disable_weight_init.Conv3d(channels, channels, 3, padding=(0, 1, 1))


def load_vae(state: dict[str, Tensor]) -> Any:
    """A VAE from its weights, through the stock loader."""
    return comfy.sd.VAE(sd=state)


# The VAE and video part of the host.

VideoInput = Input.Video
VideoFromFile = InputImpl.VideoFromFile
VideoFromComponents = InputImpl.VideoFromComponents
VideoComponents = Types.VideoComponents

# What VAEs use where no memory-saving attention is at hand, as on the CPU.
plain_attention = comfy.ldm.modules.diffusionmodules.model.normal_attention

# Pixel-shuffle factor of each supported VAE class.
WAN_VAES: dict[type, int] = {
    comfy.ldm.wan.vae.WanVAE: 1,
    comfy.ldm.wan.vae2_2.WanVAE: 2,
}


def wan_patch(vae: Any) -> int | None:
    """1 for a Wan 2.1 VAE, 2 for a Wan 2.2 VAE, None for every other VAE."""
    return WAN_VAES.get(type(vae.first_stage_model))


def wan_residual_block(channels: int) -> torch.nn.Module:
    """An uninitialised residual block of a Wan VAE."""
    return comfy.ldm.wan.vae.ResidualBlock(channels, channels)


def is_rms_norm(module: Any) -> bool:
    """Whether a layer is the Wan VAEs' RMS norm over channels."""
    return type(module) is comfy.ldm.wan.vae.RMS_norm


def require_bit_depth(bit_depth: int) -> None:
    """Refuse a bit depth that the running ComfyUI's encoder does not write.

    Raises:
        ValueError: names the depths that it does write.
    """
    parameters = inspect.signature(VideoFromComponents.__init__).parameters
    allowed = (8, 10) if "bit_depth" in parameters else (8,)
    if bit_depth not in allowed:
        names = " or ".join(map(str, allowed))
        raise ValueError(
            f"bit_depth is {bit_depth}, but this ComfyUI writes videos of {names} bits. "
            f"Set it to {names}" + (", or update ComfyUI for 10." if len(allowed) == 1 else ".")
        )


def video_components(images: Any, frame_rate: Fraction, audio: Any) -> Any:
    """The core's bundle of images [frames, height, width, 3], frame rate and sound."""
    return VideoComponents(images=images, audio=audio, frame_rate=frame_rate)


def encode_video(components: Any, target: Any, bit_depth: int, **choices: Any) -> None:
    """Write a video with the core's own encoder loop; 8 bit is every version's default."""
    if bit_depth != 8:
        choices["bit_depth"] = bit_depth
    VideoFromComponents(components).save_to(target, **choices)


class _WatchedPacket:
    """A packet that remembers damage, which the core's conversion passes over."""

    def __init__(self, packet: Any, damaged: list[float]) -> None:
        self._packet = packet
        self._damaged = damaged

    def __getattr__(self, name: str) -> Any:
        return getattr(self._packet, name)

    def decode(self) -> list[Any]:
        packet = self._packet
        if packet.is_corrupt:  # the file ends within it
            self._note()
        try:
            return packet.decode()
        except InvalidDataError:
            self._note()
            raise

    def _note(self) -> None:
        packet = self._packet
        place = packet.pts if packet.pts is not None else packet.dts
        self._damaged.append(float((place or 0) * (packet.time_base or 0)))


class _PartOfContainer:
    """A video container that is read on where the last reading ended, `size` items at a time.

    The core's own conversion of a file to images takes an open container; given this one, it
    converts a few frames per call. `damaged` are the times in seconds of what cannot be decoded.
    """

    def __init__(self, container: Any, size: int) -> None:
        self.streams = SimpleNamespace(video=container.streams.video, audio=())
        self.metadata = container.metadata
        self.exhausted = False
        self.damaged: list[float] = []
        self._container = container
        self._size = size
        self._items: Iterator[Any] | None = None

    def seek(self, *place: Any, **options: Any) -> None:
        """Only the first reading has to find the start."""
        if self._items is None:
            self._container.seek(*place, **options)

    def demux(self, *streams: Any) -> list[Any]:
        return [_WatchedPacket(p, self.damaged) for p in self._next(self._container.demux, streams)]

    def decode(self, *streams: Any) -> list[Any]:
        return self._next(self._container.decode, streams)

    def _next(self, read: Callable[..., Iterator[Any]], streams: tuple[Any, ...]) -> list[Any]:
        if self._items is None:
            self._items = read(*streams)
        items = list(islice(self._items, self._size))
        self.exhausted = len(items) < self._size
        return items


def video_batches(video: Any, size: int) -> Generator[Tensor, None, None]:
    """The images of a video file, as its `get_components` gives them, about `size` at a time.

    Raises:
        ValueError: it is no video, or a part of it cannot be decoded. The core leaves such a part
            out, which shows as a jump in the middle, or as an end that comes too soon.
    """
    with _video_errors(video), av.open(video.get_stream_source(), mode="r") as container:
        if not container.streams.video:
            raise ValueError(f"{video_name(video)} holds no pictures. Choose another file.")
        part = _PartOfContainer(container, size)
        started = False
        while not part.exhausted:
            images = video.get_components_internal(part).images
            if part.damaged:
                raise ValueError(
                    f"{video_name(video)} is damaged at {part.damaged[0]:.2f} s: frames there "
                    "cannot be decoded. Copy or download it again; or repair it, which leaves them "
                    "out, with: ffmpeg -i damaged.mp4 repaired.mp4"
                )
            if len(images) > 0:
                started = True
                yield images
            elif started:  # past the end of a trimmed video
                return


class _SoundOfContainer:
    """A video container that hides its frames: the core's conversion reads the sound alone."""

    def __init__(self, container: Any) -> None:
        self.streams = container.streams
        self.metadata = container.metadata
        self.seek = container.seek
        self._container = container

    def demux(self, *streams: Any) -> Iterator[Any]:
        return self._read(self._container.demux, streams)

    def decode(self, *streams: Any) -> Iterator[Any]:
        return self._read(self._container.decode, streams)

    def _read(self, read: Callable[..., Iterator[Any]], streams: tuple[Any, ...]) -> Iterator[Any]:
        sound = [stream for stream in streams if stream.type == "audio"]
        return read(*sound) if sound else iter(())


def video_sound(video: Any) -> Any:
    """The AUDIO of a video file, as its `get_components` gives it, or None."""
    with _video_errors(video), av.open(video.get_stream_source(), mode="r") as container:
        return video.get_components_internal(_SoundOfContainer(container)).audio


def video_name(video: Any) -> str:
    """What to call a video file in a message."""
    source = video.get_stream_source()
    return Path(source).name if isinstance(source, str) else "The video"


@contextmanager
def _video_errors(video: Any) -> Iterator[None]:
    """FFmpeg's errors in an artist's words.

    Raises:
        ValueError: in their place.
    """
    try:
        yield
    except (FFmpegError, OSError) as error:
        raise ValueError(
            f"{video_name(video)} cannot be read as a video ({error.strerror or error}): it is "
            "empty, cut short, damaged or no video. Copy or download it again, or choose another."
        ) from error


def frame_count(video: Any) -> int:
    """Frames of a video file, as its header tells.

    Raises:
        ValueError: see `video_batches`.
    """
    with _video_errors(video):
        return video.get_frame_count()


def scale_and_crop(images: Tensor, width: int, height: int) -> Tensor:
    """Images [n, h, w, c] scaled bilinearly and cropped around the centre, as stock nodes do."""
    scaled = comfy.utils.common_upscale(images.movedim(-1, 1), width, height, "bilinear", "center")
    return scaled.movedim(1, -1)


def encode_pixels(vae: Any, pixels: Tensor) -> Tensor:
    """Frames [N, H, W, 3] in 0 to 1 -> ComfyUI latent [1, C, T, H', W'], float32 on the CPU."""
    return vae.encode(pixels).float().cpu()


def vae_weights(vae: Any) -> dict[str, Tensor]:
    """The weights of a VAE."""
    return vae.first_stage_model.state_dict()
