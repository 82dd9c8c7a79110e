"""Where a map ends up: in the convolution's weights, behind a mean or a max pool, or nowhere at all.

Many maps could go several ways. The rules that fold, move or drop them ask here, so that they agree
and lead to the same program in any order.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.chain import attributes, dtype, op_name, op_of, operands, same_shape, sizes
from fxfuse.patterns.rule import Reject
from fxfuse.vocabulary import Kind
from fxfuse.vocabulary.conv import output_size

#: maps that are affine in one operand: a*y + c
AFFINE = ("mul", "div", "add", "sub", "neg", "batch_norm")
#: those without a shift
LINEAR = ("mul", "div", "neg")
#: maps that are non-decreasing for some or all of their numbers
MONOTONE = ("relu", "relu6", "hardtanh", "clamp", "leaky_relu", "add", "sub", "mul", "div")
#: what takes the place of all that a map was before
REDUCING = ("mean", "sum", "avg_pool", "adaptive_avg_pool", "max_pool")
#: dtypes whose rounding may move from one value to another; 16-bit ones are too coarse for it
WIDE = (torch.float32, torch.float64)


# --- into the weights -----------------------------------------------------------------------------
def source(node: fx.Node) -> fx.Node | None:
    """The convolution that ``node`` becomes a part of, as only copies and maps that fold lie between; or None."""
    if op_name(node) == "conv_transpose":
        return node
    if op_name(node) != "clone" and op_name(node) not in AFFINE:
        return None
    for value in dict.fromkeys(operands(node)):
        if not isinstance(value, fx.Node) or len(value.users) != 1:
            continue
        conv = source(value)
        if conv is not None and (op_name(node) == "clone" or fold_refusal(node, value, conv) is None):
            return conv
    return None


def fold_refusal(node: fx.Node, value: fx.Node, conv: fx.Node) -> Reject | None:
    """Why the map ``node`` of ``value`` does not fold into ``conv``, which ``value`` is or becomes a part of."""
    refusal = foldable(conv)
    if refusal is None:
        check = _batch_norm_refusal if op_name(node) == "batch_norm" else _arithmetic_refusal
        refusal = check(node, value, conv)
    return refusal or (_weight_refusal(node, value, conv) if _scales(node, value) else None)


def foldable(conv: fx.Node) -> Reject | None:
    """None where arithmetic may move into ``conv``'s weights."""
    if dtype(conv) not in WIDE:
        return Reject(f"folding would round the {dtype(conv)} weights a second time", conv)
    return None


def batched(conv: fx.Node) -> bool:
    """Whether a convolution's input has a batch dim before its channels."""
    return bool(conv.meta["val"].dim() == len(attributes(conv)["stride"]) + 2)


def _batch_norm_refusal(node: fx.Node, value: fx.Node, conv: fx.Node) -> Reject | None:
    if operands(node)[0] is not value:
        return Reject("the convolution is one of the statistics", node)
    if not batched(conv):
        return Reject("an input without a batch dim has its channels elsewhere", conv)
    if any(isinstance(a, fx.Node) and dtype(a) is not dtype(conv) for a in operands(node)[1:]):
        return Reject("the statistics are of another dtype than the convolution", node)
    return None


def _arithmetic_refusal(node: fx.Node, value: fx.Node, conv: fx.Node) -> Reject | None:
    if dtype(node) is not dtype(conv):
        return Reject(f"the result is {dtype(node)}, the convolution {dtype(conv)}", node)
    if node.meta["val"].dim() != conv.meta["val"].dim():
        return Reject("its other operand adds dims", node)
    if op_name(node) == "div" and operands(node)[0] is not value:
        return Reject("the convolution is the divisor", node)
    others = [o for o in operands(node) if o is not value]
    if op_name(node) != "neg" and len(others) != 1:
        return Reject("both operands are the convolution", node)
    if vanishes(node):
        return Reject("the shift vanishes in the softmax instead", node)
    return number_refusal(node) or next((r for o in others if (r := _channel_refusal(o, node, conv)) is not None), None)


def _channel_refusal(value: Any, node: fx.Node, conv: fx.Node) -> Reject | None:
    """None where ``value`` is one number per output channel of ``conv`` (or one in all)."""
    if not isinstance(value, fx.Node):
        return None
    shape, rank = value.meta["val"].shape, conv.meta["val"].dim()
    channel_dim = rank - len(attributes(conv)["stride"]) - 1
    if not constant_along(value, tuple(d for d in range(rank) if d != channel_dim), rank):
        return Reject("its other operand does not have one value per channel", node)
    given = (1,) * (rank - len(shape)) + tuple(shape)
    if all(not statically_known_true(given[channel_dim] == s) for s in (1, conv.meta["val"].shape[channel_dim])):
        return Reject("its other operand broadcasts over the channels", node)
    return None


def _scales(node: fx.Node, value: fx.Node) -> bool:
    """Whether folding ``node`` multiplies the weights, rather than changing the bias alone."""
    return op_name(node) != "add" and not (op_name(node) == "sub" and operands(node)[0] is value)


def _weight_refusal(node: fx.Node, value: fx.Node, conv: fx.Node) -> Reject | None:
    """A fold costs a pass over the weight in every call, and saves one over what the map runs on."""
    reduce = moved_behind(node, value)
    if reduce is None or op_name(reduce) not in ("mean", "sum"):
        return weight_refusal(conv)
    return _larger_weight(conv, str(op_name(reduce)), sizes(reduce))


def weight_refusal(conv: fx.Node) -> Reject | None:
    """Why a scale of all outputs of ``conv`` costs less than one of its weight; None where it does not."""
    return _larger_weight(conv, "output", _full_shape(conv))


def _larger_weight(conv: fx.Node, place: str, shape: tuple[int, ...] | None) -> Reject | None:
    weight = sizes(operands(conv)[1])
    if weight is None or shape is None or math.prod(weight) <= math.prod(shape):
        return None
    return Reject(f"the weight has {math.prod(weight)} elements, the {place} only {math.prod(shape)}", conv)


def _full_shape(conv: fx.Node) -> tuple[int, ...] | None:
    """The shape of ``conv`` with its dead outputs: the same before and after they are dropped."""
    x, weight, out = sizes(operands(conv)[0]), sizes(operands(conv)[1]), sizes(conv)
    if x is None or weight is None or out is None:
        return None
    first = len(out) - (len(weight) - 2)
    geometry = (attributes(conv)[k] for k in ("stride", "padding", "output_padding", "dilation"))
    return (*out[:first], *(output_size(*each) for each in zip(x[first:], weight[2:], *geometry, strict=True)))


# --- behind a mean, or a pool ---------------------------------------------------------------------
def moved_behind(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """The mean, sum or pool behind which the map ``node`` of ``value`` moves, through copies and further maps; or None.

    Behind a max pool only as far as the operators say: what they do with negative numbers may still change, as numbers
    merge.
    """
    path = [value, node]
    while True:
        if len(path[-1].users) != 1:
            return None
        (user,) = path[-1].users
        if op_name(user) in REDUCING:
            break
        if not copies(user) and op_name(user) not in (*AFFINE, *MONOTONE):
            return None
        path.append(user)
    moves = all(copies(after) or _moves(before, after, user) for before, after in itertools.pairwise(path))
    return user if moves else None


def copies(node: fx.Node) -> bool:
    """Whether a rule drops ``node``, as it does nothing to its operand, or nothing but crop it."""
    return op_name(node) in ("clone", "crop") or (op_name(node) == "cast" and dtype(operands(node)[0]) is dtype(node))


def _moves(value: fx.Node, node: fx.Node, reduce: fx.Node) -> bool:
    """Whether the map ``node`` of ``value`` moves behind ``reduce`` once it is next to it."""
    if op_name(reduce) == "max_pool":
        return op_name(node) in MONOTONE and sum(isinstance(o, fx.Node) for o in operands(node)) == 1
    moved = moves_behind if op_name(reduce) in ("mean", "sum") else moves_behind_pool
    return op_name(node) in AFFINE and moved(node, reduce) is value


def moves_behind(node: fx.Node, reduce: fx.Node) -> fx.Node | Reject:
    """The operand y of the affine map ``node`` = a*y + c that a mean or sum may take in its place, or why not."""
    if op_name(reduce) == "sum" and op_name(node) not in LINEAR:
        return Reject("a sum counts the shift once per element", node)
    if not attributes(reduce)["keepdim"] and sizes(reduce) is None and not of_numbers(node):
        return Reject("dropped dims need sizes that are known", reduce)
    return affine_value(node, attributes(reduce)["dims"])


def of_numbers(node: fx.Node) -> bool:
    """Whether a map of one value has no other tensor, whose dims would have to be those of the value."""
    return sum(isinstance(o, fx.Node) for o in operands(node)) == 1


def moves_behind_pool(node: fx.Node, pool: fx.Node) -> fx.Node | Reject:
    """The operand y of the affine map ``node`` = a*y + c that an average pool may take in its place, or why not."""
    if op_name(pool) == "avg_pool":
        refusal = plain_average(pool)
        if refusal is not None:
            return refusal
    else:
        out, given = sizes(pool), sizes(node)
        if out is None or given is None or math.prod(out) > math.prod(given):
            return Reject("it is not known to have fewer outputs than inputs", pool)
    rank, names = pool.meta["val"].dim(), attributes(pool)
    return affine_value(node, tuple(range(rank - len(names["kernel"] if "kernel" in names else names["size"]), rank)))


def plain_average(pool: fx.Node) -> Reject | None:
    """None where each output of an ``avg_pool`` is the mean of a whole window."""
    if any(attributes(pool)["padding"]):
        return Reject("padding changes the weight of border values", pool)
    if attributes(pool)["ceil_mode"]:
        return Reject("ceil_mode averages partial windows", pool)
    if attributes(pool)["divisor_override"] is not None:
        return Reject("divisor_override is not the window's size", pool)
    return None


def composed_average(inner: fx.Node, outer: fx.Node) -> Reject | None:
    """None where the ``avg_pool`` of an ``avg_pool`` is one."""
    if len(attributes(inner)["kernel"]) != len(attributes(outer)["kernel"]):
        return Reject("the pools run over different dims", outer)
    for node in (inner, outer):
        refusal = plain_average(node)
        if refusal is not None:
            return refusal
    one, two = attributes(inner), attributes(outer)
    for k1, s1, k2 in zip(one["kernel"], one["stride"], two["kernel"], strict=True):
        if s1 != k1 and k2 != 1:
            return Reject(f"stride {s1} != kernel {k1}: the inner windows overlap or leave gaps", inner)
    return None


def affine_value(node: fx.Node, dims: tuple[int, ...], *, rounded: bool = True) -> fx.Node | Reject:
    """The operand y of the affine map ``node`` = a*y + c where a and c are constant along ``dims``, or why none is.

    ``rounded``: whether the mean of y is rounded to the map's dtype before the map is applied to it.
    """
    if not dtype(node).is_floating_point:
        return Reject("a mean of integers", node)
    if rounded and dtype(node) not in WIDE and op_name(node) not in LINEAR:
        return Reject(f"a mean rounded to {dtype(node)} before the shift could lose what the shift leaves", node)
    if op_name(node) == "batch_norm":
        normed: fx.Node = operands(node)[0]
        return Reject("the mean runs over the channels", node) if 1 in dims else normed
    value = _varying(node, dims)
    if value is None:
        return Reject("both operands vary along the averaged dims", node)
    if op_name(node) == "div" and operands(node)[0] is not value:
        return Reject("the value is the divisor", node)
    if dtype(node) is not dtype(value):
        return Reject("the map changes the dtype", node)
    return number_refusal(node) or value


def _varying(node: fx.Node, dims: tuple[int, ...]) -> fx.Node | None:
    """The operand of ``node``'s own shape, where the other one is constant along ``dims``."""
    tensors = [o for o in operands(node) if isinstance(o, fx.Node)]
    for value in tensors:
        others = [o for o in tensors if o is not value]
        constant = all(constant_along(o, dims, node.meta["val"].dim()) for o in others)
        if constant and len(others) == len(tensors) - 1 and same_shape(value.meta["val"], node.meta["val"]):
            return value
    return None


def value_over_space(node: fx.Node) -> fx.Node | None:
    """The one operand of a pointwise ``node`` that varies over space, or None."""
    if op_name(node) is None or op_of(node).kind is not Kind.POINTWISE:
        return None
    val = node.meta["val"]
    tensors = [o for o in operands(node) if isinstance(o, fx.Node)]
    values = {o for o in tensors if same_shape(o.meta["val"], val)}
    others = [o for o in tensors if o not in values]
    if len(values) != 1:
        return None
    if op_name(node) != "prelu":  # its weight lies along the channels, whatever its shape
        space = tuple(range(2, val.dim()))
        if not all(constant_along(o, space, val.dim()) for o in others):
            return None
    return values.pop()


def crops_convolution(value: fx.Node | None, dims: int) -> bool:
    """Whether a crop of ``value`` in its last ``dims`` becomes one of a convolution, whose space these are."""
    while value is not None and op_name(value) != "conv_transpose":
        if len(value.users) != 1:
            return False
        value = value_over_space(value)
    if value is None or not batched(value) or len(value.users) != 1:
        return False
    return len(attributes(value)["stride"]) == dims


def constant_along(operand: fx.Node, dims: tuple[int, ...], rank: int) -> bool:
    """Whether an operand that broadcasts to ``rank`` dims is constant along ``dims`` of them."""
    shape = operand.meta["val"].shape
    missing = rank - len(shape)
    return all(d < missing or statically_known_true(shape[d - missing] == 1) for d in dims)


# --- behind a max pool ----------------------------------------------------------------------------
def stays_before_max_pool(node: fx.Node, pool: fx.Node) -> Reject | None:
    """Why ``pool`` of the map ``node`` is not the map of the pool; None where it is."""
    refusal = _decreasing(node)
    if refusal is None and op_name(node) in ("mul", "div") and _sign(node) <= 0:
        return Reject("it merges with a factor before it that is negative or zero", node)
    if refusal is None and any(d != 1 for d in attributes(pool)["dilation"]) and any(attributes(pool)["padding"]):
        return Reject("a dilated, padded window can hold padding alone, which the map would change", pool)
    return refusal


def _sign(node: fx.Node) -> int:
    """The sign of the product of the factor ``node`` and of those right before it, with which it merges."""
    sign = 1
    while op_name(node) in ("clone", "mul", "div"):
        value, *others = (o for o in operands(node) if isinstance(o, fx.Node))
        if op_name(node) != "clone":
            if others or (op_name(node) == "div" and operands(node)[0] is not value):
                break
            if dtype(node) not in WIDE or dtype(value) is not dtype(node) or number_refusal(node) is not None:
                break
            (number,) = (o for o in operands(node) if o is not value)
            sign *= (number > 0) - (number < 0)
        if len(value.users) > 1:
            break
        node = value
    return sign


def _decreasing(node: fx.Node) -> Reject | None:
    """Why a map of one tensor is not known to be non-decreasing, NaN only at NaN; None where it is."""
    tensors = [o for o in operands(node) if isinstance(o, fx.Node)]
    if len(tensors) > 1:
        return Reject("its other operand is a tensor, whose values are not known before the call", node)
    if dtype(node) is not dtype(tensors[0]) or not dtype(node).is_floating_point:
        return Reject("the map changes the dtype", node)
    if op_name(node) in ("sub", "div") and operands(node)[0] is not tensors[0]:
        return Reject("a number minus or divided by the value is not non-decreasing", node)
    numbers = [*(o for o in operands(node) if o is not tensors[0]), *attributes(node).values()]
    if not all(n is None or math.isfinite(n) for n in numbers):
        return Reject("one of its numbers is not finite", node)
    if op_name(node) in ("mul", "div") and not numbers[0] > 0:
        return Reject(f"a factor of {numbers[0]} is not positive", node)
    if op_name(node) == "leaky_relu" and not (numbers[0] > 0 and ordinary(numbers[0], "mul", dtype(node))):
        return Reject(f"a slope of {numbers[0]} is not positive: it turns the order, or -Inf into NaN", node)
    if op_name(node) in ("add", "sub", "mul", "div"):
        return number_refusal(node)
    return None


# --- nowhere --------------------------------------------------------------------------------------
def vanishes(node: fx.Node) -> bool:
    """Whether ``node`` adds a number that a softmax cancels, with only copies and other such shifts between."""
    while isinstance(shifted(node), fx.Node) or op_name(node) == "clone":
        if len(node.users) != 1:
            return False
        (node,) = node.users
        if op_name(node) in ("softmax", "log_softmax"):
            return True
    return False


def shifted(node: fx.Node) -> fx.Node | Reject:
    """The operand y of ``node`` = y + c with a number c, or why it is not that."""
    if op_name(node) not in ("add", "sub"):
        return Reject("it is not a shift", node)
    values = [o for o in operands(node) if isinstance(o, fx.Node)]
    if len(values) > 1:
        return Reject("the shift is a tensor, which may vary along the softmax", node)
    if op_name(node) == "sub" and operands(node)[0] is not values[0]:
        return Reject("the value is subtracted from a number, which turns its sign", node)
    if dtype(values[0]) is not dtype(node) or not dtype(node).is_floating_point:
        return Reject("the shift changes the dtype", node)
    return number_refusal(node) or values[0]


# --- numbers --------------------------------------------------------------------------------------
def number_refusal(node: fx.Node) -> Reject | None:
    """Why a number in the arithmetic ``node`` does not commute with sums: it is no ordinary one in its dtype."""
    kind, op = dtype(node), str(op_name(node))
    numbers = operands(node)[1:] if op == "div" else operands(node)
    for number in numbers:
        if isinstance(number, fx.Node):
            continue
        if not ordinary(number, op, kind):
            return Reject(f"{op} with {number} leaves the range of {kind}", node)
        if op in ("add", "sub") and 2 * abs(number) * torch.finfo(kind).eps >= 1:
            return Reject(f"a shift of {number} may be there to round to whole numbers", node)
    return None


def ordinary(number: float, op: str, kind: torch.dtype) -> bool:
    """Whether a number is finite in ``kind``; as a factor 0 or normal, as a divisor normal, its reciprocal too."""
    limits, size = torch.finfo(kind), abs(number)
    if op in ("add", "sub") or (op != "div" and size == 0):
        return size <= limits.max
    if not limits.tiny <= size <= limits.max:
        return False
    return op != "div" or limits.tiny <= 1 / size <= limits.max
