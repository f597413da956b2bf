"""Runs stock nodes directly, on either supported ComfyUI."""

import inspect
from fractions import Fraction
from pathlib import Path

import av
import folder_paths
import torch
from comfy_api.latest import InputImpl, Types
from comfy_extras.nodes_video import CreateVideo, SaveVideo


def create_video(images: torch.Tensor, fps: float, audio=None, bit_depth: int = 8):
    """The stock CreateVideo's VIDEO."""
    extra = {} if bit_depth == 8 else {"bit_depth": bit_depth}
    return CreateVideo.execute(images, fps, audio, **extra)[0]


def save_video(video, folder: Path) -> Path:
    """The one file that the stock SaveVideo writes into `folder`."""
    folder_paths.set_output_directory(str(folder))
    codec = {"codec": "auto"} if "dynamic" in inspect.getsource(SaveVideo).lower() else "auto"
    SaveVideo.PREPARE_CLASS_CLONE(None).execute(video, "clip", "auto", codec)
    (written,) = folder.rglob("*")
    return written


def video_from_images(images: torch.Tensor, fps: float):
    components = Types.VideoComponents(images=images, frame_rate=Fraction(fps))
    return InputImpl.VideoFromComponents(components)


def has_ten_bit() -> bool:
    return "bit_depth" in inspect.signature(InputImpl.VideoFromComponents.__init__).parameters


def saved_alike(ours, theirs, folder: Path) -> bool:
    """Whether SaveVideo hands the core's encoder the same of both videos and writes alike files.

    Their bytes are not compared: x264 writes the same frames in one of several ways, stock against
    stock too.
    """
    one, other = (saved(video, folder / name) for video, name in ((ours, "a"), (theirs, "b")))
    return one == other


def saved(video, folder: Path):
    """What SaveVideo gives to the core's encoder, and what the file is that it writes."""
    given = []
    encode = InputImpl.VideoFromComponents.save_to

    def recorded(self, path, *args, bit_depth=None, **choices):
        parts, depth = self.get_components(), bit_depth or getattr(self, "get_bit_depth", int)()
        levels = 65535 if depth == 10 else 255
        pixels = [
            (image * levels).clip(0, levels).int().numpy().tobytes() for image in parts.images
        ]
        sound = parts.audio and (
            parts.audio["waveform"].numpy().tobytes(),
            parts.audio["sample_rate"],
        )
        chosen = {name: choice for name, choice in choices.items() if choice is not None}
        given.append((tuple(parts.images.shape), pixels, sound, parts.frame_rate, args, chosen))
        options = {} if bit_depth is None else {"bit_depth": bit_depth}
        return encode(self, path, *args, **options, **choices)

    InputImpl.VideoFromComponents.save_to = recorded
    try:
        file = save_video(video, folder)
    finally:
        InputImpl.VideoFromComponents.save_to = encode
    with av.open(file) as container:
        streams = [
            (s.type, s.codec_context.name, s.frames, s.base_rate if s.type == "video" else s.rate)
            for s in container.streams
        ]
    return file.name, streams, given
