"""What becomes of kept renders once the prompt that made them has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from safetensors import SafetensorError

from ..comfyui import server
from ..log import log
from . import store
from .store import IN_USE, Render

INTERVAL = 0.5
"""Seconds between two looks at the queue."""
KEEP, DELETE = "keep", "delete"
WHEN_DONE = (KEEP, DELETE)


@dataclass(frozen=True)
class Held:
    """A render whose video is not made yet."""

    render: Render
    when_done: str
    nodes: dict[str, Any] | None
    """That its latent comes from, in the prompt."""
    before: frozenset[str] = frozenset()
    """The prompts that had ended when its own failed, that one among them."""


class Ending:
    """The renders of prompts that are not at their end yet.

    A render is finished when its whole prompt is, with decoding and saving: until then all of its
    answers are needed, should one of these fail.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Held]] = {}
        self._left: list[Held] = []
        """Of prompts that failed or were cancelled."""

    def expect(self, prompt_id: str, node_id: str, render: Render, when_done: str) -> None:
        """Hold a render until its prompt has ended, then finish, delete or leave it.

        Args:
            node_id: of the sampler.
        """
        IN_USE.hold(render.id, prompt_id)
        held = Held(render, when_done, server.upstream(prompt_id, node_id))
        with self._lock:
            self._left = [each for each in self._left if each.render.id != render.id]
            waiting = self._waiting.setdefault(prompt_id, [])
            waiting.append(held)
            if len(waiting) > 1:
                return
        threading.Thread(target=self._watch, args=(prompt_id,), daemon=True).start()

    def _watch(self, prompt_id: str) -> None:
        while (ended := server.prompt_ended(prompt_id)) is None:
            time.sleep(INTERVAL)
        with self._lock:
            waiting = self._waiting.pop(prompt_id)
            if ended != "success":
                before = frozenset(server.ended_prompts())
                failed = [replace(held, before=before) for held in waiting]
                self._left += [held for held in failed if held.nodes is not None]
        for held in waiting:
            IN_USE.release(held.render.id, prompt_id)
            if ended == "success":
                settle(held.render, held.when_done)

    def settle_left(self) -> None:
        """Settle the renders of failed prompts of which a later one made the video.

        ComfyUI keeps the sampled latent itself, so that prompt only decodes and is not watched.
        """
        with self._lock:
            left, self._left = self._left, []
        for held in left:
            if server.succeeded_with(held.nodes or {}, held.before):
                settle(held.render, held.when_done)
            else:
                with self._lock:
                    self._left.append(held)


ENDING = Ending()
"""Of this process."""


def settle(render: Render, when_done: str) -> None:
    """A render's video is made: keep its answers while there is room, or delete them."""
    action: Callable[[], None] = render.delete if when_done == DELETE else render.finish
    try:
        action()
    except (OSError, SafetensorError) as error:
        log.warning("The kept render %s could not be marked as finished: %s", render.id, error)


def listing() -> list[dict[str, Any]]:
    """What the front end shows of the kept renders."""
    ENDING.settle_left()
    return store.listing()
