"""Normalisations. Running statistics never appear inside a region: training-mode BatchNorm
returns the statistics of its batch, and the graph around the region updates the buffers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.vocabulary.op import Kind, define


@define(Kind.NORM)
def batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with given statistics, one per channel (dim 1)."""
    return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)


@define(Kind.NORM, outputs=3)
def batch_norm_train(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise with the batch's own statistics: (y, mean, var), var the unbiased one that torch keeps.

    mean and var: (C,), not differentiable, float32 at least.
    """
    kept = weight.dtype if weight is not None else torch.promote_types(x.dtype, torch.float32)
    # with momentum 1 torch's running statistics are those of this batch
    mean, var = x.new_zeros(x.shape[1], dtype=kept), x.new_zeros(x.shape[1], dtype=kept)
    y = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0, eps=eps)
    return y, mean, var


@define(Kind.NORM)
def batch_norm_batch(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    """Training-mode BatchNorm whose statistics nobody keeps (track_running_stats=False)."""
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


@define(Kind.NORM)
def group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, groups: int, eps: float) -> Tensor:
    """Statistics per sample and group of channels (dim 1), over the group and all later dims."""
    return F.group_norm(x, groups, weight, bias, eps)


@define(Kind.NORM)
def instance_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    """Statistics per sample and channel, over all later dims."""
    return F.instance_norm(x, None, None, weight, bias, use_input_stats=True, eps=eps)


@define(Kind.NORM)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, shape: tuple[int, ...], eps: float) -> Tensor:
    """Statistics over the trailing dims, whose sizes ``shape`` names."""
    return F.layer_norm(x, shape, weight, bias, eps)


@define(Kind.NORM)
def rms_norm(x: Tensor, weight: Tensor | None, *, shape: tuple[int, ...], eps: float | None) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the trailing dims, whose sizes ``shape`` names."""
    return F.rms_norm(x, shape, weight, eps)
