"""Whether two results agree, and the state that running a model twice must not disturb."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

#: relative L2 error up to which two runs of the same operators in the same dtype agree
SAME_OPERATORS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
#: on a GPU a library may choose another algorithm, or TF32, for the second run
SAME_OPERATORS_CUDA = {**SAME_OPERATORS, torch.float32: 2e-3}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """``||value - truth|| / ||truth||`` in float64 over the finite elements; inf where Inf or NaN differ."""
    value, truth = value.detach().double(), truth.detach().double()
    if value.numel() == 0:
        return 0.0
    finite = truth.isfinite()
    if not torch.equal(finite, value.isfinite()):
        return float("inf")
    special, expected = value[~finite], truth[~finite]
    if not torch.equal(special.isnan(), expected.isnan()) or not torch.equal(
        special.nan_to_num(), expected.nan_to_num()
    ):
        return float("inf")
    difference, scale = float((value[finite] - truth[finite]).norm()), float(truth[finite].norm())
    return difference / scale if scale > 0 else difference


def disagreement(got: Any, expected: Any) -> str | None:
    """Why two nested results of the same operators differ, or None: structure, type, shape, grad, values."""
    leaves, spec = pytree.tree_flatten(got)
    wanted, wanted_spec = pytree.tree_flatten(expected)
    if spec != wanted_spec:
        return "the results are nested differently"
    for number, (a, b) in enumerate(zip(leaves, wanted, strict=True)):
        reason = _leaf_disagreement(a, b)
        if reason:
            return f"output {number}: {reason}"
    return None


def _leaf_disagreement(got: Any, expected: Any) -> str | None:
    if not isinstance(got, Tensor) or not isinstance(expected, Tensor):
        same = type(got) is type(expected) and (got is expected or bool(got == expected))
        return None if same else f"{got!r} where the model gives {expected!r}"
    for name in ("shape", "dtype", "device", "requires_grad"):
        if getattr(got, name) != getattr(expected, name):
            return f"{name} {getattr(got, name)} where the model gives {getattr(expected, name)}"
    if not expected.is_floating_point():
        return None if torch.equal(got, expected) else "other values than the model gives"
    limits = SAME_OPERATORS_CUDA if expected.is_cuda else SAME_OPERATORS
    error = relative_error(got, expected)
    limit = limits.get(expected.dtype, 0.1)
    return None if error <= limit else f"relative error {error:.1e} (at most {limit:.0e} is expected)"


def fresh(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies that a second run may write to, with the same layout and need for gradients."""
    return [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]


@dataclasses.dataclass
class State:
    """Buffers of a model and the random generators that its devices use."""

    buffers: list[tuple[Tensor, Tensor]]
    cpu: Tensor
    cuda: list[tuple[int, Tensor]]

    @staticmethod
    def of(model: nn.Module, tensors: Sequence[Tensor]) -> State:
        buffers = [(b, b.detach().clone()) for b in model.buffers()]
        devices = {t.get_device() for t in (*tensors, *model.parameters(), *model.buffers()) if t.is_cuda}
        cuda = [(d, torch.cuda.get_rng_state(d)) for d in sorted(devices)]
        return State(buffers, torch.get_rng_state(), cuda)

    def restore(self) -> None:
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda:
            torch.cuda.set_rng_state(state, device)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Come back to this state at the end, unnoticed by autograd, which may have saved these buffers."""
        counted = tuple(buffer for buffer, _ in self.buffers if not buffer.is_inference())
        with torch.autograd._unsafe_preserve_version_counter(counted) if counted else contextlib.nullcontext():
            try:
                yield
            finally:
                self.restore()

    def differs(self, other: State) -> str | None:
        """The position of a buffer that differs between two states of one model, as text, or None."""
        for number, ((_, a), (_, b)) in enumerate(zip(self.buffers, other.buffers, strict=True)):
            if _leaf_disagreement(a, b):
                return f"buffer {number} is left with other values"
        return None
