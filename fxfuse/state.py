"""What running a model may disturb: attributes, values of tensors, random generators."""

from __future__ import annotations

import collections
import contextlib
import copy
import pickle
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from fxfuse.compare import leaf_disagreement

#: what is searched and compared by its elements
CONTAINERS = (dict, list, set, collections.deque)

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.memory_format)
_LARGEST = 64


def is_plain(value: Any) -> bool:
    """Whether ``value`` is made of numbers, strings and the like, of a moderate size."""
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, (list, tuple, set, frozenset)):
        return len(value) <= _LARGEST and all(map(is_plain, value))
    if isinstance(value, dict):
        return len(value) <= _LARGEST and all(is_plain(k) and is_plain(v) for k, v in value.items())
    return False


def elements(value: Any) -> list[Any]:
    """What a container holds, keys of a dict included."""
    return [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)


class Attributes:
    """The attributes of all modules of a tree, containers one level deep, by identity."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(m.__dict__, dict(m.__dict__)) for m in model.modules()]
        self._containers = [
            (value, copy.copy(value), name)
            for _, state in self._modules
            for name, value in state.items()
            if isinstance(value, CONTAINERS)
        ]

    def changed(self) -> list[str]:
        """The names of attributes that are others now, or hold something else."""
        names = set()
        for now, before in self._modules:
            for name in now.keys() | before.keys():
                a, b = now.get(name, self), before.get(name, self)
                if a is not b and not _equal(a, b):
                    names.add(name)
        for container, held, name in self._containers:
            names.update(_container_changes(container, held, name))
        return sorted(names)

    def restore(self) -> None:
        for now, before in self._modules:
            for name in now.keys() - before.keys():
                del now[name]
            for name, value in before.items():
                if now.get(name, self) is not value:
                    now[name] = value
        for container, held, name in self._containers:
            if _container_changes(container, held, name):
                container.clear()
                (container.extend if isinstance(container, (list, collections.deque)) else container.update)(held)


def _equal(a: Any, b: Any) -> bool:
    """Whether a plain value was only made again."""
    return type(a) is type(b) and is_plain(a) and bool(a == b)


def _container_changes(value: Any, before: Any, name: str) -> list[str]:
    """The name of a container that holds something else now, or, of a module's own dicts, of its entries."""
    if isinstance(value, dict) and name in ("_parameters", "_buffers", "_modules"):
        return [k for k in value.keys() | before.keys() if value.get(k) is not before.get(k)]
    now, then = elements(value), elements(before)
    same = len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))
    return [] if same else [name]


def tensors_of(model: nn.Module) -> list[Tensor]:
    """All tensors that hang on modules: parameters, buffers, attributes, elements of containers. No doubles."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        values = [*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()]
        values += [e for v in module.__dict__.values() if isinstance(v, (dict, list)) for e in elements(v)]
        found.update((id(v), v) for v in values if isinstance(v, Tensor) and not nn.parameter.is_lazy(v))
    return list(found.values())


class State:
    """A moment of a model: take one, run the model, compare with it or come back to it."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor] = ()) -> None:
        self.attributes = Attributes(model)
        self._values = [(t, t.detach().clone()) for t in tensors_of(model)]
        self._devices = sorted({t.get_device() for t in (*inputs, *(t for t, _ in self._values)) if t.is_cuda})
        self._torch = self.generators()
        self._python = random.getstate()
        self._numpy: Any = numpy.random.get_state(legacy=False)

    def generators(self) -> list[Tensor]:
        """The states of torch's random generators now, those of the devices in use included."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self._devices)]

    def restore(self) -> None:
        """Put everything back."""
        self.attributes.restore()
        with torch.no_grad():
            for tensor, value in self._values:
                if _differ(tensor, value):
                    tensor.copy_(value)
        torch.set_rng_state(self._torch[0])
        for device, state in zip(self._devices, self._torch[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Come back to this state at the end, unnoticed by autograd, which may have saved some of the tensors."""
        counted = tuple(t for t, _ in self._values if not t.is_inference())
        with torch.autograd._unsafe_preserve_version_counter(counted):
            try:
                yield
            finally:
                self.restore()

    def differs(self) -> str | None:
        """How the model is in another state now, as a sentence, or None. Values may differ by rounding."""
        changed = self.attributes.changed()
        if changed:
            return f"{changed[0]} of a module is left changed"
        for tensor, value in self._values:
            reason = leaf_disagreement(tensor.detach(), value)
            if reason:
                return f"a tensor of the model, of shape {tuple(tensor.shape)}, is left with {reason}"
        if self.draws():
            return "it draws other random numbers than the model"
        return None

    def written(self) -> list[Tensor]:
        """The tensors of the model that hold other values now."""
        return [t for t, value in self._values if _differ(t, value)]

    def draws(self) -> bool:
        """Whether torch's random generators have moved on."""
        return any(not torch.equal(a, b) for a, b in zip(self.generators(), self._torch, strict=True))

    def draws_elsewhere(self) -> bool:
        """Whether the random generators of Python or NumPy have moved on."""
        now: Any = numpy.random.get_state(legacy=False)
        return random.getstate() != self._python or pickle.dumps(now) != pickle.dumps(self._numpy)


def _differ(tensor: Tensor, value: Tensor) -> bool:
    comparable = tensor.shape == value.shape and tensor.dtype == value.dtype and not tensor.is_meta
    return comparable and not torch.equal(tensor.detach(), value)
