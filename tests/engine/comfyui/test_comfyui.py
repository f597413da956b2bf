"""Which models the pack accepts, on real model classes of ComfyUI at small sizes."""

from typing import Any

import comfy.supported_models
import pytest
import torch
from atlasvid.engine.comfyui import management, models
from atlasvid.engine.families import tiny
from atlasvid.engine.families.family import latent_space
from atlasvid.engine.geometry import space
from comfy.model_patcher import ModelPatcher
from wan import small_wan


def small_flux() -> ModelPatcher:
    """An image model: Flux with one block of one head."""
    config = {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "vec_in_dim": 64,
        "context_in_dim": 64,
        "hidden_size": 128,
        "mlp_ratio": 1.0,
        "num_heads": 1,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [16, 56, 56],
        "txt_ids_dims": [],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": False,
    }
    model_config = comfy.supported_models.Flux(config)
    model_config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    return ModelPatcher(model_config.get_model({}, device=cpu), cpu, cpu)


def small_vace() -> ModelPatcher:
    """A Wan with VACE's control blocks, as the stock loader recognises it."""
    state = tiny.wan_state(num_layers=2)
    controls = {
        name.replace("blocks.", "vace_blocks.", 1): value
        for name, value in state.items()
        if name.startswith("blocks.0.")
    }
    return models.load_diffusion_model(
        {**state, **controls, "vace_patch_embedding.weight": torch.zeros(256, 96, 1, 2, 2)}
    )


@pytest.mark.parametrize(
    ("make", "name"), [(small_flux, "Flux"), (small_vace, "WAN21_Vace")], ids=["image", "vace"]
)
def test_other_models_are_named_beside_those_supported(make, name: str) -> None:
    with pytest.raises(ValueError, match=rf"recognised as {name}.*Supported are Wan 2\.1"):
        latent_space(make())


def test_a_plain_wan_is_accepted() -> None:
    assert latent_space(small_wan()) == space.LatentSpace(16, 8, 4, (1, 2, 2))


def test_a_tensor_that_does_not_fit_is_none() -> None:
    class Full:
        def __init__(self, error: Exception):
            self.error = error

        def new_empty(self, shape: tuple[int, ...]) -> torch.Tensor:
            raise self.error

    full: Any = Full(torch.cuda.OutOfMemoryError("out of memory"))
    assert management.empty_if_it_fits(full, (2, 3)) is None
    broken: Any = Full(ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        management.empty_if_it_fits(broken, (2, 3))
    made = management.empty_if_it_fits(torch.zeros(1, dtype=torch.bfloat16), (2, 3))
    assert made is not None
    assert (made.shape, made.dtype) == ((2, 3), torch.bfloat16)
