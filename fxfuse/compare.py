"""Whether two results of the same operators agree: nesting, types, values, and the way to their gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils import _pytree as pytree

from fxfuse.tolerance import rounding


def relative_error(value: Tensor, truth: Tensor) -> float:
    """``||value - truth|| / ||truth||`` in float64 over the finite elements; inf where Inf or NaN differ."""
    value, truth = value.detach().double(), truth.detach().double()
    if value.numel() == 0:
        return 0.0
    finite = truth.isfinite()
    if bool((finite & value.isfinite()).all()):  # picking elements by a mask needs much memory
        return _relative(value, truth)
    if not torch.equal(finite, value.isfinite()):
        return float("inf")
    special, expected = value[~finite], truth[~finite]
    if not torch.equal(special.isnan(), expected.isnan()) or not torch.equal(
        special.nan_to_num(), expected.nan_to_num()
    ):
        return float("inf")
    return _relative(value[finite], truth[finite])


def _relative(value: Tensor, truth: Tensor) -> float:
    difference, scale = float((value - truth).norm()), float(truth.norm())
    return difference / scale if scale > 0 else difference


def disagreement(got: Any, expected: Any) -> str | None:
    """Why two nested results of the same operators differ, or None: structure, type, shape, grad, values."""
    leaves, spec = pytree.tree_flatten(got)
    wanted, wanted_spec = pytree.tree_flatten(expected)
    if spec != wanted_spec:
        return "the results are nested differently"
    for number, (a, b) in enumerate(zip(leaves, wanted, strict=True)):
        reason = leaf_disagreement(a, b)
        if reason:
            return f"output {number}: {reason}"
    return None


def leaf_disagreement(got: Any, expected: Any) -> str | None:
    """Why two leaves of a result differ, or None. A dataclass is compared field by field."""
    if not isinstance(got, Tensor) or not isinstance(expected, Tensor):
        if type(got) is type(expected) and dataclasses.is_dataclass(got):
            return disagreement(_fields(got), _fields(expected))
        same = type(got) is type(expected) and (got is expected or bool(got == expected))
        return None if same else f"{got!r} where the model gives {expected!r}"
    for name in ("shape", "dtype", "device", "requires_grad"):
        if getattr(got, name) != getattr(expected, name):
            return f"{name} {getattr(got, name)} where the model gives {getattr(expected, name)}"
    if torch.equal(got, expected):
        return None
    if not expected.is_floating_point():
        return "other values than the model gives"
    error = relative_error(got, expected)
    limit = rounding(expected.dtype, tf32=expected.is_cuda)  # a library may choose another algorithm the second time
    return None if error <= limit else f"relative error {error:.1e} (at most {limit:.0e} is expected)"


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}


def fresh(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies that a second run may write to, with the same layout and need for gradients."""
    return [_fresh(t) for t in tensors]


def _fresh(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return copy if tensor.is_leaf else copy.clone()


# --- gradients ------------------------------------------------------------------------------------
def edges(tensors: Iterable[Tensor]) -> list[GradientEdge | None]:
    """Where the gradient of each tensor arrives; None for one that needs none."""
    return [get_gradient_edge(t) if t.requires_grad else None for t in tensors]


def gradient_disagreement(
    got: Any, expected: Any, got_from: Sequence[GradientEdge | None], expected_from: Sequence[GradientEdge | None]
) -> str | None:
    """Why the gradients of two nested results would be computed otherwise, or None.

    The results come from the same operators, hence from the same autograd graph down to the inputs
    (``edges`` of these, taken before the run) and parameters. A trace that lost the backward of a
    custom autograd.Function shows here, and nowhere else.
    """
    ends = {_target(a): _target(b) for a, b in zip(got_from, expected_from, strict=True) if a and b}
    waiting = [
        (_target(get_gradient_edge(a)), _target(get_gradient_edge(b)))
        for a, b in zip(tensors_in(got), tensors_in(expected), strict=True)
        if a.requires_grad and b.requires_grad
    ]
    found: dict[_Target, _Target] = {}
    while waiting:
        left, right = waiting.pop()
        if left in found:
            if found[left] != right:
                return f"the gradients of {left[0].name()} are summed otherwise"
            continue
        found[left] = right
        if left in ends or right in ends.values():
            if ends.get(left) != right:
                return "gradients reach other inputs"
            continue
        reason = _node_disagreement(left, right)
        if reason:
            return reason
        nexts = zip(left[0].next_functions, right[0].next_functions, strict=True)
        waiting += [((a, i), (b, j)) for (a, i), (b, j) in nexts if a is not None and b is not None]
    return None


_Target = tuple[Node, int]


def _target(edge: GradientEdge) -> _Target:
    return edge.node, edge.output_nr


def _node_disagreement(got: _Target, expected: _Target) -> str | None:
    (a, i), (b, j) = got, expected
    if a.name() != b.name() or i != j:
        return f"the gradient takes {a.name()} where the model has {b.name()}"
    if getattr(a, "variable", None) is not getattr(b, "variable", None):
        return "the gradient reaches another parameter"
    if [f is None for f, _ in a.next_functions] != [f is None for f, _ in b.next_functions]:
        return f"{a.name()} passes its gradient to other operands"
    return None


def tensors_in(nested: Any) -> list[Tensor]:
    """The tensors of a result, those in dataclasses included."""
    found = []
    for leaf in pytree.tree_leaves(nested):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in(_fields(leaf))
    return found
