"""The tiny twin of a shipped graph: the same nodes and links, on the tiny models, at a small size.

A twin is made, never kept: what changes in a graph changes in its twin. Loaders become AtlasVid
Tiny Models, prompts become ones that its world knows, sizes and steps shrink.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

Prompt = dict[str, dict[str, Any]]

TINY = "tiny"
PROMPT = "wide view of a red balloon drifting left over hills at noon"
STEPS = 4
TINY_OUTPUTS = {
    "UNETLoader": 0,
    "CLIPLoader": 1,
    "VAELoader": 2,
    "AtlasVidGuideLoRA": 3,
    "AtlasVidFlashVSRLoader": 5,
}
LEFT_OUT = ("LoraLoaderModelOnly", "ModelSamplingSD3")
"""Nodes that only pass a model on, and have no tiny counterpart."""
IMAGE_TO_VIDEO = "AtlasVidImageToVideo"
TRAINING = "AtlasVidTrainLoRA"


def tiny_twin(prompt: Prompt, seconds: float = 1.0, width: int = 384, steps: int = STEPS) -> Prompt:
    """The twin of a prompt in API format.

    Frame interpolation keeps its loader, whose file has to be there. Image-to-video graphs keep
    their UNETLoader (the tiny family has no such model, so a file of the graph's name has to be
    there) and lose the image encoder.

    Args:
        seconds: of the target, at most; the graph's own where shorter.
        width: of a landscape target; heights follow the graph's aspect.
        steps: of every sampler, at most.
    """
    twin = copy.deepcopy(prompt)
    kinds = {node["class_type"] for node in twin.values()}
    tiny_model = IMAGE_TO_VIDEO not in kinds
    pass_by(twin, LEFT_OUT, "model")
    moved = {
        name: [TINY, TINY_OUTPUTS[node["class_type"]]]
        for name, node in twin.items()
        if node["class_type"] in TINY_OUTPUTS and (tiny_model or node["class_type"] != "UNETLoader")
    }
    for name in [*moved, *_named(twin, "CLIPVisionLoader"), *_named(twin, "CLIPVisionEncode")]:
        del twin[name]
    for node in twin.values():
        inputs = node["inputs"]
        for key, value in list(inputs.items()):
            if _is_link(value) and value[0] in moved:
                inputs[key] = moved[value[0]]
            elif _is_link(value) and value[0] not in twin:
                del inputs[key]
    twin[TINY] = _node("AtlasVidTinyModels", seed=0, weights="trained")
    _say_what_the_world_knows(twin)
    for node in twin.values():
        if change := SMALLER.get(node["class_type"]):
            change(node["inputs"], seconds, width, steps)
    return twin


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _named(prompt: Prompt, kind: str) -> list[str]:
    return [name for name, node in prompt.items() if node["class_type"] == kind]


def pass_by(prompt: Prompt, kinds: tuple[str, ...], passed: str) -> None:
    """Take nodes out that have one input `passed`, and one output of the same type."""
    for name in [name for name, node in prompt.items() if node["class_type"] in kinds]:
        source = prompt.pop(name)["inputs"][passed]
        for node in prompt.values():
            for key, value in node["inputs"].items():
                if _is_link(value) and value[0] == name:
                    node["inputs"][key] = source


def _say_what_the_world_knows(prompt: Prompt) -> None:
    """Positive prompts become one of the world's, negative ones empty."""
    for node in list(prompt.values()):
        for key, text in (("positive", PROMPT), ("negative", "")):
            link = node["inputs"].get(key)
            if _is_link(link) and prompt[link[0]]["class_type"] == "CLIPTextEncode":
                prompt[link[0]]["inputs"]["text"] = text


def _shrink_plan(inputs: dict[str, Any], seconds: float, width: int, steps: int) -> None:
    aspect = inputs["height"] / inputs["width"]
    inputs["width"], inputs["height"] = width, max(192, round(width * aspect / 16) * 16)
    inputs["proxy_short_side"] = 128
    inputs["seconds"] = min(inputs["seconds"], seconds)


def _fewer_steps(inputs: dict[str, Any], seconds: float, width: int, steps: int) -> None:
    inputs["steps"] = min(inputs["steps"], steps)
    inputs["cfg"] = min(inputs["cfg"], 3.0)


def _fewer_steps_in_parts(inputs: dict[str, Any], seconds: float, width: int, steps: int) -> None:
    share = min(steps / inputs["steps"], 1.0)
    for key in ("start_at_step", "end_at_step"):
        inputs[key] = min(round(inputs[key] * share), 10_000)
    _fewer_steps(inputs, seconds, width, steps)


def _cut_earlier(inputs: dict[str, Any], seconds: float, width: int, steps: int) -> None:
    inputs["amount"] = min(inputs["amount"], 4)


def _train_less(inputs: dict[str, Any], seconds: float, width: int, steps: int) -> None:
    inputs |= {"steps": min(inputs["steps"], steps), "rank": 4, "cuts_per_clip": 1}


def _up_scale_less(inputs: dict[str, Any], seconds: float, width: int, steps: int) -> None:
    inputs["local_range"] = 3  # what the tiny model was trained with
    if not _is_link(inputs.get("width")):
        inputs["width"] = width


SMALLER: dict[str, Callable[[dict[str, Any], float, int, int], None]] = {
    "AtlasVidPlan": _shrink_plan,
    "AtlasVidFlashVSR": _up_scale_less,
    "KSampler": _fewer_steps,
    "KSamplerAdvanced": _fewer_steps_in_parts,
    "LatentCut": _cut_earlier,
    TRAINING: _train_less,
}
