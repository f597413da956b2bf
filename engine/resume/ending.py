"""What becomes of kept renders once the prompt that made them has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from safetensors import SafetensorError

from ..comfyui import server
from ..log import log
from .store import IN_USE, Render

INTERVAL = 0.5
"""Seconds between two looks at the queue."""
KEEP, DELETE = "keep", "delete"
WHEN_DONE = (KEEP, DELETE)


class Ending:
    """The renders of prompts that are not at their end yet.

    A render is finished when its whole prompt is, with decoding and saving: until then all of its
    answers are needed, should one of these fail.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, list[tuple[Render, str]]] = {}

    def expect(self, prompt_id: str, render: Render, when_done: str) -> None:
        """Hold a render until its prompt has ended, then finish, delete or leave it."""
        IN_USE.hold(render.id, prompt_id)
        with self._lock:
            waiting = self._waiting.setdefault(prompt_id, [])
            waiting.append((render, when_done))
            if len(waiting) > 1:
                return
        watch = threading.Thread(target=self._watch, args=(prompt_id,), daemon=True)
        watch.start()

    def _watch(self, prompt_id: str) -> None:
        while (ended := server.prompt_ended(prompt_id)) is None:
            time.sleep(INTERVAL)
        with self._lock:
            renders = self._waiting.pop(prompt_id)
        for render, when_done in renders:
            IN_USE.release(render.id, prompt_id)
            if ended == "success":
                settle(render, when_done)


ENDING = Ending()
"""Of this process."""


def settle(render: Render, when_done: str) -> None:
    """A render's video is made: keep its answers while there is room, or delete them."""
    action: Callable[[], None] = render.delete if when_done == DELETE else render.finish
    try:
        action()
    except (OSError, SafetensorError) as error:
        log.warning("The kept render %s could not be marked as finished: %s", render.id, error)
