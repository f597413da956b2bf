"""A short form of `tools/evaluate.py`: pictures get no worse, and what would spoil them is noticed.

An equation may stay as it is while the pictures that it makes go bad. Here the tiny trained family
makes a few small videos, whose scores have to stay within bounds taken from the measured ones; each
way of spoiling them is tried, and has to break its bound.
"""

from collections.abc import Callable
from dataclasses import replace
from statistics import mean

import pytest
import torch
from atlasvid.engine import detail, guidance, windows
from atlasvid.engine.tiny import trained_family
from world.comparisons import proxy_scores, window_layouts
from world.judge import Judge
from world.scenes import scene_of
from world.studio import DEFAULT, Case, Method, Studio

SEEDS = (0, 1, 2)
GUIDED = replace(DEFAULT, name="guide alone", structure=0, denoise=1.0, steps=6)
STRUCTURED = replace(DEFAULT, name="structure alone", guide_weight=0, denoise=1.0, steps=6)
MOVING = "wide view of a red balloon drifting right over snow at noon"


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(trained_family())


@pytest.fixture(scope="module")
def cases(studio: Studio) -> list[Case]:
    """Scenes at twice the proxy's size, five frames."""
    with torch.inference_mode():
        return [studio.case(seed, studio.plan(2, 1, 2)) for seed in SEEDS]


def score(studio: Studio, cases: list[Case], method: Method, measure: str) -> float:
    """The mean of a measure over the cases."""
    with torch.inference_mode():
        found = []
        for case in cases:
            judge = Judge(case, window_layouts(case.plan))
            found.append(judge.scores(studio.make(case, method), method.window)[measure])
    return mean(found)


def proxy_speed(studio: Studio, scaled: bool = True) -> float:
    """Heights per second at which the balloon of sampled proxies drifts; 0.09 to 0.13 are right."""
    scene, plan = scene_of(MOVING, 0), studio.plan(3, 4, 5)
    speeds = []
    with torch.inference_mode():
        for seed in SEEDS:
            video = studio.decode(studio.proxy(plan, MOVING, seed, scaled, lora=True))
            speeds.append(proxy_scores(video, scene, plan)["speed"])
    return mean(speeds)


# Bounds lie between the measured value and that of the spoilt pictures, both in the comments.
FOLLOWS = 18.0
SEAM = 6.0
STRUCTURE = 19.0
SPEED = (0.06, 0.17)


def test_the_target_follows_the_guide(studio: Studio, cases: list[Case]) -> None:
    assert score(studio, cases, GUIDED, "fidelity") > FOLLOWS


@pytest.mark.parametrize("spoil", ["unread", "unweighted", "shifted by a token"])
def test_a_spoilt_guide_is_noticed(
    studio: Studio, cases: list[Case], spoil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spoil == "shifted by a token":
        right = windows.GuideAlignment._first

        def wrong(self: windows.GuideAlignment, axis: int, window: windows.Box) -> int:
            first, last = right(self, axis, window), self.guide[axis] - self.count[axis]
            return min(first + 1, last) if axis else first

        monkeypatch.setattr(windows.GuideAlignment, "_first", wrong)
    else:
        weight = {"unread": 1e-6, "unweighted": 1.0}[spoil]
        monkeypatch.setattr(detail, "preset_guide_weight", lambda *_: weight)
    assert score(studio, cases, GUIDED, "fidelity") < FOLLOWS


def test_windows_leave_no_seams(studio: Studio, cases: list[Case]) -> None:
    assert score(studio, cases, GUIDED, "seam") < SEAM


def test_windows_that_do_not_move_are_noticed(
    studio: Studio, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = [window_layouts(case.plan) for case in cases]  # as they should be
    cuts: Callable = windows.cuts
    monkeypatch.setattr(
        windows, "cuts", lambda length, window, shifted: cuts(length, window, False)
    )
    found = []
    with torch.inference_mode():
        for case, layout in zip(cases, layouts, strict=True):
            video = studio.make(case, GUIDED)
            found.append(Judge(case, layout).scores(video, GUIDED.window)["seam"])
    assert mean(found) > SEAM


def test_structure_guidance_holds_the_composition(studio: Studio, cases: list[Case]) -> None:
    assert score(studio, cases, STRUCTURED, "fidelity") > STRUCTURE


def test_structure_guidance_of_the_wrong_sign_is_noticed(
    studio: Studio, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = guidance.guidance_weight
    monkeypatch.setattr(guidance, "guidance_weight", lambda *sigmas: -right(*sigmas))
    assert score(studio, cases, STRUCTURED, "fidelity") < STRUCTURE


def test_proxies_move_at_the_asked_speed(studio: Studio) -> None:
    assert SPEED[0] < proxy_speed(studio) < SPEED[1]


def test_proxies_without_scaled_rope_are_noticed(studio: Studio) -> None:
    assert not SPEED[0] < proxy_speed(studio, scaled=False) < SPEED[1]
