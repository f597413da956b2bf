"""What a node hands to the engine under which names, and what comes of it: for any node."""

import inspect
import sys
import types
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.sd
import torch
from PIL.Image import Image

ENGINE, NODES = "atlasvid.engine", "atlasvid.nodes"
STATE = "state.safetensors"
"""Not looked at: it repeats the settings of a training, whether they have an effect or not."""


@dataclass
class Seen:
    """One execution of a node."""

    named: dict[str, list]
    """Values by the engine's name of the parameter that a node gave them to, or of its output."""
    effects: dict[str, Any]
    """What came of it: outputs, what the node shows, files, how often each engine function ran."""


class _Recorder:
    """A profile function: the engine really runs, and its own names tell what it was given."""

    def __init__(self) -> None:
        self.named: dict[str, list] = defaultdict(list)
        self.ran: Counter = Counter()

    def __call__(self, frame: types.FrameType, event: str, _: Any) -> None:
        if event != "call" or not _module(frame).startswith(ENGINE):
            return
        code = frame.f_code
        self.ran[_module(frame), code.co_qualname] += 1
        if _module(frame.f_back).startswith(NODES):
            for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
                self.add(name, frame.f_locals[name])

    def add(self, name: str, value: Any) -> None:
        if name == "self":
            return
        self.named[name].append(frozen(value))
        for part in getattr(value, "_fields", ()):  # a grid's sides are inputs of their own
            self.named[part].append(frozen(getattr(value, part)))


def _module(frame: types.FrameType | None) -> str:
    return frame.f_globals.get("__name__", "") if frame else ""


def observe(node: Any, inputs: dict[str, Any], folder: Path) -> Seen:
    """Execute a node as ComfyUI does.

    Args:
        folder: where it may write files.
    """
    schema = node.define_schema()
    if schema.is_input_list:
        inputs = {k: v if isinstance(v, list) else [v] for k, v in inputs.items()}
    recorder = _Recorder()
    sys.setprofile(recorder)
    try:
        result = node.PREPARE_CLASS_CLONE(None).execute(**inputs)
    finally:
        sys.setprofile(None)
    for socket, value in zip(schema.outputs, result.args, strict=True):
        recorder.add(socket.id or socket.display_name, value)
    shown = {k: v for k, v in (result.ui or {}).items() if k != "images"}  # of random names
    written = [file for file in folder.rglob("*") if file.is_file() and file.name != STATE]
    files = {str(file): zlib.crc32(file.read_bytes()) for file in written}
    effects = {"outputs": frozen(result.args), "shown": shown, "files": files, "ran": recorder.ran}
    return Seen(recorder.named, effects)


def require_effect(base: Seen, changed: Seen, *names: str) -> None:
    """Fail unless a changed input arrived under its own name and made a difference.

    Args:
        names: of the input, and of the engine's parameters or the outputs that stand for it.
    """
    found = [name for name in names if name in base.named]
    assert found, f"nothing that the engine is given, and no output, is called {' or '.join(names)}"
    for name in found:
        same = [value for value in base.named[name] if value in changed.named[name]]
        assert not same, f"{name} does not follow the input: it stays {same}"
    assert base.effects != changed.effects, "no output, file or work changes"


def _of_module(module: torch.nn.Module) -> Any:
    return module.state_dict(), {k: v for k, v in vars(module).items() if not k.startswith("_")}


def _of_function(function: types.FunctionType) -> Any:
    inner: Any = inspect.unwrap(function)
    cells = function.__closure__ or ()
    return (
        inner if inner is not function else (inner.__qualname__, [c.cell_contents for c in cells])
    )


CONTENTS: dict[type, Callable[[Any], Any]] = {
    torch.Tensor: lambda x: (
        x.shape,
        x.dtype,
        zlib.crc32(x.detach().cpu().float().numpy().tobytes()),
    ),
    comfy.model_patcher.ModelPatcher: lambda model: (
        getattr(model.model, "diffusion_model", model.model),
        model.model_options,
        model.wrappers,
        model.object_patches,
    ),
    comfy.sd.VAE: lambda vae: vae.first_stage_model,
    torch.nn.Module: _of_module,
    types.MethodType: lambda method: (method.__name__, method.__self__),
    types.FunctionType: _of_function,
    types.ModuleType: lambda module: module.__name__,
    Image: Image.tobytes,
}


def frozen(value: Any) -> Any:
    """A value that compares by content: by all that its outcome depends on, closures too."""
    for kind, contents in CONTENTS.items():
        if isinstance(value, kind):
            return frozen(contents(value))
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(item) for item in value]
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return value
    return type(value), frozen(vars(value))
