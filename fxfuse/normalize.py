"""One spelling per operator: module calls, functions, methods and aten overloads -> :class:`Call`.

A node is *annotated*, not replaced: what stays outside every region runs exactly as the model wrote
it. Each adapter has the signature of the spelling that it reads, so that positional and keyword
arguments bind as they do in torch.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from fxfuse import spellings, vocabulary
from fxfuse.call import HOOKS, Adapter, Call, Unsupported, refuse
from fxfuse.instr import DTYPE_NAMES
from fxfuse.vocabulary import Kind

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
            return constant(held)
        if isinstance(held, torch.SymFloat) and held.node.maybe_as_float() is not None:
            return held.node.maybe_as_float()
        return value
    if isinstance(value, (tuple, list)):
        return tuple(constant(v) for v in value)
    if isinstance(value, float):  # numpy's float64 is one, but prints as something else
        return float(value)
    return value


# --- binding arguments ----------------------------------------------------------------------------
#: what torch also accepts as the name of an argument
_ALIASES = {"self": "input", "x": "input", "a": "input", "x1": "input", "x2": "other", "axis": "dim", "size": "shape"}
_ALIASES["keepdims"] = "keepdim"


def _bind(adapter: Adapter, args: Sequence[Any], kwargs: dict[str, Any], inplace: bool = False) -> Call:
    """Call ``adapter``; whatever it does not understand becomes a refusal."""
    if kwargs.get("out") is not None:
        refuse("it writes to out=")
    signature = inspect.signature(adapter)
    known = signature.parameters.keys()
    named = {k if k in known else _ALIASES.get(k, k): v for k, v in kwargs.items() if k != "out"}
    if len(named) < len(kwargs) - ("out" in kwargs):
        refuse("an argument is given twice")
    try:
        signature.bind(*args, **named)
        call = adapter(*args, **named)
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(f"its arguments are not understood ({_first_line(error)})") from error
    if inplace:
        if vocabulary.lookup(call.op).kind is not Kind.POINTWISE or call.inplace:
            refuse("it changes its operand in place in a way that is not pointwise")
        call = dataclasses.replace(call, inplace=True)
    for operand in call.operands:
        _check_operand(operand)
    for name, value in call.attributes.items():
        _check_attribute(name, value)
    return call


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_operand(value: Any) -> None:
    if isinstance(value, fx.Node):
        if not isinstance(value.meta.get("fxfuse_val"), Tensor):
            refuse(f"its argument {value.name} is not known before the call")
    elif value is not None and type(value) not in (bool, int, float):
        refuse(f"its operand {value!r} is neither a tensor nor a real number")


def _check_attribute(name: str, value: Any) -> None:
    for leaf in value if isinstance(value, tuple) else (value,):
        if isinstance(leaf, fx.Node):
            refuse(f"its argument {name} is a tensor, or not known before the call")
        known = leaf in DTYPE_NAMES if isinstance(leaf, torch.dtype) else type(leaf) in (bool, int, float, str)
        if leaf is not None and not known:
            refuse(f"its argument {name} is {leaf!r}")


# --- dialects -------------------------------------------------------------------------------------
def _call_module(module: nn.Module, params: dict[str, fx.Node], args: Any, kwargs: Any) -> Call:
    kind = type(module)
    if kind not in MODULES:
        if nn.utils.parametrize.is_parametrized(module):
            refuse(f"{kind.__name__} is parametrized")
        refuse(f"{kind.__name__} is not in the vocabulary")
    if any(getattr(module, hooks) for hooks in HOOKS):
        refuse("the module has hooks, which must see its input and output")
    if _has_any_global_hook():
        refuse("hooks on all modules are registered")
    if "forward" in module.__dict__:
        refuse("the module has a forward of its own")

    def param(name: str) -> fx.Node | None:
        if name not in params and getattr(module, name, None) is not None:
            refuse(f"its {name} is not a parameter or a buffer of its own")
        return params.get(name)

    return _bind(functools.partial(MODULES[kind], module, param), args, kwargs)


def _aten(overload: torch._ops.OpOverload, args: Any, kwargs: Any) -> Call:
    namespace, name = overload._schema.name.split("::")
    if namespace != "aten":
        refuse(f"{overload} is not in the vocabulary")
    inplace = name.endswith("_") and not name.endswith("__")
    base = name[:-1] if inplace else name
    adapter = ATEN.get(f"{base}.{overload._overloadname}") or ATEN.get(base)
    if adapter is None:
        refuse(f"{overload} is not in the vocabulary")
    return _bind(adapter, args, kwargs, inplace)


# --- values of an operator that also gives indices ------------------------------------------------
_VALUES = {
    ("call_function", torch.max): spellings.reductions.max_values,
    ("call_function", torch.min): spellings.reductions.min_values,
    ("call_function", torch.ops.aten.max.dim): spellings.reductions.max_values,
    ("call_function", torch.ops.aten.min.dim): spellings.reductions.min_values,
    ("call_method", "max"): spellings.reductions.max_values,
    ("call_method", "min"): spellings.reductions.min_values,
}


def values_only(graph: fx.Graph) -> None:
    """Spell ``y.max(dim)`` as one function where only its values are read, not its indices; in place."""
    for node in list(graph.nodes):
        function = _VALUES.get((node.op, node.target))
        if function is None or not _over_one_dim(node):
            continue
        readers = [u for u in node.users if u.users or not _reads(u, 1, "indices")]
        if not readers or not all(_reads(u, 0, "values") for u in readers):
            continue
        with graph.inserting_before(node):
            values = graph.call_function(function, node.args, node.kwargs)
        values.meta.update(readers[0].meta)
        for user in readers:
            user.replace_all_uses_with(values)
        for dead in [*node.users, node]:
            graph.erase_node(dead)


def _over_one_dim(node: fx.Node) -> bool:
    """Whether a max or min has a literal dim: with a tensor in its place it gives no indices."""
    rest = [*node.args[1:], *(v for k, v in node.kwargs.items() if k in ("dim", "axis"))]
    return bool(rest) and type(rest[0]) is int and "out" not in node.kwargs


def _reads(user: fx.Node, index: int, name: str) -> bool:
    if user.op != "call_function":
        return False
    if user.target is operator.getitem:
        return type(user.args[1]) is int and user.args[1] == index
    return user.target is getattr and user.args[1:] == (name,)
