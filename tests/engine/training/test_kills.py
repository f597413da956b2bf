"""A training that is killed goes on from its last checkpoint, whenever that was."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import killed_runs
import pytest
import torch
from atlasvid.engine.lora.guide import load_guide_lora
from atlasvid.engine.training.state import TrainingState
from clips import render
from safetensors.torch import load_file

STARTS = {
    "while encoding": 0,
    "in an update": 2,
    "half a file written": 2,
    "before the first rename": 0,
    "between state and LoRA": 2,
    "before a later rename": 2,
}
"""The last checkpoint that a run of this kind had: at most two steps are lost."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    (folder / "clips").mkdir()
    for name, seed in (("a", 0), ("b", 1)):
        render(folder / "clips" / f"{name}.mp4", 18, seed=seed)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """The same run, never killed."""
    return killed_runs.train(folder / "clips", folder / "clips" / "cache", folder / "whole")


@pytest.fixture(scope="module")
def killed(folder, whole):
    """The signal that ended each run."""
    script = Path(killed_runs.__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "clips"), str(folder)],
        capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.rpartition(" ") for line in done.stdout.splitlines()]
    return {point: int(ended) for point, _, ended in lines if point in killed_runs.POINTS}


@pytest.mark.parametrize("point", killed_runs.POINTS)
def test_a_kill_loses_at_most_what_lies_between_two_checkpoints(folder, whole, killed, point):
    assert killed[point] == -signal.SIGKILL
    out = folder / point
    for file in out.rglob("[!.]*.safetensors"):  # whatever has a final name is whole
        load_file(file)
    state = out / "run" / "state.safetensors"
    assert (TrainingState.load(state).step if state.exists() else 0) == STARTS[point]
    cache = out / "cache" if point == "while encoding" else folder / "clips" / "cache"
    resumed = killed_runs.train(folder / "clips", cache, out)
    assert resumed.resumed_at == STARTS[point]
    assert resumed.losses == whole.losses
    assert load_guide_lora(resumed.path, 1.0).file.recipe.steps == killed_runs.STEPS
    ours, theirs = load_file(resumed.path), load_file(whole.path)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list(out.rglob(".*.part"))
