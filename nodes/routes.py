"""What the front end asks: a plan's picture and list, and the renders that are kept."""

import asyncio

from aiohttp import web
from server import PromptServer

from ..engine.estimate.overview import calibrate, overview
from ..engine.resume import store
from ..engine.resume.ending import listing

_measuring: set[asyncio.Task] = set()


def register() -> None:
    """Adds the routes to ComfyUI's server, where there is one."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get("/atlasvid/plan")(plan_route)
        server.routes.get("/atlasvid/renders")(renders_route)
        server.routes.delete("/atlasvid/renders/{id}")(delete_render_route)


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


async def renders_route(request: web.Request) -> web.Response:
    """GET /atlasvid/renders: the kept renders, the one that was used last first."""
    return web.json_response({"renders": await asyncio.to_thread(listing)})


async def delete_render_route(request: web.Request) -> web.Response:
    """DELETE /atlasvid/renders/{id}: deletes one, and answers with what is left."""
    answer = {}
    try:
        await asyncio.to_thread(store.delete, request.match_info["id"])
    except ValueError as error:
        answer["error"] = str(error)
    return web.json_response({**answer, "renders": await asyncio.to_thread(listing)})


def _is_busy() -> bool:
    return bool(PromptServer.instance.prompt_queue.currently_running)
