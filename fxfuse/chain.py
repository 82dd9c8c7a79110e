"""A program as an fx graph: the form that rewrite rules edit.

Placeholders are the inputs, ``call_function`` nodes have an :class:`~fxfuse.vocabulary.Op` as target,
operands as ``args`` and *complete* attributes as ``kwargs``; an operator of several outputs is read
through ``operator.getitem``. ``node.meta["val"]`` is a fake tensor (a tuple for several outputs).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse import forms, vocabulary
from fxfuse.forms import Form
from fxfuse.instr import Instr, Ref, TensorType
from fxfuse.program import Program
from fxfuse.vocabulary import Op


class Builder:
    """Adds operators to a graph, each with its shape and dtype inferred on fake tensors."""

    def __init__(self, graph: fx.Graph, mode: FakeTensorMode) -> None:
        self.graph = graph
        self.mode = mode

    def input(self, name: str, val: Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = val
        return node

    def call(self, name: str, *operands: Any, **attributes: Any) -> fx.Node:
        """A new node ``name(*operands, **attributes)`` at the insertion point; raises what torch raises."""
        op = vocabulary.lookup(name)
        complete = op.complete(attributes)
        val = self.infer(op, operands, complete)
        node = self.graph.call_function(op, operands, complete)
        node.meta["val"] = val
        return node

    def output(self, node: fx.Node, index: int) -> fx.Node:
        """Output ``index`` of an operator of several outputs."""
        item = self.graph.call_function(operator.getitem, (node, index))
        item.meta["val"] = node.meta["val"][index]
        return item

    def infer(self, op: Op, operands: Sequence[Any], attributes: dict[str, Any]) -> Any:
        vals = [o.meta["val"] if isinstance(o, fx.Node) else o for o in operands]
        given = [Form.of(v) if isinstance(v, Tensor) else v for v in vals]
        key = None
        if all(v.known for v in given if isinstance(v, Form)):
            key = forms.key_of(op.name, [*attributes.items()], given)
            results = forms.recall(key)
            if results is not None:
                with self.mode:
                    made = tuple([r.empty() for r in results])
                return made[0] if op.outputs == 1 else made
        with self.mode, torch.no_grad(), no_autocast():
            found = op(*vals, **attributes)
        if key is not None:
            forms.remember(key, tuple(map(Form.of, found if isinstance(found, tuple) else (found,))))
        return found


class no_autocast:  # noqa: N801 - a context manager, named like torch's
    """Switch autocast off for every device type: a region's casts are written out."""

    def __enter__(self) -> no_autocast:
        on = torch._C._is_any_autocast_enabled()  # one question, on the way of every call
        #: device types whose autocast was on
        self.active = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)] if on else ()
        for device in self.active:
            torch.set_autocast_enabled(device, False)
        return self

    def __exit__(self, *_: object) -> None:
        for device in self.active:
            torch.set_autocast_enabled(device, True)


# --- reading nodes --------------------------------------------------------------------------------
def op_name(node: Any) -> str | None:
    """The operator's name of a node, or None for anything that is not a call of the vocabulary."""
    if isinstance(node, fx.Node) and isinstance(node.target, Op):
        return node.target.name
    return None


def op_of(node: fx.Node) -> Op:
    """The operator that a node calls."""
    assert isinstance(node.target, Op)
    return node.target


def operands(node: fx.Node) -> tuple[Any, ...]:
    """The operands of a node: other nodes, numbers, None."""
    return node.args


def attributes(node: fx.Node) -> dict[str, Any]:
    """The attributes of a node, complete."""
    return node.kwargs


def sizes(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a node's value, or None where a size is symbolic."""
    shape = tuple(node.meta["val"].shape)
    return shape if all(isinstance(s, int) for s in shape) else None


def strides(val: Tensor) -> list[int] | None:
    """The strides of a fake tensor's dims of more than one element, or None where some are symbolic."""
    pairs = [(n, s) for n, s in zip(val.shape, val.stride(), strict=True)]
    return [s for n, s in pairs if n > 1] if all(isinstance(v, int) for p in pairs for v in p) else None


def dtype(node: fx.Node) -> torch.dtype:
    """The dtype of a node's value."""
    return node.meta["val"].dtype  # type: ignore[no-any-return]


def same_type(a: Any, b: Any) -> bool:
    """Whether two fake values have the same dtype and, provably, the same shape."""
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same_type(x, y) for x, y in zip(a, b, strict=True))
    return a.dtype is b.dtype and a.device == b.device and same_shape(a, b)


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether two fake tensors have, provably, the same shape."""
    return a.dim() == b.dim() and all(statically_known_true(x == y) for x, y in zip(a.shape, b.shape, strict=True))


# --- program <-> graph ----------------------------------------------------------------------------
def to_graph(program: Program, inputs: Sequence[Tensor]) -> Builder:
    """The graph of ``program`` on fake ``inputs``."""
    mode = detect_fake_mode(list(inputs))
    if mode is None:
        raise TypeError("to_graph needs fake tensors")
    build = Builder(fx.Graph(), mode)
    values: dict[str, fx.Node] = {
        name: build.input(name, val) for (name, _), val in zip(program.inputs, inputs, strict=True)
    }
    for instr in program.body:
        operands = [values[o.name] if isinstance(o, Ref) else o for o in instr.operands]
        node = build.call(instr.op, *operands, **dict(instr.attributes))
        if len(instr.outs) == 1:
            values[instr.outs[0]] = node
        else:
            values.update((out, build.output(node, i)) for i, out in enumerate(instr.outs))
    build.graph.output(tuple(values[o] for o in program.outputs))
    return build


def to_program(graph: fx.Graph) -> Program:
    """Freeze a graph. Values are renamed x0, x1, ... (inputs) and v0, v1, ... in order."""
    names: dict[fx.Node, str] = {}
    inputs: list[tuple[str, TensorType]] = []
    body: list[Instr] = []
    results: tuple[str, ...] = ()
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = f"x{len(inputs)}"
            inputs.append((names[node], type_of(node.meta["val"])))
        elif node.op == "output":
            results = tuple(names[n] for n in node.args[0])
        elif node.target is not operator.getitem:
            outs = list(_outs(node))
            for i, items in enumerate(outs):
                for item in items:
                    names[item] = f"v{len(body)}" if len(outs) == 1 else f"v{len(body)}_{i}"
            operands = tuple(Ref(names[a]) if isinstance(a, fx.Node) else a for a in node.args)
            written = tuple(f"v{len(body)}" if len(outs) == 1 else f"v{len(body)}_{i}" for i in range(len(outs)))
            body.append(Instr(written, node.target.name, operands, tuple(node.kwargs.items())))
    return Program(tuple(inputs), tuple(body), results)


def _outs(node: fx.Node) -> Iterator[list[fx.Node]]:
    if node.target.outputs == 1:  # type: ignore[union-attr]
        yield [node]
        return
    for i in range(node.target.outputs):  # type: ignore[union-attr]
        yield [u for u in node.users if u.target is operator.getitem and u.args[1] == i]


def type_of(val: Tensor) -> TensorType:
    return TensorType(val.dtype, tuple(s if isinstance(s, int) else None for s in val.shape))


def eliminate_dead(graph: fx.Graph) -> None:
    """Erase the operators that nothing reads; every operator of the vocabulary is pure."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def sort(graph: fx.Graph) -> None:
    """Put every operator right before its first reader, so that the order says nothing about the graph's past."""
    output = graph.output_node()
    placed = {n for n in graph.nodes if n.op == "placeholder"}
    stack = [output]
    while stack:
        missing = [n for n in stack[-1].all_input_nodes if n not in placed]
        if missing:
            stack.append(missing[0])
            continue
        node = stack.pop()
        if node not in placed and node is not output:
            output.prepend(node)
            placed.add(node)
