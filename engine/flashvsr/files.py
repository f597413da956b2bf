"""FlashVSR's files: which there are, what is in them, what is wrong with them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..comfyui import management, models, server
from ..families.wan import TEXT_WIDTH
from .bundle import FlashVSR
from .projection import PATCH, VERSIONS, LowQualityProjection
from .tc_decoder import TCDecoder, load_tc_decoder

HEAD = 128
"""Width of a head, over which positions are split 44 / 42 / 42."""
PREFIX = "LQ_proj_in."
PICKLES = (".ckpt", ".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *PICKLES)
NONE = "none"
HUB = "huggingface.co/JunhaoZhuang/FlashVSR-v1.1 (v1: huggingface.co/JunhaoZhuang/FlashVSR)"


@dataclass(frozen=True)
class Role:
    """What a file is for.

    Args:
        file: its published name.
        words: one of which names of such files hold.
        where: it is published.
    """

    file: str
    words: tuple[str, ...]
    where: str = HUB

    @property
    def missing(self) -> str:
        """Stands among the choices where no such file is there; ComfyUI's errors list those."""
        return f"missing: put {self.file} into models/{server.FLASHVSR}"


ROLES = {
    "transformer": Role(
        "diffusion_pytorch_model_streaming_dmd.safetensors", ("streaming_dmd", "flashvsr")
    ),
    "projection": Role("LQ_proj_in.ckpt", ("lq_proj",)),
    "prompt": Role(
        "posi_prompt.pth",
        ("prompt",),
        "github.com/OpenImagingLab/FlashVSR, in examples/WanVSR/prompt_tensor",
    ),
    "tc_decoder": Role("TCDecoder.ckpt", ("tcdecoder", "tc_decoder")),
}
"""By the loader's inputs."""
PUBLISHED_BYTES = {575_695_268: "v1", 575_694_948: "v1.1"}
"""Of LQ_proj_in.ckpt: nothing else tells the versions apart."""


def choices(role: str) -> list[str]:
    """The files that may be chosen for a role, the likely ones first; or that it is missing."""
    names = [name for name in server.flashvsr_names() if Path(name).suffix in SUFFIXES]
    if role == "transformer":
        names = sorted({*names, *server.diffusion_model_names()})
    likely = [name for name in names if _is_likely(name, role)]
    rest = [name for name in names if name not in likely]
    if role == "tc_decoder":
        return [*likely, NONE, *rest]
    return [*(likely or [ROLES[role].missing]), *rest]


def _is_likely(name: str, role: str) -> bool:
    """By the name of the file; other roles' words rule it out."""
    said = {r for r in ROLES if any(word in Path(name).name.lower() for word in ROLES[r].words)}
    return role in said and said <= {role, "transformer"}


def paths_of(names: Mapping[str, str]) -> dict[str, Path]:
    """The chosen files by role; without a decoder where none is chosen.

    Raises:
        ValueError: some are not there; says where each belongs and where it is published.
    """
    chosen = {r: name for r, name in names.items() if (r, name) != ("tc_decoder", NONE)}
    found = {role: server.flashvsr_file(name) for role, name in chosen.items()}
    lacking = [_advice(chosen[role], role) for role, path in found.items() if path is None]
    if lacking:
        raise ValueError("\n".join(lacking))
    return {role: path for role, path in found.items() if path}


def _advice(name: str, role: str) -> str:
    wanted = ROLES[role]
    folders = " or ".join(server.flashvsr_folders())
    what = wanted.file if name == wanted.missing else repr(name)
    return (
        f"{role}: there is no file {what}. Put it into {folders}. FlashVSR's own is {wanted.file}, "
        f"at {wanted.where}."
    )


def load_flashvsr(
    *, transformer: str, projection: str, prompt: str, tc_decoder: str, version: str
) -> FlashVSR:
    """The parts of FlashVSR from the names of their files.

    Raises:
        ValueError: a file is missing, cannot be read or holds something else; says which and why.
    """
    if version not in VERSIONS:
        raise ValueError(f"version is {version!r}; allowed are {' and '.join(VERSIONS)}.")
    names = {"transformer": transformer, "projection": projection, "prompt": prompt}
    paths = paths_of(names | {"tc_decoder": tc_decoder})
    shown = read_prompt(paths["prompt"])
    with _naming(paths["projection"]):
        require_version(paths["projection"], version)
    lq = read_projection(paths["projection"])
    decoder = read_decoder(paths["tc_decoder"]) if "tc_decoder" in paths else None
    model = read_transformer(paths["transformer"])
    with _naming(paths["transformer"]):
        require_together(model, lq, shown)
    return FlashVSR(
        model,
        models.patcher(lq),
        shown,
        None if decoder is None else models.patcher(decoder),
        version,
    )


def read_transformer(path: Path) -> Any:
    """The transformer of a file, through ComfyUI's own loader.

    Raises:
        ValueError: it cannot be read, or holds another model.
    """
    try:
        model = models.load_diffusion_model_file(str(path))
    except Exception as error:  # of many kinds: whatever reads the file, or the loader raises
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{path.name} cannot be loaded as a diffusion model ({first}). Choose "
            "diffusion_pytorch_model_streaming_dmd.safetensors; if it is that, download it again."
        ) from error
    with _naming(path):
        require_transformer(model)
    return model


def require_transformer(model: Any) -> None:
    """Raises ValueError where a loaded model is not of FlashVSR's kind."""
    if not models.is_plain_wan(model):
        raise ValueError(
            f"This is a {models.model_name(model)}. FlashVSR's transformer is a Wan 2.1 "
            "text-to-video model: choose diffusion_pytorch_model_streaming_dmd.safetensors."
        )
    net = model.model.diffusion_model
    if net.in_dim != 16 or net.model_type != "t2v":
        raise ValueError(
            f"This Wan is of type {net.model_type} with {net.in_dim} input channels. FlashVSR's "
            "transformer is of type t2v with 16: choose "
            "diffusion_pytorch_model_streaming_dmd.safetensors."
        )
    if net.dim != net.num_heads * HEAD:
        raise ValueError(f"This Wan has heads of {net.dim // net.num_heads}; they must be {HEAD}.")


def require_together(model: Any, projection: LowQualityProjection, prompt: Tensor) -> None:
    """Raises ValueError where the parts are of different sizes."""
    dim = model.model.diffusion_model.dim
    width = projection.linear_layers[0].out_features
    if width != dim:
        raise ValueError(
            f"The projection makes tokens of {width} numbers, the transformer takes {dim}. "
            "Choose the LQ_proj_in file that belongs to this transformer."
        )
    text = model.model.diffusion_model.text_embedding[0].in_features
    if prompt.shape[-1] != text:
        raise ValueError(
            f"The prompt has {prompt.shape[-1]} numbers per token, the transformer takes {text}. "
            "Choose posi_prompt.pth of FlashVSR."
        )


def read_decoder(path: Path) -> TCDecoder:
    """The Tiny Conditional decoder of a file, in the dtype to compute in.

    Raises:
        ValueError: weights are missing or have other shapes; names them.
    """
    state = read_tensors(path)
    with _naming(path):
        return load_tc_decoder(state, management.compute_dtype(management.compute_device()))


def read_projection(path: Path) -> LowQualityProjection:
    """The LQ projection of a file, with or without the prefix in its keys.

    Raises:
        ValueError: keys are missing or shapes do not fit together; names them.
    """
    state = read_tensors(path)
    if any(name.startswith(PREFIX) for name in state):
        state = {n.removeprefix(PREFIX): v for n, v in state.items() if n.startswith(PREFIX)}
    with _naming(path):
        return projection_of(state)


def projection_of(state: Mapping[str, Tensor]) -> LowQualityProjection:
    """The LQ projection of a state dict.

    Raises:
        ValueError: keys are missing or shapes do not fit together; names them.
    """
    advice = "Choose LQ_proj_in.ckpt of FlashVSR."
    missing = [name for name in projection_shapes(0, 0, 0) if name not in state]
    if missing:
        raise ValueError(f"This is no LQ projection: {', '.join(missing)} missing. {advice}")
    widths = (
        state["conv1.weight"].shape[0],
        state["conv2.weight"].shape[0],
        state["linear_layers.0.weight"].shape[0],
    )
    needed = projection_shapes(*widths)
    wrong = [name for name, shape in needed.items() if tuple(state[name].shape) != shape]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{name} has the shape {list(state[name].shape)}, but needs {list(needed[name])}. "
            + advice
        )
    return LowQualityProjection.from_state({name: state[name] for name in needed})


def projection_shapes(first: int, second: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """The published keys with their shapes at some widths."""
    kernel = (4, 3, 3)
    return {
        "conv1.weight": (first, 3 * PATCH**2, *kernel),
        "conv1.bias": (first,),
        "norm1.gamma": (first, 1, 1, 1),
        "conv2.weight": (second, first, *kernel),
        "conv2.bias": (second,),
        "norm2.gamma": (second, 1, 1, 1),
        "linear_layers.0.weight": (tokens, second),
        "linear_layers.0.bias": (tokens,),
    }


def read_prompt(path: Path) -> Tensor:
    """The text [1, L, width] that the checkpoint was trained with.

    Raises:
        ValueError: the file holds something else.
    """
    tensors = list(read_tensors(path).values())
    if len(tensors) == 1 and tensors[0].ndim == 3 and tensors[0].shape[0] == 1:
        return tensors[0].float()
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors[:3])
    raise ValueError(
        f"{path.name} is no prompt of FlashVSR: it holds {shapes or 'nothing'}, a prompt is one "
        f"tensor [1, 512, {TEXT_WIDTH}]. Choose posi_prompt.pth of FlashVSR."
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, which is data: nothing in it is run.

    Raises:
        ValueError: it cannot be read, or holds other things than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path.name} cannot be read ({str(error).splitlines()[0]}): it is cut short or holds "
            "more than tensors. Download it again; a safetensors copy is read, too."
        ) from error
    if isinstance(content, Tensor):
        return {"": content}
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__} in place of tensors.")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def require_version(path: Path, version: str) -> None:
    """Raises ValueError where a published projection is of another version."""
    own = PUBLISHED_BYTES.get(path.stat().st_size, version)
    if own != version:
        raise ValueError(
            f"This is the LQ projection of FlashVSR {own}, and version is {version}: the video "
            "would show ghosts. Choose all files of one version, and that version."
        )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts a file's name before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
