"""GET /atlasvid/plan: what the plan node's picture and list show, from the engine's own rules."""

import asyncio

from aiohttp import web
from server import PromptServer

from ..engine.estimate.overview import calibrate, overview

_measuring: set[asyncio.Task] = set()


def register() -> None:
    """Adds the route to ComfyUI's server, where there is one."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get("/atlasvid/plan")(plan_route)


async def plan_route(request: web.Request) -> web.Response:
    """Answers with the overview of the plan that the query describes.

    Where the machine was never measured, a measurement starts beside the answer, unless it is busy
    sampling; `measured` tells the page to ask again.
    """
    query = dict(request.query)
    try:
        answer = await asyncio.to_thread(overview, query)
    except ValueError as error:
        return web.json_response({"error": str(error)})
    if not answer["measured"] and not _measuring and not _is_busy():
        task = asyncio.create_task(asyncio.to_thread(calibrate, query))
        _measuring.add(task)
        task.add_done_callback(_measuring.discard)
    return web.json_response(answer)


def _is_busy() -> bool:
    return bool(PromptServer.instance.prompt_queue.currently_running)
