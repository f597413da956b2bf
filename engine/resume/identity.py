"""What a value is, as a hash that is the same after a restart.

Data is told by its bytes. Code is told by its source: of ComfyUI and of this pack, whose functions
and objects are known to keep no state from call to call. Anything else is refused: an answer that
may depend on what we cannot see is never kept.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from fractions import Fraction
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..comfyui import management, origins

PACK = __name__.partition(".engine.")[0]
PACK_FOLDER = Path(__file__).resolve().parents[2]
SLICE = 64 * 2**20
"""Bytes of a tensor that are hashed at a time."""
DIGEST_BYTES = 16
PLAIN = (type(None), bool, int, float, complex, str, bytes, Fraction)
CONSTANTS = (torch.dtype, torch.layout, torch.memory_format, torch.Size)
WRITES = {"STORE_DEREF", "DELETE_DEREF", "STORE_GLOBAL", "DELETE_GLOBAL"}


class Unstable(Exception):  # noqa: N818  (it says what was found, and is no error of the artist's)
    """A value that another run could not be compared with; says where it was found."""


def digest(value: Any, tensors: TensorDigests | None = None) -> bytes:
    """The hash of a value.

    Args:
        tensors: remembers those that were hashed before.

    Raises:
        Unstable: the value, or a part of it, cannot be told by its content.
    """
    stream = _Stream(TensorDigests() if tensors is None else tensors)
    stream.add(value, "")
    return stream.hash.digest()


# --- Tensors --------------------------------------------------------------------------------


class TensorDigests:
    """Hashes of tensors, remembered by object for as long as this lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, bytes]] = {}

    def of(self, tensor: Tensor) -> bytes:
        if id(tensor) not in self._known:
            self._known[id(tensor)] = tensor, tensor_digest(tensor)
        return self._known[id(tensor)][1]


def tensor_digest(tensor: Tensor) -> bytes:
    """The hash of a tensor's type, shape and every byte, on whatever device it lies.

    Raises:
        Unstable: it has no bytes of its own (meta, sparse, nested).
    """
    made = hashlib.blake2b(digest_size=DIGEST_BYTES)
    if (inner := getattr(tensor, "_qdata", None)) is not None:  # comfy_kitchen's quantised tensor
        params = vars(tensor._params)  # type: ignore[attr-defined]
        made.update(tensor_digest(inner))
        made.update(digest({"layout": str(tensor._layout_cls), **params}))  # type: ignore[attr-defined]
        return made.digest()
    plain = tensor.detach()
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):  # GGUF keeps raw bytes so
        facts = {k: str(v) for k, v in vars(tensor).items() if k != "patches"}
        made.update(digest({"class": type(tensor).__qualname__, **facts}))
        plain = plain.as_subclass(Tensor)
    if plain.is_meta or plain.is_nested or plain.layout != torch.strided:
        raise Unstable(f"a tensor without bytes of its own ({plain.device}, {plain.layout})")
    made.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
    flat = plain.resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.stride() != (1,):  # of one number that was expanded
        flat = flat.clone(memory_format=torch.contiguous_format)
    step = max(1, SLICE // max(1, flat.element_size()))
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].view(torch.uint8)
        made.update(part.cpu().numpy().data)
    return made.digest()


def weights_digest(
    weights: Iterable[tuple[str, Tensor]], on_progress: Callable[[float], None]
) -> bytes:
    """The hash of all weights, every byte of them, on all cores.

    Args:
        on_progress: is given the share that is done.

    Raises:
        Unstable: see `tensor_digest`.
    """
    listed = list(weights)
    total = sum(tensor.nbytes for _, tensor in listed) or 1
    made, done = hashlib.blake2b(digest_size=DIGEST_BYTES), 0
    pool = ThreadPoolExecutor(min(16, cpu_count() or 1))
    try:
        results = pool.map(lambda entry: tensor_digest(entry[1]), listed)
        for (name, tensor), result in zip(listed, results, strict=True):
            management.raise_if_cancelled()
            made.update(name.encode() + b"\0" + result)
            done += tensor.nbytes
            on_progress(done / total)
    finally:
        pool.shutdown(cancel_futures=True)
    return made.digest()


# --- Code -----------------------------------------------------------------------------------


@functools.cache
def sources_digest() -> bytes:
    """The hash of the sources that compute an answer: ComfyUI's and this pack's."""
    folders = [*origins.source_folders(), PACK_FOLDER / "engine", PACK_FOLDER / "nodes"]
    return digest([_folder_digest(folder) for folder in folders])


@functools.cache
def _folder_digest(folder: Path) -> bytes:
    made = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for file in sorted(folder.rglob("*.py")):
        made.update(f"{file.relative_to(folder).as_posix()}\0".encode())
        made.update(hashlib.blake2b(file.read_bytes(), digest_size=DIGEST_BYTES).digest())
    return made.digest()


def layers(model: nn.Module) -> dict[str, Any]:
    """The classes of a model's layers; those of other packs with the sources beside them.

    Raises:
        Unstable: a layer has a hook, or a forward of its own.
    """
    classes: dict[str, Any] = {}
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise Unstable(f"a hook on the layer {name or type(module).__name__}")
        kind = type(module)
        if (label := _label(kind)) not in classes:
            known = _root(kind.__module__) in (*origins.HOST_PACKAGES, "torch", PACK)
            classes[label] = None if known else _folder_digest(_source_folder(kind))
    return classes


def _source_folder(kind: type) -> Path:
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None:
        raise Unstable(f"the layer {_label(kind)}, whose source is not at hand")
    return Path(file).resolve().parent


def _root(module: str) -> str:
    """The package that a module belongs to."""
    return PACK if f"{module}.".startswith(f"{PACK}.") else module.partition(".")[0]


def _label(thing: Any) -> str:
    """The name of a class or function, wherever the pack was installed."""
    return f"{thing.__module__.removeprefix(PACK)}.{thing.__qualname__}"


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def keeps_state(function: types.FunctionType) -> bool:
    """Whether a function writes to a variable that outlives its call."""
    outside = set(function.__code__.co_freevars)
    return any(
        step.opname in WRITES and (step.opname.endswith("GLOBAL") or step.argval in outside)
        for code in _codes(function.__code__)
        for step in dis.get_instructions(code)
    )


# --- Values ---------------------------------------------------------------------------------


class _Stream:
    """Values one after the other into one hash, each with its type and length."""

    def __init__(self, tensors: TensorDigests):
        self.hash = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self._tensors = tensors
        self._open: list[int] = []

    def add(self, value: Any, where: str) -> None:
        """Raises Unstable, naming the place, for what cannot be told by its content."""
        if id(value) in self._open:
            self._mark("seen", str(self._open.index(id(value))))
            return
        self._open.append(id(value))
        try:
            self._dispatch(value, where)
        finally:
            self._open.pop()

    def _mark(self, kind: str, content: str | bytes = b"") -> None:
        data = content.encode() if isinstance(content, str) else content
        self.hash.update(f"{kind}:{len(data)}:".encode() + data)

    def _dispatch(self, value: Any, where: str) -> None:
        if isinstance(value, enum.Enum):
            self._mark("enum", f"{_label(type(value))}.{value.name}")
        elif type(value) in PLAIN:
            self._mark(type(value).__name__, repr(value))
        elif isinstance(value, CONSTANTS):
            self._mark("constant", str(value))
        elif isinstance(value, torch.device):
            self._mark("device", value.type)
        elif isinstance(value, Tensor):
            self._mark("tensor", self._tensors.of(value))
        elif isinstance(value, np.ndarray | np.generic):
            array = np.ascontiguousarray(value)
            self._mark("array", f"{array.dtype} {array.shape}".encode() + array.tobytes())
        elif isinstance(value, Mapping):
            self._mapping(value, where)
        elif isinstance(value, tuple | list):
            self._all(type(value).__name__, value, where)
        elif isinstance(value, set | frozenset):
            self._all("set", sorted(digest(item, self._tensors) for item in value), where)
        elif isinstance(value, functools.partial):
            self._all("partial", [value.func, value.args, value.keywords], where)
        else:
            self._code_or_object(value, where)

    def _all(self, kind: str, parts: Iterable[Any], where: str) -> None:
        parts = list(parts)
        self._mark(kind, str(len(parts)))
        for part in parts:
            self.add(part, where)

    def _mapping(self, mapping: Mapping, where: str) -> None:
        self._mark("mapping", str(len(mapping)))
        for key, value in mapping.items():
            self.add(key, where)
            self.add(value, f"{where} / {key}" if where else str(key))

    def _code_or_object(self, value: Any, where: str) -> None:
        value = getattr(value, "_torchdynamo_orig_callable", value)  # torch.compiler.disable's
        if isinstance(value, types.MethodType):
            self._all("method", [value.__func__.__qualname__, value.__self__], where)
        elif isinstance(value, types.FunctionType):
            self._function(value, where)
        elif isinstance(value, types.ModuleType):
            self._known(value.__name__, where, value)
            self._mark("module", value.__name__.removeprefix(PACK))
        elif isinstance(value, type):
            self._known(value.__module__, where, value, "torch")
            self._mark("class", _label(value))
        elif isinstance(value, nn.Module):
            self._layer(value, where)
        else:
            self._object(value, where)

    def _known(self, module: str, where: str, value: Any, *more: str) -> None:
        if _root(module) not in (*origins.HOST_PACKAGES, PACK, *more):
            raise Unstable(_found(value, where))

    def _function(self, function: types.FunctionType, where: str) -> None:
        self._known(function.__module__ or "", where, function)
        kept = [cell.cell_contents for cell in function.__closure__ or ()]
        kept += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        own = _root(function.__module__) == PACK
        if keeps_state(function) or not (own or all(map(_cannot_change, kept))):
            raise Unstable(f"{_found(function, where)}, which keeps a state from step to step")
        self._mark("function", _label(function))
        self._all("kept", kept, where)

    def _layer(self, layer: nn.Module, where: str) -> None:
        self._all("layer", [kind.__qualname__ for kind in type(layer).__mro__], where)
        self.add(layers(layer), where)
        self.add(dict(layer.named_parameters()), where)
        self.add(dict(layer.named_buffers()), where)
        public = {k: v for k, v in vars(layer).items() if not k.startswith("_")}
        self.add({k: v for k, v in public.items() if k != "training"}, where)

    def _object(self, value: Any, where: str) -> None:
        kind = type(value)
        if hasattr(kind, "identity") and _root(kind.__module__) == PACK:
            content = value.identity()
        elif _root(kind.__module__) == PACK and is_dataclass(value):
            kept = [f.name for f in fields(value) if f.metadata.get("identity", True)]
            content = {name: getattr(value, name) for name in kept}
        elif _root(kind.__module__) == PACK or isinstance(value, origins.DATA_CLASSES):
            content = vars(value)
        else:
            raise Unstable(_found(value, where))
        self._mark("object", _label(kind))
        self.add(content, where)


def _cannot_change(value: Any) -> bool:
    """Whether a variable that a function of ComfyUI carries along can hold no state."""
    if isinstance(value, tuple):
        return all(map(_cannot_change, value))
    return isinstance(value, (*PLAIN, *CONSTANTS, Tensor, type, types.FunctionType))


def _found(value: Any, where: str) -> str:
    thing = value if hasattr(value, "__qualname__") else type(value)
    module = (inspect.getmodule(thing) or types.ModuleType("?")).__name__
    return f"{thing.__qualname__} of {module.rpartition('/')[2]}" + (f" ({where})" if where else "")
