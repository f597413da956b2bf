"""Clips to learn from: found with their captions, decoded, cut and resized."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import torch
import torch.nn.functional as F
from av.error import FFmpegError
from torch import Tensor

from ..comfyui import management, server

VIDEO_FILES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")


class Unusable(Exception):  # noqa: N818  (it says why)
    """Why a clip cannot be learned from."""


@dataclass(frozen=True)
class Clip:
    """A video with its caption."""

    name: str
    source: str | io.BytesIO
    caption: str

    @property
    def identity(self) -> str:
        """Changes when the video does: its path, size and time, or its content in memory."""
        if isinstance(self.source, io.BytesIO):
            return hashlib.sha256(self.source.getbuffer()).hexdigest()
        facts = Path(self.source).stat()
        return f"{self.source} {facts.st_size} {facts.st_mtime_ns}"


def clips_in_folder(folder: str | Path) -> list[Clip]:
    """The videos of a folder with the captions (.txt) beside them, by name.

    Raises:
        ValueError: no folder, no video in it, or videos without a caption.
    """
    folder = Path(os.path.expanduser(folder))
    if not os.path.isdir(folder):
        raise ValueError(f"There is no folder {folder!s:.300}. Name the one that holds your clips.")
    videos = sorted(f for f in folder.iterdir() if f.suffix.lower() in VIDEO_FILES)
    if not videos:
        raise ValueError(
            f"There is no video in {folder}. Put clips there ({', '.join(VIDEO_FILES)}), each with "
            "its caption in a .txt file of the same name."
        )
    bare = [video.name for video in videos if not video.with_suffix(".txt").is_file()]
    if bare:
        raise ValueError(
            f"{len(bare)} of {len(videos)} clips in {folder} have no caption: {some(bare)}. Write "
            f"what each shows into a .txt file of the same name, such as "
            f"{Path(bare[0]).with_suffix('.txt')} (an empty one trains without words)."
        )
    return [
        Clip(v.name, str(v), v.with_suffix(".txt").read_text("utf-8", errors="replace").strip())
        for v in videos
    ]


def named_folder(name: str) -> Path:
    """A folder by its path, or by its name in ComfyUI's input folder."""
    folder = Path(os.path.expanduser(name))  # as it is where there is no such user
    return folder if folder.is_absolute() else Path(server.input_folder()) / folder


def folder_state(folder: Path) -> str:
    """Changes when a clip or a caption in a folder does."""
    if not os.path.isdir(folder):
        return ""
    facts = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    text = repr([(name, fact.st_size, fact.st_mtime_ns) for name, fact in facts])
    return hashlib.sha256(text.encode()).hexdigest()


def clips_given(folder: str, videos: Sequence[Any], captions: Sequence[str]) -> list[Clip]:
    """The clips of a folder, or else of ComfyUI's dataset nodes.

    Raises:
        ValueError: both or neither are given, or what is given is incomplete.
    """
    if folder and len(videos):
        raise ValueError(
            "Both a folder and videos are given. Empty the one or disconnect the other."
        )
    if not folder and not len(videos):
        raise ValueError(
            "There is nothing to train on. Name a folder of clips, or connect videos and captions "
            "from a dataset node."
        )
    return clips_in_folder(named_folder(folder)) if folder else clips_of_nodes(videos, captions)


def clips_of_nodes(videos: Sequence[Any], captions: Sequence[str]) -> list[Clip]:
    """ComfyUI's VIDEOs with their captions, as its dataset nodes give them.

    Raises:
        ValueError: not one caption per video.
    """
    if len(videos) != len(captions):
        raise ValueError(
            f"There are {len(videos)} videos and {len(captions)} captions. Connect both outputs "
            "of the same dataset node."
        )
    clips = []
    for i, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        source = video.get_stream_source()
        name = Path(source).name if isinstance(source, str) else f"video {i + 1}"
        clips.append(Clip(name, source, caption.strip()))
    return clips


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few names of a list, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


# --- Decoding -------------------------------------------------------------------------------


def cut_starts(clip: Clip, seconds: float, most: int) -> list[float]:
    """Where up to `most` cuts of a length begin in a clip, in seconds, one after the other.

    Raises:
        Unusable: the clip cannot be opened.
    """
    with _opened(clip) as container:
        stream = container.streams.video[0]
        length = 0.0
        if stream.duration and stream.time_base:
            length = float(stream.duration * stream.time_base)
        elif container.duration:
            length = container.duration / av.time_base
    count = max(1, min(most, int((length + 1e-3) / seconds)))
    return [i * seconds for i in range(count)]


def read_cut(clip: Clip, start: float, frames: int, fps: float, width: int, height: int) -> Tensor:
    """Frames of a clip from `start` seconds on, at a frame rate and size of one's own.

    Each is the decoded frame nearest in time, cut to the aspect ratio around its centre and
    scaled down. -> uint8 [frames, height, width, 3]

    Raises:
        Unusable: unreadable, too short or too small.
    """
    out = torch.empty(frames, height, width, 3, dtype=torch.uint8)
    done = 0
    with _opened(clip) as container:
        for i, frame in enumerate(_frames_at(clip, container, start, fps)):
            management.raise_if_cancelled()
            if i == frames:
                break
            out[i] = fitted(frame, width, height)
            done += 1
    if done < frames:
        raise Unusable(
            f"too short: {done} of the {frames} frames that are needed at {fps:g} fps "
            f"({frames / fps:.1f} s)"
        )
    return out


def _opened(clip: Clip) -> Any:
    if isinstance(clip.source, io.BytesIO):
        clip.source.seek(0)
    try:
        container = av.open(clip.source)
    except (FFmpegError, OSError) as error:
        raise Unusable(f"unreadable ({error.strerror or error})") from error
    if not container.streams.video:
        container.close()
        raise Unusable("it holds no video")
    return container


def _decoded(container: Any, start: float) -> Iterator[tuple[float, Any]]:
    """(seconds since the clip's beginning, frame) from at or before `start` on.

    Raises:
        Unusable: the data is damaged.
    """
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    begin = float((stream.start_time or 0) * stream.time_base)
    try:
        if start > 0:
            container.seek(int((begin + start) * av.time_base))
        for frame in container.decode(stream):
            yield (frame.time or 0.0) - begin, frame
    except (FFmpegError, OSError) as error:
        raise Unusable(f"unreadable ({error.strerror or error})") from error


def _frames_at(clip: Clip, container: Any, start: float, fps: float) -> Iterator[Any]:
    """The frames nearest to start, start + 1/fps, ... until half a step past the clip's end."""
    wanted, index = start, 0
    before = None
    for time, frame in _decoded(container, start):
        while wanted <= time:
            near = before is not None and wanted - before[0] <= time - wanted + 1e-6
            yield before[1] if before and near else frame
            index += 1
            wanted = start + index / fps
        before = time, frame
    if before and wanted <= before[0] + 0.5 / fps:
        yield before[1]


def fitted(frame: Any, width: int, height: int) -> Tensor:
    """A decoded frame turned upright, cut and scaled to a size: uint8 [height, width, 3].

    Raises:
        Unusable: the frame is smaller than that.
    """
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    pixels = pixels.rot90(round(frame.rotation / 90))  # phones store upright clips lying
    given_h, given_w = pixels.shape[:2]
    if given_w < width or given_h < height:
        raise Unusable(f"too small: {given_w} x {given_h}, and {width} x {height} is needed")
    scale = min(given_w / width, given_h / height)
    cut_w, cut_h = round(width * scale), round(height * scale)
    left, top = (given_w - cut_w) // 2, (given_h - cut_h) // 2
    return resized(pixels[None, top : top + cut_h, left : left + cut_w], width, height)[0]


def resized(frames: Tensor, width: int, height: int) -> Tensor:
    """uint8 frames [N, H, W, 3] at another size, antialiased."""
    if frames.shape[1:3] == (height, width):
        return frames
    planes = frames.movedim(-1, 1).float()
    planes = F.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return planes.round().clamp(0, 255).to(torch.uint8).movedim(1, -1)
