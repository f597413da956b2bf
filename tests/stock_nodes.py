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


class _SingleThreaded:
    """An output container whose encoders run in one thread."""

    def __init__(self, container):
        self._container = container

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self._container.close()

    def __getattr__(self, name):
        return getattr(self._container, name)

    def add_stream(self, *args, **settings):
        stream = self._container.add_stream(*args, **settings)
        stream.codec_context.thread_count = 1
        return stream


def make_encoder_deterministic(monkeypatch) -> None:
    """x264 with several threads may write the same frames in different bytes."""
    from comfy_api.latest._input_impl import video_types

    stock_open = video_types.av.open

    def single_threaded_open(*args, **settings):
        container = stock_open(*args, **settings)
        return _SingleThreaded(container) if settings.get("mode") == "w" else container

    monkeypatch.setattr(video_types.av, "open", single_threaded_open)
