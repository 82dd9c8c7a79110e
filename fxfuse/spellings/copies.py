"""Spellings of copies, casts, and of nothing at all.

What returns its operand itself (nn.Identity, a cast to the same dtype) also means a copy: inside a
region values have no identity, and the partitioner keeps out what is written to later.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfuse.call import Call, Param, call, everywhere, module, refuse, spells, tensor


def _copy(input: Any, memory_format: Any) -> Call:
    if memory_format in (None, torch.preserve_format):
        return call("clone", input)
    if memory_format is not torch.contiguous_format:
        refuse(f"a copy into memory_format={memory_format}")
    return call("clone" if tensor(input).is_contiguous() else "contiguous", input)


@spells("clone", torch.clone, "aten::clone")
def _clone(input, memory_format=None):
    return _copy(input, memory_format)


@spells("contiguous", "aten::contiguous")
def _contiguous(input, memory_format=torch.contiguous_format):
    return _copy(input, memory_format)


@spells(*everywhere("detach"))
def _detach(input):
    return call("detach", input)


@module(nn.Identity)
def _identity(m, param: Param, input):
    return call("clone", input)


# --- dropout --------------------------------------------------------------------------------------
def _unless_random(input: Any, p: Any, training: Any) -> Call:
    if isinstance(p, fx.Node) or isinstance(training, fx.Node):
        refuse("whether dropout is random is not known before the call")
    if training and p > 0:
        refuse("dropout is random in training mode")
    return call("clone", input)


@module(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
def _dropout_module(m, param: Param, input):
    return _unless_random(input, m.p, m.training)


@spells(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
def _dropout(input, p=0.5, training=True, inplace=False):
    return _unless_random(input, p, training)


@spells(F.alpha_dropout, F.feature_alpha_dropout)
def _alpha_dropout(input, p=0.5, training=False, inplace=False):
    return _unless_random(input, p, training)


@spells(
    *(torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout),
    *("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::feature_alpha_dropout"),
)
def _aten_dropout(input, p, train):
    return _unless_random(input, p, train)


# --- padding by nothing ---------------------------------------------------------------------------
@spells(F.pad, "aten::pad")
def _pad(input, pad, mode="constant", value=None):
    if mode != "constant" or any(isinstance(p, fx.Node) or p != 0 for p in pad):
        refuse("padding that adds elements")
    return call("clone", input)


@spells(torch.constant_pad_nd, "aten::constant_pad_nd")
def _constant_pad(input, pad, value=0):
    return _pad(input, pad)


@module(
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
)
def _pad_module(m, param: Param, input):
    return _pad(input, m.padding)


# --- casts ----------------------------------------------------------------------------------------
def _cast(input: Any, dtype: torch.dtype) -> Call:
    if not dtype.is_floating_point or not tensor(input).is_floating_point():
        refuse(f"a cast from {tensor(input).dtype} to {dtype}")
    return call("cast", input, dtype=dtype) if dtype is not tensor(input).dtype else call("clone", input)


@spells("to")
def _to(input, dtype, non_blocking=False, copy=False, *, memory_format=None):
    if not isinstance(dtype, torch.dtype):
        refuse("a move to another device, or to the type of another tensor")
    if memory_format not in (None, torch.preserve_format):
        refuse(f"a copy into memory_format={memory_format}")
    return _cast(input, dtype)


@spells("type")
def _type(input, dtype, non_blocking=False):
    if not isinstance(dtype, torch.dtype):
        refuse("a type that is not a torch.dtype")
    return _cast(input, dtype)


@spells("type_as", "aten::type_as")
def _type_as(input, other):
    return _cast(input, tensor(other).dtype)


@spells("aten::to.dtype")
def _aten_to(input, dtype, non_blocking=False, copy=False, memory_format=None):
    return _to(input, dtype, memory_format=memory_format)


@spells("aten::_to_copy")
def _to_copy(input, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None):
    if dtype is None or layout is not None or device is not None or pin_memory is not None:
        refuse("a move to another device, or a layout")
    return _to(input, dtype, memory_format=memory_format)


for _name, _dtype in {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}.items():

    @spells(_name)
    def _named_cast(input, memory_format=None, *, _dtype=_dtype):
        return _to(input, _dtype, memory_format=memory_format)
