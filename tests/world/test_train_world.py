"""The order of the stages that make the tiny world's family, alone and side by side."""

from itertools import chain

import pytest
import train_world
import world_worker
from train_world import STAGES, together

NEEDS = {
    "code": (),
    "clips": ("code",),
    "pairs": ("code",),
    "model": ("code", "clips"),
    "decoder": ("code",),
    "encoder": ("code",),
    "tune": ("code", "decoder", "encoder"),
    "files": ("model", "tune"),
    "proxy": ("files",),
    "guide": ("files",),
    "student": ("code", "pairs"),
    "tc-decoder": ("pairs", "student"),
    "pack": ("code", "files", "proxy", "guide", "student", "tc-decoder"),
}
"""What each stage reads of what others wrote."""


def test_the_worker_has_every_stage():
    assert set(STAGES) == set(world_worker.STAGES) == set(NEEDS)


@pytest.mark.parametrize(("cpu", "cores"), [(True, 2), (True, 1), (False, 8)])
@pytest.mark.parametrize("stages", [list(STAGES), ["pairs", "student", "tc-decoder", "pack"]])
def test_what_a_stage_reads_is_written_before_it_begins(monkeypatch, stages, cpu, cores):
    monkeypatch.setattr(train_world.os, "cpu_count", lambda: cores)
    steps = together(stages, cpu)
    assert sorted(chain(*chain(*steps))) == sorted(stages)
    assert max(map(len, steps)) <= (2 if cpu and cores > 1 else 1)
    done: set[str] = set()
    for lanes in steps:
        for lane in lanes:
            before = set(done)
            for stage in lane:
                assert set(NEEDS[stage]) & set(stages) <= before, (stage, steps)
                before.add(stage)
        done.update(chain(*lanes))
