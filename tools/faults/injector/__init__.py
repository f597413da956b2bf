"""A node pack for the server under test: any value by a link, and memory that runs out when told.

`faults.host` puts it beside the pack; it is no part of it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import threading
from typing import Any

import torch
from aiohttp import web
from comfy_api.latest import ComfyExtension, io
from server import PromptServer

ANYTHING = io.Custom("*")


class FaultValue(io.ComfyNode):
    """Gives what JSON says, NaN and Infinity too, to an input of any type."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaultValue",
            inputs=[io.String.Input("json")],
            outputs=[ANYTHING.Output("value")],
        )

    @classmethod
    def execute(cls, json: str) -> io.NodeOutput:
        return io.NodeOutput(loads(json))


class FaultSink(io.ComfyNode):
    """An end for nodes that show nothing."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaultSink", is_output_node=True, inputs=[ANYTHING.Input("value")], outputs=[]
        )

    @classmethod
    def execute(cls, value: Any) -> io.NodeOutput:
        del value
        return io.NodeOutput()


class FaultNoise(io.ComfyNode):
    """A video latent of noise, whose pictures do not compress."""

    @classmethod
    def define_schema(cls):
        sizes = ("width", "height", "frames")
        return io.Schema(
            node_id="FaultNoise",
            inputs=[
                io.Int.Input("seed", min=0, max=2**64),
                *(io.Int.Input(name, min=1, max=2**16) for name in sizes),
            ],
            outputs=[io.Latent.Output("latent")],
        )

    @classmethod
    def execute(cls, seed: int, width: int, height: int, frames: int) -> io.NodeOutput:
        shape = 1, 16, (frames - 1) // 4 + 1, height // 8, width // 8
        generator = torch.Generator().manual_seed(seed)
        return io.NodeOutput({"samples": torch.randn(shape, generator=generator)})


loads = json.loads


class Allocations:
    """Lets calls that allocate fail: from the n-th on, so many times."""

    ALLOCATING = ("linear", "silu", "layer_norm", "gelu", "scaled_dot_product_attention", "conv3d")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wait, self._fail = 0, 0
        for name in self.ALLOCATING:
            original = getattr(torch.nn.functional, name)
            setattr(torch.nn.functional, name, self._failing(original))

    def arm(self, wait: int, fail: int) -> int:
        """Fail after `wait` more calls, `fail` times; says how many failures were still to come."""
        with self._lock:
            left, self._wait, self._fail = self._fail, wait, fail
        return left

    def _failing(self, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._fail:
                self._count()
            return original(*args, **kwargs)

        return call

    def _count(self) -> None:
        with self._lock:
            self._wait -= 1
            if self._fail and self._wait < 0:
                self._fail -= 1
                raise torch.OutOfMemoryError("an allocation that was made to fail")


ALLOCATIONS = Allocations()


@PromptServer.instance.routes.post("/faults/allocations")
async def fail_allocations(request: web.Request) -> web.Response:
    asked = await request.json()
    return web.json_response({"left": ALLOCATIONS.arm(asked["wait"], asked["fail"])})


@PromptServer.instance.routes.post("/faults/settle")
async def settle(_: web.Request) -> web.Response:
    """Gives back what is only waiting to be collected, so that growth is growth."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return web.json_response({})


class Faults(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [FaultValue, FaultSink, FaultNoise]


async def comfy_entrypoint() -> Faults:
    return Faults()
