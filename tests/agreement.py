"""Run a model and its optimised twin side by side, and compare all that a user could see."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxfuse
from fxfuse.ops import Run, watch

F64 = torch.float64

#: rtol, atol: what another order of summation explains
TOLERANCE = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (2e-2, 2e-3),
    torch.bfloat16: (1e-1, 3e-2),
}


def leaves(nested: Any) -> list[Any]:
    """All leaves of a result, those of dataclasses included."""
    found = []
    for leaf in pytree.tree_leaves(nested):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += leaves([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
        else:
            found.append(leaf)
    return found


def assert_same(got: Any, expected: Any, what: str = "result") -> None:
    """Equal nesting, types, strides and values."""
    assert pytree.tree_structure(got) == pytree.tree_structure(expected), f"{what}: other nesting"
    for a, b in zip(leaves(got), leaves(expected), strict=True):
        assert type(a) is type(b), what
        if not isinstance(b, Tensor):
            assert a == b, what
            continue
        assert (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad), what
        assert visible_strides(a) == visible_strides(b), f"{what}: strides {a.stride()}, eager has {b.stride()}"
        rtol, atol = TOLERANCE.get(b.dtype, (0.0, 0.0))
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{what}: {m}")


def visible_strides(tensor: Tensor) -> list[int]:
    """The strides that say where elements are: those of dims of more than one element."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and tensor.numel()]


@dataclasses.dataclass
class Outcome:
    """What a run leaves behind."""

    result: Any
    inputs: list[Any]
    state: dict[str, Any]
    generator: Tensor
    gradients: list[Tensor | None]


def run(call: Callable[..., Any], model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], seed: int) -> Outcome:
    """Call ``call`` with the parameters of ``model``, and differentiate what can be."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    result = call(*args, **kwargs)
    generator = torch.get_rng_state()
    outputs = [t for t in leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    wanted = [t for t in (*inputs, *model.parameters()) if t.requires_grad and t.is_leaf]
    gradients: list[Tensor | None] = []
    if outputs and wanted:
        torch.manual_seed(seed)
        weights = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in outputs]
        gradients = list(torch.autograd.grad(outputs, wanted, weights, allow_unused=True))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return Outcome(result, [t.detach().clone() for t in inputs], state, generator, gradients)


def assert_agree(
    model: nn.Module,
    make: Callable[[], tuple[Any, ...]],
    kwargs: dict[str, Any] | None = None,
    *,
    rounds: int = 3,
    fused: bool = True,
    **options: Any,
) -> tuple[nn.Module, list[Run]]:
    """Optimise ``model`` and run it beside a copy; the optimised module, and the regions that ran in the last round.

    ``make`` gives the positional arguments of one call. The first round is provisional. ``fused``: whether a
    region must have run.
    """
    twin = copy.deepcopy(model)
    optimized = fxfuse.optimize(model, **options)
    last: list[Run] = []
    for seed in range(rounds):
        torch.manual_seed(seed)
        given, expected_given = _twice(make())
        named, expected_named = _twice(kwargs or {})
        with watch() as runs:
            got = run(optimized, model, given, named, seed)
        last = runs
        expected = run(twin, twin, expected_given, expected_named, seed)
        where = f"round {seed}"
        assert_same(got.result, expected.result, f"{where}: result")
        assert_same(got.inputs, expected.inputs, f"{where}: inputs afterwards")
        assert list(got.state) == list(expected.state)
        assert_same(got.state, expected.state, f"{where}: state")
        assert torch.equal(got.generator, expected.generator), f"{where}: random numbers"
        assert len(got.gradients) == len(expected.gradients)
        for number, (a, b) in enumerate(zip(got.gradients, expected.gradients, strict=True)):
            assert (a is None) == (b is None), f"{where}: gradient {number}"
            if b is not None:
                assert_same(a, b, f"{where}: gradient {number}")
    assert bool(last) == fused, optimized.fxfuse_report
    return optimized, last


def _twice(nested: Any) -> tuple[Any, Any]:
    """Two copies of arguments; tensors that share memory share it in the copies too."""
    return copy.deepcopy(nested), copy.deepcopy(nested)


# --- a model ----------------------------------------------------------------------------------------
class Block(nn.Module):
    """A small decoder block with state of all kinds: weights, buffers, flags, dropout, an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.unused = nn.Parameter(torch.ones(2))
        self.up = nn.ConvTranspose3d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm3d(4)
        self.head = nn.Conv3d(4, 2, 1)
        self.double_it = False
        self.act = F.relu
        self.register_buffer("offset", torch.zeros(4, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.up(x)) + self.offset)
        return self.head(y * 2 if self.double_it else y)

    def describe(self) -> str:
        return f"{self.double_it}"


def data(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (2, 2, 4, 4, 4), dtype=dtype)


def optimized_block(x: Tensor | None = None, **options: Any) -> tuple[nn.Module, nn.Module]:
    model = Block().eval()
    return model, fxfuse.optimize(model, data() if x is None else x, **options)


def assert_follows(optimized: nn.Module, model: nn.Module, x: Tensor | None = None, *, calls: int = 2) -> None:
    """The optimised module does what the model does now, and by a region in the end."""
    x = data() if x is None else x
    with torch.no_grad():
        for _ in range(calls):
            with watch() as runs:
                got = optimized(x.clone())
            assert_same(got, copy.deepcopy(model)(x.clone()))
    assert runs
