"""What an artist meets who gives FlashVSR the wrong thing, over a real server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import flashvsr_reference as reference
import pytest
import torch
from atlasvid.engine.families.tiny import wan_state
from atlasvid.engine.flashvsr.files import ROLES, projection_shapes
from comfy_server import PromptFailed, PromptRejected, Server, Session, output_files
from pipeline import Prompt, node
from safetensors.torch import save_file

TIMEOUT = 300.0
PUBLISHED = {role: wanted.file for role, wanted in ROLES.items()}


def prompt(images: dict[str, Any] | None = None, scale: float = 4.0, **files: str) -> Prompt:
    chosen = {**PUBLISHED, "version": "v1.1", **files}
    size = {"width": 24, "height": 16, "batch_size": 2, "color": 0x4488CC, **(images or {})}
    return {
        "load": node("AtlasVidFlashVSRLoader", **chosen),
        "images": node("EmptyImage", **size),
        "vsr": node(
            "AtlasVidFlashVSR",
            flashvsr=["load", 0],
            video=["images", 0],
            scale=scale,
            seed=0,
            decoder="tiny conditional",
            colour="adain",
        ),
        "save": node(
            "SaveVideo", video=["vsr", 0], filename_prefix="vsr", format="auto", codec="auto"
        ),
    }


def without_files(server: Server) -> Path:
    folder = server.log.parent / "models" / "FlashVSR"
    folder.mkdir(parents=True, exist_ok=True)
    assert not list(folder.iterdir())
    return folder


@pytest.fixture
def files(any_server: Server) -> Iterator[Path]:
    """A small FlashVSR under the published names, in the server's models folder."""
    folder = without_files(any_server)
    projection = {n: torch.randn(s) * 0.05 for n, s in projection_shapes(6, 10, 256).items()}
    save_file(wan_state(0, num_layers=2), folder / PUBLISHED["transformer"])
    torch.save(projection, folder / PUBLISHED["projection"])
    torch.save(torch.randn(1, 7, 4096), folder / PUBLISHED["prompt"])
    torch.save(reference.tc_weights((8, 8, 4, 4)), folder / PUBLISHED["tc_decoder"])
    yield folder
    for file in folder.iterdir():
        file.unlink()


def failure(session: Session, wrong: Prompt) -> str:
    with pytest.raises(PromptFailed) as failed:
        session.run(wrong, TIMEOUT)
    return str(failed.value)


def test_missing_files_are_named_with_their_folder(any_server: Server) -> None:
    without_files(any_server)
    with Session(any_server) as session:
        with pytest.raises(PromptRejected) as refused:
            session.queue(prompt())
        for role in ("transformer", "projection", "prompt"):
            assert f"missing: put {PUBLISHED[role]} into models/FlashVSR" in str(refused.value)
        offered = {role: ROLES[role].missing for role in ("transformer", "projection", "prompt")}
        said = failure(session, prompt(**offered, tc_decoder="none"))
    for role in offered:
        assert f"{role}: there is no file {PUBLISHED[role]}. Put it into " in said
    assert "huggingface.co/JunhaoZhuang/FlashVSR-v1.1" in said


def test_the_wrong_file_in_each_slot_is_named(any_server: Server, files: Path) -> None:
    swapped = {
        "transformer": (PUBLISHED["tc_decoder"], "cannot be loaded as a diffusion model"),
        "projection": (PUBLISHED["prompt"], "This is no LQ projection"),
        "prompt": (PUBLISHED["transformer"], "is no prompt of FlashVSR"),
        "tc_decoder": (PUBLISHED["projection"], "This is no Tiny Conditional decoder"),
    }
    with Session(any_server) as session:
        for role, (file, message) in swapped.items():
            said = failure(session, prompt(**{role: file}))
            assert message in said, role
            assert file in said
            assert PUBLISHED[role] in said or "TCDecoder" in said


def test_impossible_sizes_are_refused_and_tiny_ones_are_made(
    any_server: Server, files: Path
) -> None:
    with Session(any_server) as session:
        with pytest.raises(PromptRejected, match=r"bigger than max of 16\.0: scale"):
            session.queue(prompt(scale=99.0))
        said = failure(session, prompt({"width": 2048, "batch_size": 1}, 16.0))
        assert "would become 32768 x 256 pixels; at most 16384 a side" in said
        said = failure(session, prompt(tc_decoder="none"))
        assert "loaded without its Tiny Conditional decoder" in said
        history = session.run(prompt({"width": 1, "height": 1}, 16.0), TIMEOUT)
        (file,) = output_files(history, any_server.log.parent / "output")
    with av.open(str(file)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(16, 16, 3)] * 2
