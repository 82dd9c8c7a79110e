"""Rows of x as `prepare` makes them, for tests."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fxfuse.kernels.convolution.layer import Layer


def rows_of(layer: Layer, x: Tensor) -> Tensor:
    """The rows of x, as `prepare` makes them: (N, numbers, D, H, W)."""
    d, h, w = layer.row_sizes(tuple(x.shape[2:]))  # type: ignore[arg-type]
    rows = torch.zeros(x.shape[0], x.shape[1], len(layer.offsets), d, h, w, dtype=x.dtype)
    for (i, offset), *at in itertools.product(enumerate(layer.offsets), range(d), range(h), range(w)):
        z, y, v = (a + o for a, o in zip(at, offset, strict=True))
        if 0 <= z < x.shape[2] and 0 <= y < x.shape[3] and 0 <= v < x.shape[4]:
            rows[:, :, i, at[0], at[1], at[2]] = x[:, :, z, y, v]
    return rows.flatten(1, 2)
