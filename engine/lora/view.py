"""A model seen with other layers in some places."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn


def with_layers(module: nn.Module, layers: Mapping[str, nn.Module]) -> Any:
    """A view of a module tree with other layers in the named places.

    Only containers on the way to a replaced layer are copied (shallowly: parameters, buffers and
    hooks are shared), so later changes to the shared layers show in the view.
    """
    view = copy.copy(module)
    children: dict[str, nn.Module | None] = dict(module._modules)
    inner: dict[str, dict[str, nn.Module]] = {}
    for name, layer in layers.items():
        head, _, rest = name.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = layer
        else:
            children[head] = layer
    for head, below in inner.items():
        child = children[head]
        assert child is not None
        children[head] = with_layers(child, below)
    view.__dict__["_modules"] = children
    return view
