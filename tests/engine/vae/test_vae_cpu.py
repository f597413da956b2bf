"""The CPU's fast layers against the core's own layers."""

import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import pytest
import torch
from atlasvid.engine.vae import cpu
from atlasvid.engine.vae.decode import decode_images
from atlasvid.engine.vae.encode import encode_frames
from atlasvid.engine.vae.sources import ImageFrames
from torch.utils._python_dispatch import TorchDispatchMode
from wan_vaes import wan21_vae, wan22_vae

TOLERANCE = 5e-6
BLOCKS = [comfy.ldm.wan.vae.ResidualBlock, comfy.ldm.wan.vae2_2.ResidualBlock]
SLOW = {"aten.conv3d.default", "aten.linalg_vector_norm.default"}
FAST = "aten.mkldnn_convolution.default"
CPU = torch.empty(0)


@pytest.fixture(autouse=True)
def narrow_bands(monkeypatch):
    """Four rows a band, so that small pictures have many."""
    monkeypatch.setattr(cpu, "BAND_VALUES", 1)
    monkeypatch.setattr(cpu, "BAND_POSITIONS", 1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_weights(module: torch.nn.Module) -> torch.nn.Module:
    for number, parameter in enumerate(module.parameters()):
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1.0
        parameter.data = scale * random(*parameter.shape, seed=number)
    return module


def in_chunks(block, x: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """A block over a video whose frames come in chunks, with its cache."""
    cache = [None, None]
    with torch.inference_mode():
        return torch.cat([block(part, cache, [0]) for part in x.split(chunks, dim=2)], dim=2)


@pytest.mark.parametrize("make", BLOCKS)
@pytest.mark.parametrize(
    ("channels", "items", "chunks", "height", "width"),
    [
        ((8, 8), 1, [1, 2, 2], 9, 13),
        ((8, 8), 2, [1, 4, 4], 16, 8),
        ((3, 5), 1, [1, 2, 2, 1], 5, 7),
        ((16, 8), 2, [3, 2], 1, 6),
        ((8, 32), 1, [1], 12, 1),
        ((32, 32), 1, [4, 4], 4, 11),
    ],
)
def test_a_residual_block_is_the_cores(make, channels, items, chunks, height, width):
    block = with_weights(make(*channels))
    x = random(items, channels[0], sum(chunks), height, width, seed=5)
    expected = in_chunks(block, x, chunks)
    with cpu.fast_on_cpu(block, CPU):
        assert (in_chunks(block, x, chunks) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("chunks", [[1, 1, 1], [2, 1, 2]])
def test_single_frames_see_two_frames_back_as_in_wan22(chunks):
    block = with_weights(comfy.ldm.wan.vae2_2.ResidualBlock(8, 8))
    x = random(1, 8, sum(chunks), 6, 10)
    expected = in_chunks(block, x, chunks)
    with cpu.fast_on_cpu(block, CPU):
        assert (in_chunks(block, x, chunks) - expected).abs().max() <= TOLERANCE


def test_a_block_takes_crops_and_any_layout():
    block = with_weights(BLOCKS[0](8, 8))
    x = random(1, 8, 2, 12, 17)
    crops = [x[..., 1:10, 2:15], x.to(memory_format=torch.channels_last_3d)[..., 1:10, 2:15]]
    with torch.inference_mode():
        expected = block(crops[0])
        with cpu.fast_on_cpu(block, CPU):
            for crop in crops:
                assert (block(crop) - expected).abs().max() <= TOLERANCE


def test_weights_go_through_the_layers_casts():
    block = with_weights(BLOCKS[0](8, 16))
    for conv in block.modules():
        if isinstance(conv, torch.nn.Conv3d):
            conv.comfy_cast_weights = True
            conv.to(torch.bfloat16)
            conv.weight_function = [lambda weight: 2 * weight]
    x = random(1, 8, 2, 6, 7)
    with torch.inference_mode():
        expected = block(x)
        with cpu.fast_on_cpu(block, CPU):
            assert (block(x) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("channels", "out"), [(8, 3), (16, 12), (32, 32)])
@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("known", [0, 1, 2])
def test_a_head_is_the_cores(channels, out, frames, known):
    layers = with_weights(
        torch.nn.Sequential(
            comfy.ldm.wan.vae.RMS_norm(channels, images=False),
            torch.nn.SiLU(),
            comfy.ldm.wan.vae.CausalConv3d(channels, out, 3, padding=1),
        )
    )
    norm, silu, conv = layers
    x = random(2, channels, frames, 9, 7)
    before = random(2, channels, known, 9, 7, seed=1) if known else None
    with torch.inference_mode():
        expected = conv(silu(norm(x)), before if before is None else silu(norm(before)))
        with cpu.fast_on_cpu(layers, CPU):
            assert (conv(silu(norm(x)), before) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_lone_convolution_is_the_cores(frames, kernel):
    conv = with_weights(comfy.ldm.wan.vae.CausalConv3d(3, 8, kernel, padding=kernel // 2))
    x = random(2, 3, frames, 5, 7)
    with torch.inference_mode():
        expected = conv(x)
        with cpu.fast_on_cpu(conv, CPU):
            assert (conv(x) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 7), (8, 6)])
@pytest.mark.parametrize("out", [2, 3, 8, 16])
def test_upsampling_is_the_cores(height, width, out):
    layers = with_weights(comfy.ldm.wan.vae.Resample(16, "upsample2d").resample)
    layers[1] = with_weights(comfy.ldm.wan.vae.ops.Conv2d(16, out, 3, padding=1))
    x = random(3, 16, height, width)
    with torch.inference_mode():
        expected = layers(x)
        with cpu.fast_on_cpu(layers, CPU):
            found = layers(x)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("bias", [False, True])
def test_the_norm_is_the_cores_at_every_size_of_number(bias):
    norm = with_weights(comfy.ldm.wan.vae.RMS_norm(8, images=False, bias=bias))
    x = random(2, 8, 2, 5, 6)
    for column, size in enumerate((0.0, 1e-30, 1e-13, 1e-11, 1e12, 1.0)):
        x[..., column] *= size
    x[0, 3, 0, 0, 5] = float("nan")
    with torch.inference_mode():
        expected = norm(x)
        with cpu.fast_on_cpu(norm, CPU):
            found = norm(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def changed(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that do not compute what their class says."""
    return [layer for layer in model.modules() if {"forward", "_conv_forward"} & {*vars(layer)}]


class Operations(TorchDispatchMode):
    """Records what PyTorch is asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def operations(compute) -> set[str]:
    with torch.inference_mode(), Operations() as recorded:
        compute()
    return recorded.names


@pytest.mark.skipif(not cpu.ONEDNN, reason="this PyTorch is without oneDNN")
@pytest.mark.parametrize(("make", "channels"), [(wan21_vae, 16), (wan22_vae, 48)])
def test_the_fast_layers_are_taken(make, channels):
    vae = make()
    latent = random(1, channels, 3, 8, 8)
    images = torch.rand(5, 64, 64, 3)
    assert operations(lambda: vae.decode(latent)) >= SLOW
    for compute in (
        lambda: decode_images(vae, latent),
        lambda: encode_frames(vae, ImageFrames(images)),
    ):
        found = operations(compute)
        assert FAST in found
        assert not found & SLOW
    changed = [
        m for m in vae.first_stage_model.modules() if {"forward", "_conv_forward"} & {*vars(m)}
    ]
    assert not changed, "the VAE's layers were not given back"


@pytest.mark.parametrize("x", [torch.empty(0, device="meta"), torch.empty(0, dtype=torch.bfloat16)])
def test_other_devices_and_dtypes_keep_the_cores_layers(x):
    decoder = wan21_vae().first_stage_model.decoder
    with cpu.fast_on_cpu(decoder, x):
        assert not changed(decoder)


def test_the_layers_are_given_back_after_an_error():
    block = BLOCKS[0](8, 8)
    with pytest.raises(ValueError, match="stop"), cpu.fast_on_cpu(block, CPU):
        raise ValueError("stop")
    assert not changed(block)
