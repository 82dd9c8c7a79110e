"""Sizes in a graph as numbers: whoever asks for a size alone does not keep a value, and all else stays as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxfuse


class Behind(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.up, self.function = nn.ConvTranspose3d(2, 6, 3, stride=2), function

    def forward(self, x: Tensor) -> object:
        return self.function(self.up(x))


def unpacked(y: Tensor) -> Tensor:
    b, c, *space = y.shape
    assert len(space) == 3
    return torch.softmax(y.relu().view(b, c, -1), 2).view(b, c, *space)


def by_attribute(y: Tensor) -> Tensor:
    return y.sigmoid().reshape(y.shape[0], y.shape[1] * y.shape[2], -1)


ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "unpacked": unpacked,
    "by attribute": by_attribute,
    "by method": lambda y: y.tanh().view(y.size(0), y.size(dim=1), -1),
    "whole": lambda y: y.neg().flatten(1).view(y.size()),
    "another value's": lambda y: y.relu() + torch.ones(y.shape),
    "a slice": lambda y: nn.functional.layer_norm(y, y.shape[2:]),
    "a count": lambda y: y.relu() / y.numel() + y.dim() + len(y),
    "an operand": lambda y: y * y.shape[1] + y.size(0),
}


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("given", [True, False], ids=["with inputs", "at the first call"])
def test_who_asks_for_a_size_keeps_no_value(name: str, given: bool) -> None:
    torch.manual_seed(0)
    model, x = Behind(ALONE[name]).eval(), torch.randn(2, 2, 3, 4, 5)
    fast = fxfuse.optimize(model, (x,)) if given else fxfuse.optimize(model)
    torch.testing.assert_close(fast(x), model(x))
    (region,) = fast.fxfuse_report.regions
    assert len(region.region.original.outputs) == 1
    other = torch.randn(1, 2, 4, 3, 2)  # other sizes are other numbers
    torch.testing.assert_close(fast(other), model(other))


KEPT: dict[str, Callable[[Tensor], object]] = {
    "returned": lambda y: (y.relu(), y.shape),
    "a size that is returned": lambda y: (y.relu(), y.size(1)),
    "a shape that is asked itself": lambda y: y.relu() / y.shape.numel(),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_stays(name: str) -> None:
    """With the type that it had."""
    torch.manual_seed(0)
    model, x = Behind(KEPT[name]).eval(), torch.randn(2, 2, 3, 4, 5)
    fast = fxfuse.optimize(model, (x,))
    got, expected = fast(x), model(x)
    assert type(got) is type(expected)
    if isinstance(expected, tuple):
        assert type(got[1]) is type(expected[1]) and got[1] == expected[1]  # type: ignore[index]
    torch.testing.assert_close(got, expected)


def test_sizes_that_a_compiler_does_not_know_stay() -> None:
    torch.manual_seed(0)
    model = Behind(unpacked).eval()
    compiled = torch.compile(model, backend="fxfuse", dynamic=True, options={"remainder": "eager"})
    for shape in ((2, 2, 3, 4, 5), (3, 2, 2, 3, 4), (1, 2, 4, 4, 6)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x))
