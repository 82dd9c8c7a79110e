"""Spellings of normalisations."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from fxfuse.call import Call, Param, Statistics, call, everywhere, module, rank, refuse, spells


@spells(F.batch_norm)
def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if not training:
        if running_mean is None or running_var is None:
            refuse("batch_norm in eval mode without running statistics")
        return call("batch_norm", input, running_mean, running_var, weight, bias, eps=eps)
    if running_mean is None and running_var is None:
        return call("batch_norm_batch", input, weight, bias, eps=eps)
    if running_mean is None or running_var is None:
        refuse("one running statistic without the other")
    statistics = Statistics(running_mean, running_var, None, momentum)
    return Call("batch_norm_train", (input, weight, bias), {"eps": eps}, False, statistics)


@spells(torch.batch_norm, "aten::batch_norm")
def _aten_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled=True):
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


@module(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm_module(m, param: Param, input):
    expected = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}[type(m)]
    if rank(input) not in expected:
        refuse(f"{type(m).__name__} on an input of {rank(input)} dims")
    mean, var, weight, bias = (param(name) for name in ("running_mean", "running_var", "weight", "bias"))
    if not m.training and mean is not None:
        return _batch_norm(input, mean, var, weight, bias, False, 0.0, m.eps)
    if mean is None or not m.track_running_stats:
        return _batch_norm(input, None, None, weight, bias, True, 0.0, m.eps)
    count, momentum = param("num_batches_tracked"), m.momentum
    if momentum is None and count is None:
        momentum = 0.0  # as torch does: nothing to average by
    train = _batch_norm(input, mean, var, weight, bias, True, momentum, m.eps)
    assert train.statistics is not None
    return dataclasses.replace(train, statistics=dataclasses.replace(train.statistics, count=count))


@spells(F.group_norm)
def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    return call("group_norm", input, weight, bias, groups=num_groups, eps=eps)


@spells(torch.group_norm, "aten::group_norm")
def _aten_group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    return _group_norm(input, num_groups, weight, bias, eps)


@module(nn.GroupNorm)
def _group_norm_module(m, param: Param, input):
    return _group_norm(input, m.num_groups, param("weight"), param("bias"), m.eps)


@spells(F.instance_norm)
def _instance_norm(
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
):
    if running_mean is not None or running_var is not None:
        refuse("instance_norm with running statistics")
    if not use_input_stats:
        refuse("instance_norm without the input's statistics")
    return call("instance_norm", input, weight, bias, eps=eps)


@spells(torch.instance_norm, "aten::instance_norm")
def _aten_instance_norm(
    input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled=True
):
    return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


@module(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _instance_norm_module(m, param: Param, input):
    batched = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}[type(m)]
    if rank(input) != batched:
        refuse(f"{type(m).__name__} on an input of {rank(input)} dims")
    return _instance_norm(input, param("running_mean"), param("running_var"), param("weight"), param("bias"), eps=m.eps)


@spells(F.layer_norm)
def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    return call("layer_norm", input, weight, bias, shape=tuple(normalized_shape), eps=eps)


@spells(torch.layer_norm, "aten::layer_norm")
def _aten_layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    return _layer_norm(input, normalized_shape, weight, bias, eps)


@module(nn.LayerNorm)
def _layer_norm_module(m, param: Param, input):
    return _layer_norm(input, m.normalized_shape, param("weight"), param("bias"), m.eps)


@spells(*everywhere("rms_norm"))
def _rms_norm(input, normalized_shape, weight=None, eps=None):
    return call("rms_norm", input, weight, shape=tuple(normalized_shape), eps=eps)


@module(nn.RMSNorm)
def _rms_norm_module(m, param: Param, input):
    return _rms_norm(input, m.normalized_shape, param("weight"), m.eps)
