"""The report of a first session on a card keeps what it had."""

import json
import subprocess
from argparse import Namespace

import bench_card
import pytest
from bench_card import Step


def run(monkeypatch, folder, *steps, minutes=1.0):
    monkeypatch.setattr(bench_card, "RESULTS", folder)
    monkeypatch.setattr(bench_card, "card_steps", lambda: list(steps))
    bench_card.run(Namespace(case=None, tiny=False, minutes=minutes, only=None))


def found(folder):
    return [json.loads(line) for line in (folder / "card.jsonl").read_text().splitlines()[1:]]


def raises(error):
    def step(_):
        raise error

    return step


def test_a_failed_step_costs_no_other(monkeypatch, tmp_path):
    run(
        monkeypatch,
        tmp_path,
        Step("first", 5, lambda seconds: {"seconds": seconds}),
        Step("broken", 5, raises(RuntimeError("no such kernel"))),
        Step("slow", 5, raises(subprocess.TimeoutExpired("x", 5))),
        Step("last", 5, lambda _: {"value": 2.0}),
    )
    rows = found(tmp_path)
    assert [row["step"] for row in rows] == ["first", "broken", "slow", "last"]
    assert rows[0]["seconds"] == 5
    assert rows[1]["failed"] == "no such kernel"
    assert rows[2]["failed"] == "not done after 5 s"
    assert "| last | value 2" in (tmp_path / "card.md").read_text()


def test_what_was_found_is_kept_when_it_is_cut_short(monkeypatch, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(
            monkeypatch,
            tmp_path,
            Step("first", 5, lambda _: {"value": 1}),
            Step("killed", 5, raises(KeyboardInterrupt())),
        )
    assert [row["step"] for row in found(tmp_path)] == ["first"]
    assert "first" in (tmp_path / "card.md").read_text()


def test_it_ends_in_time(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, Step("late", 5, lambda _: {}), minutes=0.1)
    assert found(tmp_path) == [{"step": "late", "skipped": "no time left"}]


def test_the_steps_take_at_most_eight_minutes_by_their_first():
    """The first half of the steps, which tell most, fit even if each takes all of its time."""
    steps = bench_card.card_steps()
    assert sum(step.seconds for step in steps[:7]) <= 60 * bench_card.MINUTES
    tiny = bench_card.tiny_steps()
    assert len(tiny) >= len(steps) - 4
