"""What goes wrong on purpose in a real server: the short form of `tools/soak.py`.

One server for all, in the order of the file: what a fault leaves behind shows in the next.
"""

import pytest
from faults import trials
from faults.host import Host
from faults.trials import PHASES, Outcome

MIB = 2**20
ALLOWED_SECONDS = 4.0
"""Twice what a cancel may take, for machines whose cores are busy."""


def require_all(outcome: Outcome) -> Outcome:
    assert not outcome.lost, "\n".join(outcome.lost)
    assert outcome.survived == outcome.tried > 0
    return outcome


def test_nothing_adds_up_over_renders_with_errors_and_cancels(host: Host) -> None:
    growth = require_all(trials.renders_in_a_row(host, 6)).growth
    assert growth.memory < 150 * MIB
    assert growth.files <= 4
    assert growth.threads <= 4
    assert growth.scratch == 0


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_a_cancel_ends_every_phase_and_the_next_render_works(host: Host, phase) -> None:
    assert require_all(trials.cancels(host, phase, 1)).slowest < ALLOWED_SECONDS


def test_memory_that_runs_out_is_survived(host: Host) -> None:
    require_all(trials.out_of_memory(host, 4))


def test_a_full_disk_is_named_and_leaves_nothing(host: Host) -> None:
    require_all(trials.file_limits(host, 1))


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(host: Host) -> None:
    require_all(trials.full_disk_in_training(host, 1))


def test_broken_files_are_named(host: Host) -> None:
    assert require_all(trials.broken_files(host)).slowest < 30


def test_wrong_numbers_are_refused_within_a_second(host: Host) -> None:
    assert require_all(trials.wrong_numbers(host, 60)).slowest < 2 * ALLOWED_SECONDS


def test_the_plan_is_drawn_whatever_is_asked_for(host: Host) -> None:
    assert require_all(trials.plan_queries(host)).slowest < ALLOWED_SECONDS


def test_a_killed_server_leaves_nothing_half_written(host: Host) -> None:
    """In the middle of a save, where most is open."""
    (saving,) = (phase for phase in PHASES if phase.name == "save")
    require_all(trials.kills(host, saving, 1))
