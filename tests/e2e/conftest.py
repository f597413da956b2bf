"""Real ComfyUI servers and a real browser for the tests of whole graphs.

COMFYUI_PATH names the ComfyUI under test, COMFYUI_OLDEST_PATH the oldest one that is supported;
`tools/test.py` sets both.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))  # last: a test must not find tools/test.py for `test`

import browser  # noqa: E402
import comfy_server  # noqa: E402
from pipeline import comfyui_folder  # noqa: E402


@pytest.fixture(scope="session")
def start(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], comfy_server.Server]]:
    """Starts the ComfyUI that an environment variable names, once per session."""
    servers: dict[str, comfy_server.Server] = {}
    with ExitStack() as stack:

        def started(variable: str) -> comfy_server.Server:
            if variable not in servers:
                base = tmp_path_factory.mktemp(variable.lower())
                comfyui = comfyui_folder(variable)
                running = comfy_server.running(
                    Path(sys.executable), comfyui, base, options=("--cpu",)
                )
                servers[variable] = stack.enter_context(running)
            return servers[variable]

        yield started


@pytest.fixture
def server(start: Callable[[str], comfy_server.Server]) -> comfy_server.Server:
    """The ComfyUI under test."""
    return start("COMFYUI_PATH")


@pytest.fixture(params=["COMFYUI_PATH", "COMFYUI_OLDEST_PATH"], ids=["newest", "oldest"])
def any_server(
    request: pytest.FixtureRequest, start: Callable[[str], comfy_server.Server]
) -> comfy_server.Server:
    """Each supported ComfyUI in turn."""
    return start(request.param)


@pytest.fixture
def page(server: comfy_server.Server) -> Iterator[Page]:
    """The front end of the ComfyUI under test in a real browser, ready for a workflow."""
    with sync_playwright() as playwright:
        chromium = browser.launch(playwright)
        opened = chromium.new_page()
        browser.open_front_end(opened, server.address)
        yield opened
        chromium.close()
