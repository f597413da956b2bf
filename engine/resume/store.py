"""Kept renders on disk: one folder for each, one safetensors file for each answer of the model.

They lie in ComfyUI's output folder, as trained LoRAs' checkpoints do: that is the disk that the
artist chose for large files, and the temp folder is emptied at every start.
"""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..comfyui import server
from ..log import log
from ..vae.video import whole_file
from .identity import tensor_digest

FOLDER = "atlasvid_renders"
KEY = "atlasvid_render"
"""Metadata key; its value is JSON."""
FACTS = "render.safetensors"
_FACTS_FILE = threading.Lock()
"""Held while facts are read or replaced: Windows replaces no file that is open."""
RENDER_ID = re.compile(r"[0-9a-f]{32}")
ANSWER = re.compile(r"(?P<step>\d{5})-(?P<key>[0-9a-f]{32})\.safetensors")


@dataclass(frozen=True)
class Facts:
    """What the list of renders says of one."""

    name: str
    steps: int
    size: tuple[int, ...]
    """Of the latent."""
    finished: bool = False
    """The prompt that it belongs to came to its end."""


@dataclass(frozen=True)
class Answer:
    """What the model said, and how long that took."""

    tensor: Tensor
    seconds: float


class Render:
    """The kept answers of one render, by what was asked."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.answers: dict[str, Path] = {}
        if folder.is_dir():
            for path in folder.iterdir():
                if match := ANSWER.fullmatch(path.name):
                    self.answers[match["key"]] = path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def step(self) -> int:
        """The last step that an answer is kept of, from 1 on; 0 where there is none."""
        return max((int(path.name[:5]) for path in self.answers.values()), default=0)

    @property
    def bytes(self) -> int:
        return sum(_size(path) for path in self.folder.glob("*.safetensors"))

    @property
    def used(self) -> float:
        """When it was last sampled, in seconds since 1970."""
        try:
            return (self.folder / FACTS).stat().st_mtime
        except OSError:
            return 0.0

    def read(self, key: str) -> Answer | None:
        """The answer to what was asked, or None; a damaged file is dropped, and the log says so."""
        path = self.answers.get(key)
        if path is None:
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})[KEY])
                tensor = file.get_tensor("answer").clone()
            if facts["key"] == key and facts["digest"] == tensor_digest(tensor).hex():
                return Answer(tensor, float(facts["seconds"]))
            reason = "its checksum does not match"
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            reason = str(error)
        log.warning("The kept step in %s is damaged (%s): it is sampled again.", path, reason)
        self.forget(key)
        return None

    def write(self, key: str, step: int, answer: Answer) -> None:
        """Keep an answer.

        Raises:
            OSError, SafetensorError: it could not be written; nothing is left of it.
        """
        facts = {"key": key, "digest": tensor_digest(answer.tensor).hex()}
        path = self.folder / f"{step:05}-{key}.safetensors"
        _save(path, {"answer": answer.tensor}, {**facts, "seconds": answer.seconds})
        self.answers[key] = path

    def forget(self, key: str) -> None:
        """Drop one answer."""
        path = self.answers.pop(key, None)
        if path is not None:
            _unlink(path)

    def set_facts(self, facts: Facts) -> None:
        """Say what this is; it counts as used now.

        Raises:
            OSError, SafetensorError: it could not be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _FACTS_FILE:
            _save(self.folder / FACTS, {}, asdict(facts))

    @property
    def facts(self) -> Facts | None:
        """What was said of it, or None where that cannot be read."""
        try:
            with _FACTS_FILE, safe_open(self.folder / FACTS, framework="pt") as file:
                given = json.loads((file.metadata() or {})[KEY])
            return Facts(**{**given, "size": tuple(given["size"])})
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            return None

    def finish(self) -> None:
        """Mark it as finished, which lets it go first when room is needed."""
        if (facts := self.facts) is not None:
            self.set_facts(replace(facts, finished=True))

    def delete(self) -> None:
        """Remove its files and its folder; files of another kind stay, and the folder with them."""
        self.answers.clear()
        if self.folder.is_symlink() or not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if path.suffix == ".safetensors":
                _unlink(path)
        try:
            self.folder.rmdir()
        except OSError as error:
            log.warning("%s was not removed: %s", self.folder, error)


def _save(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    with whole_file(path) as scratch:
        safetensors.torch.save_file(tensors, scratch, {KEY: json.dumps(facts)})


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # another process has just removed it
        return 0


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # open in another program, on Windows
        log.warning("%s was not removed: %s", path, error)


# --- All of them ----------------------------------------------------------------------------


class InUse:
    """Renders that a prompt works on, which nobody may delete, by the prompt."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: dict[str, set[object]] = {}

    def __contains__(self, render_id: str) -> bool:
        with self._lock:
            return bool(self._holders.get(render_id))

    def hold(self, render_id: str, holder: object) -> None:
        with self._lock:
            self._holders.setdefault(render_id, set()).add(holder)

    def release(self, render_id: str, holder: object) -> None:
        with self._lock:
            self._holders.get(render_id, set()).discard(holder)


IN_USE = InUse()
"""Of this process."""


def folder() -> Path:
    """Where renders are kept."""
    return Path(server.output_folder()) / FOLDER


def renders() -> list[Render]:
    """All kept renders, the one that was used last first."""
    try:
        found = [each for each in folder().iterdir() if RENDER_ID.fullmatch(each.name)]
    except OSError:
        return []
    kept = [Render(each) for each in found if each.is_dir() and not each.is_symlink()]
    return sorted(kept, key=lambda render: -render.used)


def listing() -> list[dict[str, Any]]:
    """What the front end shows of the kept renders."""
    now, shown = time.time(), []
    for render in renders():
        facts = render.facts or Facts("", 0, ())
        shown.append(
            {
                "id": render.id,
                "name": facts.name,
                "step": render.step,
                "steps": facts.steps,
                "bytes": render.bytes,
                "age": max(0.0, now - render.used),
                "finished": facts.finished,
                "in_use": render.id in IN_USE,
            }
        )
    return shown


def delete(render_id: str) -> None:
    """Delete a kept render.

    Raises:
        ValueError: there is none of that name, or it is being sampled.
    """
    found = [render for render in renders() if render.id == render_id]
    if not found:
        raise ValueError(f"There is no kept render {render_id[:40]!r}. Reload the list.")
    if render_id in IN_USE:
        raise ValueError("This render is being made. Cancel it first, then delete it.")
    found[0].delete()


def make_room(needed: int, limit: int, spare: int) -> bool:
    """Delete renders until `needed` bytes more may be kept: finished ones first, oldest first.

    Args:
        limit: bytes that all renders together may take.
        spare: bytes that have to stay free on the disk.

    Returns:
        Whether there is room.
    """
    kept = renders()
    total = sum(render.bytes for render in kept)
    going = [render for render in reversed(kept) if render.id not in IN_USE]
    going.sort(key=lambda render: not getattr(render.facts, "finished", False))
    while total + needed > limit or server.free_disk() < needed + spare:
        if not going:
            return False
        oldest = going.pop(0)
        freed, facts = oldest.bytes, oldest.facts
        oldest.delete()
        total -= freed
        name = facts.name if facts else oldest.id
        log.info("Deleted the kept render %s (%.1f GB) to make room.", name, freed / 1e9)
    return True
