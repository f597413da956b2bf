"""Small checkpoints of the real architectures, so that every workflow runs without downloads.

A family trained on drawings of one small world (models/tiny_world) makes pictures that one
recognises; random weights exercise every code path at the real layer types and make noise.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..comfyui import media, models
from ..lora.guide import GuideLora, load_guide_lora
from .wan import TEXT_WIDTH

WORLD = Path(__file__).resolve().parents[2] / "models" / "tiny_world"
WORLD_VERSION = "1"
WORLD_SHIFT = 3.0
"""Of the noise levels; Wan's own 8 is for many more tokens."""
WORLD_WORDS = {
    "view": ("wide", "close"),
    "colour": ("red", "yellow", "green", "purple", "white"),
    "direction": ("left", "right"),
    "land": ("hills", "desert", "snow"),
    "time of day": ("noon", "dusk", "night"),
    "other": ("view", "of", "a", "balloon", "drifting", "over", "at"),
}
"""Every word that the trained family knows, by kind."""

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
    return random_weights(models.build_wan(**(small | config)), seed, matrices)


def vae_state(seed: int = 0, dim: int = 8) -> dict[str, Tensor]:
    """Weights of a small Wan 2.1 VAE (0.9 M parameters at dim 8)."""
    return random_weights(media.build_wan_vae(dim), seed)


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
    """A small model, text encoder and VAE, as ComfyUI's MODEL, CLIP and VAE: random weights."""
    model = models.load_diffusion_model(wan_state(seed))
    return model, TinyTextEncoder(seed), media.load_vae(vae_state(seed))


# --- The trained family ---------------------------------------------------------------------


class WorldTextEncoder(TinyTextEncoder):
    """The trained family's text encoder: it knows the words of its world and no others."""

    def tokenize(self, text: str, **_: Any) -> list[str]:
        """The words of a prompt.

        Raises:
            ValueError: words that the family was not trained on.
        """
        words = text.lower().replace(",", " ").replace(".", " ").split()
        known = [word for kind in WORLD_WORDS.values() for word in kind]
        unknown = sorted({word for word in words if word not in known})
        if unknown:
            raise ValueError(
                f"The tiny world does not know {', '.join(unknown)}. Its words are: "
                f"{', '.join(known)}. For example: wide view of a red balloon drifting left over "
                "hills at noon. A negative prompt has to stay empty."
            )
        return words[:TEXT_TOKENS]


class TinyFamily(NamedTuple):
    """What AtlasVid Tiny Models gives."""

    model: Any
    text_encoder: TinyTextEncoder
    vae: Any
    guide_lora: GuideLora | None
    proxy_model: Any
    """The model with the LoRA that samples proxies, or the model itself."""


def world_file(name: str, folder: Path = WORLD) -> Path:
    """A file of the trained family.

    Raises:
        ValueError: it is missing, cut short, or of another version of this pack.
    """
    path = folder / f"tiny_world_{name}.safetensors"
    advice = "Download the pack again, or set weights to random."
    if not path.is_file():
        raise ValueError(f"{path} is missing. {advice}")
    try:
        with safe_open(path, framework="pt") as file:
            version = (file.metadata() or {}).get("tiny_world")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it is cut short. {advice}") from error
    if version != WORLD_VERSION:
        raise ValueError(
            f"{path} is of version {version} of the tiny world; this pack needs {WORLD_VERSION}. "
            f"{advice}"
        )
    return path


def world_state(name: str, folder: Path = WORLD) -> dict[str, Tensor]:
    """Weights of the trained family in float32, which costs nothing at this size.

    Raises:
        ValueError: see `world_file`.
    """
    with safe_open(world_file(name, folder), framework="pt") as file:
        return {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118


def trained_family(folder: Path = WORLD) -> TinyFamily:
    """The family that was trained on the tiny world.

    Raises:
        ValueError: see `world_file`.
    """
    model = models.with_shift(models.load_diffusion_model(world_state("t2v", folder)), WORLD_SHIFT)
    return TinyFamily(
        model,
        WorldTextEncoder(),
        media.load_vae(world_state("vae", folder)),
        load_guide_lora(world_file("guide_lora", folder), 1.0),
        models.with_lora(model, world_state("proxy_lora", folder)),
    )


def random_family(seed: int) -> TinyFamily:
    """A family of random weights, without LoRAs."""
    model, text_encoder, vae = tiny_models(seed)
    return TinyFamily(model, text_encoder, vae, None, model)
