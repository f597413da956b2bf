"""Low-rank adapters, built by peft on a view of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..lora.view import with_layers
from .frozen import freeze

TARGETS = {
    "attention and feed-forward": r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])",
    "attention": r"blocks\.\d+\.(self|cross)_attn\.[qkvo]",
    "self-attention": r"blocks\.\d+\.self_attn\.[qkvo]",
}
"""What an adapter changes, as patterns of layer names; the first is UltraImageGen's choice."""
ADAPTER = "default"


@dataclass(frozen=True)
class Adapters:
    """A view of the base model with peft adapters in it, and their weights."""

    view: Any
    layers: Mapping[str, Any]
    """peft's layers by the model's names."""
    rank: int
    alpha: float

    def parameters(self) -> list[nn.Parameter]:
        """Every trained weight, in a fixed order."""
        return [weight for _, weight in self.named_parameters()]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trained weights as `<layer>.lora_A.weight` and `<layer>.lora_B.weight`."""
        return [
            (f"{name}.{side}.weight", getattr(layer, side)[ADAPTER].weight)
            for name, layer in self.layers.items()
            for side in ("lora_A", "lora_B")
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the weights on the CPU."""
        return {
            name: weight.detach().to("cpu", copy=True) for name, weight in self.named_parameters()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take weights saved by `tensors`."""
        with torch.no_grad():
            for name, weight in self.named_parameters():
                weight.copy_(tensors[name])


def build_adapters(
    model: Any, rank: int, alpha: float, targets: str, seed: int, device: torch.device
) -> Adapters:
    """peft's LoRA layers over a WanModel, which itself is not touched.

    The first factor is random, the second 0, so training starts from the base model.

    Args:
        targets: a key of TARGETS.

    Raises:
        ValueError: a rank that is no rank of these layers.
        RuntimeError: peft is not installed.
    """
    peft = _peft()
    require_rank(model, rank)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS[targets])  # type: ignore[arg-type]
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    containers = with_layers(model, linears)  # peft writes into the containers: into copies
    peft.inject_adapter_in_model(config, containers, ADAPTER)
    layers = {
        name: module
        for name, module in containers.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    _start(layers.values(), seed, device)
    for layer in layers.values():
        layer.base_layer = freeze(layer.base_layer)
    others = {
        name: frozen
        for name, module in model.named_modules()
        if name.startswith(("blocks.", "head."))
        and name not in layers
        and (frozen := freeze(module))
    }
    return Adapters(with_layers(containers, others), layers, rank, alpha)


def _start(layers: Iterable[Any], seed: int, device: torch.device) -> None:
    """Seeded float32 weights, whatever type peft took over from the base layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            for factors in (layer.lora_A, layer.lora_B):
                factors.to("cpu", torch.float32)
            layer.reset_lora_parameters(ADAPTER, True)
            for factors in (layer.lora_A, layer.lora_B):
                factors.to(device).requires_grad_(True)


def require_rank(model: Any, rank: int) -> None:
    """Refuse a rank that is none of a low-rank change of a WanModel's layers.

    Raises:
        ValueError: says what is allowed.
    """
    if not 1 <= rank <= model.dim // 2:
        raise ValueError(
            f"rank is {rank}; allowed is 1 to {model.dim // 2} for this model, whose layers are "
            f"{model.dim} wide (a larger change is no longer of low rank). 16 is the usual choice."
        )


def _peft() -> Any:
    try:
        import peft
        import peft.tuners.lora
    except ImportError as error:
        raise RuntimeError(
            "Training needs the package peft. Install it into ComfyUI's Python: "
            "python -m pip install peft"
        ) from error
    return peft
