"""A node of a user's graph in the vocabulary's terms, and the tables of spellings that lead there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxfuse import vocabulary


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Buffers that a training-mode BatchNorm updates: fx nodes; ``momentum`` a number, a node, or None (average)."""

    mean: fx.Node
    var: fx.Node
    count: fx.Node | None
    momentum: float | fx.Node | None


@dataclasses.dataclass(frozen=True)
class Call:
    """``op(*operands, **attributes)`` of the vocabulary; operands are fx nodes, Python scalars or None."""

    op: str
    operands: tuple[Any, ...]
    attributes: dict[str, Any]
    inplace: bool = False  #: the model writes the result over the first operand
    statistics: Statistics | None = None


class Unsupported(Exception):  # noqa: N818 - a verdict on a node, not a failure
    """A node that the vocabulary does not cover; the message completes "<node> ends the region: ..."."""


def refuse(reason: str) -> NoReturn:
    raise Unsupported(reason)


#: attributes of nn.Module that hold hooks around its call
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Adapter = Callable[..., Call]
#: how an adapter of a module class asks for the node of a parameter or buffer; None where the module has none
Param = Callable[[str], fx.Node | None]
FUNCTIONS: dict[Any, Adapter] = {}
METHODS: dict[str, Adapter] = {}
ATEN: dict[str, Adapter] = {}
MODULES: dict[type[nn.Module], Callable[..., Call]] = {}
#: functions that write over their first operand (torch.relu_, operator.iadd)
INPLACE_FUNCTIONS: set[Any] = set()


def spells(*spellings: Any) -> Callable[[Adapter], Adapter]:
    """Register an adapter: callables (functions), "name" (methods), "aten::name[.overload]" (aten)."""

    def enter(adapter: Adapter) -> Adapter:
        for spelling in spellings:
            if not isinstance(spelling, str):
                FUNCTIONS[spelling] = adapter
            elif spelling.startswith("aten::"):
                ATEN[spelling.removeprefix("aten::")] = adapter
            else:
                METHODS[spelling] = adapter
        return adapter

    return enter


def everywhere(name: str) -> list[Any]:
    """The spellings of one pointwise operator that exist: torch.name, F.name, Tensor.name, aten.name."""
    found = [getattr(space, name) for space in (torch, F) if hasattr(space, name)]
    found += [name] if hasattr(Tensor, name) else []
    return [*found, *([f"aten::{name}"] if hasattr(torch.ops.aten, name) else [])]


def module(*kinds: type[nn.Module]) -> Callable[[Callable[..., Call]], Callable[..., Call]]:
    """Register the adapter of module classes: ``adapter(module, param, *args)``."""

    def enter(adapter: Callable[..., Call]) -> Callable[..., Call]:
        MODULES.update(dict.fromkeys(kinds, adapter))
        return adapter

    return enter


def call(op: str, *operands: Any, inplace: bool = False, **attributes: Any) -> Call:
    return Call(op, operands, vocabulary.lookup(op).complete(attributes), inplace)


# --- reading arguments ----------------------------------------------------------------------------
def ints(value: Any, count: int) -> tuple[int, ...]:
    """torch's "int or tuple" as a tuple of ``count`` ints."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,) * count
    if isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value):
        if len(value) == 1:
            return tuple(value) * count
        if len(value) == count:
            return tuple(value)
    refuse(f"its argument {value} is not {count} whole numbers known before the call")


def tensor(value: Any) -> Tensor:
    """The fake tensor that an operand node holds."""
    held = value.meta.get("fxfuse_val") if isinstance(value, fx.Node) else None
    if not isinstance(held, Tensor):
        refuse("its input is not a tensor that is known before the call")
    return held


def rank(value: Any) -> int:
    return tensor(value).dim()


def all_dims(value: Any, dim: Any) -> tuple[int, ...]:
    """Non-negative, sorted dims; None and () mean all of them, as in torch."""
    count = rank(value)
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return tuple(range(count))
    return tuple(sorted(one_dim(value, d) for d in (dim if isinstance(dim, (tuple, list)) else (dim,))))


def one_dim(value: Any, dim: Any) -> int:
    """A non-negative dim; refuses one that torch would not accept."""
    count = max(rank(value), 1)  # torch lets a 0-dim tensor have dim 0
    if not isinstance(dim, int):
        refuse("a named dim, or one that is not known before the call")
    if not -count <= dim < count:
        refuse(f"dim {dim} of a tensor of {rank(value)} dims")
    return dim % count
