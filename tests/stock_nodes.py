"""Runs stock nodes directly, on either supported ComfyUI."""

import inspect
from fractions import Fraction
from pathlib import Path

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
    """Whether SaveVideo writes the same bytes for both videos.

    x264 writes the same small frames in one of several ways, stock against stock too, so both are
    written until one way of each agrees; different frames would never agree.
    """
    written: dict[str, set[bytes]] = {"ours": set(), "theirs": set()}
    for attempt in range(12):
        for name, video in (("ours", ours), ("theirs", theirs)):
            file = save_video(video, folder / f"{name}{attempt}")
            written[name].add(file.name.encode() + file.read_bytes())
        if written["ours"] & written["theirs"]:
            return True
    return False
