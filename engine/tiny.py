"""Small checkpoints of the real architectures, so that every workflow runs without downloads.

Random weights: they exercise every code path at the real layer types and produce noise pictures.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from . import host

TEXT_WIDTH = 4096
TEXT_TOKENS = 16


def random_weights(
    module: nn.Module, seed: int, matrices: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Seeded weights for every parameter: matrices keep their input's scale, norms stay near 1.

    Args:
        matrices: dtype of the blocks' matrices, one after the other, so that a large model never
            exists in full precision.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = {
        name
        for name, part in module.named_modules()
        if isinstance(part, (nn.LayerNorm, nn.RMSNorm))
    }
    state = {}
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        parent, _, leaf = name.rpartition(".")
        if leaf == "gamma" or (leaf == "weight" and parent in norms):
            state[name] = 1 + 0.1 * noise
        elif leaf == "weight":
            weight = noise / value[0].numel() ** 0.5
            in_block = name.startswith("blocks.") and weight.ndim == 2
            state[name] = weight.to(matrices) if in_block else weight
        else:
            state[name] = 0.1 * noise
    return state


def wan_state(
    seed: int = 0, matrices: torch.dtype = torch.float32, **config: Any
) -> dict[str, Tensor]:
    """Weights of a small Wan (dim 256, 4 blocks, 2 heads, 6 M parameters unless overridden).

    Args:
        seed: of the weights.
        matrices: dtype of the blocks' matrices.
        config: arguments of WanModel, such as `in_dim`, `out_dim` or `model_type`.
    """
    small = {"dim": 256, "ffn_dim": 1024, "num_heads": 2, "num_layers": 4, "text_dim": TEXT_WIDTH}
    return random_weights(host.build_wan(**(small | config)), seed, matrices)


def vae_state(seed: int = 0, dim: int = 8) -> dict[str, Tensor]:
    """Weights of a small Wan 2.1 VAE (0.9 M parameters at dim 8)."""
    return random_weights(host.build_wan_vae(dim), seed)


class TinyTextEncoder:
    """Stands in for UMT5: every word becomes one seeded random token of the right width.

    Works with the stock CLIPTextEncode, which calls `tokenize` and
    `encode_from_tokens_scheduled`.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed

    def tokenize(self, text: str, **_: Any) -> list[str]:
        return text.lower().split()[:TEXT_TOKENS]

    def encode_from_tokens_scheduled(self, tokens: list[str], **_: Any) -> list[list[Any]]:
        """Conditioning [[embedding [1, 16, 4096], {}]]; the rest is zero, as Wan's padding is."""
        embedding = torch.zeros(1, TEXT_TOKENS, TEXT_WIDTH)
        for i, word in enumerate(tokens):
            digest = hashlib.sha256(f"{self.seed} {word}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            embedding[0, i] = torch.randn(TEXT_WIDTH, generator=generator)
        return [[embedding, {}]]


def tiny_models(seed: int = 0) -> tuple[Any, TinyTextEncoder, Any]:
    """A small model, text encoder and VAE, as ComfyUI's MODEL, CLIP and VAE."""
    model = host.load_diffusion_model(wan_state(seed))
    return model, TinyTextEncoder(seed), host.load_vae(vae_state(seed))
