"""ComfyUI's models and sampling: what is done with a MODEL, its attention and its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.latent_formats
import comfy.ldm.common_dit
import comfy.ldm.modules.attention
import comfy.ldm.wan.model
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.sample
import comfy.sd
import comfy.utils
import latent_preview
import node_helpers
import torch
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Wrappers = comfy.patcher_extension.WrappersMP


def make_innermost(options: dict, key: str) -> None:
    """Let the forward under `key` run inside all other nodes' wrappers of the forward.

    It answers in place of the stock forward, so wrappers inside of it would never be called.
    """
    wrappers = options.get("wrappers", {}).get(Wrappers.DIFFUSION_MODEL, {})
    if key in wrappers:
        wrappers[key] = wrappers.pop(key)


def model_name(model: Any) -> str:
    """What ComfyUI recognised the loaded model as, in words for an error message."""
    base = model.model
    inner = getattr(base, "diffusion_model", None)
    return f"{type(base).__name__} ({type(inner).__name__})"


def is_plain_wan(model: Any) -> bool:
    """Whether a loaded model's blocks are the plain Wan blocks."""
    wan22 = getattr(comfy.model_base, "WAN22", None)
    plain = type(model.model) in (comfy.model_base.WAN21, wan22)
    inner: Any = getattr(model.model, "diffusion_model", None)
    return plain and type(inner) is comfy.ldm.wan.model.WanModel and inner.ref_conv is None


def process_latent_in(model: Any, latent: Tensor) -> Tensor:
    """A ComfyUI latent in the normalised space that the model works in."""
    return model.get_model_object("latent_format").process_in(latent)


def process_latent_out(model: Any, latent: Tensor) -> Tensor:
    """A ComfyUI latent from the normalised space that the model works in."""
    return model.get_model_object("latent_format").process_out(latent)


def latent_previewer(model: Any) -> Callable[[Tensor], Any]:
    """Makes a small PIL picture of a normalised latent [1, C, T, h, w]; None without previews."""
    latent_format = model.get_model_object("latent_format")
    previewer = latent_preview.get_previewer(model.load_device, latent_format)
    return previewer.decode_latent_to_preview if previewer else lambda _: None


def percent_to_sigma(model: Any, percent: float) -> float:
    """The noise level reached when `percent` (0 to 1) of the sampling is done."""
    return float(model.get_model_object("model_sampling").percent_to_sigma(percent))


def seeded_noise(latent: Tensor, seed: int) -> Tensor:
    """The stock sampler's own noise for this seed, without moving the global generator."""
    cards = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=cards):
        return comfy.sample.prepare_noise(latent.cpu().float(), seed)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, options: dict) -> Tensor:
    """ComfyUI's attention, as chosen by its start flags or by an override in the options.

    q [B, Lq, C], k and v [B, Lk, C] -> [B, Lq, C].
    """
    return comfy.ldm.modules.attention.optimized_attention(
        q, k, v, heads=heads, transformer_options=options
    )


def biased_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor) -> Tensor:
    """PyTorch's attention with a bias added to the logits, whatever the start flags chose.

    q [B, Lq, C], k and v [B, Lk, C], bias broadcast to [B, heads, Lq, Lk] -> [B, Lq, C].
    """
    return comfy.ldm.modules.attention.attention_pytorch(q, k, v, heads=heads, mask=bias)


CUDNN_FIRST = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
"""PyTorch's kernels for attention in an order other than ComfyUI's, which has flash first."""


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any) -> Tensor:
    """PyTorch's attention by cuDNN where that can, with the parameters of ComfyUI's attentions."""
    if kwargs.get("mask") is not None or kwargs.get("skip_reshape") or q.ndim != 3:
        return comfy.ldm.modules.attention.attention_pytorch(q, k, v, heads=heads, **kwargs)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(list(CUDNN_FIRST), set_priority=True):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


def attention_function(name: str) -> Callable | None:
    """One of ComfyUI's registered attentions by name, or None where it is not installed."""
    return comfy.ldm.modules.attention.get_attention_function(name, None)


def started_attention() -> str | None:
    """The registered name of the attention that ComfyUI's start flags chose."""
    registered = comfy.ldm.modules.attention.REGISTERED_ATTENTION_FUNCTIONS
    chosen = comfy.ldm.modules.attention.optimized_attention
    return next((name for name, function in registered.items() if function is chosen), None)


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
    """A bare parameter in the dtype and on the device of `like`.

    Copied without waiting for the device's work, where it can.
    """
    return comfy.model_management.cast_to_device(weight, like.device, like.dtype)


def time_waves(timestep: Tensor, dim: int) -> Tensor:
    """Sines and cosines [n, dim] of timesteps [n], as Wan embeds them."""
    return comfy.ldm.wan.model.sinusoidal_embedding_1d(dim, timestep)


def pad_to_patch(latent: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Pad a latent [B, C, T, H, W] to whole patches, as the stock model does."""
    return comfy.ldm.common_dit.pad_to_patch_size(latent, patch)


def compile_choices(model_options: dict) -> dict[str, Any] | None:
    """The arguments of torch.compile that the stock compile node left, or None without it."""
    return model_options.get(TORCH_COMPILE_KWARGS)


def has_scheduled_weights(model: Any) -> bool:
    """Whether weights change with the conditioning or the step (hook LoRAs)."""
    return bool(getattr(model, "hook_patches", None))


def build_wan(**config: Any) -> torch.nn.Module:
    """An uninitialised stock WanModel, float32, on the CPU."""
    return comfy.ldm.wan.model.WanModel(
        dtype=torch.float32, operations=comfy.ops.disable_weight_init, **config
    )


def load_diffusion_model(state: dict[str, Tensor]) -> Any:
    """A ModelPatcher from a diffusion model's weights, through the stock loader."""
    return comfy.sd.load_diffusion_model_state_dict(state)


def load_diffusion_model_file(path: str) -> Any:
    """A ModelPatcher from the file of a diffusion model, through the stock loader."""
    return comfy.sd.load_diffusion_model(path)


def with_lora(model: Any, lora: dict[str, Tensor], strength: float = 1.0) -> Any:
    """A clone of the model with an ordinary LoRA on it, as the stock loader puts it there."""
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


def with_shift(model: Any, shift: float) -> Any:
    """A clone of the model that samples at shifted noise levels, as the stock node sets it."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    return ModelSamplingSD3().patch(model, shift)[0]


def set_conditioning(conditioning: Any, values: dict[str, Any]) -> Any:
    """A copy of a CONDITIONING with `values` set on every entry."""
    return node_helpers.conditioning_set_values(conditioning, values)


def differentiable_attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's attention in place of the one that the start flags chose (an override)."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def conv2d(*sizes: int, **choices: Any) -> torch.nn.Module:
    """An uninitialised 2D convolution whose weights ComfyUI may keep elsewhere."""
    return comfy.ops.manual_cast.Conv2d(*sizes, **choices)


def patcher(module: torch.nn.Module) -> Any:
    """A module under ComfyUI's memory management."""
    return comfy.model_patcher.CoreModelPatcher(
        module,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


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


@contextmanager
def held_weights(module: torch.nn.Module, like: Tensor) -> Iterator[None]:
    """While open, weights that are kept elsewhere, or in another dtype, are brought to `like` once.

    Else every call of a layer brings its own. Quantised weights stay so; layers of other packs are
    left as they are, and with dynamic VRAM quantised ones too: `weights_ahead` brings those.
    """
    with ExitStack() as stack:
        for layer in module.modules():
            if _is_quantised(layer):
                if _can_move(layer, like):
                    stack.enter_context(_moved(layer, like))
            elif _is_brought(layer, like):
                stack.enter_context(_held(layer, like))
        yield


HELD_LAYERS = ("Linear", "LayerNorm", "RMSNorm")


def _is_brought(layer: Any, like: Tensor) -> bool:
    """Whether a layer casts its weights as the stock ones do, and has to."""
    weight = getattr(layer, "weight", None)
    if not getattr(layer, "comfy_cast_weights", False) or weight is None:
        return False
    cast = getattr(type(layer), "forward_comfy_cast_weights", None)
    stock = (getattr(comfy.ops.disable_weight_init, name) for name in HELD_LAYERS)
    if cast not in [kind.forward_comfy_cast_weights for kind in stock]:
        return False
    elsewhere = weight.device != like.device or weight.dtype != like.dtype
    return elsewhere or bool(layer.weight_function) or bool(layer.bias_function)


def _is_quantised(layer: Any) -> bool:
    quantised = getattr(comfy.ops, "QuantizedTensor", None)
    return quantised is not None and isinstance(getattr(layer, "weight", None), quantised)


def _can_move(layer: Any, like: Tensor) -> bool:
    """Whether a quantised layer of ComfyUI's own only has to be brought to the device."""
    return (
        type(layer).forward.__module__ == "comfy.ops"
        and layer.weight.device != like.device
        and not (hasattr(layer, "_v") or layer.weight_function or layer.bias_function)
    )


@contextmanager
def _moved(layer: Any, like: Tensor) -> Iterator[None]:
    """A quantised layer on the device of `like`, as it is stored."""
    kept = dict(layer._parameters)
    for name, tensor in kept.items():
        if tensor is not None:
            dtype = None if name == "weight" else like.dtype
            moved = comfy.model_management.cast_to(tensor, dtype, like.device)
            layer._parameters[name] = moved
    try:
        yield
    finally:
        layer._parameters.update(kept)


@contextmanager
def _held(layer: Any, like: Tensor) -> Iterator[None]:
    """A layer with its weights as `like`; its own are back afterwards."""
    dynamic = hasattr(layer, "_v")
    result = comfy.ops.cast_bias_weight(layer, like, offloadable=dynamic)
    weight, bias, place = result if dynamic else (*result, None)
    if place is not None and place[0] is not None and place[1] is None:
        # In a buffer that the next layer's weights are brought to.
        weight, bias = weight.clone(), None if bias is None else bias.clone()
    kept = dict(layer._parameters), layer.weight_function, layer.bias_function
    layer._parameters["weight"] = weight
    if bias is not None:
        layer._parameters["bias"] = bias
    layer.weight_function = layer.bias_function = []
    try:
        yield
    finally:
        layer._parameters.update(kept[0])
        layer.weight_function, layer.bias_function = kept[1:]
        if place is not None:
            comfy.ops.uncast_bias_weight(layer, weight, bias, place)


def weights_ahead(
    blocks: Sequence[torch.nn.Module], device: torch.device, options: dict
) -> Callable[[torch.nn.Module | None], None]:
    """Brings the next block's weights while one computes, where this ComfyUI can.

    Call the result with every block before it is evaluated, and with None after the last.
    """
    try:
        import comfy.model_prefetch as ahead
    except ImportError:  # before ComfyUI 0.30
        return lambda _: None
    queue = ahead.make_prefetch_queue(list(blocks), device, options)
    return lambda block: ahead.prefetch_queue_pop(queue, device, block)


def is_plain_linear(layer: Any) -> bool:
    """Whether a layer is one of ComfyUI's own that multiplies with its weight as it is."""
    cast = getattr(type(layer), "forward_comfy_cast_weights", None)
    return (
        cast is comfy.ops.disable_weight_init.Linear.forward_comfy_cast_weights
        and not _is_quantised(layer)
        and not layer._forward_hooks
    )


def is_plain_norm(layer: Any) -> bool:
    """Whether a layer is ComfyUI's own RMSNorm with a weight."""
    cast = getattr(type(layer), "forward_comfy_cast_weights", None)
    return (
        cast is comfy.ops.disable_weight_init.RMSNorm.forward_comfy_cast_weights
        and layer.weight is not None
        and layer.eps is not None
        and not _is_quantised(layer)
        and not layer._forward_hooks
    )


def is_plain_cross_attention(layer: Any) -> bool:
    """Whether a cross-attention of Wan computes what ComfyUI's own does, and nobody listens."""
    stock = comfy.ldm.wan.model
    return (
        type(layer) in (stock.WanT2VCrossAttention, stock.WanI2VCrossAttention)
        and "forward" not in vars(layer)
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


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


def encode_text(clip: Any, text: str) -> Tensor:
    """A prompt as Wan's cross-attention reads it: [1, L, C], float32 on the CPU."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0].float().cpu()


def wan_latent_in(latent: Tensor) -> Tensor:
    """A ComfyUI latent of the Wan 2.1 VAE in the normalised space that its models work in."""
    return comfy.latent_formats.Wan21().process_in(latent)


def load_wan_files(model: Any, vae: Any) -> tuple[Any, Any]:
    """MODEL and VAE from the paths of their files, through the stock loaders."""
    return (
        comfy.sd.load_diffusion_model(str(model)),
        comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(vae))),
    )


def load_wan_text_encoder(file: Any) -> Any:
    """CLIP from the path of Wan's text encoder, through the stock loader."""
    return comfy.sd.load_clip([str(file)], clip_type=comfy.sd.CLIPType.WAN)


def layers() -> Any:
    """Layer classes whose weights are cast to the dtype and device of what they are given."""
    return comfy.ops.manual_cast
