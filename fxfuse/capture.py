"""nn.Module -> fx graph whose placeholders are the call's tensors, then the module's own.

Parameters, buffers and other tensors of the module become *lifted* placeholders, fetched from the
live module on every call: weight updates, ``load_state_dict`` and ``.to()`` are followed without
doing anything. Modules that stay are called as they are, hooks included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxfuse.call import HOOKS
from fxfuse.guards import Guards, is_plain
from fxfuse.normalize import MODULES

log = logging.getLogger(__name__)


class CaptureError(RuntimeError):
    """A model that cannot be captured this way; the message says why."""


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
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        tensors = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        constants = tuple((i, leaf) for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor))
        return CallForm(spec, constants, tensors), [leaves[i] for i in tensors]

    def arguments(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with ``tensors`` in place."""
        leaves: list[Any] = [None] * (len(self.constants) + len(self.tensors))
        for i, leaf in self.constants:
            leaves[i] = leaf
        for i, leaf in zip(self.tensors, tensors, strict=True):
            leaves[i] = leaf
        return pytree.tree_unflatten(leaves, self.spec)  # type: ignore[no-any-return]


@dataclasses.dataclass
class Capture:
    """A captured forward: ``graph`` takes the call's tensors, then ``lifted``; it returns flat leaves."""

    graph: fx.Graph
    modules: dict[str, nn.Module]
    lifted: list[Lifted]
    form: CallForm
    out_spec: pytree.TreeSpec
    how: str
    guards: Guards

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """Execute the capture as it is, for comparison with the model."""
        flat = fx.Interpreter(self.graph_module(self.graph)).run(*tensors, *(t.fetch() for t in self.lifted))
        return pytree.tree_unflatten(flat, self.out_spec)

    def graph_module(self, graph: fx.Graph) -> fx.GraphModule:
        return graph_module(self.modules, graph)


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


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        with torch.enable_grad():
            self._modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        hooked = any(getattr(m, h) for h in HOOKS)
        return hooked or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise CaptureError("the forward changes grad mode or autocast on the way, which a trace would lose")
        return super().create_node(*args, **kwargs)


def _modes() -> tuple[bool, ...]:
    return (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[list[str]]:
    """Undo what a trace assigns to module attributes, and name it."""
    before = [(m, dict(m.__dict__)) for m in model.modules()]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for module, state in before:
            for name in [k for k in module.__dict__ if k not in state]:
                changed.append(name)
                del module.__dict__[name]
            for name, value in state.items():
                if module.__dict__.get(name) is not value:
                    if not (is_plain(value) and module.__dict__.get(name) == value):
                        changed.append(name)
                    module.__dict__[name] = value


def symbolic_trace(model: nn.Module, form: CallForm) -> Capture:
    """Capture with ``torch.fx``; raises CaptureError with the reason. The model is left as it was."""
    guards = Guards(model)
    flat = _flat(model, form)
    tracer = _Tracer()
    rng = torch.get_rng_state()
    try:
        with _attributes_kept(model) as changed, torch.enable_grad():  # so that a no_grad block shows
            graph = tracer.trace(flat)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {_first_line(error)}") from error
    finally:
        torch.set_rng_state(rng)
    if changed:
        raise CaptureError(f"the forward assigns attributes of its modules ({', '.join(sorted(set(changed)))})")
    assert flat.out_spec is not None
    capture = Capture(graph, {}, [], form, flat.out_spec, "torch.fx.symbolic_trace", guards)
    _lift(capture, flat)
    return capture


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _lift(capture: Capture, flat: _Flat) -> None:
    """Turn get_attr nodes into placeholders, and give known modules nodes for their tensors."""
    graph = capture.graph
    made: dict[tuple[int, str], fx.Node] = {}
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    first = next(n for n in graph.nodes if n.op != "placeholder")

    def lifted(holder: dict[str, Any], name: str, path: str) -> fx.Node:
        key = (id(holder), name)
        if key not in made:
            with graph.inserting_before(first):
                made[key] = graph.placeholder("p_" + path.replace(".", "_"))
            capture.lifted.append(Lifted(holder, name, path))
        return made[key]

    for node in list(graph.nodes):
        if node.op == "get_attr":
            owner, name = _owner(flat, str(node.target))
            path = str(node.target).removeprefix("model.")
            node.replace_all_uses_with(lifted(_holder(owner, name), name, path))
            if node is first:
                first = node.next
            graph.erase_node(node)
        elif node.op == "call_module":
            module = flat.get_submodule(str(node.target))
            node.target = str(node.target).removeprefix("model.") if str(node.target) != "model" else "model"
            capture.modules[node.target] = module
            node.meta["fxfuse_params"] = {
                path: lifted(holder, name, f"{node.target}.{path}") for path, holder, name in _tensors_of(module)
            }
    assert [n for n in graph.nodes if n.op == "placeholder"][: len(placeholders)] == placeholders


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Path, holder and name of what a module's node may touch: parameters, if it may join a region, and all buffers."""
    if type(module) in MODULES:
        yield from ((name, module._parameters, name) for name, t in module._parameters.items() if t is not None)
    for path, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.layout is torch.strided:
                yield f"{path}.{name}".removeprefix("."), child._buffers, name


def _owner(root: nn.Module, target: str) -> tuple[Any, str]:
    *parents, name = target.split(".")
    owner: Any = root
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def _holder(owner: Any, name: str) -> dict[str, Any]:
    for holder in (owner._parameters, owner._buffers):
        if name in holder:
            return holder  # type: ignore[no-any-return]
    return owner.__dict__  # type: ignore[no-any-return]


# --- torch.export ---------------------------------------------------------------------------------
def export(model: nn.Module, form: CallForm, tensors: Sequence[Tensor]) -> Capture:
    """Capture with non-strict ``torch.export``, for the shapes of ``tensors``; raises CaptureError."""
    hooked = [name for name, m in model.named_modules() if m is not model and any(getattr(m, h) for h in HOOKS)]
    if hooked:
        raise CaptureError(f"{hooked[0]} has hooks, which an export would run once and forget")
    guards = Guards(model)
    args, kwargs = form.arguments(tensors)
    try:
        with _attributes_kept(model) as changed, torch.enable_grad():
            program = torch.export.export(_Callable(model), args, kwargs, strict=False)
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {_first_line(error)}") from error
    if changed:
        raise CaptureError(f"the forward assigns attributes of its modules ({', '.join(sorted(set(changed)))})")
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise CaptureError("the export moved mutations out of the graph")
    graph = program.graph_module.graph
    if any(
        n.op == "get_attr" and not isinstance(_get(program.graph_module, str(n.target)), Tensor) for n in graph.nodes
    ):
        raise CaptureError("the export has control flow or nested graphs")
    capture = Capture(graph, {}, [], form, program.call_spec.out_spec, "torch.export", guards)
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
        if node.name in constants:
            holder, name, path = program.constants, constants[node.name], constants[node.name]
        else:
            path = paths[node.name].removeprefix("model.")
            owner, name = _owner(model, path)
            holder = _holder(owner, name)
        capture.lifted.append(Lifted(holder, name, path))
    anchor = next(n for n in graph.nodes if n.op != "placeholder")
    for node in rest:
        anchor.prepend(node)
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        with graph.inserting_before(anchor):
            new = graph.placeholder(node.name + "_constant")
        capture.lifted.append(Lifted({node.name: _get(program.graph_module, str(node.target))}, node.name, node.name))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    # drop the checks on inputs that export adds
    for node in reversed(graph.nodes):
        if node.op == "call_function" and "_guards_fn" in str(node.target):
            graph.erase_node(node)
    output = graph.output_node()
    output.args = (list(output.args[0]),)  # type: ignore[arg-type]
