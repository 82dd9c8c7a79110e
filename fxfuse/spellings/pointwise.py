"""Spellings of activations and other pointwise operators of one operand."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import nn

from fxfuse.call import Param, call, everywhere, module, refuse, spells, tensor
from fxfuse.vocabulary.pointwise import UNARY


def _unary(name: str) -> None:
    @spells(*everywhere(name))
    def adapter(input, inplace=False):
        return call(name, input, inplace=inplace)


for _name in UNARY:
    _unary(_name)

for _name, _others in {
    "neg": (operator.neg, torch.negative, "negative", "__neg__", "aten::negative"),
    "abs": (operator.abs, torch.absolute, "absolute", "__abs__", "aten::absolute"),
    "sigmoid": (torch.special.expit, "aten::special_expit"),
    "log_sigmoid": (F.logsigmoid,),
}.items():
    spells(*_others)(lambda input, _name=_name: call(_name, input))


@spells(operator.invert, torch.bitwise_not, "bitwise_not", "__invert__", "aten::bitwise_not")
def _bitwise_not(input):
    if tensor(input).dtype is not torch.bool:
        refuse("a bitwise operator on integers")
    return call("logical_not", input)


# --- modules --------------------------------------------------------------------------------------
def _activation(kind: type[nn.Module], name: str, *attributes: str) -> None:
    """A module whose attributes have the operator's names."""

    @module(kind)
    def adapter(m, param: Param, input):
        return call(name, input, inplace=getattr(m, "inplace", False), **{a: getattr(m, a) for a in attributes})


for _kind, _name, *_attributes in (
    (nn.ReLU, "relu"),
    (nn.SiLU, "silu"),
    (nn.Mish, "mish"),
    (nn.Hardswish, "hardswish"),
    (nn.Hardsigmoid, "hardsigmoid"),
    (nn.SELU, "selu"),
    (nn.Sigmoid, "sigmoid"),
    (nn.LogSigmoid, "log_sigmoid"),
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


@module(nn.ReLU6)
def _relu6_module(m, param: Param, input):
    if (m.min_val, m.max_val) != (0.0, 6.0):
        refuse("an nn.ReLU6 whose bounds were changed")
    return call("relu6", input, inplace=m.inplace)


@module(nn.PReLU)
def _prelu_module(m, param: Param, input):
    return call("prelu", input, param("weight"))


# --- functions with attributes --------------------------------------------------------------------
@spells(*everywhere("leaky_relu"))
def _leaky_relu(input, negative_slope=0.01, inplace=False):
    return call("leaky_relu", input, inplace=inplace, negative_slope=negative_slope)


@spells(F.elu)
def _elu(input, alpha=1.0, inplace=False):
    return call("elu", input, inplace=inplace, alpha=alpha)


@spells("aten::elu")
def _aten_elu(input, alpha=1, scale=1, input_scale=1):
    if scale != 1 or input_scale != 1:
        refuse("aten.elu with a scale")
    return call("elu", input, alpha=alpha)


@spells(*everywhere("celu"))
def _celu(input, alpha=1.0, inplace=False):
    return call("celu", input, inplace=inplace, alpha=alpha)


@spells(F.gelu, "aten::gelu")
def _gelu(input, approximate="none"):
    return call("gelu", input, approximate=approximate)


@spells(F.hardtanh, "aten::hardtanh")
def _hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False):
    return call("hardtanh", input, inplace=inplace, min_val=min_val, max_val=max_val)


@spells(*everywhere("hardshrink"))
def _hardshrink(input, lambd=0.5):
    return call("hardshrink", input, lambd=lambd)


@spells(F.softshrink, "aten::softshrink")
def _softshrink(input, lambd=0.5):
    return call("softshrink", input, lambd=lambd)


@spells(*everywhere("threshold"))
def _threshold(input, threshold, value, inplace=False):
    return call("threshold", input, inplace=inplace, threshold=threshold, value=value)


@spells(F.softplus, "aten::softplus")
def _softplus(input, beta=1.0, threshold=20.0):
    return call("softplus", input, beta=beta, threshold=threshold)


@spells(*everywhere("prelu"))
def _prelu(input, weight):
    return call("prelu", input, weight)
