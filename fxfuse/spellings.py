"""How models spell the vocabulary: one adapter per operator and dialect, tables only."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfuse.call import (
    ATEN,
    FUNCTIONS,
    INPLACE_FUNCTIONS,
    METHODS,
    MODULES,
    Call,
    Statistics,
    all_dims,
    call,
    everywhere,
    inplace_twins,
    ints,
    module,
    one_dim,
    rank,
    refuse,
    spells,
    tensor,
)
from fxfuse.vocabulary import conv as conv_vocabulary
from fxfuse.vocabulary.pointwise import BINARY, UNARY

Param = Callable[[str], fx.Node | None]


# --- anchors --------------------------------------------------------------------------------------
def _conv_transpose(n: int) -> None:
    name = f"conv_transpose{n}d"

    @spells(getattr(F, name), f"aten::{name}")
    def functional(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):  # type: ignore[no-untyped-def]
        return call(
            "conv_transpose",
            input,
            weight,
            bias,
            stride=ints(stride, n),
            padding=ints(padding, n),
            output_padding=ints(output_padding, n),
            dilation=ints(dilation, n),
            groups=groups,
        )

    @module({1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[n])
    def modular(m, param: Param, input, output_size=None):  # type: ignore[no-untyped-def]
        extra = m.output_padding
        if output_size is not None:
            extra = _output_padding(m, tensor(input), output_size, n)
        return functional(input, param("weight"), param("bias"), m.stride, m.padding, extra, m.groups, m.dilation)


def _output_padding(m: Any, x: torch.Tensor, output_size: Any, n: int) -> tuple[int, ...]:
    """What nn.ConvTransposeNd derives from ``output_size=``; refuses sizes that it would not accept."""
    wanted = tuple(output_size)[-n:]
    if not all(isinstance(s, int) for s in (*wanted, *x.shape[-n:])):
        refuse("output_size is not known before the call")
    extra = []
    for d in range(n):
        plain = conv_vocabulary.output_size(
            x.shape[x.dim() - n + d], m.kernel_size[d], m.stride[d], m.padding[d], 0, m.dilation[d]
        )
        if not 0 <= wanted[d] - plain < max(m.stride[d], m.dilation[d]):
            refuse(f"output_size {wanted} cannot be reached")
        extra.append(wanted[d] - plain)
    return tuple(extra)


for _n in (1, 2, 3):
    _conv_transpose(_n)


@spells("aten::convolution")
def _convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):  # type: ignore[no-untyped-def]
    if not transposed:
        refuse("a convolution that is not transposed is not an anchor")
    n = rank(weight) - 2
    return call(
        "conv_transpose",
        input,
        weight,
        bias,
        stride=ints(stride, n),
        padding=ints(padding, n),
        output_padding=ints(output_padding, n),
        dilation=ints(dilation, n),
        groups=groups,
    )


# --- pointwise ------------------------------------------------------------------------------------
def _unary(name: str) -> None:
    @spells(*everywhere(name))
    def adapter(input, inplace=False):  # type: ignore[no-untyped-def]
        return call(name, input, inplace=inplace)


for _name in UNARY:
    _unary(_name)
spells(operator.neg, "negative", torch.negative, "__neg__")(lambda input: call("neg", input))
spells(operator.abs, "absolute", torch.absolute)(lambda input: call("abs", input))
spells(torch.special.expit)(lambda input: call("sigmoid", input))


def _activation(kind: type[nn.Module], name: str, *attributes: str) -> None:
    """A module whose attributes have the operator's names."""

    @module(kind)
    def adapter(m, param: Param, input):  # type: ignore[no-untyped-def]
        return call(name, input, inplace=getattr(m, "inplace", False), **{a: getattr(m, a) for a in attributes})


for _kind, _name, *_attributes in (
    (nn.ReLU, "relu"),
    (nn.ReLU6, "relu6"),
    (nn.SiLU, "silu"),
    (nn.Mish, "mish"),
    (nn.Hardswish, "hardswish"),
    (nn.Hardsigmoid, "hardsigmoid"),
    (nn.SELU, "selu"),
    (nn.Sigmoid, "sigmoid"),
    (nn.LogSigmoid, "logsigmoid"),
    (nn.Tanh, "tanh"),
    (nn.Tanhshrink, "tanhshrink"),
    (nn.Softsign, "softsign"),
    (nn.LeakyReLU, "leaky_relu", "negative_slope"),
    (nn.ELU, "elu", "alpha"),
    (nn.CELU, "celu", "alpha"),
    (nn.GELU, "gelu", "approximate"),
    (nn.Hardtanh, "hardtanh", "min_val", "max_val"),
    (nn.Hardshrink, "hardshrink", "lambd"),
    (nn.Softshrink, "softshrink", "lambd"),
    (nn.Threshold, "threshold", "threshold", "value"),
    (nn.Softplus, "softplus", "beta", "threshold"),
):
    _activation(_kind, _name, *_attributes)


@spells(*everywhere("leaky_relu"))
def _leaky_relu(input, negative_slope=0.01, inplace=False):  # type: ignore[no-untyped-def]
    return call("leaky_relu", input, inplace=inplace, negative_slope=negative_slope)


@spells(F.elu)
def _elu(input, alpha=1.0, inplace=False):  # type: ignore[no-untyped-def]
    return call("elu", input, inplace=inplace, alpha=alpha)


@spells("aten::elu")
def _aten_elu(input, alpha=1, scale=1, input_scale=1):  # type: ignore[no-untyped-def]
    if scale != 1 or input_scale != 1:
        refuse("aten.elu with a scale")
    return call("elu", input, alpha=float(alpha))


@spells(*everywhere("celu"))
def _celu(input, alpha=1.0, inplace=False):  # type: ignore[no-untyped-def]
    return call("celu", input, inplace=inplace, alpha=float(alpha))


@spells(F.gelu, "aten::gelu")
def _gelu(input, approximate="none"):  # type: ignore[no-untyped-def]
    return call("gelu", input, approximate=approximate)


@spells(F.hardtanh, "aten::hardtanh")
def _hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False):  # type: ignore[no-untyped-def]
    return call("hardtanh", input, inplace=inplace, min_val=min_val, max_val=max_val)


@spells(F.hardshrink, torch.hardshrink, "hardshrink", "aten::hardshrink")
def _hardshrink(input, lambd=0.5):  # type: ignore[no-untyped-def]
    return call("hardshrink", input, lambd=lambd)


@spells(F.softshrink, "aten::softshrink")
def _softshrink(input, lambd=0.5):  # type: ignore[no-untyped-def]
    return call("softshrink", input, lambd=lambd)


@spells(*everywhere("threshold"))
def _threshold(input, threshold, value, inplace=False):  # type: ignore[no-untyped-def]
    return call("threshold", input, inplace=inplace, threshold=threshold, value=value)


@spells(F.softplus, "aten::softplus")
def _softplus(input, beta=1.0, threshold=20.0):  # type: ignore[no-untyped-def]
    return call("softplus", input, beta=beta, threshold=threshold)


@spells(F.prelu, torch.prelu, "prelu", "aten::prelu", "aten::_prelu_kernel")
def _prelu(input, weight):  # type: ignore[no-untyped-def]
    return call("prelu", input, weight)


@module(nn.PReLU)
def _prelu_module(m, param: Param, input):  # type: ignore[no-untyped-def]
    return call("prelu", input, param("weight"))


# --- arithmetic -----------------------------------------------------------------------------------
def _first_tensor(*operands: Any) -> None:
    if not any(isinstance(o, fx.Node) for o in operands):
        refuse("no operand is a tensor")


def _binary(name: str, *more: Any) -> None:
    @spells(*everywhere(name), *more)
    def adapter(input, other):  # type: ignore[no-untyped-def]
        _first_tensor(input, other)
        return call(name, input, other)


for _name, _more in {
    "pow": (operator.pow, "__pow__"),
    "minimum": (),
    "maximum": (),
    "eq": (operator.eq,),
    "ne": (operator.ne,),
    "lt": (operator.lt, torch.less, "less"),
    "le": (operator.le, torch.less_equal, "less_equal"),
    "gt": (operator.gt, torch.greater, "greater"),
    "ge": (operator.ge, torch.greater_equal, "greater_equal"),
    "logical_and": (),
    "logical_or": (),
}.items():
    _binary(_name, *_more)


@spells(*everywhere("mul"), operator.mul, torch.multiply, "multiply")
def _mul(input, other):  # type: ignore[no-untyped-def]
    _first_tensor(input, other)
    return call("mul", input, other)


def _alpha(alpha: Any) -> None:
    if alpha != 1:
        refuse(f"alpha={alpha}")


@spells(*everywhere("add"), operator.add)
def _add(input, other, alpha=1):  # type: ignore[no-untyped-def]
    _first_tensor(input, other)
    _alpha(alpha)
    return call("add", input, other)


@spells(*everywhere("sub"), operator.sub, torch.subtract, "subtract")
def _sub(input, other, alpha=1):  # type: ignore[no-untyped-def]
    _first_tensor(input, other)
    _alpha(alpha)
    return call("sub", input, other)


@spells(torch.rsub, "rsub", "aten::rsub", "__rsub__")
def _rsub(input, other, alpha=1):  # type: ignore[no-untyped-def]
    _alpha(alpha)
    return call("sub", other, input)


@spells(*everywhere("div"), operator.truediv, torch.true_divide, "true_divide", torch.divide, "divide")
def _div(input, other, rounding_mode=None):  # type: ignore[no-untyped-def]
    _first_tensor(input, other)
    if rounding_mode is not None:
        refuse(f"division with rounding_mode={rounding_mode!r}")
    return call("div", input, other)


@spells(torch.clamp, "clamp", torch.clip, "clip", "aten::clamp", "aten::clip")
def _clamp(input, min=None, max=None):  # type: ignore[no-untyped-def]
    return call("clamp", input, min, max)


@spells(torch.clamp_min, "clamp_min", "aten::clamp_min")
def _clamp_min(input, min):  # type: ignore[no-untyped-def]
    return call("clamp", input, min, None)


@spells(torch.clamp_max, "clamp_max", "aten::clamp_max")
def _clamp_max(input, max):  # type: ignore[no-untyped-def]
    return call("clamp", input, None, max)


@spells(torch.where, "aten::where.self", "aten::where.ScalarOther", "aten::where.ScalarSelf")
def _where(condition, input, other):  # type: ignore[no-untyped-def]
    return call("where", condition, input, other)


@spells("masked_fill", torch.masked_fill, "aten::masked_fill")
def _masked_fill(input, mask, value):  # type: ignore[no-untyped-def]
    return call("masked_fill", input, mask, value)


@spells(*everywhere("lerp"))
def _lerp(input, end, weight):  # type: ignore[no-untyped-def]
    return call("lerp", input, end, weight)


@spells(*everywhere("addcmul"))
def _addcmul(input, tensor1, tensor2, value=1):  # type: ignore[no-untyped-def]
    return call("addcmul", input, tensor1, tensor2, value=value)


@spells(*everywhere("addcdiv"))
def _addcdiv(input, tensor1, tensor2, value=1):  # type: ignore[no-untyped-def]
    return call("addcdiv", input, tensor1, tensor2, value=value)


# --- copies, casts, nothing at all ----------------------------------------------------------------
@spells("clone", torch.clone, "aten::clone")
def _clone(input, memory_format=None):  # type: ignore[no-untyped-def]
    if memory_format not in (None, torch.preserve_format):
        refuse(f"a copy into memory_format={memory_format}")
    return call("clone", input)


@module(nn.Identity)
def _identity(m, param: Param, input):  # type: ignore[no-untyped-def]
    return call("clone", input)


@module(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
def _dropout_module(m, param: Param, input):  # type: ignore[no-untyped-def]
    return _dropout(input, m.p, m.training)


@spells(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
def _dropout(input, p=0.5, training=True, inplace=False):  # type: ignore[no-untyped-def]
    if training and p > 0:
        refuse("dropout is random in training mode")
    return call("clone", input)


@spells("aten::dropout", torch.dropout, "aten::feature_dropout", torch.feature_dropout)
def _aten_dropout(input, p, train):  # type: ignore[no-untyped-def]
    return _dropout(input, p, train)


def _cast(input: Any, dtype: torch.dtype) -> Call:
    if not dtype.is_floating_point or not tensor(input).is_floating_point():
        refuse(f"a cast from {tensor(input).dtype} to {dtype}")
    return call("cast", input, dtype=dtype) if dtype is not tensor(input).dtype else call("clone", input)


@spells("to", "type")
def _to(input, *args, **kwargs):  # type: ignore[no-untyped-def]
    rest = [a for a in args if not isinstance(a, bool)]
    dtype = kwargs.pop("dtype", None)
    kwargs.pop("copy", None)
    kwargs.pop("non_blocking", None)
    if kwargs or len(rest) > (dtype is None) or (rest and not isinstance(rest[0], torch.dtype)):
        refuse("a move to another device, or a layout")
    if dtype is None and not rest:
        refuse("a conversion to nothing")
    return _cast(input, dtype or rest[0])


@spells("aten::_to_copy", "aten::to.dtype")
def _to_copy(input, dtype=None, non_blocking=False, copy=False, memory_format=None, **rest):  # type: ignore[no-untyped-def]
    if any(v is not None for v in rest.values()) or dtype is None or memory_format not in (None, torch.preserve_format):
        refuse("a move to another device, or a layout")
    return _cast(input, dtype)


for _name, _dtype in {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}.items():
    spells(_name)(lambda input, _dtype=_dtype: _cast(input, _dtype))


# --- pools ----------------------------------------------------------------------------------------
def _pools(n: int) -> None:
    @spells(getattr(F, f"max_pool{n}d"), getattr(torch, f"max_pool{n}d"), f"aten::max_pool{n}d")
    def max_pool(  # type: ignore[no-untyped-def]
        input,
        kernel_size,
        stride=None,
        padding=0,
        dilation=1,
        ceil_mode=False,
        return_indices=False,
    ):
        if return_indices:
            refuse("a max pool that returns indices")
        return call(
            "max_pool",
            input,
            kernel=ints(kernel_size, n),
            stride=ints(kernel_size if stride in (None, (), []) else stride, n),
            padding=ints(padding, n),
            dilation=ints(dilation, n),
            ceil_mode=ceil_mode,
        )

    @module(getattr(nn, f"MaxPool{n}d"))
    def max_module(m, param: Param, input):  # type: ignore[no-untyped-def]
        return max_pool(input, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)

    @spells(getattr(F, f"avg_pool{n}d"), f"aten::avg_pool{n}d")
    def avg_pool(  # type: ignore[no-untyped-def]
        input,
        kernel_size,
        stride=None,
        padding=0,
        ceil_mode=False,
        count_include_pad=True,
        divisor_override=None,
    ):
        return call(
            "avg_pool",
            input,
            kernel=ints(kernel_size, n),
            stride=ints(kernel_size if stride in (None, (), []) else stride, n),
            padding=ints(padding, n),
            ceil_mode=ceil_mode,
            count_include_pad=count_include_pad,
            divisor_override=divisor_override,
        )

    @module(getattr(nn, f"AvgPool{n}d"))
    def avg_module(m, param: Param, input):  # type: ignore[no-untyped-def]
        divisor = getattr(m, "divisor_override", None)
        return avg_pool(input, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, divisor)

    def adaptive(name: str, op: str) -> None:
        function, kind = getattr(F, f"{name}{n}d"), getattr(nn, f"{_camel(name)}{n}d")

        @spells(function, f"aten::{name}{n}d")
        def functional(input, output_size, return_indices=False):  # type: ignore[no-untyped-def]
            if return_indices:
                refuse("a max pool that returns indices")
            size = output_size if isinstance(output_size, (tuple, list)) else (output_size,) * n
            if not all(s is None or isinstance(s, int) for s in size) or len(size) != n:
                refuse(f"output_size {output_size} is not known before the call")
            spatial = tuple(range(rank(input) - n, rank(input)))
            if all(s == 1 for s in size) and op == "adaptive_avg_pool":
                return call("mean", input, dims=spatial, keepdim=True)
            return call(op, input, size=tuple(size))

        @module(kind)
        def modular(m, param: Param, input):  # type: ignore[no-untyped-def]
            return functional(input, m.output_size, getattr(m, "return_indices", False))

    adaptive("adaptive_avg_pool", "adaptive_avg_pool")
    adaptive("adaptive_max_pool", "adaptive_max_pool")


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


for _n in (1, 2, 3):
    _pools(_n)


# --- norms ----------------------------------------------------------------------------------------
@spells(F.batch_norm)
def _batch_norm(  # type: ignore[no-untyped-def]
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    if not training:
        if running_mean is None or running_var is None:
            refuse("batch_norm in eval mode without running statistics")
        return call("batch_norm", input, running_mean, running_var, weight, bias, eps=eps)
    if running_mean is None and running_var is None:
        return call("batch_norm_batch", input, weight, bias, eps=eps)
    if running_mean is None or running_var is None:
        refuse("one running statistic without the other")
    return Call(
        "batch_norm_train",
        (input, weight, bias),
        {"eps": eps},
        False,
        Statistics(running_mean, running_var, None, momentum),
    )


@spells(torch.batch_norm, "aten::batch_norm")
def _aten_batch_norm(  # type: ignore[no-untyped-def]
    input,
    weight,
    bias,
    running_mean,
    running_var,
    training,
    momentum,
    eps,
    cudnn_enabled=True,
):
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


@module(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm_module(m, param: Param, input):  # type: ignore[no-untyped-def]
    expected = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}[type(m)]
    if rank(input) not in expected:
        refuse(f"{type(m).__name__} on an input of {rank(input)} dims")
    mean, var = param("running_mean"), param("running_var")
    if not m.training and mean is not None:
        return _batch_norm(input, mean, var, param("weight"), param("bias"), False, 0.0, m.eps)
    if mean is None or not m.track_running_stats:
        return _batch_norm(input, None, None, param("weight"), param("bias"), True, 0.0, m.eps)
    statistics = Statistics(mean, var, param("num_batches_tracked"), m.momentum)  # type: ignore[arg-type]
    return Call("batch_norm_train", (input, param("weight"), param("bias")), {"eps": m.eps}, False, statistics)


@spells(F.group_norm, torch.group_norm, "aten::group_norm")
def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):  # type: ignore[no-untyped-def]
    return call("group_norm", input, weight, bias, groups=num_groups, eps=eps)


@module(nn.GroupNorm)
def _group_norm_module(m, param: Param, input):  # type: ignore[no-untyped-def]
    return _group_norm(input, m.num_groups, param("weight"), param("bias"), m.eps)


@spells(F.instance_norm)
def _instance_norm(  # type: ignore[no-untyped-def]
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
def _aten_instance_norm(  # type: ignore[no-untyped-def]
    input,
    weight,
    bias,
    running_mean,
    running_var,
    use_input_stats,
    momentum,
    eps,
    cudnn_enabled=True,
):
    return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


@module(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _instance_norm_module(m, param: Param, input):  # type: ignore[no-untyped-def]
    batched = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}[type(m)]
    if rank(input) != batched:
        refuse(f"{type(m).__name__} on an input of {rank(input)} dims")
    return _instance_norm(input, param("running_mean"), param("running_var"), param("weight"), param("bias"), eps=m.eps)


@spells(F.layer_norm, torch.layer_norm, "aten::layer_norm")
def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):  # type: ignore[no-untyped-def]
    return call("layer_norm", input, weight, bias, shape=tuple(normalized_shape), eps=eps)


@module(nn.LayerNorm)
def _layer_norm_module(m, param: Param, input):  # type: ignore[no-untyped-def]
    return _layer_norm(input, m.normalized_shape, param("weight"), param("bias"), m.eps)


@spells(F.rms_norm, torch.rms_norm, "aten::rms_norm")
def _rms_norm(input, normalized_shape, weight=None, eps=None):  # type: ignore[no-untyped-def]
    return call("rms_norm", input, weight, shape=tuple(normalized_shape), eps=eps)


@module(nn.RMSNorm)
def _rms_norm_module(m, param: Param, input):  # type: ignore[no-untyped-def]
    return _rms_norm(input, m.normalized_shape, param("weight"), m.eps)


# --- reductions -----------------------------------------------------------------------------------
def _no_dtype(dtype: Any) -> None:
    if dtype is not None:
        refuse(f"a reduction into dtype={dtype}")


def _total(name: str) -> None:
    @spells(getattr(torch, name), name, f"aten::{name}.dim_IntList", f"aten::{name}.dim")
    def adapter(input, dim=None, keepdim=False, dtype=None, axis=None):  # type: ignore[no-untyped-def]
        _no_dtype(dtype)
        return call(name, input, dims=all_dims(input, dim if axis is None else axis), keepdim=keepdim)

    @spells(f"aten::{name}.default")
    def whole(input, dtype=None):  # type: ignore[no-untyped-def]
        _no_dtype(dtype)
        return call(name, input, dims=all_dims(input, None), keepdim=False)


def _extremum(name: str) -> None:
    @spells(getattr(torch, name), name, f"aten::{name}")
    def adapter(input, dim=(), keepdim=False):  # type: ignore[no-untyped-def]
        return call(name, input, dims=all_dims(input, dim), keepdim=keepdim)


for _name in ("sum", "mean"):
    _total(_name)
for _name in ("amax", "amin"):
    _extremum(_name)


@spells(torch.logsumexp, "logsumexp", torch.special.logsumexp, "aten::logsumexp")
def _logsumexp(input, dim, keepdim=False):  # type: ignore[no-untyped-def]
    return call("logsumexp", input, dims=all_dims(input, dim), keepdim=keepdim)


@spells(torch.prod, "prod", "aten::prod.dim_int")
def _prod(input, dim=None, keepdim=False, dtype=None):  # type: ignore[no-untyped-def]
    _no_dtype(dtype)
    if dim is None:
        refuse("a product over all dims")
    return call("prod", input, dim=one_dim(input, dim), keepdim=keepdim)


def _spread(name: str) -> None:
    @spells(getattr(torch, name), name, f"aten::{name}.correction")
    def adapter(input, dim=None, unbiased=None, keepdim=False, correction=None):  # type: ignore[no-untyped-def]
        if isinstance(dim, bool):
            unbiased, dim = dim, None
        degrees = correction if correction is not None else 1 if unbiased in (None, True) else 0
        return call(name, input, dims=all_dims(input, dim), correction=float(degrees), keepdim=keepdim)


for _name in ("var", "std"):
    _spread(_name)


def _softmax(name: str, kind: type[nn.Module]) -> None:
    @spells(getattr(F, name), getattr(torch, name), name, f"aten::{name}.int", getattr(torch.special, name))
    def adapter(input, dim=None, _stacklevel=3, dtype=None):  # type: ignore[no-untyped-def]
        _no_dtype(dtype)
        if dim is None:
            refuse(f"{name} without a dim")
        return call(name, input, dim=one_dim(input, dim))

    @module(kind)
    def modular(m, param: Param, input):  # type: ignore[no-untyped-def]
        return adapter(input, m.dim)


_softmax("softmax", nn.Softmax)
_softmax("log_softmax", nn.LogSoftmax)

# --- in place -------------------------------------------------------------------------------------
inplace_twins(
    (*UNARY, *BINARY, "leaky_relu", "elu", "celu", "hardtanh", "threshold", "clamp", "clamp_min", "clamp_max")
)
for _inplace, _plain in {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}.items():
    FUNCTIONS[_inplace] = FUNCTIONS[_plain]
    INPLACE_FUNCTIONS.add(_inplace)

__all__ = ["ATEN", "FUNCTIONS", "INPLACE_FUNCTIONS", "METHODS", "MODULES"]
