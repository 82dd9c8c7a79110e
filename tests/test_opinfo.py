"""torch's own samples of arguments, behind a transposed convolution."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from agreement import F64, assert_same
from samples import ALL_REFUSED, op_infos
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxfuse
from fxfuse.call import FUNCTIONS
from fxfuse.ops import watch

#: regions of their own
ANCHORS = {f"nn.functional.conv_transpose{n}d_" for n in (1, 2, 3)}
SAMPLES, MOST = 6, 24  #: of each operator; where none of these joins


class Behind(nn.Module):
    """An operator whose first operand is what a transposed convolution gives, in the shape of the sample."""

    def __init__(self, info: Any, sample: Any) -> None:
        super().__init__()
        self.anchor = nn.ConvTranspose1d(1, 1, 1, bias=False, dtype=F64)
        nn.init.ones_(self.anchor.weight)  # the sample's values are of the operator's domain
        self.shape = sample.input.shape
        self.op = (
            info.op
            if info.op in FUNCTIONS
            else lambda value, *args, **kwargs: getattr(value, info.name)(*args, **kwargs)
        )
        leaves, self.spec = pytree.tree_flatten((sample.args, sample.kwargs))
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, x: Tensor, *tensors: Tensor) -> Any:
        leaves = list(self.constants)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.op(self.anchor(x).reshape(self.shape), *args, **kwargs)


def cases(info: Any) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    for sample in itertools.islice(info.sample_inputs("cpu", F64), MOST):
        x = sample.input
        if not isinstance(x, Tensor) or x.layout is not torch.strided or x.dtype is not F64 or not x.numel():
            continue
        tensors = [t for t in pytree.tree_leaves((sample.args, sample.kwargs)) if isinstance(t, Tensor)]
        yield Behind(info, sample), [x.detach().reshape(1, 1, -1), *(t.detach() for t in tensors)]


def fused(info: Any) -> bool:
    """Whether the operator joins the region of the convolution for some sample; it agrees with eager mode for all."""
    joined = False
    for number, (model, inputs) in enumerate(cases(info)):
        if number >= SAMPLES and joined:
            break
        with torch.no_grad():
            try:
                expected = model(*(t.clone() for t in inputs))
            except (TypeError, RuntimeError):
                continue
            optimized = fxfuse.optimize(model, tuple(t.clone() for t in inputs))
            with watch() as runs:
                got = optimized(*(t.clone() for t in inputs))
        assert_same(got, expected, str(optimized.fxfuse_report))
        joined |= any(len(r.region.original.body) > 2 for r in runs)
    return joined


@pytest.mark.parametrize("info", op_infos(), ids=lambda info: f"{info.name}_{info.variant_test_name}")
def test_samples_of_torch_behind_a_convolution(info: Any) -> None:
    assert fused(info) != (f"{info.name}_{info.variant_test_name}" in ALL_REFUSED | ANCHORS)
