"""The two files of the world's FlashVSR: half precision, its largest matrices in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from atlasvid.engine.families.tiny import WORLD_VERSION, world_state
from atlasvid.engine.flashvsr.tiny import PROMPT
from safetensors.torch import save_file
from torch import Tensor

from .vsr_start import CONSTANT

State = dict[str, Tensor]
LARGEST = 200.0
"""Of an 8-bit matrix, whose own largest number is 448."""
NET, PROJECTION = "net.", "projection."
"""Of the student's names; the decoder's begin with `decoder.`."""
TEXT = "text_embedding.0.weight"
CONVS = ("conv1", "conv2")


def packed(student: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> tuple[State, State]:
    """What the files hold: the transformer, and all else.

    An 8-bit matrix is scaled up to where its numbers are finest. The prompt is scaled down in
    return; after the convolutions a norm takes any scale away.
    """
    net = _without(student, NET)
    text, scale = _eight_bits(net[TEXT])
    transformer = {name: _half(value) for name, value in net.items()} | {TEXT: text}
    rest = {PROMPT: _half(student[PROMPT] / scale)}
    rest |= {name: _half(value) for name, value in decoder.items()}
    rest |= {name: _half(v) for name, v in student.items() if name.startswith(PROJECTION)}
    for conv in CONVS:
        weight, bias = (f"{PROJECTION}{conv}.{part}" for part in ("weight", "bias"))
        rest[weight], scale = _eight_bits(student[weight])
        rest[bias] = _half(student[bias] * scale)
    return transformer, rest


def unpacked(transformer: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> tuple[State, State]:
    """The student's and the decoder's weights of the files, at the scale that training began with.

    Its learning rates suit a prompt of unit variance and convolutions whose constant channel is 6.
    """
    student = {NET + name: value.float() for name, value in transformer.items()}
    student |= {name: v.float() for name, v in rest.items() if not name.startswith("decoder.")}
    scale = student[PROMPT].pow(2).mean().sqrt()
    student[PROMPT] = student[PROMPT] / scale
    student[NET + TEXT] = student[NET + TEXT] * scale
    for conv in CONVS:
        weight, bias = (f"{PROJECTION}{conv}.{part}" for part in ("weight", "bias"))
        scale = CONSTANT / student[bias].max()
        student |= {name: student[name] * scale for name in (weight, bias)}
    return student, {name: v.float() for name, v in rest.items() if name.startswith("decoder.")}


def save(folder: Path, student: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> None:
    """Write both files, marked with the version that the pack reads."""
    transformer, rest = packed(student, decoder)
    for name, state in (("flashvsr_transformer", transformer), ("flashvsr", rest)):
        path = folder / f"tiny_world_{name}.safetensors"
        save_file(state, path, {"format": "pt", "tiny_world": WORLD_VERSION})


def load(folder: Path) -> tuple[State, State]:
    """The student's and the decoder's weights of a finished family.

    Raises:
        ValueError: a file is missing, cut short, or of another version of this pack.
    """
    names = ("flashvsr_transformer", "flashvsr")
    return unpacked(*(world_state(name, folder) for name in names))


def _without(state: Mapping[str, Tensor], prefix: str) -> State:
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def _half(value: Tensor) -> Tensor:
    return value.half().contiguous()


def _eight_bits(weight: Tensor) -> tuple[Tensor, float]:
    """The scaled weight, and by how much."""
    scale = LARGEST / float(weight.abs().max())
    return (weight * scale).to(torch.float8_e4m3fn).contiguous(), scale
