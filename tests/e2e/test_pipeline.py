"""Whole graphs in real ComfyUI servers, over their own API."""

import json
import time
from pathlib import Path
from typing import Any

import av
import pytest
from comfy_server import PromptFailed, PromptRejected, Server, Session, output_files
from pipeline import DETAIL, Prompt, node, pipeline
from workflow import to_prompt

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "workflows" / "atlasvid_demo.json"
TIMEOUT = 300.0


def output_folder(server: Server) -> Path:
    return server.log.parent / "output"


def videos(server: Server) -> set[Path]:
    return set(output_folder(server).rglob("*.mp4"))


def read_video(file: Path) -> tuple[int, int, int, float]:
    """(width, height, frames, fps) as PyAV decodes them."""
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
        return stream.width, stream.height, frames, float(stream.average_rate or 0)


def inputs_of(prompt: Prompt, kind: str) -> dict[str, Any]:
    return next(node["inputs"] for node in prompt.values() if node["class_type"] == kind)


def planned_video(wish: dict[str, Any]) -> tuple[int, int, int, float]:
    """What a plan's inputs promise, for sizes that need no rounding: stride x 4 n + 1 frames."""
    step = 4 * wish["temporal_stride"]
    frames = step * int(wish["seconds"] * wish["fps"] / step + 0.5) + 1
    return wish["width"], wish["height"], frames, wish["fps"]


def test_the_demo_workflow_makes_the_planned_video(any_server: Server) -> None:
    workflow = json.loads(DEMO.read_text("utf-8"))
    with Session(any_server) as session:
        prompt = to_prompt(workflow, session.object_info())
        prompt_id = session.queue(prompt, workflow)
        events = list(session.events(prompt_id, TIMEOUT))
        history = session.history(prompt_id)
    assert history["status"]["status_str"] == "success"

    samplers = {name for name, node in prompt.items() if "KSampler" in node["class_type"]}
    for sampler in samplers:
        steps = [data["value"] for kind, data in events if kind == "progress"
                 and data["node"] == sampler]  # fmt: skip
        assert steps == sorted(steps)
        assert steps[-1] == prompt[sampler]["inputs"]["steps"]

    wish = inputs_of(prompt, "AtlasVidPlan")
    made = [read_video(file) for file in output_files(history, output_folder(any_server))]
    proxy, finished = sorted(made)
    assert finished == planned_video(wish)
    assert min(proxy[:2]) == wish["proxy_short_side"]
    assert wish["temporal_stride"] * (proxy[2] - 1) + 1 == finished[2]
    assert wish["temporal_stride"] * proxy[3] == finished[3]


def test_a_cancel_in_the_detail_sampling_ends_it_and_the_next_prompt_runs(
    any_server: Server,
) -> None:
    long = pipeline(width=768, height=512, seconds=4.0)
    long[DETAIL]["inputs"]["steps"] = 1000
    before = videos(any_server)
    with Session(any_server) as session:
        prompt_id = session.queue(long)
        posted = None
        kinds = []
        for kind, data in session.events(prompt_id, TIMEOUT):
            kinds.append(kind)
            if kind == "progress" and data["node"] == DETAIL and not posted:
                time.sleep(1)  # well inside the next step, which takes several seconds
                session.interrupt(prompt_id)
                posted = time.monotonic()
        assert posted
        assert time.monotonic() - posted < 2
        assert "execution_interrupted" in kinds
        assert videos(any_server) == before

        prompt = pipeline()
        (file,) = output_files(session.run(prompt, TIMEOUT), output_folder(any_server))
    assert read_video(file) == planned_video(prompt["plan"]["inputs"])


# --- Bad input: a clear message, nothing half done, and the server goes on -------------------


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"width": 64}, "smaller than min of 128: width"),
        ({"height": 8208}, "bigger than max of 8192: height"),
        ({"seconds": 0.0}, "smaller than min of 0.05: seconds"),
        ({"temporal_stride": 9}, "bigger than max of 8: temporal_stride"),
        ({"proxy_short_side": 0}, "smaller than min of 128: proxy_short_side"),
        ({"fps": 0.0}, "smaller than min of 1.0: fps"),
    ],
)
def test_a_plan_out_of_range_is_refused_before_anything_runs(
    server: Server, wish: dict[str, float], message: str
) -> None:
    with Session(server) as session, pytest.raises(PromptRejected) as refused:
        session.queue(pipeline(**wish))
    assert f"AtlasVidPlan (node plan): Value {next(iter(wish.values()))}" in str(refused.value)
    assert message in str(refused.value)


def with_proxy(latent: dict[str, Any]) -> Prompt:
    """The pipeline with another latent in the proxy's place."""
    prompt = pipeline()
    prompt["other"] = latent
    prompt["latent"]["inputs"]["proxy"] = ["other", 0]
    prompt["attention"]["inputs"]["proxy"] = ["other", 0]
    return prompt


def with_target(latent: dict[str, Any]) -> Prompt:
    """The pipeline with another latent to sample in detail."""
    prompt = pipeline()
    prompt["other"] = latent
    prompt[DETAIL]["inputs"]["latent_image"] = ["other", 0]
    return prompt


VIDEO = "EmptyHunyuanLatentVideo"
NOT_A_NUMBER = {"samples": ["proxy_sampler", 0], "multiplier": float("nan")}


@pytest.mark.parametrize(
    ("prompt", "culprit", "message"),
    [
        (
            with_proxy(node(VIDEO, width=64, height=64, length=9, batch_size=1)),
            "latent",
            "the plan expects 2 x 16 x 26",
        ),
        (
            with_proxy(node("EmptyLatentImage", width=208, height=128, batch_size=1)),
            "latent",
            "Was it made by an image model?",
        ),
        (
            with_target(node(VIDEO, width=320, height=160, length=9, batch_size=1)),
            DETAIL,
            "the plan expects 3 x 20 x 32",
        ),
        (with_proxy(node("LatentMultiply", **NOT_A_NUMBER)), "latent", "NaN or infinite"),
        (with_target(node("LatentMultiply", **NOT_A_NUMBER)), DETAIL, "NaN or infinite"),
    ],
    ids=["another-size", "another-family", "another-target", "nan-proxy", "nan-target"],
)
def test_bad_latents_are_named_and_nothing_is_saved(
    server: Server, prompt: Prompt, culprit: str, message: str
) -> None:
    before = videos(server)
    with Session(server) as session:
        with pytest.raises(PromptFailed) as failed:
            session.run(prompt, TIMEOUT)
        assert failed.value.details["node_id"] == culprit
        assert message in str(failed.value)
        assert videos(server) == before
        assert session.run(pipeline(), TIMEOUT)["status"]["status_str"] == "success"
