"""What an answer of a model depends on, as ComfyUI keeps it: to tell one render from another."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.weight_adapter
import torch
from comfy.cli_args import args
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from comfyui_version import __version__
from torch import Tensor

from . import models

HOST_PACKAGES = ("comfy", "comfy_extras", "comfy_api", "comfy_execution")
"""ComfyUI's own code: its sources are part of a fingerprint, its layers keep no state."""
DATA_CLASSES = (
    comfy.conds.CONDRegular,
    comfy.clip_vision.Output,
    comfy.weight_adapter.WeightAdapterBase,
    comfy.latent_formats.LatentFormat,
)
"""Classes of ComfyUI that are what their attributes say, and do not change by being used."""
PACKAGES = (
    "torch",
    "comfy-kitchen",
    "comfy-aimdo",
    "triton",
    "xformers",
    "sageattention",
    "flash-attn",
    "spas-sage-attn",
)
"""What computes beside ComfyUI."""
FLAGS = (
    "fast",
    "deterministic",
    "force_upcast_attention",
    "dont_upcast_attention",
    "force_channels_last",
    "supports_fp8_compute",
    "cuda_malloc",
)
LEFT_OUT_OPTIONS = ("denoise_mask_function", "to_load_options")
"""Model options that act outside of the model's answer, or repeat others."""


def environment() -> dict[str, Any]:
    """Versions, device and start flags that decide how the machine computes."""
    device = comfy.model_management.get_torch_device()
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "comfyui": __version__,
        "packages": installed,
        "cuda": torch.version.cuda,
        "device": comfy.model_management.get_torch_device_name(device),
        "attention": models.started_attention(),
        "flags": {name: getattr(args, name, None) for name in FLAGS},
        "matmul": torch.get_float32_matmul_precision(),
    }


def source_folders() -> list[Path]:
    """Where the code lies that computes an answer, ComfyUI's part of it."""
    comfyui = Path(inspect.getfile(comfy.samplers)).parents[1]
    return [comfyui / "comfy", comfyui / "comfy_extras"]


def replaced_functions(model: Any) -> list[str]:
    """Functions between sampler and model that another pack has put in ComfyUI's place."""
    kind, net = type(model.model), type(model.model.diffusion_model)
    sampling, guider = comfy.samplers, comfy.samplers.CFGGuider
    stations = [
        *((sampling, name) for name in ("sampling_function", "calc_cond_batch", "cfg_function")),
        (sampling, "_calc_cond_batch"),
        (guider, "predict_noise"),
        (kind, "apply_model"),
        (kind, "_apply_model"),
        (net, "forward"),
    ]
    found = []
    for owner, name in stations:
        function = getattr(owner, name, None)
        allowed = (*HOST_PACKAGES, getattr(owner, "__module__", "").partition(".")[0])
        if function is not None and function.__module__.partition(".")[0] not in allowed:
            found.append(f"{function.__module__}.{function.__qualname__}")
    return found


def weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a ModelPatcher by its name, as it was before LoRAs were put on it."""
    for parent, module in model.model.named_modules():
        kept = set(module._buffers) - module._non_persistent_buffers_set
        for leaf, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and (leaf in module._parameters or leaf in kept):
                name = f"{parent}.{leaf}".lstrip(".")
                before = model.backup.get(name)
                yield name, tensor if before is None else before.weight


def patches(model: Any) -> dict[str, Any]:
    """All that nodes put on a model beside its options, in the order in which it acts."""
    return {
        "weight patches": model.patches,
        "weight wrappers": model.weight_wrapper_patches,
        "hooks": model.hook_patches or None,
        "injections": model.injections,
        "additional models": model.additional_models,
        "attachments": model.attachments,
        "object patches": model.object_patches,
        "dtype": model.model.get_dtype_inference(),
        "network": _numbers(model.model.diffusion_model),
        "noise levels": _numbers(model.get_model_object("model_sampling")),
    }


def _numbers(thing: Any) -> dict[str, Any]:
    """The plain attributes of an object, such as a network's width or the shift of noise levels."""
    kept = {key: value for key, value in vars(thing).items() if not key.startswith("_")}
    return {k: v for k, v in kept.items() if isinstance(v, int | float | str)}


def options(model_options: dict, own: tuple[str, ...]) -> dict[str, Any]:
    """Model options as a sampler passes them, without what does not change an answer.

    Args:
        own: keys, of wrappers and options, that are left out.
    """
    kept = {key: value for key, value in model_options.items() if key not in LEFT_OUT_OPTIONS}
    transformer = {
        key: value
        for key, value in model_options.get("transformer_options", {}).items()
        if key not in own
    }
    for kind in ("wrappers", "callbacks"):
        transformer[kind] = {
            call: {key: found for key, found in keyed.items() if found and key not in own}
            for call, keyed in transformer.get(kind, {}).items()
        }
    compiled = transformer["wrappers"].get(models.Wrappers.APPLY_MODEL)
    if compiled:  # what is compiled, and how, is told by the model and by the node's choices
        compiled.pop(COMPILE_KEY, None)
    return {**kept, "transformer_options": transformer}


GUIDER_PARTS = ("model_patcher", "model_options", "original_conds", "inner_model", "loaded_models")


def guider_state(guider: Any) -> dict[str, Any]:
    """Cfg, conditionings and whatever else a guider goes by."""
    state = {key: value for key, value in vars(guider).items() if key not in GUIDER_PARTS}
    state["conds"] = {
        name: [{key: value for key, value in cond.items() if key != "uuid"} for cond in conds]
        for name, conds in state.get("conds", {}).items()
    }
    return state


def sampler_label(sampler: Any) -> str:
    """What a sampler is called; how it works does not matter to an answer."""
    function = getattr(sampler, "sampler_function", None)
    return f"{type(sampler).__name__} {getattr(function, '__name__', '')}".strip()
