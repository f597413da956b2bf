"""Numbers inside their widgets' limits, however they reached a node."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from numbers import Integral, Real
from typing import Any

from comfy_api.latest import io

LONGEST_SHOWN = 60


def within_limits(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """Lets a node's `execute` run with numbers only that its schema allows.

    ComfyUI looks at what is typed into a widget and not at what comes by a link, and a NaN passes.

    Raises:
        ValueError: names the input, what was given and what is allowed.
    """
    signature = inspect.signature(execute)

    @wraps(execute)
    def checked(cls: Any, *args: Any, **kwargs: Any) -> io.NodeOutput:
        given = dict(signature.bind_partial(cls, *args, **kwargs).arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        schema = cls.define_schema()
        if schema.is_input_list:
            _require_lists(schema.inputs, given)
        else:
            _require(schema.inputs, given)
        return execute(cls, *args, **kwargs)

    return checked


def _require(inputs: Iterable[Any], given: Mapping[str, Any]) -> None:
    """Refuse numbers outside their limits, also those that a choice brings along."""
    for each in inputs:
        if each.id not in given:
            continue
        value = given[each.id]
        if isinstance(each, io.DynamicCombo.Input):
            _require(_inputs_of_choice(each, value), value)
        elif isinstance(each, io.Int.Input | io.Float.Input):
            _require_number(each, value)


def _require_lists(inputs: Iterable[Any], given: Mapping[str, Any]) -> None:
    """The same for a node that takes lists."""
    for each in inputs:
        if isinstance(each, io.Int.Input | io.Float.Input) and each.id in given:
            if not given[each.id]:
                raise ValueError(f"{each.id} is empty; connect one value.")
            for value in given[each.id]:
                _require_number(each, value)


def _inputs_of_choice(choice: Any, value: Any) -> list[Any]:
    chosen = value.get(choice.id) if isinstance(value, Mapping) else value
    for option in choice.options:
        if isinstance(value, Mapping) and option.key == chosen:
            return option.inputs
    allowed = ", ".join(option.key for option in choice.options)
    raise ValueError(f"{choice.id} is {shown(chosen)}; allowed are {allowed}.")


def _require_number(limits: Any, value: Any) -> None:
    whole = isinstance(limits, io.Int.Input)
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        kind = "whole number" if whole else "number"
        raise ValueError(
            f"{limits.id} is {shown(value)}; allowed is a {kind} from {limits.min} to {limits.max}."
        )
    if not limits.min <= value <= limits.max:  # as no NaN is
        raise ValueError(f"{limits.id} is {shown(value)}; allowed is {limits.min} to {limits.max}.")


def shown(value: Any) -> str:
    """A value in an error message: short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 4 * LONGEST_SHOWN:
        return f"a number of {value.bit_length()} bits"
    if not isinstance(value, Real | str | None):
        return f"of type {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
