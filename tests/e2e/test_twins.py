"""Every shipped graph runs to its end in a real server, as its tiny twin."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from atlasvid.engine.families.tiny import wan_state
from comfy_server import Server, Session, output_files
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from twins import IMAGE_TO_VIDEO, TRAINING, Prompt, tiny_twin
from workflow import to_prompt

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))
MAKE_LORAS = ("atlasvid_train_guide", "atlasvid_train_proxy")
MAKE_VIDEOS = [file for file in WORKFLOWS if file.stem not in MAKE_LORAS]
TIMEOUT = 300.0
FRAMES = 17


@contextmanager
def files_for(prompt: Prompt, base: Path) -> Iterator[None]:
    """The pictures, videos and image-to-video models that a twin reads, small, for its time alone:
    the front end shows previews of files that are there, which other tests do not expect."""
    places = {
        "LoadImage": (base / "input", "image", write_picture),
        "LoadVideo": (base / "input", "file", write_video),
        "UNETLoader": (base / "models" / "diffusion_models", "unet_name", write_model),
        TRAINING: (base / "input", "folder", write_clips),
        "FrameInterpolationModelLoader": (
            base / "models" / "frame_interpolation",
            "model_name",
            write_cross_fade,
        ),
    }
    made = []
    for node in prompt.values():
        if node["class_type"] in places:
            folder, name, write = places[node["class_type"]]
            made.append(folder / node["inputs"][name])
            made[-1].parent.mkdir(parents=True, exist_ok=True)
            write(made[-1])
    yield
    for file in made:
        shutil.rmtree(file) if file.is_dir() else file.unlink()


def write_picture(file: Path) -> None:
    picture = np.linspace(0, 255, 192 * 128 * 3).reshape(128, 192, 3).astype("uint8")
    Image.fromarray(picture).save(file)


def write_model(file: Path) -> None:
    save_file(wan_state(0, in_dim=36, num_layers=2), file)


def write_cross_fade(file: Path) -> None:
    """A RIFE whose flow is nothing and whose mask is a half."""
    from comfy_extras.frame_interpolation_models.ifnet import IFNet

    faded = IFNet(channels=(16, 16, 16, 16, 16)).state_dict()
    save_file({name: torch.zeros_like(weight) for name, weight in faded.items()}, file)


def write_video(file: Path) -> None:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 384, 224, "yuv420p"
        for i in range(FRAMES):
            frame = np.full((224, 384, 3), 40 + 8 * i, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_clips(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    write_video(folder / "clip.mp4")
    (folder / "clip.txt").write_text("a wide view of a red balloon", "utf-8")


def read_frames(file: Path) -> list[np.ndarray]:
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", MAKE_LORAS)
def test_a_training_graph_makes_its_lora(server: Server, name: str) -> None:
    """A LoRA of the stage that the graph is named by, at the size of its plan, and a curve."""
    base = server.log.parent
    workflow = json.loads((WORKFLOWS[0].parent / f"{name}.json").read_text("utf-8"))
    with Session(server) as session:
        prompt = tiny_twin(to_prompt(workflow, session.object_info()), seconds=1.0, width=256)
        with files_for(prompt, base):
            history = session.run(prompt, TIMEOUT)
    (training,) = [node["inputs"] for node in prompt.values() if node["class_type"] == TRAINING]
    with safe_open(base / "models" / "loras" / f"{training['name']}.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["atlasvid"])
        changed = [key for key in file.keys() if "lora_B" in key and file.get_tensor(key).any()]  # noqa: SIM118
    assert changed
    assert recipe["stage"] == name.removeprefix("atlasvid_train_")
    assert recipe["steps"] == training["steps"] == 4
    (shown,) = [each for each in history["outputs"].values() if "images" in each]
    with Image.open(base / "temp" / shown["images"][0]["filename"]) as curve:
        assert curve.size == (800, 480)


@pytest.mark.parametrize("file", MAKE_VIDEOS, ids=lambda file: file.stem)
def test_a_shipped_graph_makes_its_video(server: Server, file: Path) -> None:
    workflow = json.loads(file.read_text("utf-8"))
    base = server.log.parent
    with Session(server) as session:
        prompt = tiny_twin(to_prompt(workflow, session.object_info()), seconds=1.0, steps=2)
        with files_for(prompt, base):
            history = session.run(prompt, TIMEOUT)
    kinds = {node["class_type"] for node in prompt.values()}
    assert "UNETLoader" not in kinds or IMAGE_TO_VIDEO in kinds
    files = output_files(history, base / "output")
    made = [read_frames(file) for file in files if file.suffix == ".mp4"]
    frames = max(made, key=lambda video: video[0].size)  # the proxy is saved too
    assert (*frames[0].shape[:2], len(frames)) == promised(prompt)
    assert np.stack(frames).std() > 5  # a picture, not one colour


def promised(prompt: Prompt) -> tuple[int, int, int]:
    """Height, width and frames of the largest video that a graph saves."""
    inputs = {node["class_type"]: node["inputs"] for node in prompt.values()}
    if "AtlasVidPlan" not in inputs:  # the file of `write_video` at another width
        width = inputs["AtlasVidFlashVSR"]["width"]
        return round(224 * width / 384), width, FRAMES
    plan = inputs["AtlasVidPlan"]
    step = 4 * plan["temporal_stride"]
    width = plan["width"]
    if "ImageStitch" in inputs:
        width += inputs["ImageStitch"]["spacing_width"] + width
    frames = step * int(plan["seconds"] * plan["fps"] / step + 0.5) + 1
    if "LatentCut" in inputs:
        frames = min(frames, 4 * inputs["LatentCut"]["amount"] - 3)
    return plan["height"], width, frames
