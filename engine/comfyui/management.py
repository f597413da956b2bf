"""ComfyUI's model management: devices, memory, loading, cancelling."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import comfy.model_management
import torch
from torch import Tensor


def use_on_device(model: Any, working_bytes: int = 0) -> torch.device:
    """Load all of a model's weights where ComfyUI computes, and say where that is.

    Args:
        working_bytes: to be free beside them; other models give way.
    """
    comfy.model_management.load_models_gpu(
        [model], memory_required=working_bytes, force_full_load=True
    )
    return model.load_device


def load_together(models: list[Any], working_bytes: int) -> torch.device:
    """Load models' weights where ComfyUI computes, as far as they fit beside `working_bytes`.

    Returns:
        where that is.
    """
    comfy.model_management.load_models_gpu(models, memory_required=working_bytes)
    return models[0].load_device


def raise_if_cancelled() -> None:
    """Leave the job when the artist pressed cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def cancel() -> None:
    """Ask the job that runs to stop, as the artist does. Without one it says nothing: a job that
    begins forgets what was asked before."""
    comfy.model_management.interrupt_current_processing(True)


def is_cancelled(error: BaseException) -> bool:
    """Whether an exception means that the artist pressed cancel."""
    return isinstance(error, comfy.model_management.InterruptProcessingException)


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


def empty_cache() -> None:
    """Give cached device memory back after a failed allocation."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


def host_free_memory() -> int:
    """Bytes of host memory that may be allocated now."""
    return free_memory(torch.device("cpu"))


def inference_itemsize(model: Any) -> int:
    """Bytes per number of a model's activations."""
    return comfy.model_management.dtype_size(model.model.get_dtype_inference())


def noise_shape_for(model: Any, wanted: int) -> list[int]:
    """A noise shape for which ComfyUI leaves `wanted` bytes free of weights.

    Its estimate is linear in the latent's area, for full-length activations that we do not have.
    Weights of this model make room for one conditioning, those of other models for two.
    """
    probe = 2**20
    per_area = model.model.memory_required([1, 1, probe]) / probe
    return [1, 1, max(1, int(wanted / per_area))]


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


def intermediate_device() -> torch.device:
    """Where nodes keep the tensors that they hand to each other."""
    return comfy.model_management.intermediate_device()


# The machine and its folders.


def compute_device() -> torch.device:
    """The device that ComfyUI samples on."""
    return comfy.model_management.get_torch_device()


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype that ComfyUI samples a Wan model in."""
    if device.type == "cpu":
        return torch.float32
    if comfy.model_management.should_use_bf16(device):
        return torch.bfloat16
    fp16 = comfy.model_management.should_use_fp16(device)  # not on every card, nor where forced
    return torch.float16 if fp16 else torch.float32


def device_name(device: torch.device) -> str:
    """What a device is called, to keep one machine's measurements from another's."""
    return f"{comfy.model_management.get_torch_device_name(device)}, torch {torch.__version__}"


def total_memory(device: torch.device) -> int:
    """Bytes of memory that a device has in all."""
    return int(comfy.model_management.get_total_memory(device))


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
