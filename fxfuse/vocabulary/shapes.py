"""Shape operators: the same elements under other indices. Sizes are absolute, without -1."""

from __future__ import annotations

from torch import Tensor

from fxfuse.vocabulary.op import Kind, define


@define(Kind.SHAPE, view=True)
def reshape(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    return x.reshape(shape)


@define(Kind.SHAPE, view=True)
def expand(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    """Dims of size 1 repeated, and new ones in front."""
    return x.expand(shape)


@define(Kind.SHAPE, view=True)
def permute(x: Tensor, *, dims: tuple[int, ...]) -> Tensor:
    return x.permute(dims)
