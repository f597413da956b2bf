"""Writes beside the sampling, so that a step does not wait for the disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from ..comfyui import management

WAITING = 1
"""Answers that may wait for the one that is being written: each takes memory."""
PATIENCE = 0.2
"""Seconds between two looks at whether the artist has cancelled."""


class Writer:
    """One thread that does one job after the other; the jobs handle their own errors."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None

    def put(self, job: Callable[[], None]) -> None:
        """Hand over a job; waits, and can be cancelled, while earlier ones are not done."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="atlasvid-resume", daemon=True)
            self._thread.start()
        while True:
            try:
                self._jobs.put(job, timeout=PATIENCE)
                return
            except queue.Full:
                management.raise_if_cancelled()

    def close(self) -> None:
        """Returns once all is written."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
