"""Renders that survive, in real servers: killed in the middle, cancelled, failed after sampling."""

import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import comfy_server
import pytest
from comfy_server import PromptFailed, Server, Session, output_files, request
from pipeline import DETAIL, Prompt, comfyui_folder, node, pipeline
from safetensors.torch import load_file

TIMEOUT = 300.0
STEPS = 6
FOLDER = "atlasvid_renders"


def graph(kept: bool = True, **resume: Any) -> Prompt:
    """Proxy and detail with every step kept, and the sampled latent saved as it is."""
    prompt = pipeline(width=256, height=160)
    for name in ("decode", "video", "save"):
        del prompt[name]
    for name, inputs in (("proxy_sampler", {}), (DETAIL, {"sampler_name": "dpmpp_2m"})):
        sampler = prompt[name]["inputs"]
        sampler |= {"steps": STEPS, **inputs}
        if kept:
            prompt[f"keep {name}"] = node("AtlasVidResume", model=sampler["model"], **resume)
            sampler["model"] = [f"keep {name}", 0]
    prompt["save"] = node("SaveLatent", samples=[DETAIL, 0], filename_prefix="sampled")
    return prompt


def sampled(history: dict[str, Any], server: Server) -> Any:
    (file,) = output_files(history, server.log.parent / "output")
    return load_file(file)["latent_tensor"]


def listed(server: Server) -> list[dict[str, Any]]:
    return request(f"{server.address}/atlasvid/renders")["renders"]


def delete(server: Server, name: str) -> dict[str, Any]:
    address = f"{server.address}/atlasvid/renders/{name}"
    asked = urllib.request.Request(address, method="DELETE")
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.loads(answer.read())


def wait_until(true: Any, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.1)
    return true()


@pytest.fixture
def empty(any_server: Server) -> Server:
    """A server without kept renders and without cached nodes."""
    for render in listed(any_server):
        assert "error" not in delete(any_server, render["id"])
    forget_nodes(any_server)
    return any_server


def forget_nodes(server: Server) -> None:
    """As after a restart, for ComfyUI's own cache of nodes' results."""
    request(f"{server.address}/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)  # the flag is read by the queue's thread, once a second at least


def test_a_killed_server_goes_on_bit_by_bit(server: Server, tmp_path: Path) -> None:
    with Session(server) as session:
        expected = sampled(session.run(graph(kept=False), TIMEOUT), server)

    def started() -> Any:
        python = Path(sys.executable)
        comfyui = comfyui_folder("COMFYUI_PATH")
        return comfy_server.running(python, comfyui, tmp_path, options=("--cpu",))

    with started() as first, Session(first) as session:
        prompt_id = session.queue(graph())
        for kind, data in session.events(prompt_id, TIMEOUT):
            if kind == "progress" and data["node"] == DETAIL and data["value"] == 3:
                first.process.kill()
                first.process.wait()
                break
    kept = list((tmp_path / "output" / FOLDER).glob("*/0*.safetensors"))
    assert STEPS + 2 <= len(kept) < 2 * STEPS
    with started() as second:
        with Session(second) as session:
            result = sampled(session.run(graph(), TIMEOUT), second)
        assert (result == expected).all()
        log = second.log.read_text("utf-8")
        assert f"all {STEPS} steps were kept" in log, "the proxy was sampled before"
        assert f"went on at step {len(kept) - STEPS + 1} of {STEPS}" in log
        assert wait_until(lambda: all(render["finished"] for render in listed(second)))


def test_a_cancel_is_a_pause(empty: Server) -> None:
    server = empty
    with Session(server) as session:
        prompt_id = session.queue(graph())
        texts = []
        for kind, data in session.events(prompt_id, TIMEOUT):
            texts.append(kind)
            if kind == "progress" and data["node"] == DETAIL and data["value"] == 2:
                session.interrupt(prompt_id)
        assert "execution_interrupted" in texts
        assert wait_until(lambda: not any(render["in_use"] for render in listed(server)))
        detail, proxy = listed(server)
        assert proxy["name"] == "KSampler"
        assert (proxy["step"], proxy["steps"], proxy["finished"]) == (STEPS, STEPS, False)
        assert 2 <= detail["step"] < STEPS
        assert detail["bytes"] > 0
        forget_nodes(server)
        result = sampled(session.run(graph(), TIMEOUT), server)
        expected = sampled(session.run(graph(kept=False), TIMEOUT), server)
    assert (result == expected).all()
    assert f"went on at step {detail['step'] + 1} of {STEPS}" in server.log.read_text("utf-8")
    left = delete(server, detail["id"])
    assert [render["id"] for render in left["renders"]] == [proxy["id"]]
    assert "no kept render" in delete(server, detail["id"])["error"]
    assert "no kept render" in delete(server, "..%2F..%2Finput")["error"]


@pytest.mark.parametrize("sampled_again", [True, False])
def test_what_fails_after_sampling_is_all_that_is_done_again(
    empty: Server, sampled_again: bool
) -> None:
    """Until a whole prompt has ended well no step goes, though they are to be deleted then."""
    server = empty
    wrong, right = graph(when_done="delete"), graph(when_done="delete")
    wrong["save"]["inputs"]["filename_prefix"] = "../../outside"

    def answered() -> int:
        return server.log.read_text("utf-8").count(f"all {STEPS} steps were kept")

    with Session(server) as session:
        with pytest.raises(PromptFailed):
            session.run(wrong, TIMEOUT)
        assert wait_until(lambda: not any(render["in_use"] for render in listed(server)))
        assert [render["step"] for render in listed(server)] == [STEPS, STEPS]
        assert not any(render["finished"] for render in listed(server))
        if sampled_again:
            forget_nodes(server)
        before = answered()
        session.run(right, TIMEOUT)
    assert answered() - before == (2 if sampled_again else 0)
    assert wait_until(lambda: listed(server) == [])
