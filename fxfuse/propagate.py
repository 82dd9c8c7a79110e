"""What each node of a graph computes and touches, found by running it once on fake tensors.

Besides shapes and dtypes this observes, from the aten operators that really run, which storages a
node writes to and whether it draws random numbers: exact in every dialect, where names would lie.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fxfuse import vocabulary
from fxfuse.call import HOOKS, Call, Unsupported
from fxfuse.normalize import normalize

log = logging.getLogger(__name__)


class _Unknown:
    """The value of a node that could not be run on fake tensors."""

    def __repr__(self) -> str:
        return "unknown"


UNKNOWN = _Unknown()


@dataclasses.dataclass
class Facts:
    """What is known of a node."""

    val: Any  #: fake tensors (or other values) that it returns; UNKNOWN where it cannot be run
    index: int  #: its position in the graph as captured
    writes: frozenset[int]  #: storages that it writes to
    reads: frozenset[int]  #: storages that it is given
    holds: frozenset[int]  #: storages of its value; of an unknown value, all that it may share
    random: bool
    switches: bool  #: it changes what later nodes mean (autocast, gradients): nothing moves across it
    autocast: bool  #: whether autocast is on for the value's device
    call: Call | None  #: its meaning in the vocabulary
    refusal: str  #: why it has none
    spelling: str  #: how the model spells it: a module's class, a function's or method's name

    @property
    def tensor(self) -> Tensor | None:
        return self.val if isinstance(self.val, Tensor) else None


def facts(node: fx.Node) -> Facts:
    return node.meta["fxfuse"]  # type: ignore[no-any-return]


def label(node: fx.Node) -> str:
    """How a person knows the node: the module's path, or the node's name."""
    return str(node.target) if node.op == "call_module" else node.name


def storages(value: Any) -> frozenset[int]:
    return frozenset(
        t.untyped_storage()._cdata
        for t in pytree.tree_leaves(value)
        if isinstance(t, Tensor) and t.layout is torch.strided
    )


#: what a node is called for when it has no other effect
_VALUES: tuple[type, ...] = (Tensor, bool, int, float, complex, str, torch.SymInt, torch.SymFloat, torch.SymBool)
_VALUES += (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, slice, type(None), type(...))


class _Effects(TorchDispatchMode):
    """Records writes and randomness of the aten operators that run, and tensors whose shape they change."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: set[int] = set()
        self.made: set[int] = set()  # memory of the node's own, to which it may write
        self.random = False
        self.reshaped: list[tuple[Tensor, Tensor]] = []  # as it is now, and as it was
        self.alive: list[Tensor] = []  # a storage that is freed leaves its number to another one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        written: list[Tensor] = []
        if func._schema.is_mutable:
            for i, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    given = args[i] if i < len(args) else kwargs.get(argument.name)
                    written += [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor)]
        elif func._schema.name in _HIDDEN_WRITES and args[5]:
            written += [t for t in args[3:5] if t is not None]  # running statistics, which the schema does not mark
        self.writes |= storages(written) - self.made
        self.alive += written
        before = [(t, t.detach()) for t in written]
        result = func(*args, **kwargs)
        self.made |= storages(result) - storages((args, kwargs))
        self.alive += [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        self.reshaped += [(now, old) for now, old in before if _layout(now) != _layout(old)]
        return result


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), storages(tensor)


_HIDDEN_WRITES = {"aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"}


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """No tracing mode, tracing context, autograd or changed autocast leaks into the compiler, nor out of it."""
    autocast = {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")}
    with tracing(None), _disable_current_modes(), torch.no_grad():
        try:
            yield
        finally:
            for device, (enabled, dtype) in autocast.items():
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)


def propagate(graph: fx.Graph, modules: dict[str, nn.Module], inputs: Sequence[Any]) -> None:
    """Annotate every node with ``meta["fxfuse"]`` (:class:`Facts`) and ``meta["fxfuse_val"]``.

    ``inputs``: one value per placeholder, fake tensors for tensors. A node that cannot be run on
    fake tensors, and all that depend on it, are unknown: they stay as they are. So is, from then on,
    a value whose shape is changed in place by another operator than the one that made it.
    """
    mode = detect_fake_mode(list(inputs)) or FakeTensorMode(allow_non_fake_inputs=True)
    observed: list[_Effects] = []
    values: dict[fx.Node, Any] = {}
    waiting = iter(inputs)
    for index, node in enumerate(graph.nodes):
        effects, refusal, call = _Effects(), "", None
        observed.append(effects)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "placeholder":
            value = next(waiting)
        elif node.op == "output" or any(a is UNKNOWN for a in pytree.tree_leaves((args, kwargs))):
            value, refusal = UNKNOWN, "an operand of it is not known before the call"
        else:
            call, refusal = _meaning(node, modules)
            try:
                with mode, effects:
                    value = _run(node, call, modules, mode, args, kwargs)
            except Exception as error:  # noqa: BLE001 - whatever it is, the node then runs as the model wrote it
                log.debug("%s cannot be run on fake tensors: %s", node.name, error)
                value, call = UNKNOWN, None
                refusal = refusal or "its shape cannot be found out before the call"
        values[node] = value
        reads = storages((args, kwargs)).union(*(facts(n).holds for n in node.all_input_nodes))
        updated = _buffers(node, call, modules)
        reads |= (touched := storages([values[n] for n in updated]))
        effects.writes |= touched
        node.meta["fxfuse_val"] = value
        node.meta["fxfuse"] = Facts(
            val=value,
            index=index,
            writes=frozenset(effects.writes),
            reads=reads,
            holds=storages(value) if value is not UNKNOWN else reads,
            random=effects.random,
            switches=_is_switch(node, value, effects),
            autocast=any(
                torch.is_autocast_enabled(t.device.type) for t in pytree.tree_leaves(value) if isinstance(t, Tensor)
            ),
            call=call,
            refusal=refusal,
            spelling=type(modules[node.target]).__name__ if node.op == "call_module" else str(node.target),
        )
        for now, old in effects.reshaped:
            holders = [n for n, v in values.items() if any(t is now for t in pytree.tree_leaves(v))]
            if holders == [node]:  # nobody has seen it otherwise
                continue
            for other in holders:
                values[other] = UNKNOWN
                if other is not node and facts(other).val is now:
                    facts(other).val = other.meta["fxfuse_val"] = old


def _buffers(node: fx.Node, call: Call | None, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """The buffers that ``node`` updates besides its operands; all those of a module that is not understood."""
    if call is not None and call.statistics is not None:
        updated = (call.statistics.mean, call.statistics.var, call.statistics.count)
        return [n for n in updated if n is not None]
    if call is None and node.op == "call_module":
        names = {name for name, _ in modules[str(node.target)].named_buffers()}
        return [n for name, n in node.meta.get("fxfuse_params", {}).items() if name in names]
    return []


def _is_switch(node: fx.Node, value: Any, effects: _Effects) -> bool:
    """Whether ``node`` was called for what shows neither in its value nor in memory: it enters or leaves a mode."""
    if value is UNKNOWN or not node.op.startswith("call"):
        return False  # whatever depends on an unknown value stays where it is
    name = getattr(node.target, "__name__", "")
    if isinstance(node.target, torch._ops.OpOverload) or name.startswith(("_assert", "_check")):
        return False
    if value is None:
        return not effects.writes
    return not isinstance(value, _VALUES) and not all(isinstance(v, _VALUES) for v in pytree.tree_leaves(value))


def _meaning(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[Call | None, str]:
    try:
        return normalize(node, modules.get(str(node.target)), node.meta.get("fxfuse_params", {})), ""
    except Unsupported as reason:
        return None, str(reason)


def _run(
    node: fx.Node, call: Call | None, modules: dict[str, nn.Module], mode: FakeTensorMode, args: Any, kwargs: Any
) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    module = modules[str(node.target)]
    if _has_any_global_hook() or any(getattr(m, hooks) for m in module.modules() for hooks in HOOKS):
        raise Unsupported("hooks may change the value, and must not run on fake tensors")
    if call is not None and (module._parameters or module._buffers):  # not the module itself: it could count batches
        operands = [o.meta["fxfuse_val"] if isinstance(o, fx.Node) else o for o in call.operands]
        result = vocabulary.lookup(call.op)(*operands, **call.attributes)
        return result[0] if isinstance(result, tuple) else result
    if next(module.buffers(), None) is not None:
        with FakeCopyMode(mode):
            module = copy.deepcopy(module)
    return module(*args, **kwargs)
