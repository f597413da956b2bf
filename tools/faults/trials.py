"""Each kind of fault, what has to be true after it, and what was seen."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import av
from comfy_server import Event
from safetensors import SafetensorError, safe_open

from . import files, graphs
from .graphs import Prompt
from .host import NOTHING, Host, Level, Run, filled

RAW = ("Errno", "Traceback", "ZeroDivision", "list index", "NoneType", "object has no attribute")
"""Words of Python or of a library that no artist should have to read."""


class Lost(AssertionError):  # noqa: N818  (it says what happened)
    """What did not survive a fault."""


@dataclass
class Outcome:
    """One row of the table."""

    fault: str
    tried: int = 0
    survived: int = 0
    slowest: float | None = None
    """Seconds from a cancel to the end of the execution, or of an error."""
    growth: Level | None = None
    """The largest seen over the level before; None where it was not measured."""
    lost: list[str] = field(default_factory=list)

    def took(self, seconds: float) -> None:
        self.slowest = max(seconds, self.slowest or 0.0)


# --- What has to be true afterwards ----------------------------------------------------------


def next_render_works(host: Host) -> None:
    """A whole render, from the proxy to the file, with nothing of it in a cache."""
    before = set(host.output.rglob("*.mp4"))
    host.succeed(graphs.render(random.getrandbits(48)))
    new = set(host.output.rglob("*.mp4")) - before
    if len(new) != 1:
        raise Lost(f"the next render wrote {len(new)} videos")
    if frames_of(new.pop()) != graphs.FRAMES:
        raise Lost("the next render's video is not whole")


def no_partial_file(host: Host) -> None:
    """Whatever has a final name is whole, and nothing temporary is left beside it."""
    for file in host.output.rglob("*.mp4"):
        frames_of(file)
    for file in [*host.output.rglob("*.safetensors"), *host.loras.glob("trained*.safetensors")]:
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise Lost(f"{file.name} is partial: {error}") from error
    # A video in the server's cache keeps its frames in a file.
    own = f"atlasvid-{host.server.process.pid}-"
    if left := [file.name for file in host.scratch_files() if not file.name.startswith(own)]:
        raise Lost(f"{len(left)} temporary files are left, such as {left[0]}")


AFTERMATH: tuple[Callable[[Host], None], ...] = (next_render_works, no_partial_file)
"""Looked at after every fault. A further promise, such as that a render goes on, belongs here."""


def frames_of(file: Path) -> int:
    """Raises Lost for a video that cannot be decoded from its first frame to its last."""
    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            frames = sum(1 for _ in container.decode(stream))
            if frames != stream.frames:
                raise Lost(f"{file.name} has {frames} of {stream.frames} frames")
            return frames
    except (OSError, IndexError, ValueError) as error:
        raise Lost(f"{file.name} is partial: {error}") from error


@contextmanager
def trial(host: Host, outcome: Outcome, aftermath: bool = True) -> Iterator[None]:
    """Counts one try, and what is lost by it."""
    outcome.tried += 1
    try:
        yield
        if not host.alive:
            raise Lost("the server is gone")
        if aftermath:
            for still_true in AFTERMATH:
                still_true(host)
        outcome.survived += 1
    except Exception as error:
        outcome.lost.append(f"{outcome.fault}: {type(error).__name__} {error}"[:400])
        if not host.alive:
            host.restart()


# --- Phases ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A part of the work that a fault can strike."""

    name: str
    prompt: Callable[[], Prompt]
    node: str
    after: str = "executing"
    """The event that tells that the node is in this phase: it began, or it made progress."""

    def reached(self, event: Event) -> bool:
        kind, data = event
        return kind == self.after and data.get("node") == self.node


def seed() -> int:
    return random.getrandbits(48)


LARGE = {"width": 512, "height": 320, "seconds": 1.0, "temporal_stride": 1}

PHASES = (
    Phase("proxy", lambda: graphs.render(seed(), proxy_steps=5000), graphs.PROXY, "progress"),
    Phase("guide", lambda: graphs.render(seed(), **LARGE), graphs.DETAIL),
    Phase("detail", lambda: graphs.render(seed(), detail_steps=5000), graphs.DETAIL, "progress"),
    Phase("decode", lambda: graphs.decoding(seed()), graphs.DECODE),
    Phase("save", lambda: graphs.saving(seed()), graphs.SAVE),
    Phase("encode", lambda: graphs.encoding(seed()), graphs.ENCODE),
    Phase(
        "training",
        lambda: graphs.training("clips", f"cancelled{seed()}", steps=100_000),
        graphs.TRAIN,
        "progress",
    ),
)


def cancels(host: Host, phase: Phase, times: int) -> Outcome:
    """Cancel at random moments: how long until the execution has ended."""
    outcome = Outcome(f"cancel in {phase.name}")
    for number in range(times):
        with trial(host, outcome, aftermath=number == times - 1):
            ended = host.run(
                phase.prompt(),
                when=phase.reached,
                delay=random.uniform(0.0, 0.4),
                fault=host.session.interrupt,
            )
            if ended.ending != "execution_interrupted":
                raise Lost(f"a cancel ended as {ended.ending} {ended.message}")
            outcome.took(ended.seconds)
    return outcome


def kills(host: Host, phase: Phase, times: int) -> Outcome:
    """kill -9 at random moments: a new server works, and what has a name is whole."""
    outcome = Outcome(f"kill -9 in {phase.name}")
    for _ in range(times):
        with trial(host, outcome):
            ended = host.run(
                phase.prompt(), when=phase.reached, delay=random.uniform(0.0, 0.5), fault=host.kill
            )
            if ended.ending != "killed":
                raise Lost(f"ended before it was killed: {ended.ending} {ended.message}")
            host.restart()
    return outcome


def killed_training(host: Host, times: int) -> Outcome:
    """kill -9 at random moments of a training: it goes on to its last step afterwards."""
    outcome = Outcome("kill -9 in training, resumed")
    phase = Phase("training", dict, graphs.TRAIN)
    for number in range(times):
        with trial(host, outcome):
            prompt = graphs.training("clips", f"trained{number}", steps=60, seed=number)
            delay = random.uniform(0.0, 4.0)
            host.run(prompt, when=phase.reached, delay=delay, fault=host.kill)
            if not host.alive:
                host.restart()
            host.succeed(prompt)
    return outcome


# --- Memory and disk that run out ------------------------------------------------------------


def out_of_memory(host: Host, times: int) -> Outcome:
    """Calls that allocate fail, once or for good, somewhere in a phase."""
    outcome = Outcome("out of memory")
    for number in range(times):
        phase = PHASES[number % 6]
        forever = number % 2 == 1
        pieces = {"decode": graphs.decoding, "save": graphs.saving, "encode": graphs.encoding}
        prompt = pieces[phase.name](seed(), 9) if phase.name in pieces else graphs.render(seed())
        wait, fail = random.randrange(0, 60), 10**9 if forever else 1

        def strike(_: str, wait: int = wait, fail: int = fail) -> None:
            host.ask("/faults/allocations", {"wait": wait, "fail": fail})

        node = replace(phase, after="executing")
        with trial(host, outcome):
            ended = host.run(prompt, when=node.reached, fault=strike)
            host.ask("/faults/allocations", {"wait": 0, "fail": 0})
            if ended.ending == "execution_error" and "RuntimeError" in ended.message:
                raise Lost(ended.message)
            if ended.ending not in ("execution_success", "execution_error"):
                raise Lost(f"ended as {ended.ending}")
    return outcome


def file_limits(host: Host, times: int) -> Outcome:
    """A disk that is full in the middle of a save, by the largest size of a file."""
    outcome = Outcome("disk full while saving")
    for _ in range(times):
        with trial(host, outcome), host.largest_file(random.randrange(150_000, 600_000)):
            before = host.files()
            ended = host.run(graphs.saving(seed()))
            require_message(ended, "full", "Free some space")
            require_unwritten(before, host.files())
    return outcome


def full_disks(host: Host, folder: Path, times: int) -> Outcome:
    """The same on a small file system of its own, which `folder` is."""
    outcome = Outcome(f"disk of {folder.name} full")
    for number in range(times):
        filler = filled(folder, 200_000 if number % 2 else 0)
        before = host.files()
        with trial(host, outcome):
            ended = host.run(graphs.saving(seed()))
            require_message(ended, "disk", "Free some space")
            require_unwritten(before, host.files())
            filler.unlink()
        filler.unlink(missing_ok=True)
    return outcome


def full_disk_in_training(host: Host, times: int) -> Outcome:
    """A checkpoint that does not fit: the one before it is whole and is gone on from."""
    outcome = Outcome("disk full in training")
    for number in range(times):
        name = f"trained full {number}"
        with trial(host, outcome):
            host.succeed(graphs.training("clips", name, steps=2))
            longer = graphs.training("clips", name, steps=4)
            with host.largest_file(30_000):
                require_message(host.run(longer), "could not be written", "Free some space")
            host.succeed(longer)
    return outcome


# --- Files and numbers that are wrong --------------------------------------------------------


def broken_files(host: Host) -> Outcome:
    """LoRAs, models, videos and clips that are cut short, lie, or hold no numbers."""
    outcome = Outcome("broken files")
    for name, prompt, words in files.broken(host):
        with trial(host, outcome, aftermath=False):
            before = host.files()
            ended = host.run(prompt)
            if ended.ending != "execution_error":
                raise Lost(f"{name} ended as {ended.ending}")
            require_message(ended, *words)
            outcome.took(ended.seconds)
            if not name.startswith("clips"):  # whose empty caption is encoded for the next training
                require_unwritten(before, host.files())
    with trial(host, outcome):
        pass
    return outcome


def wrong_numbers(host: Host, most: int | None = None) -> Outcome:
    """Every number of every node, by a link, as what it cannot be."""
    outcome = Outcome("wrong numbers by a link")
    known = host.session.object_info()
    cases = list(wrong_inputs(known))
    if most is not None:
        cases = random.sample(cases, min(most, len(cases)))
    host.succeed(graphs.render())  # what comes before the node is cached from here on
    before = host.files()
    for kind, name, value in cases:
        with trial(host, outcome, aftermath=False):
            prompt = prompt_for(kind, name, value, known)
            ended = host.run(prompt)
            if ended.ending != "execution_error":
                raise Lost(f"{kind}.{name} = {value} ended as {ended.ending}")
            require_message(ended, f"{name.rpartition('.')[2]} is ", "; allowed is ")
            outcome.took(ended.seconds)
    require_unwritten(before, host.files())
    with trial(host, outcome):
        pass
    return outcome


NO_NUMBERS = ('"many"', "null", "[]", "{}", "true")
VALUES = ("NaN", "Infinity", "-Infinity", "-1", "1000000000", "0", *NO_NUMBERS)
SOCKETS = {
    "MODEL": ["tiny", 0],
    "CLIP": ["tiny", 1],
    "VAE": ["tiny", 2],
    "ATLASVID_PLAN": ["plan", 0],
    "LATENT": ["plan", 1],
    "CONDITIONING": ["text", 0],
    "IMAGE": ["grey", 0],
}
"""Where a node gets what is no number."""


def numbers_of(inputs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict]]:
    """(name, options) of the numbers of a node, also of those that a choice brings along."""
    for group in ("required", "optional"):
        for name, (kind, *rest) in inputs.get(group, {}).items():
            options = rest[0] if rest else {}
            if kind in ("INT", "FLOAT"):
                yield prefix + name, options
            for option in options.get("options", []) if "DYNAMIC" in str(kind) else []:
                yield from numbers_of(option["inputs"], f"{prefix}{name}.")


def wrong_inputs(known: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(node, input, JSON) for everything that an input does not allow."""
    for kind in sorted(each for each in known if each.startswith("AtlasVid")):
        for name, options in numbers_of(known[kind]["input"]):
            for value in VALUES:
                if value in NO_NUMBERS or not options["min"] <= float(value) <= options["max"]:
                    yield kind, name, value


def prompt_for(kind: str, name: str, value: str, known: dict[str, Any]) -> Prompt:
    """The node with usual inputs, but for one that comes by a link."""
    prompt = graphs.models() | {
        "grey": graphs.node("EmptyImage", width=128, height=128, batch_size=1, color=0)
    }
    inputs = {}
    for each, (type_, *rest) in known[kind]["input"]["required"].items():
        options = rest[0] if rest else {}
        socket = SOCKETS.get(str(type_).split(",")[0])
        choices = type_ if isinstance(type_, list) else options.get("options")
        if socket:
            inputs[each] = socket
        elif choices:
            first = choices[0]
            inputs[each] = first["key"] if isinstance(first, dict) else first
        else:
            inputs[each] = options.get("default", "")
    outer, _, inner = name.partition(".")
    if inner:
        sides = {f"{outer}.{side}": 2 for side in ("frames", "height", "width")}
        inputs |= {outer: "custom", **sides}
    prompt["value"] = graphs.node("FaultValue", json=value)
    prompt["node"] = graphs.node(kind, **(inputs | {name: ["value", 0]}))
    if not known[kind]["output_node"]:
        prompt["sink"] = graphs.node("FaultSink", value=["node", 0])
    return prompt


PLAN_QUERIES: tuple[dict[str, Any], ...] = (
    {"seconds": "1e9"},
    {"fps": "1e9"},
    {"seconds": "nan"},
    {"width": "-1"},
    {"shape": "[" * 1500},
    {"shape": '{"dim": 0, "ffn_dim": 1, "layers": 1}'},
    {"model": "a" * 3000, "width": "many"},
    {"window": "custom", "window.frames": "-1"},
    {"guide_margin": "-5"},
)


def plan_queries(host: Host) -> Outcome:
    """What the plan's picture is drawn from: an answer within a second, whatever is asked for."""
    outcome = Outcome("wrong queries of the plan")
    largest = {"seconds": "600", "fps": "120", "width": "8192", "height": "8192"}
    for query in (*PLAN_QUERIES, largest | {"window": "custom", "temporal_stride": "1"}):
        with trial(host, outcome, aftermath=False):
            usual = {name: str(value) for name, value in graphs.PLAN.items()}
            begun = time.monotonic()
            answer = host.ask(f"/atlasvid/plan?{urlencode(usual | query)}")
            outcome.took(time.monotonic() - begun)
            if ("error" in answer) != (query in PLAN_QUERIES):
                raise Lost(f"{query} was answered with {str(answer)[:200]}")
            if len(json.dumps(answer)) > 20_000:
                raise Lost(f"{query} was answered with {len(json.dumps(answer))} bytes")
    return outcome


# --- Many in a row ---------------------------------------------------------------------------


def renders_in_a_row(host: Host, times: int) -> Outcome:
    """Renders with errors and cancels between them: nothing adds up."""
    outcome = Outcome(f"{times} renders in a row")
    for _ in range(3):  # what is made once and kept
        host.succeed(graphs.render(seed()))
        one_cancel(host)
        one_error(host)
    before = host.level()
    for done in range(times):
        with trial(host, outcome, aftermath=done == times - 1):
            host.succeed(graphs.render(seed()))
            if done % 3 == 1:
                one_error(host)
            if done % 3 == 2:
                one_cancel(host)
        if done == times - 1 or done % 10 == 9:
            outcome.growth = (host.level() - before).largest(outcome.growth or NOTHING)
    return outcome


def one_error(host: Host) -> None:
    prompt = graphs.render(seed())
    prompt["value"] = graphs.node("FaultValue", json="NaN")
    prompt["attention"]["inputs"]["end_percent"] = ["value", 0]
    if host.run(prompt).ending != "execution_error":
        raise Lost("a NaN was taken")


def one_cancel(host: Host) -> None:
    phase = PHASES[2]
    ended = host.run(phase.prompt(), when=phase.reached, fault=host.session.interrupt)
    if ended.ending != "execution_interrupted":
        raise Lost(f"a cancel ended as {ended.ending}")


# --- Words and files -------------------------------------------------------------------------


def require_message(ended: Run, *words: str) -> None:
    """An error that says these words, and none of a library's."""
    if ended.ending != "execution_error":
        raise Lost(f"ended as {ended.ending}")
    for word in words:
        if word not in ended.message:
            raise Lost(f"the error does not say {word!r}: {ended.message}")
    for word in RAW:
        if word in ended.message:
            raise Lost(f"the error says {word!r}: {ended.message}")


def require_unwritten(before: dict, after: dict) -> None:
    """Nothing new, but for the frames of a video that is still in use and may be saved again."""
    changed = [file.name for file, facts in after.items() if before.get(file) != facts]
    if changed := [name for name in changed if not name.startswith("atlasvid-")]:
        raise Lost(f"written or changed: {changed}")
