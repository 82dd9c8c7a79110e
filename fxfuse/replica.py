"""A stand-in for a module tree: a trace may scribble on it, and it notes which attributes are read.

The copies of the modules have dicts of their own but hold the same tensors. Tracing runs the user's
``forward`` on them: attributes that it assigns, lists that it extends, parameters that torch.export
swaps for fake ones never reach the model, which other threads may be running meanwhile.
"""

from __future__ import annotations

import collections
import types
from typing import Any

from torch import nn

from fxfuse.state import Attributes

#: how deep containers are searched for modules
_DEPTH = 4


class Replica:
    """``root`` stands for ``model``; ``reads[id(module)]`` collects the attributes that are read.

    Modules of torch's own classes are not watched."""

    def __init__(self, model: nn.Module) -> None:
        self.reads: dict[int, set[str]] = {}
        self._copies: dict[int, nn.Module] = {}
        originals = {id(m): m for m in modules_of(model)}
        for key, module in originals.items():
            self._copies[key] = object.__new__(self._recording(type(module), key))
        for key, module in originals.items():
            state = {name: self._mirror(value, _DEPTH) for name, value in module.__dict__.items()}
            object.__getattribute__(self._copies[key], "__dict__").update(state)
        self.root = self._of(model)
        self._attributes = Attributes(self.root)
        for names in self.reads.values():
            names.clear()

    def _of(self, module: nn.Module) -> nn.Module:
        return self._copies.get(id(unwrapped(module)), module)

    def changed(self) -> list[str]:
        """The attributes that the trace assigned, or whose contents it changed."""
        return self._attributes.changed()

    def _mirror(self, value: Any, depth: int) -> Any:
        """``value`` with modules replaced by their copies; containers and bound methods are made anew."""
        if isinstance(value, nn.Module):
            return self._of(value)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self._of(value.__self__))
        if depth == 0:
            return value
        if type(value) in (dict, collections.OrderedDict):
            return type(value)((k, self._mirror(v, depth - 1)) for k, v in value.items())
        if type(value) in (list, tuple, set):
            return type(value)(self._mirror(v, depth - 1) for v in value)
        return value

    def _recording(self, kind: type[nn.Module], key: int) -> type[nn.Module]:
        """A subclass of ``kind`` that notes reads; torch's own classes, whose attributes are all guarded, stay."""
        if kind.__module__.startswith("torch."):
            return kind
        names: set[str] = set()
        read = kind.__getattribute__

        def __getattribute__(self: Any, name: str) -> Any:  # noqa: N807
            names.add(name)
            return read(self, name)

        space = {"__getattribute__": __getattribute__, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        try:
            recording: type[nn.Module] = types.new_class(kind.__name__, (kind,), exec_body=lambda s: s.update(space))
        except TypeError:  # its metaclass or __init_subclass__ wants more: then all attributes are guarded
            return kind
        self.reads[key] = names
        return recording


def unwrapped(module: nn.Module) -> nn.Module:
    """The module behind a view, or ``module`` itself."""
    while "_fxfuse_original" in module.__dict__:
        module = module.__dict__["_fxfuse_original"]
    return module


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a tree, what is behind its views instead of these."""
    return list(dict.fromkeys(unwrapped(m) for root in model.modules() for m in unwrapped(root).modules()))
