"""Turns a workflow as the front end saves it into the prompt that its server executes.

The rules are the front end's own (its `graphToPrompt`); a test compares the two in a browser. What
only the browser can do (subgraphs, random `{a|b}` texts, widgets with code of their own) is refused
with a WorkflowError, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MUTED, BYPASSED = 2, 4
NOTES = ("Note", "MarkdownNote")
REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
PLAIN_WIDGETS = {"INT": 0, "FLOAT": 0, "BOOLEAN": False, "STRING": "", "COLOR": "#ffffff"}
# Widgets that the front end draws with code of its own.
FOREIGN_WIDGETS = {
    "BOUNDING_BOX", "BOUNDING_BOXES", "CHART", "COLORS", "CURVE", "GALLERIA", "IMAGECOMPARE",
    "MARKDOWN", "PAINTER", "RANGE", "TEXTAREA",
}  # fmt: skip

Json = dict[str, Any]
Source = tuple[str, int]  # node id and output slot


class WorkflowError(Exception):
    """The workflow holds something that only a browser can convert."""


@dataclass(frozen=True)
class Input:
    """An input as /object_info describes it. `type` is "COMBO" for any list of choices."""

    name: str
    type: str
    options: Json

    @staticmethod
    def parse(name: str, spec: list[Any]) -> Input:
        options = spec[1] if len(spec) > 1 else {}
        if isinstance(spec[0], list):
            return Input(name, "COMBO", {"options": spec[0], **options})
        if spec[0] == "COMFY_MATCHTYPE_V3":
            return Input(name, options["template"]["allowed_types"], options)
        return Input(name, spec[0], options)

    @property
    def is_widget(self) -> bool:
        kind = self.options.get("widgetType", self.type)
        if kind in FOREIGN_WIDGETS:
            raise WorkflowError(f"input {self.name!r} has a {kind} widget: convert it in a browser")
        known = kind in PLAIN_WIDGETS or kind in ("COMBO", DYNAMIC_COMBO)
        return known and not self.options.get("forceInput")

    @property
    def has_control(self) -> bool:
        """Whether a "control after generate" widget follows, saved but not sent."""
        seed = self.type == "INT" and self.name in ("seed", "noise_seed")
        return bool(self.options.get("control_after_generate", seed))

    @property
    def default(self) -> Any:
        if self.type == DYNAMIC_COMBO:
            return self.options["options"][0]["key"]
        if self.type == "COMBO":
            choices = self.options.get("options") or [None]
            return self.options.get("default") or choices[0]
        kind = self.options.get("widgetType", self.type)
        return self.options.get("default", PLAIN_WIDGETS[kind])

    def children(self, choice: Any) -> list[Input]:
        """The inputs that a dynamic combo shows for `choice`, named "<combo>.<input>"."""
        for option in self.options["options"]:
            if option["key"] == choice:
                shown = {
                    **option["inputs"].get("required", {}),
                    **option["inputs"].get("optional", {}),
                }
                return [Input.parse(f"{self.name}.{name}", spec) for name, spec in shown.items()]
        return []


def inputs_of(definition: Json) -> list[Input]:
    """A node's inputs, in the order in which the front end lays them out."""
    order = definition.get("input_order") or {}
    found = []
    for group in ("required", "optional"):
        specs = definition["input"].get(group, {})
        found += [Input.parse(name, specs[name]) for name in order.get(group, specs)]
    return found


def widget_values(inputs: list[Input], saved: Iterator[Any]) -> Iterator[tuple[Input, Any]]:
    """Each widget with its value, drawn from the node's saved values or else its default."""
    for each in inputs:
        if not each.is_widget:
            continue
        value = next(saved, each.default)
        yield each, value
        if each.has_control:
            next(saved, None)
            if each.type == "COMBO":
                next(saved, None)  # a filter for the choices
        if each.type == DYNAMIC_COMBO:
            yield from widget_values(each.children(value), saved)


def sent_value(widget: Input, value: Any) -> Any:
    """What the prompt carries for a widget's value."""
    if isinstance(value, list):
        return {"__value__": value}  # a bare list means a link
    if isinstance(value, str) and widget.options.get("dynamicPrompts"):
        value = re.sub(r"/\*.*?\*/|//[^\n]*", "", value, flags=re.DOTALL)
        if re.search(r"[{}\\]", value):
            raise WorkflowError(
                f"the text {value!r} asks for a random choice: {{ }} and \\ do that"
            )
    if isinstance(value, str) and widget.name == "filename_prefix" and "%" in value:
        raise WorkflowError(f"the file name {value!r} holds %...%, which only the browser fills in")
    return value


def fits(one: str, other: str) -> bool:
    """Whether an output of one type may feed an input of the other."""
    if "*" in (one, other) or "" in (one, other):
        return True
    return bool(set(one.lower().split(",")) & set(other.lower().split(",")))


class Graph:
    """A workflow's nodes and links, together with the server's node definitions."""

    def __init__(self, workflow: Json, definitions: Mapping[str, Json]):
        self.nodes: dict[str, Json] = {str(node["id"]): node for node in workflow["nodes"]}
        self.links = {link[0]: link for link in workflow["links"]}
        self.definitions = definitions
        for node in self.nodes.values():
            kind = node["type"]
            if kind not in definitions and kind not in (*NOTES, REROUTE, PRIMITIVE):
                where = f"{kind!r} (node {node['id']})"
                raise WorkflowError(f"{where} is a subgraph, or a node that this server lacks")

    def is_sent(self, node: Json) -> bool:
        return node["type"] in self.definitions and node.get("mode") not in (MUTED, BYPASSED)

    def slots(self, node: Json) -> list[tuple[str, str, int | None]]:
        """(name, type, link id) of a node's inputs: sockets, widgets, then added ones."""
        saved = {slot["name"]: slot for slot in node.get("inputs") or []}
        defined: list[Input] = []
        if node["type"] in self.definitions:
            inputs = inputs_of(self.definitions[node["type"]])
            defined = [each for each in inputs if not each.is_widget]
            defined += [each for each in inputs if each.is_widget]
        types = {each.name: each.type for each in defined}
        types |= {name: str(slot["type"]) for name, slot in saved.items() if name not in types}
        return [(name, kind, saved.get(name, {}).get("link")) for name, kind in types.items()]

    def source(self, link: int | None, wanted: str) -> Source | None:
        """The output that really feeds a link, past reroutes and bypassed nodes."""
        if link is None:
            return None
        _, origin, slot, *_ = self.links[link]
        node = self.nodes[str(origin)]
        if node.get("mode") == MUTED:
            return None
        if node.get("mode") == BYPASSED:
            return self.source(self._bypass(node, slot, wanted), wanted)
        if node["type"] == REROUTE:
            return self.source(node["inputs"][0]["link"], wanted)
        return (str(origin), slot) if node["type"] in self.definitions else None

    def _bypass(self, node: Json, slot: int, wanted: str) -> int | None:
        """The link of the input that stands in for output `slot` of a bypassed node."""
        slots = self.slots(node)
        given = self.definitions[node["type"]]["output"][slot]
        given = given if isinstance(given, str) else "COMBO"
        if wanted in ("*", ""):
            return slots[slot if slot < len(slots) else 0][2]
        if slot < len(slots) and fits(slots[slot][1], given) and fits(slots[slot][1], wanted):
            return slots[slot][2]
        same = [link for _, kind, link in slots if kind == wanted]
        fitting = [link for _, kind, link in slots if fits(kind, given) and fits(kind, wanted)]
        return next(iter(same + fitting), None)

    def primitive(self, link: int | None) -> Json | None:
        """The primitive node at the other end of a link, where there is one."""
        node = self.nodes[str(self.links[link][1])] if link is not None else {}
        return node if node.get("type") == PRIMITIVE else None

    def prompt_inputs(self, node: Json) -> Json:
        """A node's inputs as the prompt carries them: widget values, then links over them."""
        inputs = inputs_of(self.definitions[node["type"]])
        saved = node.get("widgets_values") or []
        if isinstance(saved, dict):
            raise WorkflowError(f"{node['type']} (node {node['id']}) saves its values by name")
        values = {
            widget.name: sent_value(widget, value)
            for widget, value in widget_values(inputs, iter(saved))
        }
        for name, kind, link in self.slots(node):
            if given := self.primitive(link):
                values[name] = given["widgets_values"][0]
            elif (found := self.source(link, kind)) and self.is_sent(self.nodes[found[0]]):
                values[name] = list(found)
        return values


def to_prompt(workflow: Json, definitions: Mapping[str, Json]) -> dict[str, Json]:
    """The prompt (API format) of a saved workflow.

    `definitions` is the server's /object_info. Raises WorkflowError for what needs a browser.
    """
    graph = Graph(workflow, definitions)
    prompt = {}
    for name, node in graph.nodes.items():
        if graph.is_sent(node):
            definition = definitions[node["type"]]
            title = node.get("title") or definition.get("display_name") or definition["name"]
            prompt[name] = {
                "inputs": graph.prompt_inputs(node),
                "class_type": node["type"],
                "_meta": {"title": title},
            }
    return prompt
