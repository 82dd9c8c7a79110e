"""What a capture took for granted about a module tree, checked again before every call.

Tracing runs Python once; whatever it read from plain attributes (``training``, a stride, a flag of
the user's) is baked in. These attributes, the hooks and the tree itself tell when a capture no
longer speaks for its model. On modules of users' classes only the attributes that the trace read
count: a step counter that training code keeps on the model does not.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fxfuse.call import HOOKS
from fxfuse.replica import modules_of
from fxfuse.state import CONTAINERS, elements, is_plain

_TENSORS = ("_parameters", "_buffers")

#: attributes of every nn.Module that are guarded in other ways, or not at all
_OWN = frozenset(nn.Module().__dict__)

_State = dict[str, Any]


class Guards:
    """A snapshot of ``model`` and all modules below it.

    ``reads``: per id of a module, the attributes that the trace read on it; modules that are not in
    it are guarded by all their attributes. Without ``reads`` only ``training``, the hooks and the
    tree count. Tensors are not guarded: they are fetched anew.
    """

    def __init__(self, model: nn.Module, reads: Mapping[int, set[str]] | None) -> None:
        self._fixed: list[tuple[_State, Callable[[_State], tuple[Any, ...]], tuple[Any, ...], tuple[str, ...]]] = []
        self._contents: list[tuple[Any, Any, str]] = []
        self._absent: list[tuple[_State, frozenset[str]]] = []
        self._empty: list[_State] = []
        self._full: list[tuple[_State, list[Any], list[Any]]] = []
        self._none: list[tuple[_State, str]] = []
        for module in modules_of(model):
            state = module.__dict__
            names = set() if reads is None else reads.get(id(module))
            if names is None:
                names = set(state)
            elif names:
                registered = {*state["_modules"], *state["_parameters"], *state["_buffers"]}
                absent = frozenset(names - _OWN - state.keys() - registered)
                self._absent += [(state, absent)] if absent else []
            self._watch(state, sorted(({"training"} | (names - _OWN)) & state.keys()))
            self._watch_tree(module, hooks=module is not model)
        self._expected = [value for _, _, values, _ in self._fixed for value in values]

    def _watch(self, state: _State, names: list[str], nested: bool = True) -> None:
        """Watch attributes: by identity, containers by what they hold, objects of plain attributes by these."""
        names = [n for n in names if not isinstance(state[n], Tensor)]
        if not names:
            return
        getter = operator.itemgetter(*names, names[0])  # twice: of one name it would not give a tuple
        self._fixed.append((state, getter, getter(state), (*names, names[0])))
        for name in names:
            value = state[name]
            if isinstance(value, CONTAINERS):
                self._contents.append((value, copy.deepcopy(value) if is_plain(value) else copy.copy(value), name))
            elif nested and not isinstance(value, (nn.Module, type)) and not callable(value):
                inner = getattr(value, "__dict__", None)
                if isinstance(inner, dict) and is_plain(inner):
                    self._watch(inner, sorted(inner), nested=False)

    def _watch_tree(self, module: nn.Module, hooks: bool) -> None:
        state = module.__dict__
        watched = [state["_modules"], *(state[h] for h in HOOKS if hooks)]
        for part in watched:
            if not isinstance(part, dict):  # of a ScriptModule, which is fixed
                continue
            if part:
                self._full.append((part, [*part], [*part.values()]))
            else:
                self._empty.append(part)
        for part in _TENSORS:
            self._none += [(state[part], name) for name, value in state[part].items() if value is None]

    def hold(self) -> bool:
        """Whether the model is still as it was. On the way of every call, hence the loops."""
        if any(self._empty):
            return False
        values: list[Any] = []
        try:
            for state, getter, _, _ in self._fixed:
                values += getter(state)
        except KeyError:
            return False
        if not all(map(operator.is_, values, self._expected)) and not all(map(_equal, values, self._expected)):
            return False
        for state, names in self._absent:
            if not state.keys().isdisjoint(names):
                return False
        for state, name in self._none:
            if state.get(name) is not None:
                return False
        for part, keys, held in self._full:
            if [*part] != keys or not all(map(operator.is_, part.values(), held)):
                return False
        return not self._contents or all(_holds(value, contents) for value, contents, _ in self._contents)

    def difference(self) -> str | None:
        """The name of an attribute that is not as it was, for people; None where all is."""
        return next(self._differences(), None)

    def _differences(self) -> Iterator[str]:
        for state, _, expected, names in self._fixed:
            yield from (n for n, v in zip(names, expected, strict=True) if n not in state or not _equal(state[n], v))
        for state, absent in self._absent:
            yield from sorted(state.keys() & absent)
        yield from (name for state, name in self._none if state.get(name) is not None)
        yield from (name for value, expected, name in self._contents if not _holds(value, expected))
        yield from ("its hooks" for state in self._empty if state)
        yield from (
            "its submodules" for state, keys, held in self._full if not _identical(elements(state), [*keys, *held])
        )


def _equal(value: Any, expected: Any) -> bool:
    return value is expected or (type(value) is type(expected) and is_plain(value) and bool(value == expected))


def _holds(value: Any, expected: Any) -> bool:
    return bool(value == expected) if is_plain(expected) else _identical(elements(value), elements(expected))


def _identical(values: list[Any], expected: list[Any]) -> bool:
    return len(values) == len(expected) and all(map(operator.is_, values, expected))
