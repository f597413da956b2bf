"""What the measures of a report mean: limits, and words for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

GOOD, FAIR, POOR = "good", "fair", "poor"


@dataclass(frozen=True)
class Meaning:
    """What is good and what is poor of a measure; limits are this project's own.

    Args:
        unit: of its values.
        good: up to here nothing is to be seen, or from here on where more is better.
        poor: from here on it is to be seen by all, or up to here.
        fault: what a viewer sees where it is not good.
        remedy: what to change then.
    """

    title: str
    unit: str
    good: float
    poor: float
    fault: str
    remedy: str

    def badness(self, value: float) -> float:
        """0 at the limit of what is good, 1 at that of what is poor; nan of nan."""
        return (value - self.good) / (self.poor - self.good)

    def level(self, value: float) -> str:
        bad = self.badness(value)
        return GOOD if not bad > 0 else FAIR if bad < 1 else POOR

    def format(self, value: float) -> str:
        return "not measured" if math.isnan(value) else f"{value:.1f} {self.unit}"


GREY = "grey levels"
MEANINGS = {
    "borders": Meaning(
        "Window borders", GREY, 1.0, 3.0, "borders of windows",
        "set overlap to sliding, or take a larger window",
    ),
    "flicker": Meaning(
        "Flicker", GREY, 1.0, 3.0, "flicker",
        "add AtlasVid Structure Guidance, or take windows of more frames",
    ),
    "drift": Meaning(
        "Colour drift of windows", GREY, 3.0, 10.0, "windows of another colour than the proxy's",
        "raise guide_weight, or add AtlasVid Structure Guidance",
    ),
    "fidelity": Meaning(
        "Fidelity to the proxy", "dB", 22.0, 16.0, "another picture than the proxy's",
        "lower denoise, raise guide_weight, or add AtlasVid Structure Guidance",
    ),
    "detail": Meaning(
        "Detail beyond the up-scaled proxy", "dB", 6.0, 1.0, "hardly more detail than the proxy's",
        "raise denoise, or end the structure guidance earlier",
    ),
}  # fmt: skip
"""By name, in the order in which they are shown."""


def levels(overall: Mapping[str, float]) -> dict[str, str]:
    """Good, fair or poor of each measure that has a value."""
    return {
        name: MEANINGS[name].level(value)
        for name, value in overall.items()
        if not math.isnan(value)
    }


def verdict(overall: Mapping[str, float], moments: Mapping[str, float]) -> str:
    """One line: what a viewer would see first, where, and what to change.

    Args:
        overall: of the whole video, by the names of `MEANINGS`; nan where not measured.
        moments: when each measure is worst, in seconds.
    """
    found = levels(overall)
    faults = sorted(
        (name for name, level in found.items() if level != GOOD),
        key=lambda name: -MEANINGS[name].badness(overall[name]),
    )
    if not found:
        return "Nothing could be measured: the video has too few frames."
    if not faults:
        return "Clean: " + _praise(found) + "."
    first, others = MEANINGS[faults[0]], [MEANINGS[name].fault for name in faults[1:]]
    strength = "Clearly seen" if found[faults[0]] == POOR else "Slightly seen"
    also = f"; also {_listed(others)}" if others else ""
    when = f", worst at {moments[faults[0]]:.1f} s" if faults[0] in moments else ""
    return (
        f"{strength}: {first.fault} ({first.format(overall[faults[0]])}{when}){also}. "
        f"To change that, {first.remedy}."
    )


def _praise(found: Mapping[str, str]) -> str:
    words = {
        "borders": "no borders of windows",
        "flicker": "no flicker",
        "drift": "colours as in the proxy",
        "fidelity": "it follows the proxy",
        "detail": "it has far more detail than the proxy",
    }
    return _listed([text for name, text in words.items() if name in found])


def _listed(texts: list[str]) -> str:
    return ", ".join(texts[:-1]) + (" and " if len(texts) > 1 else "") + texts[-1]
