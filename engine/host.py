"""The only module that touches ComfyUI: everything the engine needs of its host, by name."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.ldm.common_dit
import comfy.ldm.modules.attention
import comfy.ldm.wan.model
import comfy.ldm.wan.vae
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import comfy.sample
import comfy.sd
import folder_paths
import torch
from torch import Tensor

log = logging.getLogger("atlasvid")
Wrappers = comfy.patcher_extension.WrappersMP

SUPPORTED_MODELS = "Wan 2.1 T2V, Wan 2.1 I2V, Wan 2.2 A14B (high and low noise), Wan 2.2 TI2V-5B"


@dataclass(frozen=True)
class LatentSpace:
    """How a model family packs pixels into latents."""

    channels: int
    spatial: int
    """Pixels per latent, height and width."""
    temporal: int
    """Frames per latent after the first."""
    patch: tuple[int, int, int]
    """Latents per token: frames, height, width."""


def use_on_device(model: Any) -> torch.device:
    """Load a model's weights where ComfyUI computes, and say where that is."""
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    return model.load_device


def model_name(model: Any) -> str:
    """What ComfyUI recognised the loaded model as, in words for an error message."""
    base = model.model
    inner = getattr(base, "diffusion_model", None)
    return f"{type(base).__name__} ({type(inner).__name__})"


def require_wan(model: Any) -> None:
    """Refuse a model whose blocks are not the plain Wan blocks.

    Raises:
        ValueError: names the model found and the models supported.
    """
    wan22 = getattr(comfy.model_base, "WAN22", None)
    plain = type(model.model) in (comfy.model_base.WAN21, wan22)
    inner: Any = getattr(model.model, "diffusion_model", None)
    if not (plain and type(inner) is comfy.ldm.wan.model.WanModel and inner.ref_conv is None):
        raise ValueError(
            f"AtlasVid cannot work on this model: it was recognised as {model_name(model)}. "
            f"Supported are {SUPPORTED_MODELS}. Load one of those with Load Diffusion Model "
            "(VACE, Animate, Camera, Fun-Control and other architectures have other blocks)."
        )


def latent_space(model: Any) -> LatentSpace:
    """The latent space of a loaded Wan model.

    Raises:
        ValueError: the model is not a supported Wan.
    """
    require_wan(model)
    latent_format = model.get_model_object("latent_format")
    return LatentSpace(
        channels=latent_format.latent_channels,
        spatial=latent_format.spacial_downscale_ratio,
        temporal=getattr(latent_format, "temporal_downscale_ratio", 4),
        patch=tuple(model.model.diffusion_model.patch_size),
    )


def process_latent_in(model: Any, latent: Tensor) -> Tensor:
    """A ComfyUI latent in the normalised space that the model works in."""
    return model.get_model_object("latent_format").process_in(latent)


def percent_to_sigma(model: Any, percent: float) -> float:
    """The noise level reached when `percent` (0 to 1) of the sampling is done."""
    return float(model.get_model_object("model_sampling").percent_to_sigma(percent))


def seeded_noise(latent: Tensor, seed: int) -> Tensor:
    """The stock sampler's own noise for this seed, without moving the global generator."""
    with torch.random.fork_rng(devices=[]):
        return comfy.sample.prepare_noise(latent.cpu().float(), seed)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, options: dict) -> Tensor:
    """ComfyUI's attention, as chosen by its start flags or by an override in the options.

    q [B, Lq, C], k and v [B, Lk, C] -> [B, Lq, C].
    """
    return comfy.ldm.modules.attention.optimized_attention(
        q, k, v, heads=heads, transformer_options=options
    )


def fused_on_cpu(chosen: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """An attention override: PyTorch's fused attention where ComfyUI would go sub-quadratic.

    ComfyUI's default on the CPU saves memory that windows do not take, at half the speed.
    """
    stock = comfy.ldm.modules.attention
    if chosen is getattr(stock.attention_sub_quad, "__wrapped__", None):
        chosen = stock.attention_pytorch
    return chosen(*args, **kwargs)


def apply_rope(x: Tensor, freqs: Tensor) -> Tensor:
    """Rotate x [B, L, heads, d] by rotation matrices [B or 1, L, 1, d/2, 2, 2]."""
    return comfy.ldm.wan.model.apply_rope1(x, freqs)


def cast(weight: Tensor, like: Tensor) -> Tensor:
    """A bare parameter in the dtype and on the device of `like`."""
    return comfy.model_management.cast_to(weight, dtype=like.dtype, device=like.device)


def pad_to_patch(latent: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Pad a latent [B, C, T, H, W] to whole patches, as the stock model does."""
    return comfy.ldm.common_dit.pad_to_patch_size(latent, patch)


def time_embedding(model: Any, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Wan's time embedding and its projection.

    timestep [B] or [B, frames] -> e [B, 1 or frames, C], e0 [B, 1 or frames, 6, C].
    """
    wave = comfy.ldm.wan.model.sinusoidal_embedding_1d(model.freq_dim, timestep.flatten())
    e = model.time_embedding(wave.to(dtype))
    e = e.reshape(timestep.shape[0], -1, e.shape[-1])
    return e, model.time_projection(e).unflatten(2, (6, model.dim))


def raise_if_cancelled() -> None:
    """Leave the job when the artist pressed cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the card's memory ran out."""
    test = getattr(comfy.model_management, "is_oom", None)
    if test is not None:
        return test(error)
    return isinstance(error, comfy.model_management.OOM_EXCEPTION)


def free_memory(device: torch.device) -> int:
    """Bytes that may be allocated on a device now."""
    return int(comfy.model_management.get_free_memory(device))


def empty_cache() -> None:
    """Give cached device memory back after a failed allocation."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


def chunk_tokens(model: Any, like: Tensor) -> int:
    """Tokens to evaluate at a time, so that their activations fit into what is free."""
    per_token = like.element_size() * (14 * model.dim + 3 * model.ffn_dim)
    most = 65_536 if like.is_cuda else 4_096  # past these, larger chunks gain no speed
    return max(1_024, min(most, int(0.5 * free_memory(like.device)) // per_token))


def in_chunks(total: int, size: int, compute: Callable[[int, int], None]) -> None:
    """Call compute(start, stop) over [0, total) in chunks; halve a chunk that runs out of memory.

    `compute` must write its result last, so that a chunk that failed can be repeated. Cancelling
    is checked before every chunk.

    Raises:
        Exception: whatever `compute` raises; out of memory only when a chunk of 1 fails too.
    """
    start = 0
    while start < total:
        raise_if_cancelled()
        stop = min(start + size, total)
        try:
            compute(start, stop)
        except Exception as error:
            if stop - start == 1 or not is_out_of_memory(error):
                raise
            size = (stop - start) // 2
            stop = start
        if stop == start:  # outside the handler, whose traceback would keep the tensors alive
            empty_cache()
        start = stop


def build_wan(**config: Any) -> torch.nn.Module:
    """An uninitialised stock WanModel, float32, on the CPU."""
    return comfy.ldm.wan.model.WanModel(
        dtype=torch.float32, operations=comfy.ops.disable_weight_init, **config
    )


def build_wan_vae(dim: int) -> torch.nn.Module:
    """An uninitialised stock Wan 2.1 VAE with `dim` base channels (the real one has 96)."""
    return comfy.ldm.wan.vae.WanVAE(dim=dim, z_dim=16, temperal_downsample=[False, True, True])


def load_diffusion_model(state: dict[str, Tensor]) -> Any:
    """A ModelPatcher from a diffusion model's weights, through the stock loader."""
    return comfy.sd.load_diffusion_model_state_dict(state)


def load_vae(state: dict[str, Tensor]) -> Any:
    """A VAE from its weights, through the stock loader."""
    return comfy.sd.VAE(sd=state)


def lora_names() -> list[str]:
    """The files in ComfyUI's loras folders."""
    return folder_paths.get_filename_list("loras")


def lora_path(name: str) -> str:
    """The path of a file in ComfyUI's loras folders.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    return folder_paths.get_full_path_or_raise("loras", name)


# --- Training -------------------------------------------------------------------------------


@contextmanager
def training() -> Iterator[None]:
    """Autograd on, ComfyUI's differentiable paths on, whatever mode the caller runs in."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        comfy.model_management.in_training = before


def differentiable_attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's attention in place of the one that the start flags chose (an override)."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


@contextmanager
def weights(module: Any, like: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A layer's weight and bias as `like`, dequantised; they may be gone after the block."""
    weight, bias, offloaded = comfy.ops.cast_bias_weight(module, like, offloadable=True)
    quantised = getattr(comfy.ops, "QuantizedTensor", None)
    try:
        if quantised is not None and isinstance(weight, quantised):
            yield weight.dequantize().to(like.dtype), bias
        else:
            yield weight, bias
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, offloaded)


def linear_input_gradient(linear: Any, gradient: Tensor) -> Tensor:
    """The gradient of a linear layer's input from that of its output [..., out] -> [..., in].

    A layer of another pack (GGUF) that keeps its weight in its own way is run once more instead.
    """
    if type(linear).forward.__module__ == "comfy.ops":
        with weights(linear, gradient) as (weight, _):
            return gradient @ weight
    with torch.enable_grad():
        shape = (*gradient.shape[:-1], linear.in_features)
        x = torch.zeros(shape, dtype=gradient.dtype, device=gradient.device, requires_grad=True)
        return torch.autograd.grad(linear(x), x, gradient)[0]


def load_for_training(model: Any, dtype: torch.dtype, activation_bytes: int) -> Any:
    """A clone of `model` that computes in `dtype`, on its device with its LoRAs applied.

    Args:
        activation_bytes: device memory to leave free; what weights do not fit are offloaded.
    """
    clone = model.clone()
    clone.set_model_compute_dtype(dtype)
    comfy.model_management.load_models_gpu([clone], memory_required=activation_bytes)
    return clone


def load_device(model: Any) -> torch.device:
    """Where a model computes."""
    return model.load_device


def encode_video(vae: Any, pixels: Tensor) -> Tensor:
    """Frames [N, H, W, 3] in 0 to 1 -> ComfyUI latent [1, C, T, H', W'], float32 on the CPU."""
    return vae.encode(pixels).float().cpu()


def encode_text(clip: Any, text: str) -> Tensor:
    """A prompt as Wan's cross-attention reads it: [1, L, C], float32 on the CPU."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0].float().cpu()


def vae_state(vae: Any) -> dict[str, Tensor]:
    """The weights of a VAE."""
    return vae.first_stage_model.state_dict()


def output_folder() -> str:
    """ComfyUI's output folder."""
    return folder_paths.get_output_directory()


def input_folder() -> str:
    """ComfyUI's input folder."""
    return folder_paths.get_input_directory()


def lora_folder() -> str:
    """The first of ComfyUI's loras folders, where a new LoRA is saved."""
    return folder_paths.get_folder_paths("loras")[0]
