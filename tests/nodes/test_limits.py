"""Numbers that come by a link are held to the limits of the widget that they replace."""

import math

import numpy as np
import pytest
import torch
from atlasvid import nodes
from comfy_api.latest import io

NODES = {node.define_schema().node_id: node for node in nodes.NODES}
NO_NUMBERS = ["many", None, [], {}, True, torch.ones(2), 1j]


def numbers():
    """(node, what it is called with, name, limits) of every number of every node."""
    for node_id, node in NODES.items():
        schema = node.define_schema()
        for given in schema.inputs:
            if isinstance(given, io.Int.Input | io.Float.Input):
                wrap = "list" if schema.is_input_list else "plain"
                yield pytest.param(node_id, given.id, wrap, given, id=f"{node_id}.{given.id}")
            for option in getattr(given, "options", None) or []:
                for part in getattr(option, "inputs", []):
                    name = f"{given.id}.{option.key}.{part.id}"
                    yield pytest.param(node_id, name, "choice", part, id=f"{node_id}.{name}")


def call(node_id, name, wrap, value):
    if wrap == "choice":
        outer, key, inner = name.split(".")
        return NODES[node_id].execute(**{outer: {outer: key, inner: value}})
    return NODES[node_id].execute(**{name: [value] if wrap == "list" else value})


@pytest.mark.parametrize(("node_id", "name", "wrap", "limits"), list(numbers()))
def test_numbers_outside_their_limits_are_refused(node_id, name, wrap, limits):
    """Nothing else is given: the node would fail for that where the number passed."""
    below, above = limits.min - 1, limits.max + 1
    for bad in (math.nan, math.inf, -math.inf, below, above, 10**400, *NO_NUMBERS):
        with pytest.raises(ValueError, match=f"^{limits.id} is .*; allowed is .*{limits.max}"):
            call(node_id, name, wrap, bad)
    if name == "seed" and wrap == "plain":  # this node needs nothing else
        return
    kind = np.uint64 if isinstance(limits, io.Int.Input) else np.float32  # as other packs give it
    for good in (limits.min, limits.max, limits.default, kind(limits.default)):
        with pytest.raises(TypeError, match="missing"):
            call(node_id, name, wrap, good)


def test_a_number_is_named_shortly():
    with pytest.raises(ValueError, match=r"^strength is 'aaa.{50,80}; allowed") as refused:
        NODES["AtlasVidGuideLoRA"].execute(strength="a" * 5000)
    assert len(str(refused.value)) < 200
    with pytest.raises(ValueError, match="seed is a number of 1329 bits"):
        NODES["AtlasVidTinyModels"].execute(seed=10**400)


def test_lists_and_choices_that_are_none_are_refused():
    with pytest.raises(ValueError, match="steps is empty; connect one value"):
        NODES["AtlasVidTrainLoRA"].execute(steps=[])
    for window in ("compact", {"window": "huge"}, None):
        with pytest.raises(ValueError, match=r"window is .*; allowed are auto, compact"):
            NODES["AtlasVidHierarchicalAttention"].execute(window=window)


def test_latents_that_fit_into_no_memory_are_refused():
    with pytest.raises(ValueError, match=r"A latent of .* takes .* GiB; this computer has"):
        NODES["AtlasVidImageToVideo"].execute(
            [], [], None, width=16384, height=16384, frames=16384, start_image=None
        )
