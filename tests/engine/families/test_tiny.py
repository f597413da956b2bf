"""The trained tiny family: for the stock loaders, and clear about what is wrong with a file."""

import shutil
from pathlib import Path

import pytest
import torch
from atlasvid.engine.estimate.cost import TINY, TINY_RANDOM
from atlasvid.engine.estimate.overview import shape_of_file, shape_of_model
from atlasvid.engine.families import tiny
from safetensors.torch import load_file, save_file

NAMES = ("t2v", "vae", "guide_lora", "proxy_lora")


@pytest.fixture(scope="module")
def family() -> tiny.TinyFamily:
    return tiny.trained_family()


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.WORLD, tmp_path / "tiny_world"))


def test_the_files_are_small_enough_for_the_repository():
    sizes = {file.name: file.stat().st_size for file in tiny.WORLD.iterdir()}
    flashvsr = sum(size for name, size in sizes.items() if "flashvsr" in name)
    assert sum(sizes.values()) - flashvsr < 24 * 2**20
    assert sum(sizes.values()) < 25 * 2**20


def test_the_stock_loader_takes_the_files_as_they_are():
    import comfy.sd
    import comfy.utils

    model = comfy.sd.load_diffusion_model(str(tiny.world_file("t2v")))
    assert type(model.model).__name__ == "WAN21"
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(tiny.world_file("vae"))))
    assert vae.decode(torch.zeros(1, 16, 2, 4, 4)).shape == (1, 5, 32, 32, 3)


def test_the_estimate_knows_both_families(family: tiny.TinyFamily):
    assert shape_of_model(family.model) == TINY
    assert shape_of_file(tiny.world_file("t2v")) == TINY
    assert shape_of_model(tiny.tiny_models()[0]) == TINY_RANDOM
    counted = sum(v.numel() for v in load_file(tiny.world_file("t2v")).values())
    assert TINY.weight_bytes / 4 == pytest.approx(counted, rel=0.02)


def test_the_loras_change_what_they_are_for(family: tiny.TinyFamily):
    assert family.guide_lora is not None
    inner = family.model.model.diffusion_model
    assert len(family.guide_lora.changes_of(inner)) > 10
    assert family.proxy_model.patches
    assert not family.model.patches


def test_unknown_words_are_named():
    encoder = tiny.WorldTextEncoder()
    assert encoder.tokenize("A red balloon, left.") == ["a", "red", "balloon", "left"]
    assert encoder.tokenize("") == []
    with pytest.raises(ValueError, match=r"does not know blurry, fox\. Its words are: wide, close"):
        encoder.tokenize("a blurry fox")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_missing_cut_short_or_of_another_version_is_named(copied: Path, name: str):
    path = copied / f"tiny_world_{name}.safetensors"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(ValueError, match=rf"tiny_world_{name}\.safetensors is missing\. Download"):
        tiny.trained_family(copied)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{name}\.safetensors cannot be read .* cut short"):
        tiny.trained_family(copied)
    save_file({"a": torch.zeros(1)}, path, {"tiny_world": "0"})
    with pytest.raises(ValueError, match=rf"{name}\.safetensors is of version 0 of the tiny world"):
        tiny.trained_family(copied)
