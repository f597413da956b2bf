"""The browser that the tests and the pictures run in: a Chromium that the system has."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from environment import SetupError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
READY = "() => window.app && window.app.extensionManager && window.app.graph"
START_MS = 180_000  # seconds, but minutes where the processor has other work


def installed() -> str | None:
    """The path of the first browser that is there."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def launch(playwright: Playwright) -> Browser:
    """The browser, started without a window. Raises SetupError where there is none."""
    if not (path := installed()):
        raise SetupError(f"none of {', '.join(NAMES)} is installed: run `python tools/test.py`")
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


def open_front_end(page: Page, address: str) -> None:
    """Opens ComfyUI's front end and waits until it takes a workflow."""
    page.goto(address, timeout=START_MS)
    page.wait_for_function(READY, timeout=START_MS)
