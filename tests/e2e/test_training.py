"""Training in real ComfyUI servers and as a command, on rendered MP4 files."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import render
from comfy_server import PromptFailed, Server, Session
from pipeline import DETAIL, Prompt, node, pipeline
from safetensors.torch import load_file
from train import parsed

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300.0


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name, seed in (("a", 0), ("b", 1)):
        render(folder / f"{name}.mp4", 18, seed=seed)
    return folder


def training(clips: Path | str, name: str, **chosen: Any) -> Prompt:
    """A training on the tiny models, at 128 x 128 for a second."""
    wish = {"width": 128, "height": 128, "seconds": 1.0, "fps": 16.0}
    wish |= {"proxy_short_side": 128, "temporal_stride": 4}
    usual = {
        "stage": "guide", "folder": str(clips), "steps": 3, "window": "compact", "rank": 4,
        "alpha": 4.0, "targets": "attention and feed-forward", "optimizer": "AdamW",
        "learning_rate": 0.01, "shift": 5.0, "sigma_min": 0.0, "sigma_max": 1.0,
        "caption_dropout": 0.1, "accumulate": 1, "precision": "bf16", "cuts_per_clip": 1,
        "save_every": 100, "seed": 0, "resume": True,
    }  # fmt: skip
    links = {"model": ["tiny", 0], "clip": ["tiny", 1], "vae": ["tiny", 2], "plan": ["plan", 0]}
    return {
        "tiny": node("AtlasVidTinyModels", seed=0, weights="random"),
        "plan": node("AtlasVidPlan", model=["tiny", 0], **wish),
        "train": node("AtlasVidTrainLoRA", name=name, **links, **(usual | chosen)),
    }


def base(server: Server) -> Path:
    return server.log.parent


def run_folder(server: Server, name: str) -> Path:
    return base(server) / "output" / "atlasvid_training" / name


def test_the_paper_s_preset_is_what_it_says_and_what_is_given_wins() -> None:
    """15K iterations, 720P x 81 frames, the proxy at 4 per second, bf16."""
    given = ["guide", "--clips", "x", "--preset", "paper"]
    paper, chosen = parsed(given), parsed([*given, "--steps", "7", "--height", "512"])
    assert (paper.steps, paper.width, paper.height, paper.precision) == (15_000, 1280, 720, "bf16")
    assert paper.fps / paper.temporal_stride == 4
    assert (chosen.steps, chosen.height, chosen.width) == (7, 512, 1280)
    light = parsed(given[:3])
    assert (light.steps, light.precision) == (1000, "bf16")


# --- The node -------------------------------------------------------------------------------


def test_a_guide_lora_is_trained_resumed_and_sampled_with(any_server: Server, clips: Path) -> None:
    """In ComfyUI's own inference mode, all in one server."""
    file = base(any_server) / "models" / "loras" / "my_guide.safetensors"
    with Session(any_server) as session:
        first = session.run(training(clips, "my_guide"), TIMEOUT)
        shown = first["outputs"]["train"]
        assert shown["images"][0]["type"] == "temp"
        assert "2 samples, 0 clips or cuts skipped" in shown["text"][0]
        before = load_file(file)
        resumed = training(clips, "my_guide", steps=5)
        assert session.run(resumed, TIMEOUT)["status"]["status_str"] == "success"
        assert any(not torch.equal(load_file(file)[name], before[name]) for name in before)
        assert file.with_suffix(".png").is_file()

        whole = pipeline()
        whole["lora"] = node("AtlasVidGuideLoRA", lora="my_guide.safetensors", strength=1.0)
        whole["attention"]["inputs"] |= {
            "guide_lora": ["lora", 0],
            "window": "auto",
            "guide_noise": "auto",
        }
        videos = set((base(any_server) / "output").rglob("*.mp4"))
        assert session.run(whole, TIMEOUT)["status"]["status_str"] == "success"
        assert len(set((base(any_server) / "output").rglob("*.mp4")) - videos) == 1
    log = any_server.log.read_text("utf-8", errors="replace")
    assert "temporal_stride 4 and is used with 2" in log


def test_a_proxy_lora_is_trained_on_comfyuis_dataset_nodes(server: Server, clips: Path) -> None:
    """The trained LoRA goes on to the stock loader, in the same graph and from its file."""
    shutil.copytree(clips, base(server) / "input" / "my_clips", dirs_exist_ok=True)
    prompt = training("", "my_proxy", stage="proxy")
    prompt["dataset"] = node("LoadVideoTextDataSetFromFolder", folder="my_clips")
    prompt["train"]["inputs"] |= {"videos": ["dataset", 0], "captions": ["dataset", 1]}
    whole = pipeline()
    whole["loaded"] = node(
        "LoraModelLoader", model=["tiny", 0], lora=["train", 1], strength_model=1.0, bypass=False
    )
    whole["rope"]["inputs"]["model"] = ["loaded", 0]
    del prompt["tiny"]
    prompt["train_plan"] = prompt.pop("plan")
    prompt["train"]["inputs"]["plan"] = ["train_plan", 0]
    with Session(server) as session:
        assert session.run(whole | prompt, TIMEOUT)["status"]["status_str"] == "success"
        start = server.log.stat().st_size
        whole["loaded"] = node(
            "LoraLoaderModelOnly",
            model=["tiny", 0],
            lora_name="my_proxy.safetensors",
            strength_model=0.5,
        )
        assert session.run(whole, TIMEOUT)["status"]["status_str"] == "success"
    assert "lora key not loaded" not in server.log.read_text("utf-8")[start:]


def test_the_wrong_output_of_a_stage_says_which_is_right(server: Server, clips: Path) -> None:
    whole = training(clips, "blocked", stage="proxy", steps=1)
    whole["latent"] = node("AtlasVidDetailLatent", plan=["plan", 0], proxy=["plan", 1])
    whole["attention"] = node(
        "AtlasVidHierarchicalAttention",
        model=["tiny", 0],
        plan=["plan", 0],
        window="auto",
        overlap="shifted",
        guide_noise="auto",
        start_percent=0.0,
        end_percent=1.0,
        proxy=["plan", 1],
        guide_lora=["train", 0],
    )
    whole |= {name: pipeline()[name] for name in ("positive", "negative", DETAIL, "decode")}
    whole["show"] = node("PreviewImage", images=["decode", 0])
    right = "Stage proxy makes an ordinary LoRA"
    with Session(server) as session, pytest.raises(PromptFailed, match=right):
        session.run(whole, TIMEOUT)


def test_cancelling_a_training_keeps_it_for_later(server: Server, clips: Path) -> None:
    state = run_folder(server, "long") / "state.safetensors"
    with Session(server) as session:
        prompt_id = session.queue(training(clips, "long", steps=100_000))
        kinds, pictures, posted = [], 0, 0.0
        for kind, data in session.events(prompt_id, TIMEOUT):
            kinds.append(kind)
            pictures += kind == "preview"
            if kind == "progress" and data["node"] == "train" and data["value"] > 5 and not posted:
                session.interrupt(prompt_id)
                posted = time.monotonic()
        assert time.monotonic() - posted < 5
        assert "execution_interrupted" in kinds
        assert pictures, "the loss curve is shown while it grows"
        assert state.is_file()
        short = training(clips, "other", steps=1)
        assert session.run(short, TIMEOUT)["status"]["status_str"] == "success"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("empty", "There is no video in"),
        ("no folder", "There is nothing to train on"),
        ("no caption", "1 of 1 clips .* have no caption: a.mp4"),
        ("corrupt", "None of the 1 clips can be used:\na.mp4: unreadable"),
        ("rank", "rank is 200; allowed is 1 to 128"),
        ("name", "name is '../up'; use letters"),
        ("taken", "exists and is of no run"),
    ],
)
def test_bad_input_is_named(server: Server, tmp_path: Path, harm: str, message: str) -> None:
    prompt = training(tmp_path, f"bad {harm}")
    if harm not in ("empty", "corrupt"):
        render(tmp_path / "a.mp4", 18, caption=None if harm == "no caption" else "waves")
    if harm == "corrupt":
        (tmp_path / "a.mp4").write_bytes(b"no video")
        (tmp_path / "a.txt").write_text("words")
    changed = {"no folder": {"folder": ""}, "rank": {"rank": 200}, "name": {"name": "../up"}}
    prompt["train"]["inputs"] |= changed.get(harm, {})
    if harm == "taken":
        taken = base(server) / "models" / "loras" / "bad taken.safetensors"
        taken.parent.mkdir(parents=True, exist_ok=True)
        taken.write_bytes(b"precious")
    with Session(server) as session, pytest.raises(PromptFailed, match=message):
        session.run(prompt, TIMEOUT)


# --- The command ----------------------------------------------------------------------------


def command_line(clips: Path, out: Path, *options: str) -> list[str]:
    """tools/train.py as a newcomer runs it, with the ComfyUI under test as their own."""
    line = [sys.executable, str(ROOT / "tools" / "train.py"), "guide", "--clips", str(clips)]
    line += ["--python", sys.executable, "--output", str(out), "--work", str(out / "work")]
    line += ["--width", "128", "--height", "128", "--seconds", "1", "--proxy-short-side", "128"]
    return [*line, "--rank", "4", "--precision", "fp32", "--cpu", *options]


def command(clips: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    line, environment = command_line(clips, out, *options), {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment)


def test_the_command_trains_stops_and_resumes(clips: Path, tmp_path: Path) -> None:
    line, printed = command_line(clips, tmp_path, "--tiny", "--steps", "100000"), ""
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert run.stdout is not None
        for news in run.stdout:
            printed += news
            if "step 10/" in news:
                os.killpg(run.pid, signal.SIGINT)  # Ctrl+C, as a terminal sends it
        assert run.wait(30) == 130
    skipped = printed.index("2 samples, 0 clips or cuts skipped")
    assert skipped < printed.index("step 10/"), "before hours of training"
    file = tmp_path / "atlasvid_guide.safetensors"
    assert file.is_file()
    done = len(load_file(tmp_path / "work" / "atlasvid_guide" / "state.safetensors")["losses"])
    assert 10 <= done < 100_000
    again = command(clips, tmp_path, "--tiny", "--steps", str(done + 1))
    assert again.returncode == 0, again.stderr
    assert f"resumed after step {done}" in again.stdout
    assert f"finished: {file}" in again.stdout


def test_two_processes_learn_what_one_learns_that_accumulates_two(
    clips: Path, tmp_path: Path
) -> None:
    two = command(clips, tmp_path, "--tiny", "--steps", "3", "--cards", "2", "--name", "two")
    assert two.returncode == 0, two.stderr
    one = command(clips, tmp_path, "--tiny", "--steps", "3", "--accumulate", "2", "--name", "one")
    assert one.returncode == 0, one.stderr
    a, b = (load_file(tmp_path / "work" / n / "state.safetensors") for n in ("two", "one"))
    assert len(a["losses"]) == 3
    assert torch.allclose(a["losses"], b["losses"], rtol=1e-5)
    for name in a:  # Adam's first moments are the gradients' means
        if name.endswith("exp_avg"):
            assert torch.allclose(a[name], b[name], atol=1e-3 * float(b[name].abs().max())), name


def test_the_command_takes_model_files(clips: Path, tmp_path: Path) -> None:
    missing = command(clips, tmp_path, "--model", str(tmp_path / "wan.safetensors"))
    assert missing.returncode == 1
    assert "there is no file" in missing.stdout
    unnamed = command(clips, tmp_path)
    assert "--model FILE is missing (or try --tiny)" in unnamed.stdout
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"half of it")
    files = [f"--{kind}={damaged}" for kind in ("model", "text-encoder", "vae")]
    stopped = command(clips, tmp_path, *files)
    assert f"stopped: {damaged} is damaged, or no safetensors file" in stopped.stderr


def test_the_command_names_bad_input(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for done, message in (
        (command(tmp_path, tmp_path, "--tiny"), "There is no video in"),
        (command(clips, tmp_path / "file", "--tiny"), "file cannot be written"),
    ):
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
