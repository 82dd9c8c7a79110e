"""One spelling per operator: module calls, functions, methods and aten overloads -> :class:`Call`.

A node is *annotated*, not replaced: what stays outside every region runs exactly as the model wrote
it. Each adapter has the signature of the spelling that it reads, so that positional and keyword
arguments bind as they do in torch.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfuse import spellings
from fxfuse.call import HOOKS, Adapter, Call, refuse

FUNCTIONS, METHODS, ATEN, MODULES = spellings.FUNCTIONS, spellings.METHODS, spellings.ATEN, spellings.MODULES


def normalize(node: fx.Node, module: nn.Module | None, params: dict[str, fx.Node]) -> Call:
    """The vocabulary's spelling of ``node``; raises Unsupported with the reason otherwise.

    ``module`` and ``params`` are those of a ``call_module`` node: its live module, and the nodes
    that hold its parameters and buffers by name.
    """
    args = tuple(constant(a) for a in node.args)
    kwargs = {k: constant(v) for k, v in node.kwargs.items()}
    if node.op == "call_module":
        assert module is not None
        return _call_module(module, params, args, kwargs)
    if node.op == "call_method":
        name = str(node.target)
        adapter, inplace = METHODS.get(name), False
        if adapter is None and name.endswith("_") and not name.endswith("__"):
            adapter, inplace = METHODS.get(name[:-1]), True
        return _bind(adapter or refuse(f"Tensor.{name} is not in the vocabulary"), args, kwargs, inplace)
    if node.op != "call_function":
        refuse(f"a {node.op} node is not an operator")
    if isinstance(node.target, torch._ops.OpOverload):
        return _aten(node.target, args, kwargs)
    found = FUNCTIONS.get(node.target)
    if found is None:
        refuse(f"{_name_of(node.target)} is not in the vocabulary")
    return _bind(found, args, kwargs, node.target in spellings.INPLACE_FUNCTIONS)


def _name_of(target: Any) -> str:
    module = getattr(target, "__module__", None) or ""
    name = getattr(target, "__name__", str(target))
    return f"{module}.{name}" if module and module not in ("builtins", "_operator") else name


def constant(value: Any) -> Any:
    """Nodes that hold Python numbers become these numbers; nodes that hold tensors stay."""
    if isinstance(value, fx.Node):
        held = value.meta.get("fxfuse_val")
        if isinstance(held, (bool, int, float, str, torch.dtype, torch.device)) or (
            isinstance(held, torch.Size) and all(isinstance(s, int) for s in held)
        ):
            return held
        if isinstance(held, torch.SymFloat) and held.node.maybe_as_float() is not None:
            return held.node.maybe_as_float()
        return value
    if isinstance(value, (tuple, list)):
        return tuple(constant(v) for v in value)
    return value


def _bind(adapter: Adapter, args: Sequence[Any], kwargs: dict[str, Any], inplace: bool = False) -> Call:
    kwargs = dict(kwargs)
    for first in ("input", "self"):
        if first in kwargs and not args:
            args = (kwargs.pop(first),)
    if kwargs.pop("out", None) is not None:
        refuse("it writes to out=")
    try:
        inspect.signature(adapter).bind(*args, **kwargs)
    except TypeError as error:
        refuse(f"its arguments are not understood ({error})")
    call = adapter(*args, **kwargs)
    for value in (*call.operands, *_leaves(tuple(call.attributes.values()))):
        if isinstance(value, fx.Node) and not isinstance(value.meta.get("fxfuse_val"), Tensor):
            refuse(f"its argument {value.name} is not known before the call")
        if isinstance(value, complex):
            refuse("complex numbers")
    if any(isinstance(v, fx.Node) for v in _leaves(tuple(call.attributes.values()))):
        refuse("an attribute is a tensor")
    return dataclasses.replace(call, inplace=True) if inplace else call


def _leaves(values: tuple[Any, ...]) -> list[Any]:
    return [leaf for v in values for leaf in (_leaves(v) if isinstance(v, tuple) else [v])]


def _call_module(module: nn.Module, params: dict[str, fx.Node], args: Any, kwargs: Any) -> Call:
    kind = type(module)
    if kind not in MODULES:
        if nn.utils.parametrize.is_parametrized(module):
            refuse(f"{kind.__name__} is parametrized")
        refuse(f"{kind.__name__} is not in the vocabulary")
    if any(getattr(module, hooks) for hooks in HOOKS):
        refuse("the module has hooks, which must see its input and output")
    return _bind(lambda *a, **k: MODULES[kind](module, params.get, *a, **k), args, kwargs)


def _aten(overload: torch._ops.OpOverload, args: Any, kwargs: Any) -> Call:
    namespace, name = overload._schema.name.split("::")
    if namespace != "aten":
        refuse(f"{overload} is not in the vocabulary")
    spelled = f"{name}.{overload._overloadname}"
    inplace = name.endswith("_") and spelled not in ATEN
    base = name[:-1] if inplace else name
    adapter = ATEN.get(f"{base}.{overload._overloadname}") or ATEN.get(base)
    if adapter is None:
        refuse(f"{overload} is not in the vocabulary")
    return _bind(adapter, args, kwargs, inplace)
