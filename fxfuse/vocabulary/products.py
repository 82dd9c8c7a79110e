"""Products with a matrix: what squeeze and excitation makes of the means of channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fxfuse.vocabulary.op import Kind, define

#: torch's function per number of spatial dims
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@define(Kind.PRODUCT)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``y[n, o] = bias[o] + sum over i of x[n, i] * weight[o, i]``: one vector per sample.

    x: (N, I) and weight: (O, I), or both with as many spatial dims of one element behind them: a convolution of one
    position. bias: (O,).
    """
    if x.dim() == 2:
        return F.linear(x, weight, bias)
    return _CONVOLUTIONS[x.dim() - 2](x, weight, bias)
