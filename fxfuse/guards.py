"""What a capture took for granted about a module tree, checked again before every call.

Tracing runs Python once; whatever it read from plain attributes (``training``, a stride, a flag of
the user's) is baked in. A snapshot of these attributes, of the hooks and of the tree itself tells
when a capture no longer speaks for its model.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxfuse.call import HOOKS

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_LARGEST = 64


def is_plain(value: Any) -> bool:
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, (list, tuple, set, frozenset)):
        return len(value) <= _LARGEST and all(map(is_plain, value))
    if isinstance(value, dict):
        return len(value) <= _LARGEST and all(is_plain(k) and is_plain(v) for k, v in value.items())
    return False


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, set, dict)) else value


class Guards:
    """A snapshot of ``model`` and all modules below it."""

    def __init__(self, model: nn.Module) -> None:
        self._checks: list[tuple[dict[str, Any], Callable[[dict[str, Any]], Any], Any]] = []
        self._absent: list[tuple[dict[str, Any], frozenset[str]]] = []
        for module in model.modules():
            state = module.__dict__
            keys = [k for k, v in state.items() if is_plain(v) and k not in HOOKS and k != "_modules"]
            keys += [k for k in (*HOOKS, "_modules") if k in state]
            getter = operator.itemgetter(*keys)
            self._checks.append((state, getter, _snapshot(getter(state))))
            tensors = {**state["_parameters"], **state["_buffers"]}
            self._absent.append((state, frozenset(k for k, v in tensors.items() if v is None)))

    def hold(self) -> bool:
        """Whether the model is still as it was."""
        try:
            for state, getter, snapshot in self._checks:
                if getter(state) != snapshot:
                    return False
        except KeyError:
            return False
        for state, absent in self._absent:
            for name in absent:
                if state["_parameters"].get(name) is not None or state["_buffers"].get(name) is not None:
                    return False
            for name, value in state["_parameters"].items():
                if value is None and name not in absent:
                    return False
        return True

    def changed(self) -> str | None:
        """The first plain attribute that differs, as ``ClassName.attribute``-like text, or None."""
        for state, getter, snapshot in self._checks:
            try:
                if getter(state) != snapshot:
                    return _difference(state, snapshot)
            except KeyError as error:
                return str(error.args[0])
        return None


def _snapshot(values: Any) -> Any:
    return tuple(map(_copy, values)) if isinstance(values, tuple) else _copy(values)


def _difference(state: dict[str, Any], snapshot: tuple[Any, ...]) -> str:
    keys = [k for k, v in state.items() if is_plain(v) and k not in HOOKS and k != "_modules"]
    for key in keys:
        if not any(state[key] is s or state[key] == s for s in snapshot):
            return key
    return "its structure"
