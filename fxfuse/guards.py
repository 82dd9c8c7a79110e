"""What a capture took for granted about a module tree, checked again before every call.

Tracing runs Python once; whatever it read from plain attributes (``training``, a stride, a flag of
the user's) is baked in. These attributes, the hooks and the tree itself tell when a capture no
longer speaks for its model. On modules of users' classes only the attributes that the trace read
count: a step counter that training code keeps on the model does not.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
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
        self._fixed: list[tuple[_State, list[str], list[Any]]] = []
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
        self._identical = self._compiled()  # on the way of every call: a term takes some 15 ns

    def _watch(self, state: _State, names: list[str], nested: bool = True) -> None:
        """Watch attributes: by identity, containers by what they hold, objects of plain attributes by these."""
        names = [n for n in names if not isinstance(state[n], Tensor)]
        if not names:
            return
        self._fixed.append((state, names, [state[n] for n in names]))
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

    def _compiled(self) -> Callable[[], bool]:
        """Whether everything is the very object that it was, as one expression. KeyError where an attribute is gone."""
        space: dict[str, Any] = {}
        terms: list[str] = []

        def named(value: Any) -> str:
            name = f"o{len(space)}"
            space[name] = value
            return name

        def spelled(key: Any) -> str:
            return repr(key) if type(key) is str else named(key)

        def compare(part: str, keys: Iterable[Any], values: Iterable[Any]) -> None:
            terms.extend(f"{part}[{spelled(k)}] is {named(v)}" for k, v in zip(keys, values, strict=True))

        terms += [f"not {named(state)}" for state in self._empty]
        for state, names, values in self._fixed:
            compare(named(state), names, values)
        for state, absent in self._absent:
            part = named(state)
            terms += [f"{spelled(name)} not in {part}" for name in sorted(absent)]
        terms += [f"{named(state)}.get({spelled(name)}) is None" for state, name in self._none]
        for state, keys, held in self._full:
            part = named(state)
            terms.append(f"[*{part}] == {named(keys)}")
            compare(part, keys, held)
        given = ", ".join(f"{name}={name}" for name in space)  # arguments are read faster than globals
        exec(f"def identical({given}):\n    return {' and '.join(terms) or True}", space)  # noqa: S102 - written above
        return space.pop("identical")  # type: ignore[no-any-return]

    def hold(self) -> bool:
        """Whether the model is still as it was."""
        try:
            if self._identical():
                return not self._contents or all(_holds(value, contents) for value, contents, _ in self._contents)
        except KeyError:
            return False
        return self.difference() is None  # what is not the same object may have been made anew

    def difference(self) -> str | None:
        """The name of an attribute that is not as it was, for people; None where all is."""
        return next(self._differences(), None)

    def _differences(self) -> Iterator[str]:
        for state, names, expected in self._fixed:
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
