"""AtlasVid FlashVSR from files to frames, against the published method computed densely."""

from argparse import Namespace
from pathlib import Path

import comfy.latent_formats
import flashvsr_reference as reference
import folder_paths
import pytest
import torch
from atlasvid.engine.comfyui import management, server
from atlasvid.engine.families.tiny import wan_state
from atlasvid.engine.flashvsr.blocks import BlockGrid
from atlasvid.engine.flashvsr.files import PUBLISHED_BYTES, ROLES, projection_shapes
from atlasvid.engine.flashvsr.noise import placed_noise
from atlasvid.engine.flashvsr.schedule import Schedule
from atlasvid.engine.flashvsr.store import LatentFile
from atlasvid.engine.vae import scratch
from atlasvid.nodes.flashvsr import AtlasVidFlashVSR, AtlasVidFlashVSRLoader
from flashvsr_dit_reference import DenseFlashVSR, tokens_of_frames
from safetensors.torch import save_file
from wan import rand
from wan_vaes import wan21_vae

WIDTHS = (8, 8, 4, 4)
NAMES = {
    "transformer": "diffusion_pytorch_model_streaming_dmd.safetensors",
    "projection": "LQ_proj_in.ckpt",
    "prompt": "posi_prompt.pth",
    "tc_decoder": "TCDecoder.ckpt",
}


def projection_state(seed=5, widths=(6, 10, 256)):
    state = {}
    for n, (name, shape) in enumerate(projection_shapes(*widths).items()):
        scale = 1.0 if len(shape) == 1 else torch.Size(shape[1:]).numel() ** -0.5
        state[name] = rand(*shape, seed=seed + n) * scale
    return state


@pytest.fixture(scope="module")
def parts():
    """Weights of a small FlashVSR under the published names."""
    return {
        "transformer": wan_state(0, num_layers=2),
        "projection": projection_state(),
        "prompt": rand(1, 7, 4096, seed=9),
        "tc_decoder": reference.tc_weights(WIDTHS),
    }


@pytest.fixture
def folder(parts, tmp_path, monkeypatch):
    """ComfyUI's models folder with the files in it."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    paths = dict(folder_paths.folder_names_and_paths)
    paths.pop("FlashVSR", None)
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", paths)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    own = tmp_path / "FlashVSR"
    own.mkdir()
    save_file(parts["transformer"], own / NAMES["transformer"])
    for role in ("projection", "prompt", "tc_decoder"):
        torch.save(parts[role], own / NAMES[role])
    return own


def load(version="v1.1", **changed):
    return AtlasVidFlashVSRLoader.execute(**{**NAMES, "version": version, **changed}).args[0]


def images(frames, height, width):
    """A picture that moves, so that frames differ and colours have a spread."""
    base = rand(height, width + frames, 3, seed=1).sigmoid()
    rows = torch.stack([base[:, n : n + width] for n in range(frames)])
    return (rows * 255).round() / 255


def published(parts, pixels, size, version, sparsity=(2.0, 3.0, 11), colour="adain", seed=0):
    """Latent and frames by definition; the noise is the node's."""
    height, width = size
    padded = tuple(-(-side // 128) * 128 for side in size)
    picture = reference.upscaled((pixels * 255).round().byte().numpy(), height, width)
    count = reference.clip_length(len(pixels))
    whole = reference.edge_padded(picture, *padded)[torch.arange(count).clamp(max=len(pixels) - 1)]
    double = lambda state: {name: value.double() for name, value in state.items()}  # noqa: E731
    shown = tokens_of_frames(double(parts["projection"]), whole.movedim(0, 1), version)
    grid = BlockGrid.of(*padded)
    noise = torch.stack([placed_noise(seed, t, grid) for t in range(len(shown))], dim=1)
    dense = DenseFlashVSR(double(parts["transformer"]), parts["prompt"][0].double(), 2, *sparsity)
    latent = dense(noise.double(), shown)
    frames = reference.tc_decode(parts["tc_decoder"], latent[None], whole[: count - 4])
    frames = frames[: len(pixels), :, :height, :width]
    corrected = getattr(reference, colour)(frames, picture) if colour != "off" else frames
    raw = comfy.latent_formats.Wan21().process_out(latent[None])
    return raw, (corrected / 2 + 0.5).clamp(0, 1).movedim(1, -1)


@pytest.mark.parametrize(
    ("frames", "size", "version", "colour"),
    [
        (21, (128, 128), "v1", "wavelet"),
        (29, (128, 256), "v1.1", "adain"),
        (1, (128, 128), "v1.1", "off"),
        (22, (60, 140), "v1.1", "adain"),
    ],
)
def test_latent_and_frames_equal_the_published_method(folder, parts, frames, size, version, colour):
    pixels = images(frames, size[0] // 4, size[1] // 4)
    video, latent = AtlasVidFlashVSR.execute(
        load(version), pixels, 4.0, 0, "tiny conditional", colour
    ).args
    raw, expected = published(parts, pixels, size, version, colour=colour)
    torch.testing.assert_close(latent["samples"].double(), raw, atol=3e-4, rtol=0)
    ours = video.get_components().images
    assert ours.shape == (frames, *size, 3)
    torch.testing.assert_close(ours.double(), expected.double(), atol=1e-3, rtol=0)


def test_the_wan_decode_is_the_stock_one_in_the_clips_colours(folder, parts):
    vae = wan21_vae()
    pixels = images(10, 32, 45)
    video, latent = AtlasVidFlashVSR.execute(
        load(), pixels, 4.0, 3, "Wan VAE", "wavelet", vae=vae
    ).args
    with torch.inference_mode():
        stock = vae.decode(latent["samples"])[0, :10, :128, :180].movedim(-1, 1).double() * 2 - 1
    picture = reference.upscaled((pixels * 255).round().byte().numpy(), 128, 180)
    expected = (reference.wavelet(stock, picture) / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    ours = video.get_components().images.double()
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_a_longer_clip_begins_like_a_shorter_one(folder):
    """Up to the last chunk of the short one, which saw copies of its last frame."""
    flashvsr, pixels = load(), images(37, 32, 32)
    whole, short = (
        AtlasVidFlashVSR.execute(flashvsr, clip, 4.0, 0, "tiny conditional", "adain").args[0]
        for clip in (pixels, pixels[:29])
    )
    whole, short = (video.get_components().images for video in (whole, short))
    assert torch.equal(whole[:21], short[:21])
    assert not torch.equal(whole[21:29], short[21:29])


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (128, 192)),
        ({"width": 100}, (67, 100)),
        ({"height": 100}, (100, 150)),
        ({"width": 130, "height": 70}, (70, 130)),
    ],
)
def test_any_target_size(folder, sizes, expected):
    video = AtlasVidFlashVSR.execute(
        load(), images(2, 32, 48), 4.0, 0, "tiny conditional", "off", **sizes
    ).args[0]
    assert video.get_components().images.shape == (2, *expected, 3)


def test_safetensors_with_a_prefix_are_the_same_files(folder, parts):
    save_file(
        {f"LQ_proj_in.{name}": value for name, value in parts["projection"].items()},
        folder / "lq.safetensors",
    )
    save_file({"context": parts["prompt"]}, folder / "prompt.safetensors")
    save_file(parts["tc_decoder"], folder / "tc.safetensors")
    folder_paths.filename_list_cache.clear()
    copies = load(
        projection="lq.safetensors", prompt="prompt.safetensors", tc_decoder="tc.safetensors"
    )
    first = load()
    assert torch.equal(copies.prompt, first.prompt)
    for theirs, ours in (
        (first.projection, copies.projection),
        (first.tc_decoder, copies.tc_decoder),
    ):
        state = ours.model.state_dict()
        assert all(torch.equal(v, state[name]) for name, v in theirs.model.state_dict().items())


class Code:
    """What a pickle must not bring in."""

    def __reduce__(self):
        return (print, ("ran",))


def test_what_is_wrong_with_a_file_is_said(folder, parts, capsys):
    broken = {
        "short.ckpt": (folder / NAMES["projection"]).read_bytes()[:2000],
        "short.safetensors": (folder / NAMES["transformer"]).read_bytes()[:2000],
    }
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    torch.save({"conv1.weight": Code()}, folder / "code.ckpt")
    torch.save({**parts["projection"], "norm2.gamma": torch.ones(3, 1, 1, 1)}, folder / "odd.ckpt")
    torch.save(projection_state(widths=(6, 10, 128)), folder / "narrow.ckpt")
    save_file(wan_state(0, num_layers=1, in_dim=36, model_type="i2v"), folder / "i2v.safetensors")
    cases = [
        ({"projection": "absent.ckpt"}, "projection: there is no file 'absent.ckpt'. Put it into"),
        (
            {"prompt": "a.pth", "tc_decoder": ROLES["tc_decoder"].missing},
            "prompt: .* at github.com/OpenImagingLab/FlashVSR, in examples/WanVSR/prompt_tensor.\n"
            "tc_decoder: there is no file TCDecoder.ckpt. Put .*huggingface.co/JunhaoZhuang",
        ),
        ({"projection": "../../secret.ckpt"}, "there is no file"),
        ({"projection": "short.ckpt"}, "short.ckpt cannot be read"),
        ({"projection": "code.ckpt"}, "holds more than tensors"),
        ({"projection": NAMES["tc_decoder"]}, "no LQ projection: conv1.weight"),
        ({"projection": "odd.ckpt"}, r"norm2.gamma has the shape \[3, 1, 1, 1\], but needs \[10"),
        ({"projection": "narrow.ckpt"}, "makes tokens of 128 numbers, the transformer takes 256"),
        ({"prompt": NAMES["projection"]}, "is no prompt of FlashVSR"),
        ({"tc_decoder": NAMES["projection"]}, "no Tiny Conditional decoder"),
        ({"transformer": "short.safetensors"}, "short.safetensors"),
        ({"transformer": "i2v.safetensors"}, "type i2v with 36 input channels"),
        ({"transformer": NAMES["projection"]}, "LQ_proj_in.ckpt"),
        ({"version": "v2"}, "version is 'v2'; allowed are v1 and v1.1"),
    ]
    for changed, message in cases:
        with pytest.raises(ValueError, match=message):
            load(**changed)
    assert "ran" not in capsys.readouterr().out


def test_files_are_offered_for_what_they_are(folder):
    offered = {i.id: i.options for i in AtlasVidFlashVSRLoader.define_schema().inputs}
    assert {role: offered[role][0] for role in NAMES} == NAMES
    assert "none" in offered["tc_decoder"]
    for file in folder.iterdir():
        file.unlink()
    ported = {
        "transformer": "Wan2_1-T2V-1_3B_FlashVSR_fp32.safetensors",
        "projection": "Wan2_1_FlashVSR_LQ_proj_model_bf16.safetensors",
        "prompt": "Prompt.safetensors",
        "tc_decoder": "Wan2_1_FlashVSR_TCDecoder_fp32.safetensors",
    }
    for name in ported.values():
        (folder / name).touch()
    folder_paths.filename_list_cache.clear()
    offered = {i.id: i.options for i in AtlasVidFlashVSRLoader.define_schema().inputs}
    assert {role: offered[role][0] for role in NAMES} == ported


def test_where_there_are_no_files_the_choice_says_so(folder):
    for file in folder.iterdir():
        file.unlink()
    folder_paths.filename_list_cache.clear()
    offered = {i.id: i.options[0] for i in AtlasVidFlashVSRLoader.define_schema().inputs}
    assert offered == {
        "transformer": "missing: put diffusion_pytorch_model_streaming_dmd.safetensors into "
        "models/FlashVSR",
        "projection": "missing: put LQ_proj_in.ckpt into models/FlashVSR",
        "prompt": "missing: put posi_prompt.pth into models/FlashVSR",
        "tc_decoder": "none",
        "version": "v1",
    }
    with pytest.raises(ValueError, match="transformer: there is no file") as refused:
        AtlasVidFlashVSRLoader.execute(**offered)
    assert len(str(refused.value).splitlines()) == 3


def test_a_published_projection_of_the_other_version_is_refused(folder, monkeypatch):
    size = (folder / NAMES["projection"]).stat().st_size
    monkeypatch.setitem(PUBLISHED_BYTES, size, "v1")
    assert load("v1").version == "v1"
    with pytest.raises(ValueError, match=r"LQ_proj_in.ckpt: This is the LQ .* of FlashVSR v1, and"):
        load("v1.1")


def upscale(flashvsr, video, scale=4.0, **more):
    chosen = {"seed": 0, "decoder": "tiny conditional", "colour": "off", **more}
    return AtlasVidFlashVSR.execute(flashvsr, video, scale, **chosen).args[0]


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [((1, 1), 4.0, (4, 4)), ((1, 1), 1.0, (1, 1)), ((2, 9), 1.5, (3, 14))],
)
def test_pictures_of_hardly_any_pixels(folder, size, scale, expected):
    shown = upscale(load(), images(1, *size), scale).get_components().images
    assert shown.shape == (1, *expected, 3)
    assert shown.isfinite().all()


def test_sizes_and_lengths_that_cannot_be_are_refused_before_the_work(folder, monkeypatch):
    flashvsr = load()
    monkeypatch.setattr(management, "load_together", None)  # nothing is loaded
    with pytest.raises(ValueError, match=r"32 x 2048 would become 512 x 32768 .* 16384 a side"):
        upscale(flashvsr, images(1, 2048, 32), 16.0)
    with pytest.raises(ValueError, match="There are no frames"):
        upscale(flashvsr, images(1, 8, 8)[:0])
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda _folder: Namespace(free=1000))
    with pytest.raises(OSError, match=r"Up-scaling 3 frames to 128 x 64 needs .* --temp-directory"):
        upscale(flashvsr, images(3, 16, 32))
    assert not list(folder.parent.glob("temp/*"))


def test_a_clip_that_the_computer_cannot_hold_is_refused(folder, monkeypatch):
    flashvsr = load()
    monkeypatch.setattr(management, "free_memory", lambda *_: 2**20)
    monkeypatch.setattr(management, "total_memory", lambda _device: 2**20)
    with pytest.raises(ValueError, match=r"MiB of the computer's memory, 1 MiB are there"):
        upscale(flashvsr, images(30, 32, 32))
    assert not list(folder.parent.glob("temp/*"))


def test_what_the_work_takes_is_shown_before_it_begins(folder, monkeypatch):
    said = []
    monkeypatch.setattr(server, "show_progress", said.append)
    upscale(load(), images(2, 32, 48))
    first, last = said[0].split("\n"), said[-1].split("\n")
    assert first[0].startswith("192 x 128 x 2, 768 tokens, ")
    assert "of memory beside the weights" in first[1]
    assert first[2] == "up-scaling"
    assert last[2].startswith("up-scaled in ")


def test_a_decoder_that_is_not_there_is_named_before_the_work(folder):
    without = load(tc_decoder="none")
    for decoder, message in (
        ("tiny conditional", "without its Tiny"),
        ("Wan VAE", "connect the Wan"),
    ):
        with pytest.raises(ValueError, match=message):
            AtlasVidFlashVSR.execute(without, images(1, 32, 32), 4.0, 0, decoder, "off")
    assert not list(folder.parent.glob("temp/*"))


def test_where_mapped_files_cannot_be_removed_the_next_latent_removes_them(tmp_path, monkeypatch):
    """As on Windows."""
    unlink, living = Path.unlink, set()

    def refusing(path, missing_ok=False):
        if path in living:
            raise PermissionError(f"{path} is in use")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refusing)
    for i in range(3):
        with LatentFile(tmp_path, (1, 16, 2, 4, 4)) as file:
            file.write(0, torch.full((1, 16, 2, 4, 4), float(i)))
            living.add(file.path)
            latent = file.tensor()
        assert latent.unique().tolist() == [i]
        assert list(tmp_path.iterdir()) == [file.path]
        living.clear()  # its tensor is released


def test_an_upscaled_clip_leaves_no_file_behind(folder):
    video, latent = AtlasVidFlashVSR.execute(
        load(), images(1, 32, 32), 4.0, 0, "tiny conditional", "off"
    ).args
    kept = latent["samples"].clone()
    assert not list(folder.parent.glob("temp/*.latent"))  # mapped, and already without a name
    assert torch.equal(latent["samples"], kept)
    assert Schedule(1).latent_frames == kept.shape[2]
    del video
