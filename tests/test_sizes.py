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


@torch.fx.wrap
def count_of(y: Tensor, shape: torch.Size) -> Tensor:
    return y / shape.numel()


RETURNED: dict[str, Callable[[Tensor], object]] = {
    "a shape": lambda y: (y.relu(), y.shape),
    "a size": lambda y: (y.relu(), y.size(1)),
    "a part of a shape": lambda y: (y.relu(), y.shape[2:]),
    "shapes put together": lambda y: (y.relu(), y.shape[:2] + y.shape[3:], y.shape + torch.Size((1,)), y.shape * 2),
    "a shape that is asked itself": lambda y: y.relu() / y.shape.numel(),
    "a part that is asked itself": lambda y: (y.relu(), (y.shape[:2] + y.shape[3:]).numel()),
    "a shape that a function is given": lambda y: count_of(y.relu(), y.shape),
}


@pytest.mark.parametrize("name", RETURNED)
def test_shapes_stay_shapes(name: str) -> None:
    """With the type that they had, and no value for them."""
    torch.manual_seed(0)
    model, x = Behind(RETURNED[name]).eval(), torch.randn(2, 2, 3, 4, 5)
    fast = fxfuse.optimize(model, (x,))
    for given in (x, x[:1, :, :2]):
        got, expected = fast(given), model(given)
        assert type(got) is type(expected)
        if isinstance(expected, tuple):
            assert [type(v) for v in got] == [type(v) for v in expected]  # type: ignore[attr-defined]
            assert list(got[1:]) == list(expected[1:])  # type: ignore[index]
            got, expected = got[0], expected[0]  # type: ignore[index]
        torch.testing.assert_close(got, expected)
    (region,) = fast.fxfuse_report.regions
    assert len(region.region.original.outputs) == 1


def test_sizes_that_a_compiler_does_not_know_stay() -> None:
    torch.manual_seed(0)
    model = Behind(unpacked).eval()
    compiled = torch.compile(model, backend="fxfuse", dynamic=True, options={"remainder": "eager"})
    for shape in ((2, 2, 3, 4, 5), (3, 2, 2, 3, 4), (1, 2, 4, 4, 6)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x))
