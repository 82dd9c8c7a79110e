"""Spellings of the same elements under other indices. Only known sizes: the shape is baked in."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.call import Call, Param, call, everywhere, module, one_dim, rank, refuse, spells, tensor


def _reshaped(input: Any, change: Callable[[Tensor], Tensor]) -> Call:
    """A reshape into what ``change`` makes of the (fake) input."""
    held = tensor(input)
    if not all(isinstance(s, int) for s in held.shape):
        refuse("a shape that is not known before the call")
    return call("reshape", input, shape=tuple(change(held).shape))


def _ints(sizes: Any) -> tuple[int, ...]:
    """``view(2, 3)`` and ``view((2, 3))`` alike."""
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = sizes[0]
    if not all(isinstance(s, int) and not isinstance(s, bool) for s in sizes):
        refuse("sizes or dims that are not whole numbers known before the call")
    return tuple(sizes)


@spells("reshape", "view")
def _reshape_method(input, *shape):
    return _reshaped(input, lambda x: x.reshape(_ints(shape)))


@spells(torch.reshape, "aten::reshape")
def _reshape(input, shape):
    return _reshaped(input, lambda x: x.reshape(_ints((shape,))))


@spells("aten::view", "aten::_unsafe_view")
def _view(input, size):
    return _reshape(input, size)


@spells("view_as", "reshape_as", "aten::view_as", "aten::reshape_as")
def _view_as(input, other):
    return _reshape(input, tuple(tensor(other).shape))


@spells(*everywhere("flatten"))
def _flatten(input, start_dim=0, end_dim=-1):
    return _reshaped(input, lambda x: x.flatten(start_dim, end_dim))


@module(nn.Flatten)
def _flatten_module(m, param: Param, input):
    return _flatten(input, m.start_dim, m.end_dim)


@spells(*everywhere("unflatten"))
def _unflatten(input, dim, sizes):
    return _reshaped(input, lambda x: x.unflatten(dim, _ints((sizes,))))


@module(nn.Unflatten)
def _unflatten_module(m, param: Param, input):
    if isinstance(m.dim, str):
        refuse("a named dim")
    return _unflatten(input, m.dim, m.unflattened_size)


@spells(*everywhere("squeeze"))
def _squeeze(input, dim=None):
    return _reshaped(input, lambda x: x.squeeze() if dim is None else x.squeeze(dim))


@spells(*everywhere("unsqueeze"))
def _unsqueeze(input, dim):
    return _reshaped(input, lambda x: x.unsqueeze(dim))


@spells(operator.getitem)
def _getitem(input, index):
    """``x[:, None]``: new dims, and nothing left out."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(p is None or p is ... or (isinstance(p, slice) and p == slice(None)) for p in parts):
        refuse("an index that takes some elements, or an output of several")
    return _reshaped(input, lambda x: x[index])


# --- repetition -----------------------------------------------------------------------------------
@spells("expand")
def _expand_method(input, *sizes):
    return _expand(input, _ints(sizes))


@spells("aten::expand", torch.broadcast_to, "broadcast_to", "aten::broadcast_to")
def _expand(input, size):
    held = tensor(input)
    if not all(isinstance(s, int) for s in held.shape):
        refuse("a shape that is not known before the call")
    return call("expand", input, shape=tuple(held.expand(_ints((size,))).shape))


@spells("expand_as", "aten::expand_as")
def _expand_as(input, other):
    return _expand(input, tuple(tensor(other).shape))


# --- orders of dims -------------------------------------------------------------------------------
def _permuted(input: Any, dims: tuple[int, ...]) -> Call:
    if len(dims) != rank(input):
        refuse(f"{len(dims)} dims for a tensor of {rank(input)}")
    return call("permute", input, dims=tuple(one_dim(input, d) for d in dims))


@spells("permute")
def _permute_method(input, *dims):
    return _permuted(input, _ints(dims))


@spells(torch.permute, "aten::permute")
def _permute(input, dims):
    return _permuted(input, _ints((dims,)))


@spells(*everywhere("transpose"), *everywhere("swapaxes"), *everywhere("swapdims"))
def _transpose(input, dim0, dim1):
    dims = list(range(rank(input)))
    if not dims:
        refuse("a transpose of a 0-dim tensor")
    first, second = one_dim(input, dim0), one_dim(input, dim1)
    dims[first], dims[second] = dims[second], dims[first]
    return _permuted(input, tuple(dims))
