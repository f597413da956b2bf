"""A training run on disk: everything that a resumed run needs to go on exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import save_tensors

KEY = "atlasvid_training"
VERSION = 1
SINCE_ADDED = {"guide_weight": 1.0, "init": ""}
"""Settings that runs of earlier versions did not name, and what they were then."""


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands.

    Random numbers need no state: each step's come from the seed and the step alone.
    """

    step: int
    losses: tuple[float, ...]
    adapters: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    """An optimizer's `state_dict`."""
    identity: Mapping[str, Any]
    """What the run was started with, as JSON values; a resumed run must have the same."""

    def save(self, path: Path) -> None:
        """Raises RuntimeError when it cannot be written; the file before it stays whole."""
        tensors = {f"adapters.{name}": tensor for name, tensor in self.adapters.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        moments, values = flat_optimizer(self.optimizer)
        tensors |= {name: tensor.detach().cpu().contiguous() for name, tensor in moments.items()}
        facts = {
            "version": VERSION,
            "step": self.step,
            "optimizer": values,
            "identity": self.identity,
        }
        save_tensors(path, tensors, {KEY: json.dumps(facts)})

    @classmethod
    def load(cls, path: Path) -> TrainingState:
        """Raises ValueError for a file that is damaged or of another kind."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                facts = json.loads((file.metadata() or {})[KEY])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} is no state of a training run, or damaged ({error}). Delete it, or "
                "choose another name, to start from the beginning."
            ) from error
        prefix = "adapters."
        return cls(
            facts["step"],
            tuple(tensors["losses"].tolist()),
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)},
            nested_optimizer(tensors, facts["optimizer"]),
            {**SINCE_ADDED, **facts["identity"]},
        )

    def require_same(self, identity: Mapping[str, Any], path: Path) -> None:
        """Refuse to resume a run that was started with other settings.

        Raises:
            ValueError: names what differs.
        """
        wanted = json.loads(json.dumps(identity))
        differing = [
            f"{name} was {self.identity.get(name)}, now {value}"
            for name, value in wanted.items()
            if self.identity.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"The run in {path.parent} was started with other settings: "
                f"{'; '.join(differing)}. Use those again to resume it, or another name to start "
                "anew."
            )


def flat_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's `state_dict` as named tensors and JSON values."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {"state": {}, "param_groups": []}

    def keep(where: dict[str, Any], prefix: str, items: Mapping[str, Any]) -> None:
        for name, value in items.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}.{name}"] = value
            else:
                where[name] = value

    for index, items in state["state"].items():
        keep(values["state"].setdefault(str(index), {}), f"state.{index}", items)
    for index, items in enumerate(state["param_groups"]):
        group: dict[str, Any] = {}
        keep(group, f"group.{index}", items)
        values["param_groups"].append(group)
    return tensors, values


def nested_optimizer(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat_optimizer`; other tensors are passed over."""
    state = {int(index): dict(items) for index, items in values["state"].items()}
    groups = [dict(group) for group in values["param_groups"]]
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        index, _, key = rest.partition(".")
        if kind == "state":
            state[int(index)][key] = tensor
        elif kind == "group":
            groups[int(index)][key] = tensor
    return {"state": state, "param_groups": groups}
