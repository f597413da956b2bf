"""The only module that touches ComfyUI: everything the engine needs of its host, by name."""

from __future__ import annotations

import gc
import inspect
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import comfy.conds
import comfy.ldm.common_dit
import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.model
import comfy.ldm.wan.model
import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import comfy.sample
import comfy.sd
import comfy.utils
import folder_paths
import node_helpers
import torch
from comfy_api.latest import Input, InputImpl, Types
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS
from comfy_execution.utils import get_executing_context
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


def make_innermost(options: dict, key: str) -> None:
    """Let the forward under `key` run inside all other nodes' wrappers of the forward.

    It answers in place of the stock forward, so wrappers inside of it would never be called.
    """
    wrappers = options.get("wrappers", {}).get(Wrappers.DIFFUSION_MODEL, {})
    if key in wrappers:
        wrappers[key] = wrappers.pop(key)


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


def is_cancelled(error: BaseException) -> bool:
    """Whether an exception means that the artist pressed cancel."""
    return isinstance(error, comfy.model_management.InterruptProcessingException)


def compile_choices(model_options: dict) -> dict[str, Any] | None:
    """The arguments of torch.compile that the stock compile node left, or None without it."""
    return model_options.get(TORCH_COMPILE_KWARGS)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the card's memory ran out."""
    test = getattr(comfy.model_management, "is_oom", None)
    if test is not None:
        return test(error)
    return isinstance(error, comfy.model_management.OOM_EXCEPTION)


def empty_if_it_fits(like: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """An uninitialised tensor of the device and dtype of `like`; None where memory runs out."""
    try:
        return like.new_empty(shape)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    empty_cache()
    return None


def free_memory(device: torch.device, model: Any = None) -> int:
    """Bytes that may be allocated on a device now.

    Args:
        model: a ModelPatcher. With dynamic VRAM, weights of all models stay on the card until an
            allocation needs their place: its patchers count those as free, the device does not.
    """
    ask = getattr(model, "get_free_memory", comfy.model_management.get_free_memory)
    return int(ask(device))


def beside_weights(model: Any) -> int:
    """Bytes of its device that a model's weights leave when all of them are there."""
    total = comfy.model_management.get_total_memory(model.load_device)
    return int(total) - int(model.model_size())


def release_pinned() -> None:
    """Give pinned host memory that is no longer used back to the system."""
    release = getattr(torch._C, "_host_emptyCache", None)
    if release is not None and torch.cuda.is_available():
        release()


def empty_cache() -> None:
    """Give cached device memory back after a failed allocation."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


def host_free_memory() -> int:
    """Bytes of host memory that may be allocated now."""
    return free_memory(torch.device("cpu"))


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor in host memory, pinned where `device` copies faster from such."""
    if device.type == "cuda":
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError:  # the system allows no more locked memory: slower, not wrong
            _say_not_pinned()
    return torch.empty(shape, dtype=dtype)


@cache
def _say_not_pinned() -> None:
    log.warning("AtlasVid: no pinned memory left, copies will be slower")


@cache
def _copy_stream(device: torch.device, way: str) -> torch.cuda.Stream:
    """A stream for copies `up` or `down` alone.

    Kept: streams come from a pool of 32, in turn, so new ones would soon be those of other copies,
    and a stream's memory is cached for that stream.
    """
    assert way in ("up", "down")
    return torch.cuda.Stream(device)


def upload(buffer: Tensor, device: torch.device) -> Tensor:
    """A copy of host memory on a device, made beside the work that the device already has."""
    if device.type != "cuda":
        return buffer.to(device, copy=True)
    stream, main = _copy_stream(device, "up"), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        uploaded = buffer.to(device, non_blocking=True)
    main.wait_stream(stream)
    uploaded.record_stream(main)
    return uploaded


def index_on(index: Tensor, device: torch.device) -> Tensor:
    """An index [n] on a device, without waiting for the work that the device already has."""
    if index.device == device:
        return index
    return upload(host_buffer(tuple(index.shape), index.dtype, device).copy_(index), device)


class Mark:
    """A point in a device's work that another thread can wait for."""

    def __init__(self, device: torch.device):
        self.device = device
        self.event = None
        if device.type == "cuda":
            self.event = torch.cuda.Event(blocking=True)  # waiting leaves the core to other threads
            self.event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Return once the device is past the mark."""
        if self.event is not None:
            self.event.synchronize()

    @contextmanager
    def after(self) -> Iterator[None]:
        """Run device work of this thread beside the main stream, once the mark is reached."""
        if self.event is None:
            yield
            return
        stream = _copy_stream(self.device, "down")
        stream.wait_event(self.event)
        with torch.cuda.stream(stream):
            yield


def inference_itemsize(model: Any) -> int:
    """Bytes per number of a model's activations."""
    return comfy.model_management.dtype_size(model.model.get_dtype_inference())


def has_scheduled_weights(model: Any) -> bool:
    """Whether weights change with the conditioning or the step (hook LoRAs)."""
    return bool(getattr(model, "hook_patches", None))


def show_progress(text: str) -> None:
    """Show a line in the node that is being executed; nothing outside of a server."""
    context = get_executing_context()
    server = sys.modules.get("server")  # only a running ComfyUI has it; importing it starts much
    if context is not None and server is not None:
        server.PromptServer.instance.send_progress_text(text, context.node_id)


def noise_shape_for(model: Any, wanted: int) -> list[int]:
    """A noise shape for which ComfyUI leaves `wanted` bytes free of weights.

    Its estimate is linear in the latent's area, for full-length activations that we do not have.
    Weights of this model make room for one conditioning, those of other models for two.
    """
    probe = 2**20
    per_area = model.model.memory_required([1, 1, probe]) / probe
    return [1, 1, max(1, int(wanted / per_area))]


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


def with_lora(model: Any, lora: dict[str, Tensor], strength: float = 1.0) -> Any:
    """A clone of the model with an ordinary LoRA on it, as the stock loader puts it there."""
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


def with_shift(model: Any, shift: float) -> Any:
    """A clone of the model that samples at shifted noise levels, as the stock node sets it."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    return ModelSamplingSD3().patch(model, shift)[0]


def load_vae(state: dict[str, Tensor]) -> Any:
    """A VAE from its weights, through the stock loader."""
    return comfy.sd.VAE(sd=state)


# The VAE and video part of the host.

VideoInput = Input.Video
VideoFromFile = InputImpl.VideoFromFile
VideoFromComponents = InputImpl.VideoFromComponents
VideoComponents = Types.VideoComponents

# What VAEs use where no memory-saving attention is at hand, as on the CPU.
plain_attention = comfy.ldm.modules.diffusionmodules.model.normal_attention

# Pixel-shuffle factor of each supported VAE class.
WAN_VAES: dict[type, int] = {
    comfy.ldm.wan.vae.WanVAE: 1,
    comfy.ldm.wan.vae2_2.WanVAE: 2,
}


def wan_patch(vae: Any) -> int | None:
    """1 for a Wan 2.1 VAE, 2 for a Wan 2.2 VAE, None for every other VAE."""
    return WAN_VAES.get(type(vae.first_stage_model))


def wan_residual_block(channels: int) -> torch.nn.Module:
    """An uninitialised residual block of a Wan VAE."""
    return comfy.ldm.wan.vae.ResidualBlock(channels, channels)


def is_rms_norm(module: Any) -> bool:
    """Whether a layer is the Wan VAEs' RMS norm over channels."""
    return type(module) is comfy.ldm.wan.vae.RMS_norm


def load_vae_weights(vae: Any, working_bytes: int) -> None:
    """Load the VAE through ComfyUI's model management, making room for `working_bytes`."""
    comfy.model_management.load_models_gpu(
        [vae.patcher], memory_required=working_bytes, force_full_load=vae.disable_offload
    )


def reachable_vae_memory(vae: Any) -> int:
    """Bytes on the VAE's device that are free once other models have been unloaded."""
    device = vae.device
    if device.type == "cpu":
        return int(comfy.model_management.get_free_memory(device))
    return int(comfy.model_management.get_total_memory(device))


def free_vae_memory(vae: Any) -> int:
    """Bytes free on the VAE's device now."""
    return int(vae.patcher.get_free_memory(vae.device))


def device_context(vae: Any) -> AbstractContextManager[Any]:
    """The VAE's device as the current one, where the core has a context for it."""
    context = getattr(comfy.model_management, "cuda_device_context", None)
    return context(vae.device) if context else nullcontext()


def progress_bar(total: int) -> Callable[[int], None]:
    """A node's progress bar of `total` steps; call the result with the steps just done."""
    return comfy.utils.ProgressBar(total).update


def intermediate_device() -> torch.device:
    """Where nodes keep the tensors that they hand to each other."""
    return comfy.model_management.intermediate_device()


def temp_directory() -> Path:
    """ComfyUI's temp folder, which it also empties when it starts."""
    return Path(folder_paths.get_temp_directory())


def require_bit_depth(bit_depth: int) -> None:
    """Refuse a bit depth that the running ComfyUI's encoder does not write.

    Raises:
        ValueError: names the depths that it does write.
    """
    parameters = inspect.signature(VideoFromComponents.__init__).parameters
    allowed = (8, 10) if "bit_depth" in parameters else (8,)
    if bit_depth not in allowed:
        names = " or ".join(map(str, allowed))
        raise ValueError(
            f"bit_depth is {bit_depth}, but this ComfyUI writes videos of {names} bits. "
            f"Set it to {names}" + (", or update ComfyUI for 10." if len(allowed) == 1 else ".")
        )


def video_components(images: Any, frame_rate: Fraction, audio: Any) -> Any:
    """The core's bundle of images [frames, height, width, 3], frame rate and sound."""
    return VideoComponents(images=images, audio=audio, frame_rate=frame_rate)


def encode_video(components: Any, target: Any, bit_depth: int, **choices: Any) -> None:
    """Write a video with the core's own encoder loop; 8 bit is every version's default."""
    if bit_depth != 8:
        choices["bit_depth"] = bit_depth
    VideoFromComponents(components).save_to(target, **choices)


class _PartOfContainer:
    """A video container that is read on where the last reading ended, `size` items at a time.

    The core's own conversion of a file to images takes an open container; given this one, it
    converts a few frames per call.
    """

    def __init__(self, container: Any, size: int) -> None:
        self.streams = SimpleNamespace(video=container.streams.video, audio=())
        self.metadata = container.metadata
        self.exhausted = False
        self._container = container
        self._size = size
        self._items: Iterator[Any] | None = None

    def seek(self, *place: Any, **options: Any) -> None:
        """Only the first reading has to find the start."""
        if self._items is None:
            self._container.seek(*place, **options)

    def demux(self, *streams: Any) -> list[Any]:
        return self._next(self._container.demux, streams)

    def decode(self, *streams: Any) -> list[Any]:
        return self._next(self._container.decode, streams)

    def _next(self, read: Callable[..., Iterator[Any]], streams: tuple[Any, ...]) -> list[Any]:
        if self._items is None:
            self._items = read(*streams)
        items = list(islice(self._items, self._size))
        self.exhausted = len(items) < self._size
        return items


def video_batches(video: Any, size: int) -> Iterator[Tensor]:
    """The images of a video file, as its `get_components` gives them, about `size` at a time."""
    with av.open(video.get_stream_source(), mode="r") as container:
        part = _PartOfContainer(container, size)
        started = False
        while not part.exhausted:
            images = video.get_components_internal(part).images
            if len(images) > 0:
                started = True
                yield images
            elif started:  # past the end of a trimmed video
                return


def scale_and_crop(images: Tensor, width: int, height: int) -> Tensor:
    """Images [n, h, w, c] scaled bilinearly and cropped around the centre, as stock nodes do."""
    scaled = comfy.utils.common_upscale(images.movedim(-1, 1), width, height, "bilinear", "center")
    return scaled.movedim(1, -1)


def set_conditioning(conditioning: Any, values: dict[str, Any]) -> Any:
    """A copy of a CONDITIONING with `values` set on every entry."""
    return node_helpers.conditioning_set_values(conditioning, values)


# The machine and its folders.


def compute_device() -> torch.device:
    """The device that ComfyUI samples on."""
    return comfy.model_management.get_torch_device()


def cpu() -> torch.device:
    """The device whose memory is the host's."""
    return torch.device("cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype that ComfyUI samples a Wan model in."""
    if device.type == "cpu":
        return torch.float32
    bf16 = comfy.model_management.should_use_bf16(device)
    return torch.bfloat16 if bf16 else torch.float16


def device_name(device: torch.device) -> str:
    """What a device is called, to keep one machine's measurements from another's."""
    return f"{comfy.model_management.get_torch_device_name(device)}, torch {torch.__version__}"


def total_memory(device: torch.device) -> int:
    """Bytes of memory that a device has in all."""
    return int(comfy.model_management.get_total_memory(device))


def free_disk() -> int:
    """Bytes free where ComfyUI writes its videos."""
    output = Path(folder_paths.get_output_directory())
    while not output.exists():  # ComfyUI makes it with the first file
        output = output.parent
    return shutil.disk_usage(output).free


def user_folder() -> Path:
    """Where ComfyUI keeps a user's files."""
    return Path(folder_paths.get_user_directory())


def model_file(name: str) -> Path | None:
    """The file of a diffusion model as the loaders list it, or None where there is none."""
    for folder in ("diffusion_models", "checkpoints"):
        if found := folder_paths.get_full_path(folder, name):
            return Path(found)
    return None


# --- LoRAs -----------------------------------------------------------------------------------


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


def encode_frames(vae: Any, pixels: Tensor) -> Tensor:
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


def preview_bar(total: int, size: int) -> Callable[[int, Any], None]:
    """A node's progress bar that can show a picture; call it with steps done and PIL or None.

    Args:
        size: longest side of the picture in pixels.
    """
    bar = comfy.utils.ProgressBar(total)

    def show(done: int, picture: Any) -> None:
        bar.update_absolute(done, total, picture and ("PNG", picture, size))

    return show


def load_wan_files(model: Any, vae: Any) -> tuple[Any, Any]:
    """MODEL and VAE from the paths of their files, through the stock loaders."""
    return (
        comfy.sd.load_diffusion_model(str(model)),
        comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(vae))),
    )


def load_wan_text_encoder(file: Any) -> Any:
    """CLIP from the path of Wan's text encoder, through the stock loader."""
    return comfy.sd.load_clip([str(file)], clip_type=comfy.sd.CLIPType.WAN)
