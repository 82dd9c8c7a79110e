"""nn.Module -> fx graph whose placeholders are the call's tensors, then the module's own.

Parameters, buffers and other tensors of the module become *lifted* placeholders, fetched from the
live module on every call: weight updates, ``load_state_dict`` and ``.to()`` are followed without
doing anything. Modules that stay are called as they are, hooks included.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxfuse.call import HOOKS
from fxfuse.normalize import MODULES
from fxfuse.replica import Replica, modules_of, unwrapped
from fxfuse.state import is_plain, tensors_of
from fxfuse.tracer import CaptureError, Tracer, Watch

#: tracing patches nn.Module for a while, and what patches must unpatch in order
_one_at_a_time = threading.RLock()


@dataclasses.dataclass(frozen=True)
class Lifted:
    """A tensor of the module: ``holder[name]``, where holder is a live ``_parameters``-like dict."""

    holder: dict[str, Any]
    name: str
    path: str

    def fetch(self) -> Tensor:
        return self.holder[self.name]  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class CallForm:
    """The structure of a call: how arguments nest, and the leaves that are not tensors."""

    spec: pytree.TreeSpec
    constants: tuple[tuple[int, Any], ...]
    tensors: tuple[int, ...]

    @staticmethod
    def of(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[CallForm, list[Tensor]]:
        if not kwargs and all(isinstance(a, Tensor) for a in args):
            return _positional(len(args)), list(args)
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        tensors = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        constants = tuple((i, leaf) for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor))
        return CallForm(spec, constants, tensors), [leaves[i] for i in tensors]

    @functools.cached_property
    def opaque(self) -> str | None:
        """The class of a leaf that is neither a tensor nor a plain value, and that may change unseen."""
        classes = (type(c).__name__ for _, c in self.constants if not (is_plain(c) or isinstance(c, enum.Enum)))
        return next(classes, None)

    @property
    def positional(self) -> bool:
        """Of tensors by position alone, not nested."""
        return self is _positional(len(self.tensors))

    @functools.cached_property
    def key(self) -> Any:
        """What two calls of the same form have in common; 0.0 is not -0.0, and 1 is not True."""
        if self.positional:
            return len(self.tensors)  # a spec takes long to hash
        return self.spec, tuple(
            (i, type(c), repr(c) if isinstance(c, (float, complex)) else c) for i, c in self.constants
        )

    def arguments(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with ``tensors`` in place."""
        leaves: list[Any] = [None] * (len(self.constants) + len(self.tensors))
        for i, leaf in self.constants:
            leaves[i] = leaf
        for i, leaf in zip(self.tensors, tensors, strict=True):
            leaves[i] = leaf
        return pytree.tree_unflatten(leaves, self.spec)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=32)
def _positional(count: int) -> CallForm:
    """The form of the commonest call: ``count`` positional tensors and nothing else."""
    _, spec = pytree.tree_flatten(((0,) * count, {}))
    return CallForm(spec, (), tuple(range(count)))


@dataclasses.dataclass
class Capture:
    """A captured forward: ``graph`` takes the call's tensors, then ``lifted``; it returns flat leaves.

    ``reads`` are the attributes that it depends on (:class:`~fxfuse.guards.Guards`). ``asks_grad``:
    the forward asked whether gradients are on. ``exact``: made for the sizes, strides and need for
    gradients of one call's tensors, and for no others.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    lifted: list[Lifted]
    form: CallForm
    out_spec: pytree.TreeSpec
    how: str
    reads: dict[int, set[str]]
    asks_grad: bool = False
    exact: bool = False

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """Execute the capture as it is, for comparison with the model."""
        values = [t.fetch() for t in self.lifted]
        constants = [(t, t._version) for t, source in zip(values, self.lifted, strict=True) if source.path == CONSTANT]
        flat = fx.Interpreter(self.graph_module(self.graph)).run(*tensors, *values)
        if any(t._version != version for t, version in constants):
            raise CaptureError("it writes to a tensor that the forward makes anew on every call")
        return pytree.tree_unflatten(flat, self.out_spec)

    def graph_module(self, graph: fx.Graph) -> fx.GraphModule:
        return graph_module(self.modules, graph)


#: the path of a lifted tensor that is no attribute of the model: made while tracing
CONSTANT = "(constant)"


def graph_module(modules: dict[str, nn.Module], graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule that calls the live ``modules``."""
    root = nn.Module()
    for path, module in modules.items():
        *parents, leaf = path.split(".")
        holder = root
        for name in parents:
            if name not in holder._modules:
                holder.add_module(name, nn.Module())
            holder = holder.get_submodule(name)
        holder.add_module(leaf, module)
    return fx.GraphModule(root, graph)


def _replica(model: nn.Module) -> Replica:
    try:
        return Replica(model)
    except Exception as error:
        raise CaptureError(f"its modules cannot be copied for the trace ({type(error).__name__}: {error})") from error


def _reason(error: Exception) -> CaptureError:
    """Why a trace failed, in one line."""
    if isinstance(error, CaptureError):
        return error
    line = (str(error).strip().splitlines() or [""])[0]
    return CaptureError(f"{type(error).__name__}: {line}")


def _assigned(names: Sequence[str]) -> CaptureError:
    return CaptureError(f"the forward changes attributes of its modules ({', '.join(names)})")


# --- symbolic_trace -------------------------------------------------------------------------------
class _Flat(nn.Module):
    """The model as a function of its call's tensors alone, returning flat leaves."""

    def __init__(self, model: nn.Module, form: CallForm) -> None:
        super().__init__()
        self.model = model
        self.form = form
        self.out_spec: pytree.TreeSpec | None = None

    def apply_model(self, tensors: Sequence[Any]) -> list[Any]:
        args, kwargs = self.form.arguments(tensors)
        leaves, self.out_spec = pytree.tree_flatten(self.model.forward(*args, **kwargs))
        return leaves


def _flat(model: nn.Module, form: CallForm) -> _Flat:
    """A _Flat whose ``forward`` has one named parameter per tensor: fx reads them from the class."""
    names = "".join(f"input_{i}, " for i in range(len(form.tensors)))
    space: dict[str, Any] = {}
    exec(f"def forward(self, {names}):\n    return self.apply_model(({names}))", space)  # noqa: S102 - names made above
    kind: type[_Flat] = type("_Flat", (_Flat,), {"forward": space["forward"]})
    return kind(model, form)


def symbolic_trace(model: nn.Module, form: CallForm) -> Capture:
    """Capture with ``torch.fx``; raises CaptureError with the reason. The model is left as it was."""
    replica = _replica(model)
    flat = _flat(replica.root, form)
    try:
        with _one_at_a_time, Watch() as watch:
            graph = Tracer(model, flat).trace_all()
    except Exception as error:
        raise _reason(error) from error
    if replica.changed():
        raise _assigned(replica.changed())
    assert flat.out_spec is not None
    capture = Capture(graph, {}, [], form, flat.out_spec, "torch.fx.symbolic_trace", replica.reads, watch.asks_grad)
    _lift(capture, flat, model)
    return capture


def _lift(capture: Capture, flat: _Flat, model: nn.Module) -> None:
    """Turn get_attr nodes into placeholders, and give modules nodes for their tensors; all of the live ``model``."""
    graph = capture.graph
    made: dict[tuple[int, str], fx.Node] = {}
    first = next(n for n in graph.nodes if n.op != "placeholder")

    def lifted(holder: dict[str, Any], name: str, path: str) -> fx.Node:
        key = (id(holder), name)
        if key not in made:
            with graph.inserting_before(first):
                made[key] = graph.placeholder("p_" + (name if path == CONSTANT else path).replace(".", "_"))
            capture.lifted.append(Lifted(holder, name, path))
        return made[key]

    for node in list(graph.nodes):
        if node.op == "get_attr":
            node.replace_all_uses_with(lifted(*_live(str(node.target), flat, model)))
            if node is first:
                first = node.next
            graph.erase_node(node)
        elif node.op == "call_module":
            path = str(node.target).removeprefix("model").removeprefix(".")
            module = unwrapped(model.get_submodule(path))
            node.target = path or "model"
            capture.modules[node.target] = module
            node.meta["fxfuse_params"] = {
                name: lifted(holder, key, f"{node.target}.{name}") for name, holder, key in _tensors_of(module)
            }


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Path, holder and name of what a module's node may touch: parameters, if it may join a region, and all buffers."""
    if type(module) in MODULES:
        yield from ((name, module._parameters, name) for name, t in module._parameters.items() if t is not None)
    for path, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.layout is torch.strided:
                yield f"{path}.{name}".removeprefix("."), child._buffers, name


def _live(target: str, flat: _Flat, model: nn.Module) -> tuple[dict[str, Any], str, str]:
    """Holder, name and path of the tensor that a get_attr node names."""
    if not target.startswith("model."):
        _owned(flat.__dict__[target], model)
        return flat.__dict__, target, CONSTANT
    path = target.removeprefix("model.")
    *parents, name = path.split(".")
    return _holder(unwrapped(model.get_submodule(".".join(parents))), name), name, path


def _holder(owner: nn.Module, name: str) -> dict[str, Any]:
    for holder in (owner._parameters, owner._buffers):
        if name in holder:
            return holder
    return owner.__dict__


def _owned(constant: Any, model: nn.Module) -> None:
    """Refuse a tensor that a trace took for a constant, and that is the model's."""
    if isinstance(constant, Tensor) and constant.layout is torch.strided:
        memory = constant.untyped_storage()._cdata
        if any(t.layout is torch.strided and t.untyped_storage()._cdata == memory for t in tensors_of(model)):
            raise CaptureError("it reaches a tensor of the model by a way on which later changes are not followed")


# --- torch.export ---------------------------------------------------------------------------------
def export(model: nn.Module, form: CallForm, tensors: Sequence[Tensor]) -> Capture:
    """Capture with non-strict ``torch.export``, for the shapes of ``tensors``; raises CaptureError."""
    hooked = [type(m).__name__ for m in modules_of(model) if m is not model and any(getattr(m, h) for h in HOOKS)]
    if hooked:
        raise CaptureError(f"a submodule ({hooked[0]}) has hooks, which an export would run once and forget")
    replica = _replica(model)
    args, kwargs = form.arguments(tensors)
    try:
        with _one_at_a_time, Watch() as watch, torch.enable_grad():
            program = torch.export.export(_Callable(replica.root), args, kwargs, strict=False)
    except Exception as error:
        raise _reason(error) from error
    if replica.changed():
        raise _assigned(replica.changed())
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise CaptureError("the export moved mutations out of the graph")
    graph = program.graph_module.graph
    if any(
        n.op == "get_attr" and not isinstance(_get(program.graph_module, str(n.target)), Tensor) for n in graph.nodes
    ):
        raise CaptureError("the export has control flow or nested graphs")
    spec = program.call_spec.out_spec
    capture = Capture(graph, {}, [], form, spec, "torch.export", replica.reads, watch.asks_grad, exact=True)
    _lift_export(capture, model, program)
    return capture


class _Callable(nn.Module):
    """The model behind a plain forward: its own hooks belong to the wrapper around the capture."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)


def _get(root: Any, target: str) -> Any:
    for part in target.split("."):
        root = getattr(root, part)
    return root


def _lift_export(capture: Capture, model: nn.Module, program: torch.export.ExportedProgram) -> None:
    """Order placeholders as (call's tensors, lifted) and tie the lifted ones to the live module."""
    signature, graph = program.graph_signature, capture.graph
    paths = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {**signature.inputs_to_lifted_tensor_constants}
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    user = [n for n in placeholders if n.name not in paths and n.name not in constants]
    rest = [n for n in placeholders if n not in user]
    # an exported graph has a placeholder for every leaf; those of constants are dropped
    leaves = sorted([*capture.form.tensors, *(i for i, _ in capture.form.constants)])
    if len(user) != len(leaves):
        raise CaptureError(f"the export takes {len(user)} inputs where the call has {len(leaves)}")
    for node, position in zip(user, leaves, strict=True):
        if position in capture.form.tensors:
            continue
        if node.users:
            raise CaptureError(f"the input {node.name} is not a tensor and is used in the exported graph")
        graph.erase_node(node)
    for node in rest:
        path = constants.get(node.name) or paths[node.name]
        capture.lifted.append(_lifted_of_export(path, program, model))
    anchor = next(n for n in graph.nodes if n.op != "placeholder")
    for node in rest:
        anchor.prepend(node)
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        with graph.inserting_before(anchor):
            new = graph.placeholder(node.name + "_constant")
        value = _get(program.graph_module, str(node.target))
        _owned(value, model)
        capture.lifted.append(Lifted({node.name: value}, node.name, CONSTANT))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    # drop the checks on inputs that export adds
    for node in reversed(graph.nodes):
        if node.op.startswith("call") and "_guards_fn" in str(node.target):
            graph.erase_node(node)
    output = graph.output_node()
    output.args = (list(output.args[0]),)  # type: ignore[arg-type]


def _lifted_of_export(path: str, program: torch.export.ExportedProgram, model: nn.Module) -> Lifted:
    """The live tensor at ``path`` of an export, or a constant that tracing made."""
    live = path.removeprefix("model.")
    *parents, name = live.split(".")
    value = program.constants.get(path)
    try:
        holder = _holder(unwrapped(model.get_submodule(".".join(parents))), name)
    except AttributeError:
        holder = {}
    if isinstance(holder.get(name), Tensor) and (value is None or holder[name] is value):
        return Lifted(holder, name, live)
    if value is None:
        raise CaptureError(f"the export names {path}, which the model does not have")
    _owned(value, model)
    return Lifted(program.constants, path, CONSTANT)
