"""Makes the workflows that vary the 4K one, and the blueprint, and gives all graphs new inputs.

Run it after changing a graph in ComfyUI or an input of a node. Made anew are the VARIANTS and the
blueprint; the other graphs only get the inputs that a node has now, with their defaults.
"""

from __future__ import annotations

import copy
import json
import os
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twins import TINY_OUTPUTS
from workflow import DYNAMIC_COMBO, Input, inputs_of

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = ROOT / "workflows"
BLUEPRINT = ROOT / "subgraphs" / "AtlasVid prompt to 4K.json"
VARIED = "atlasvid_t2v_4k"

Json = dict[str, Any]


# --- Nodes ----------------------------------------------------------------------------------


def node_definitions() -> dict[str, Json]:
    """The pack's nodes as /object_info describes them."""
    from atlasvid.nodes import NODES

    return {node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in NODES}


def places(node: Json) -> dict[str, slice]:
    """Where the value of each widget lies in `widgets_values`, a seed's control included."""
    found, end = {}, 0
    for slot in node["inputs"]:
        if "widget" in slot:
            start, end = end, end + 1 + Input(slot["name"], slot["type"], {}).has_control
            found[slot["name"]] = slice(start, end)
    return found


def set_values(node: Json, values: Mapping[str, Any]) -> None:
    """Sets widgets by name. A model's name changes in what the front end downloads too."""
    for name, value in values.items():
        place = places(node)[name].start
        before, node["widgets_values"][place] = node["widgets_values"][place], value
        for model in node["properties"].get("models", ()):
            if model["name"] == before:
                model["name"], model["url"] = value, model["url"].replace(before, value)


def set_current_inputs(node: Json, definition: Json) -> None:
    """Gives a node the inputs of its definition, in their order; new ones have their defaults."""
    slots = {slot["name"]: slot for slot in node["inputs"]}
    values = {name: node["widgets_values"][place] for name, place in places(node).items()}

    def shown(inputs: list[Input]) -> Iterator[Input]:
        for each in inputs:
            if each.is_widget:
                value = values.setdefault(
                    each.name, [each.default, "fixed"] if each.has_control else [each.default]
                )
                yield each
                if each.type == DYNAMIC_COMBO:
                    yield from shown(each.children(value[0]))

    inputs = inputs_of(definition)
    widgets = list(shown(inputs))
    sockets = [each for each in inputs if not each.is_widget]
    optional = definition["input"].get("optional", {})
    node["inputs"] = [
        slots.get(each.name)
        or {
            "localized_name": each.name,
            "name": each.name,
            **({"shape": 7} if each.name in optional else {}),
            "type": each.type,
            **({"widget": {"name": each.name}} if each.is_widget else {}),
            "link": None,
        }
        for each in sockets + widgets
    ]
    node["widgets_values"] = [value for each in widgets for value in values[each.name]]


def slot_of(node: Json, name: str) -> int:
    return [slot["name"] for slot in node["inputs"]].index(name)


# --- Graphs ---------------------------------------------------------------------------------


class Graph:
    """A workflow under change. Nodes go by their title, or by their type where they have none."""

    def __init__(self, workflow: Json):
        self.workflow = copy.deepcopy(workflow)
        self.nodes: list[Json] = self.workflow["nodes"]
        self.links: list[list[Any]] = self.workflow["links"]

    def node(self, name: str) -> Json:
        (found,) = [node for node in self.nodes if name in (node.get("title"), node["type"])]
        return found

    def add(self, node: Json, behind: str) -> Json:
        """Adds a node, in the file behind another."""
        self.workflow["last_node_id"] += 1
        made = {"id": self.workflow["last_node_id"], **copy.deepcopy(node)}
        self.nodes.insert(self.nodes.index(self.node(behind)) + 1, made)
        return made

    def connect(self, origin: Json, output: int, target: Json, name: str) -> None:
        """Links an output to a named input, in place of what fed it."""
        end = [target["id"], slot_of(target, name)]
        self.links[:] = [link for link in self.links if link[3:5] != end]
        self.workflow["last_link_id"] += 1
        kind = origin["outputs"][output]["type"]
        self.links.append([self.workflow["last_link_id"], origin["id"], output, *end, kind])

    def take_over(self, before: Json, node: Json, output: int) -> None:
        """Lets an output of `node` feed all that `before` fed."""
        for link in self.links:
            if link[1] == before["id"]:
                link[1:3] = node["id"], output

    def keep(self, names: Collection[str], groups: Collection[str]) -> None:
        """Takes all other nodes out, with their links, and all other groups."""
        self.nodes[:] = [self.node(name) for name in names]
        left = {node["id"] for node in self.nodes}
        self.links[:] = [link for link in self.links if {link[1], link[3]} <= left]
        titled = [each for each in self.workflow["groups"] if each["title"] in groups]
        self.workflow["groups"][:] = titled

    def move(self, x: int, node: str, group: str) -> None:
        """Moves a node and the group around it to another column."""
        (around,) = [each for each in self.workflow["groups"] if each["title"] == group]
        self.node(node)["pos"][0], around["bounding"][0] = x, x - 20

    def lower(self, distance: int, names: tuple[str, ...], groups: tuple[str, ...]) -> None:
        """Moves nodes down, and the lower borders of groups with them."""
        for name in names:
            self.node(name)["pos"][1] += distance
        for group in self.workflow["groups"]:
            if group["title"] in groups:
                group["bounding"][3] += distance

    def set_all_current_inputs(self, definitions: Mapping[str, Json]) -> None:
        for node in self.nodes:
            if node["type"] in definitions:
                ends = [link for link in self.links if link[3] == node["id"]]
                names = [node["inputs"][link[4]]["name"] for link in ends]
                set_current_inputs(node, definitions[node["type"]])
                for link, name in zip(ends, names, strict=True):
                    link[4] = slot_of(node, name)

    def finished(self) -> Json:
        """The workflow, with the links that its nodes name brought in line with its own."""
        for node in self.nodes:
            for i, slot in enumerate(node["inputs"]):
                ends = [link[0] for link in self.links if link[3:5] == [node["id"], i]]
                slot["link"] = next(iter(ends), None)
            for i, slot in enumerate(node["outputs"]):
                starts = [link[0] for link in self.links if link[1:3] == [node["id"], i]]
                slot["links"] = starts or None
        return self.workflow


# --- Variants -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What a workflow has in place of the 4K one's.

    `note` is the last paragraph of the note; a variant without the 4K one's steps gives the whole
    text below the title, with {models} where the files to download are listed. `change` is for
    other nodes and links.
    """

    title: str
    note: str
    values: dict[str, Json]
    whole_note: bool = False
    change: Callable[[Graph], None] = field(default=lambda graph: None)


T2V_14B = "wan2.1_t2v_14B_fp8_scaled.safetensors"
FEW_STEPS = "lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors"
LORA_LOADER = {
    "type": "LoraLoaderModelOnly",
    "pos": [40, 270],
    "size": [320, 90],
    "flags": {},
    "order": 0,
    "mode": 0,
    "inputs": [
        {"name": "model", "type": "MODEL"},
        {"name": "lora_name", "type": "COMBO", "widget": {"name": "lora_name"}},
        {"name": "strength_model", "type": "FLOAT", "widget": {"name": "strength_model"}},
    ],
    "outputs": [{"name": "MODEL", "type": "MODEL"}],
    "title": "Few-step LoRA",
    "properties": {
        "Node name for S&R": "LoraLoaderModelOnly",
        "models": [
            {
                "name": FEW_STEPS,
                "url": "https://huggingface.co/Kijai/WanVideo_comfy/resolve/main/Lightx2v/"
                + FEW_STEPS,
                "directory": "loras",
            }
        ],
    },
    "widgets_values": [FEW_STEPS, 1],
    "color": "#223",
    "bgcolor": "#335",
}
CUT = {
    "type": "LatentCut",
    "pos": [2120, 120],
    "size": [360, 110],
    "flags": {},
    "order": 0,
    "mode": 0,
    "inputs": [
        {"name": "samples", "type": "LATENT"},
        {"name": "dim", "type": "COMBO", "widget": {"name": "dim"}},
        {"name": "index", "type": "INT", "widget": {"name": "index"}},
        {"name": "amount", "type": "INT", "widget": {"name": "amount"}},
    ],
    "outputs": [{"name": "LATENT", "type": "LATENT"}],
    "title": "Cut to 29 frames (8 latents)",
    "properties": {"Node name for S&R": "LatentCut"},
    "widgets_values": ["t", 0, 8],
}
TINY_MODELS = {
    "type": "AtlasVidTinyModels",
    "pos": [40, 120],
    "size": [320, 214],
    "flags": {},
    "order": 0,
    "mode": 0,
    "inputs": [],
    "outputs": [
        {"name": "model", "type": "MODEL"},
        {"name": "clip", "type": "CLIP"},
        {"name": "vae", "type": "VAE"},
        {"name": "guide_lora", "type": "ATLASVID_GUIDE_LORA"},
        {"name": "proxy_model", "type": "MODEL"},
        {"name": "flashvsr", "type": "ATLASVID_FLASHVSR"},
    ],
    "properties": {"Node name for S&R": "AtlasVidTinyModels"},
    "widgets_values": [],
    "color": "#223",
    "bgcolor": "#335",
}


GUIDE_LORA = {
    "type": "AtlasVidGuideLoRA",
    "pos": [40, 580],
    "size": [320, 110],
    "flags": {},
    "order": 0,
    "mode": 0,
    "inputs": [{"name": "lora", "type": "COMBO", "widget": {"name": "lora"}}],
    "outputs": [{"name": "guide_lora", "type": "ATLASVID_GUIDE_LORA"}],
    "title": "Your guide LoRA",
    "properties": {"Node name for S&R": "AtlasVidGuideLoRA"},
    "widgets_values": ["atlasvid_guide.safetensors"],
    "color": "#432",
    "bgcolor": "#653",
}
REPORT = {
    "type": "AtlasVidReport",
    "pos": [2120, 960],  # below the video that the node above will show
    "size": [600, 700],
    "flags": {},
    "order": 0,
    "mode": 0,
    "inputs": [
        {"name": "plan", "type": "ATLASVID_PLAN"},
        {"name": "video", "type": "IMAGE,VIDEO"},
        {"name": "proxy", "type": "IMAGE,VIDEO"},
        {"name": "window", "type": "COMFY_DYNAMICCOMBO_V3", "widget": {"name": "window"}},
    ],
    "outputs": [{"name": "image", "type": "IMAGE"}, {"name": "text", "type": "STRING"}],
    "title": "How good is it?",
    "properties": {"Node name for S&R": "AtlasVidReport"},
    "widgets_values": ["compact"],
    "color": "#432",
    "bgcolor": "#653",
}
TRAINING = {
    "type": "AtlasVidTrainLoRA",
    "pos": [860, 120],
    "size": [460, 1240],
    "flags": {},
    "order": 0,
    "mode": 0,
    "inputs": [
        *(
            {"name": name, "type": kind}
            for name, kind in (
                ("model", "MODEL"), ("clip", "CLIP"), ("vae", "VAE"), ("plan", "ATLASVID_PLAN"),
            )
        ),
        *(
            {"name": name, "type": kind, "widget": {"name": name}}
            for name, kind in (("stage", "COMBO"), ("name", "STRING"), ("folder", "STRING"))
        ),
    ],
    "outputs": [
        {"name": "guide_lora", "type": "ATLASVID_GUIDE_LORA"},
        {"name": "lora", "type": "LORA_MODEL"},
        {"name": "loss_curve", "type": "IMAGE"},
        {"name": "file", "type": "STRING"},
    ],
    "properties": {"Node name for S&R": "AtlasVidTrainLoRA"},
    "widgets_values": ["guide", "atlasvid_guide", "my_clips"],
    "color": "#432",
    "bgcolor": "#653",
}  # fmt: skip


def with_lora(graph: Graph) -> None:
    model = graph.node("UNETLoader")
    lora = graph.add(LORA_LOADER, behind="UNETLoader")
    graph.take_over(model, lora, 0)
    graph.connect(model, 0, lora, "model")
    graph.lower(150, ("CLIPLoader", "VAELoader", "Read me"), ("Models", "Prompt"))


def with_tiny_models(graph: Graph) -> None:
    tiny = graph.add(TINY_MODELS, behind="VAELoader")
    for name in ("UNETLoader", "CLIPLoader", "VAELoader"):
        loader, output = graph.node(name), TINY_OUTPUTS[name]
        graph.take_over(loader, tiny, output)
        graph.nodes.remove(loader)
    graph.connect(tiny, 3, graph.node("AtlasVidHierarchicalAttention"), "guide_lora")
    graph.connect(tiny, 4, graph.node("AtlasVidRoPE"), "model")


def with_close_up_prompt(graph: Graph) -> None:
    """A prompt of the detail's own: a window sees a part of the picture."""
    prompt = {key: value for key, value in graph.node("Prompt").items() if key != "id"}
    prompt |= {"title": "Close-up prompt", "pos": [420, 350], "size": [380, 140]}
    near = graph.add(prompt, behind="Prompt")
    graph.connect(graph.node("AtlasVidTinyModels"), 1, near, "clip")
    graph.connect(near, 0, graph.node("Sample the detail"), "positive")
    graph.lower(200, ("Negative prompt", "Read me"), ("Models", "Prompt"))


def with_report(graph: Graph) -> None:
    report = graph.add(REPORT, behind="The finished video")
    graph.connect(graph.node("AtlasVidPlan"), 0, report, "plan")
    graph.connect(graph.node("AtlasVidDecodeToVideo"), 0, report, "video")
    graph.connect(graph.node("Proxy video (fps / stride)"), 0, report, "proxy")


def as_demo(graph: Graph) -> None:
    with_tiny_models(graph)
    with_close_up_prompt(graph)
    with_report(graph)


def with_guide_lora(graph: Graph) -> None:
    lora = graph.add(GUIDE_LORA, behind="VAELoader")
    graph.connect(lora, 0, graph.node("AtlasVidHierarchicalAttention"), "guide_lora")
    graph.lower(180, ("Read me",), ("Models", "Prompt"))


def with_cut(graph: Graph) -> None:
    """The sampled latent is cut at its end before it is decoded: frames never read later ones."""
    cut = graph.add(CUT, behind="Sample the detail")
    sampled = graph.node("Sample the detail")
    graph.take_over(sampled, cut, 0)
    graph.connect(sampled, 0, cut, "samples")
    graph.lower(180, ("AtlasVidDecodeToVideo", "The finished video"), ())


def as_training(graph: Graph) -> None:
    kept = ("UNETLoader", "CLIPLoader", "VAELoader", "AtlasVidPlan", "Read me")
    graph.keep(kept, ("Models", "1 Plan"))
    graph.move(420, "AtlasVidPlan", "1 Plan")
    graph.node("Read me").update(pos=[1380, 120], size=[620, 620])
    training = graph.add(TRAINING, behind="AtlasVidPlan")
    for name, output in (("UNETLoader", "model"), ("CLIPLoader", "clip"), ("VAELoader", "vae")):
        graph.connect(graph.node(name), 0, training, output)
    graph.connect(graph.node("AtlasVidPlan"), 0, training, "plan")
    around = {"id": 7, "title": "2 Training", "bounding": [840, 40, 500, 1374], "flags": {}}
    graph.workflow["groups"][-1]["bounding"][3] = around["bounding"][3]
    graph.workflow["groups"].append(around | {"color": "#a1309b"})


def saved_as(name: str) -> dict[str, Json]:
    return {
        "Look at the proxy": {"filename_prefix": f"video/atlasvid_{name}_proxy"},
        "The finished video": {"filename_prefix": f"video/atlasvid_{name}"},
    }


BALLOON = "view of a red balloon drifting right over hills at noon"
VARIANTS = {
    "atlasvid_t2v_2k_20s": Variant(
        "Text to 2K, twenty seconds",
        "The proxy has 81 frames, as many as Wan was trained on: the longest video that needs no "
        "other position scaling.",
        {
            "AtlasVidPlan": {"width": 2560, "height": 1440, "seconds": 20},
            **saved_as("2k"),
        },
    ),
    "atlasvid_t2v_8k": Variant(
        "Text to 8K, 29 frames",
        "With stride 4 a video has 16 n + 1 frames: 33 are planned and sampled, and the last four "
        "are cut off before they are decoded.",
        {
            "AtlasVidPlan": {"width": 7680, "height": 4320, "seconds": 2},
            **saved_as("8k"),
        },
        change=with_cut,
    ),
    "atlasvid_guide_lora_4k": Variant(
        "Text to 4K with a guide LoRA",
        "{models}\n"
        "- a guide LoRA for the same model in `models/loras`: train one with "
        "**atlasvid_train_guide**; none is public\n\n"
        "**Compact windows, a clean guide**: the proxy is read as it is, through the LoRA; every "
        "query reads about 1,100 keys, whatever the size of the video.\n\n"
        "**As set here**, the detail starts from the up-scaled proxy (`denoise` 0.7) and structure "
        "guidance holds it: of the ways with a LoRA the best one on the toy model "
        "(benchmarks/quality.md). There a close-up prompt and cfg 1 helped the detail, too.\n\n"
        "**The paper's way** starts from noise: set `denoise` of *Sample the detail* to 1 and "
        "bypass *AtlasVid Structure Guidance* (Ctrl+B).\n\n"
        "A proxy LoRA (**atlasvid_train_proxy**) goes into Load LoRA, between the model and "
        "*AtlasVid RoPE*.",
        {
            "AtlasVidHierarchicalAttention": {"window": "compact", "guide_noise": "clean"},
            **saved_as("guide_lora"),
        },
        whole_note=True,
        change=with_guide_lora,
    ),
    "atlasvid_train_guide": Variant(
        "Train a guide LoRA",
        "{models}\n\n"
        "1. Put clips of at least 5 seconds into `input/my_clips`, each with a `.txt` of the same "
        "name that says what it shows. Sharp, large, moving ones teach most.\n"
        "2. **Plan** is what the LoRA learns at: the clips' size, and beside it the proxy's. "
        "1280 x 720 with a proxy of 160 is the ratio of 4K to a proxy of 480.\n"
        "3. **Run**. Stop whenever you like: the same graph goes on where it was. The LoRA lies in "
        "`models/loras`; **atlasvid_guide_lora_4k** uses it at any size.\n\n"
        "The paper trains 15,000 steps; a thousand show whether it works. `python tools/train.py` "
        "does the same in a terminal.",
        {
            "AtlasVidPlan": {"width": 1280, "height": 720, "seconds": 5, "proxy_short_side": 160},
        },
        whole_note=True,
        change=as_training,
    ),
    "atlasvid_train_proxy": Variant(
        "Train a proxy LoRA",
        "{models}\n\n"
        "1. Put clips of at least 20 seconds into `input/my_clips`, each with a `.txt` of the same "
        "name that says what it shows.\n"
        "2. **Plan** is what the LoRA learns at: a proxy of 81 frames, four per second, of the "
        "size that you sample proxies at.\n"
        "3. **Run**. Stop whenever you like: the same graph goes on where it was. The LoRA lies in "
        "`models/loras`; give it to the model of *AtlasVid RoPE* with Load LoRA.\n\n"
        "The paper trains at 1280 x 720 for 15,000 steps: set both sizes of the plan to that where "
        "your card and your time allow. `python tools/train.py` does the same in a terminal.",
        {
            "AtlasVidPlan": {"width": 832, "height": 480, "seconds": 20},
            "AtlasVidTrainLoRA": {"stage": "proxy", "name": "atlasvid_proxy"},
        },
        whole_note=True,
        change=as_training,
    ),
    "atlasvid_low_memory_2k": Variant(
        "14B on a small card: 2K, five seconds",
        "For cards with 12 GB: fp8 weights, a `memory_budget` of 4 GB beside them, and a streamed "
        "decode. On less, set 2 GB; the result is the same, only slower.",
        {
            "UNETLoader": {"unet_name": T2V_14B},
            "AtlasVidPlan": {"width": 2560, "height": 1440, "seconds": 5},
            "AtlasVidHierarchicalAttention": {"memory_budget": "4 GB"},
            "AtlasVidDecodeToVideo": {"memory_budget": "2 GB"},
            **saved_as("low_memory"),
        },
    ),
    "atlasvid_few_steps_4k": Variant(
        "Text to 4K in few steps",
        "The LoRA is distilled: 6 steps and 4 steps at cfg 1, where the negative prompt does "
        "nothing. Other few-step LoRAs for Wan 2.1 14B work the same way.",
        {
            "UNETLoader": {"unet_name": T2V_14B},
            "AtlasVidPlan": {"seconds": 5},
            "Sample the proxy": {"steps": 6, "cfg": 1, "sampler_name": "lcm"},
            "Sample the detail": {"steps": 4, "cfg": 1, "sampler_name": "lcm"},
            **saved_as("fast"),
        },
        change=with_lora,
    ),
    "atlasvid_demo": Variant(
        "The 4K graph on a tiny trained model",
        "*AtlasVid Tiny Models* are a real Wan, text encoder and VAE made very small: a toy model "
        "of 8 million parameters trained on drawings, to show the method, not Wan's quality. "
        "Every node does its real work in about a minute on any computer.\n\n"
        "**Its words**: wide or close *view of a* red, yellow, green, purple or white *balloon "
        "drifting* left or right *over* hills, desert or snow *at* noon, dusk or night. The "
        "negative prompt stays empty.\n\n"
        "**The detail** has a prompt of its own: a window sees a part of the picture, so it is "
        "told of a close view. The proxy is read through the tiny guide LoRA, in compact windows; "
        "cfg 1 suffices.\n\n"
        "**Try**: another seed; 768 x 512; the guide LoRA unplugged; *guide_weight* 1 or 0, to "
        "see what the guide does. *How good is it?* measures what you see.\n\n"
        "For real pictures, open **atlasvid_t2v_4k**.",
        {
            "Prompt": {"text": f"wide {BALLOON}"},
            "Close-up prompt": {"text": f"close {BALLOON}"},
            "Negative prompt": {"text": ""},
            "AtlasVidPlan": {"width": 576, "height": 384, "seconds": 4, "proxy_short_side": 128},
            "Sample the proxy": {"seed": 0, "steps": 16, "cfg": 3, "sampler_name": "euler"},
            "Sample the detail": {"seed": 0, "steps": 8, "cfg": 1, "sampler_name": "euler"},
            **saved_as("demo"),
        },
        whole_note=True,
        change=as_demo,
    ),
}


def varied(name: str, variant: Variant, workflow: Json) -> Graph:
    """The graph of a variant of `workflow`."""
    graph = Graph(workflow)
    graph.workflow["id"] = str(uuid.uuid5(uuid.UUID(workflow["id"]), name))
    variant.change(graph)
    for node, values in variant.values.items():
        set_values(graph.node(node), values)
    text = graph.node("Read me")["widgets_values"]
    _, models, _, *steps, _ = text[0].split("\n\n")
    middle = [] if variant.whole_note else [models, model_list(graph), *steps]
    note = variant.note.replace("{models}", f"{models}\n\n{model_list(graph)}")
    text[0] = "\n\n".join([f"## {variant.title}", *middle, note]) + "\n"
    return graph


def model_list(graph: Graph) -> str:
    files = [file for node in graph.nodes for file in node["properties"].get("models", ())]
    return "\n".join(
        f"- [{file['name']}]({file['url']}) in `models/{file['directory']}`" for file in files
    )


# --- The blueprint --------------------------------------------------------------------------


def with_nodes_of(workflow: Json, blueprint: Json) -> Json:
    """The blueprint, with its nodes and their links taken from a workflow.

    Which nodes it holds, and what its box shows, is kept.
    """
    made = copy.deepcopy(blueprint)
    (box,) = made["nodes"]
    (inside,) = made["definitions"]["subgraphs"]
    held = {node["id"]: node for node in inside["nodes"]}
    inside["nodes"] = [copy.deepcopy(each) for each in workflow["nodes"] if each["id"] in held]
    nodes = {node["id"]: node for node in inside["nodes"]}
    between = [link for link in workflow["links"] if link[1] in nodes and link[3] in nodes]
    border = [
        link
        for link in inside["links"]
        if not {link["origin_id"], link["target_id"]} <= nodes.keys()
    ]
    for node in nodes.values():
        for slot in node["outputs"]:
            kept = [link[0] for link in between if link[0] in (slot["links"] or ())]
            slot["links"] = kept or None
    for link in border:
        if (target := link["target_id"]) in nodes:
            name = held[target]["inputs"][link["target_slot"]]["name"]
            link["target_slot"] = slot_of(nodes[target], name)
            nodes[target]["inputs"][link["target_slot"]]["link"] = link["id"]
            value = nodes[target]["widgets_values"][places(nodes[target])[name].start]
            box["widgets_values"][link["origin_slot"]] = value
        else:
            output = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
            output["links"] = [*(output["links"] or ()), link["id"]]
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    inside["links"] = [dict(zip(keys, link, strict=True)) for link in between] + border
    return made


# --- Files ----------------------------------------------------------------------------------


def read(file: Path) -> Json:
    return json.loads(file.read_text("utf-8"))


def made() -> dict[Path, Json]:
    """Every shipped graph as it has to be, by its file."""
    definitions = node_definitions()
    graphs = {file.stem: Graph(read(file)) for file in WORKFLOWS.glob("*.json")}
    workflow = graphs[VARIED].workflow
    graphs |= {name: varied(name, variant, workflow) for name, variant in VARIANTS.items()}
    for graph in graphs.values():
        graph.set_all_current_inputs(definitions)
    found = {WORKFLOWS / f"{name}.json": graph.finished() for name, graph in graphs.items()}
    return {**found, BLUEPRINT: with_nodes_of(workflow, read(BLUEPRINT))}


def main() -> int:
    from pack_loader import load_comfyui, load_pack

    if not os.environ.get("COMFYUI_PATH"):
        raise SystemExit("set COMFYUI_PATH to a ComfyUI folder")
    load_comfyui(Path(os.environ["COMFYUI_PATH"]), "--cpu")
    load_pack()
    for file, graph in made().items():
        if not file.exists() or graph != read(file):
            file.write_text(json.dumps(graph, indent=1, ensure_ascii=False) + "\n", "utf-8")
            print(f"{file.relative_to(ROOT)} is new")
    return 0


if __name__ == "__main__":
    main()
