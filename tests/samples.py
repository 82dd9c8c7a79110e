"""Sample calls of every spelling that the vocabulary reads, and what they mean there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxfuse import vocabulary
from fxfuse.call import FUNCTIONS, METHODS, Call
from fxfuse.normalize import values_only
from fxfuse.propagate import facts, isolated, propagate


@dataclasses.dataclass(frozen=True)
class Sample:
    """Arguments of a call; float64 tensors, which :meth:`to` converts."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: f"{t.dtype}{[*t.shape]}", (self.args, self.kwargs))
        return f"{args} {kwargs}"

    def fresh(self, convert: Callable[[Tensor], Tensor] = torch.clone) -> Sample:
        args, kwargs = pytree.tree_map_only(Tensor, convert, (self.args, self.kwargs))
        return Sample(args, kwargs)

    def to(self, dtype: torch.dtype) -> Sample:
        return self.fresh(lambda t: t.to(dtype, copy=True) if t.is_floating_point() else t.clone())


def S(*args: Any, **kwargs: Any) -> Sample:  # noqa: N802 - short, it is written two hundred times
    return Sample(args, kwargs)


def T(*shape: int, seed: int = 0) -> Tensor:  # noqa: N802
    """Multiples of 1/4 between -4 and 4, so that ties, zeros and whole numbers occur."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(-16, 17, shape, generator=generator).double() / 4


X, Y, V = T(2, 3, 4, 5), T(2, 3, 4, 5, seed=1), T(5, seed=2)
POSITIVE = X.abs() + 0.25
MASK = X > 0
ZERO_DIM = torch.tensor(1.5, dtype=torch.float64)

_ONE = [S(X), S(X, inplace=True), S(POSITIVE), S(ZERO_DIM), S(input=X), S(T(0, 3))]
_TWO = [
    S(X, Y), S(X, 2), S(X, 0.5), S(2, X), S(1.5, X), S(X, True), S(X, ZERO_DIM), S(ZERO_DIM, X), S(X, V),
    S(V, X), S(X, other=Y), S(input=X, other=V), S(X, X), S(X, MASK), S(MASK, X), S(X, torch.tensor(2)),
    S(ZERO_DIM, 3),
]  # fmt: skip
_ALPHA = [S(X, Y, alpha=1), S(X, 2, alpha=1.0)]
_BOOL = [S(MASK, Y > 0), S(MASK, other=Y > 0), S(input=MASK, other=Y > 0)]
_DIMS = [
    S(X), S(X, 1), S(X, -1), S(X, (1, 3)), S(X, [2, -3], True), S(X, dim=0, keepdim=True), S(X, ()),
    S(input=X, dim=(3, 1)),
    S(X, axis=1), S(X, axis=(0, 2), keepdims=True), S(ZERO_DIM), S(ZERO_DIM, 0), S(X, None),
]  # fmt: skip
_INTO = [S(X, dtype=torch.float64), S(X, 1, dtype=torch.float64), S(X, 1, True, dtype=torch.float64)]
_POOL = [(1, T(2, 3, 9)), (2, T(2, 3, 7, 6)), (3, T(2, 2, 5, 6, 4))]


def _one_position(n: int) -> list[Sample]:
    x, weight = T(2, 3, *(1,) * n), T(4, 3, *(1,) * n)
    return [S(x, weight), S(x, weight, T(4), 2, 0, 3), S(x, weight, bias=T(4), padding="same"),
            S(x, weight, None, 1, (0,) * n, 1, 1)]  # fmt: skip


def _max_pool(n: int, x: Tensor) -> list[Sample]:
    k = (3, 2, 2)[:n]
    return [
        S(x, 2), S(x, k), S(x, k, 1), S(x, k, k), S(x, k, (2,) * n, 1), S(x, 2, 1, 1, 2), S(x, 2, 2, 0, 1, True),
        S(x[0], 3, 2),
        S(x, kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=True), S(x, [2], ()),
        S(x, 2, 1, 0, 2, return_indices=False),
    ]  # fmt: skip


def _avg_pool(n: int, x: Tensor) -> list[Sample]:
    k = (3, 2, 2)[:n]
    return [
        S(x, 2), S(x, k), S(x, k, 1), S(x, k, (2,) * n, 1), S(x, 3, 2, 1, True, False), S(x, 3, 2, 1, True, True, 5),
        S(x[0], 2),
        S(x, kernel_size=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
        S(x, 2, divisor_override=3), S(x, 2, ()),
    ]  # fmt: skip


def _adaptive(n: int, x: Tensor) -> list[Sample]:
    sizes = (3, None, 2)[:n]
    return [
        S(x, 1),
        S(x, 2),
        S(x, sizes),
        S(x, 2, return_indices=False),
        S(x, (1,) * n),
        S(x[0], output_size=2),
        S(x, [2] * n),
        S(x[0], (1,) * n),
    ]


def _conv(n: int) -> list[Sample]:
    x, k = T(2, 4, *(4, 3, 2)[:n]), (3, 2, 2)[:n]
    w, b, grouped = T(4, 3, *k), T(3), T(4, 2, *k)
    return [
        S(x, w), S(x, w, b), S(x, w, b, 2), S(x, w, b, (2,) * n, 1, 1), S(x, grouped, T(4), 3, 1, (1,) * n, 2),
        S(x[0], w, b, 2),
        S(x, w, None, 2, 0, 1, 1, 2),
        S(x, weight=w, bias=b, stride=2, padding=1, output_padding=1, groups=1, dilation=3), S(x, w, b, [2]),
    ]  # fmt: skip


def _softmax() -> list[Sample]:
    return [S(X, 1), S(X, -1), S(X, dim=2), S(X, 0, dtype=torch.float64), S(X, 1, 3, torch.float64),
        S(X, 1, torch.float64),
            S(X, 1, _stacklevel=5), S(ZERO_DIM, 0)]  # fmt: skip


_SPREAD = [
    *_DIMS, S(X, False), S(X, True), S(X, 1, True), S(X, 1, False, True), S(X, (1, 2), unbiased=False, keepdim=True),
    S(X, unbiased=False),
    S(X, 1, correction=0), S(X, correction=2, dim=(2, 3)), S(X, 1, correction=1.5, keepdim=True),
    S(X, None, correction=None),
]  # fmt: skip
_CLAMP = [
    S(X, 0), S(X, -1, 2.5), S(X, min=-0.5), S(X, max=1), S(X, None, 1), S(X, min=Y), S(X, Y - 1, Y + 1), S(X, max=V),
    S(X, float("-inf"), 1.0),
    S(X, 2, 1),
]  # fmt: skip
_COND = [
    S(MASK, X, Y), S(MASK, X, 0.0), S(MASK, 1, X), S(MASK, 0.5, 2.0), S(MASK[..., 0:1], V, X),
    S(condition=MASK, input=X, other=Y),
    S(X, MASK, Y), S(X, MASK, 2), S(X, condition=MASK, other=Y),
]  # fmt: skip
_FILL = [S(X, MASK, 2), S(X, MASK, -1.5), S(X, MASK, ZERO_DIM), S(X, mask=V > 0, value=0), S(X, MASK, True)]
_CLIP_ONE = [S(X, 1), S(X, -0.5), S(X, V)]
_WEIGHTED = [S(X, Y, 0.25), S(X, Y, POSITIVE), S(X, V, weight=2), S(X, end=Y, weight=1), S(X, Y, ZERO_DIM)]
_PRODUCT = [
    S(X, Y, V),
    S(X, Y, POSITIVE, value=2),
    S(X, V, Y, value=-0.5),
    S(input=X, tensor1=Y, tensor2=POSITIVE, value=3),
]
_BN = (T(3, seed=5), T(3, seed=6).abs() + 1, T(3, seed=7), T(3, seed=8))
_VIEW = [S(X, (6, 20)), S(X, 6, 20), S(X, (2, -1)), S(X, 2, -1, 5), S(X, -1), S(X, [2, 3, 20])]
_SWAP = [S(X, 0, 1), S(X, -1, 1), S(X, 2, 2)]
_KINDS = [S(X, torch.float32), S(X, torch.float64), S(X, torch.bfloat16)]

#: arguments by the operator's name, in the order of its function's parameters; what a spelling does not take is skipped
BY_NAME: dict[str, list[Sample]] = {
    "leaky_relu": [S(X), S(X, 0.2), S(X, negative_slope=-0.5), S(X, 0.1, True), S(X, 0)],
    "elu": [S(X), S(X, 0.5), S(X, alpha=2), S(X, 0.5, True), S(X, 0.5, 1, 1)],
    "celu": [S(X), S(X, 0.5), S(X, alpha=2), S(X, 0.5, True)],
    "gelu": [S(X), S(X, approximate="tanh"), S(X, approximate="none")],
    "hardtanh": [S(X), S(X, -0.5, 2), S(X, min_val=0, max_val=1), S(X, -1.0, 0.5, True)],
    "hardshrink": [S(X), S(X, 1), S(X, lambd=0.25)],
    "softshrink": [S(X), S(X, 1), S(X, 0.25)],
    "threshold": [S(X, 0.5, 2), S(X, threshold=1, value=-1.5), S(X, 0.5, 3.0, True)],
    "softplus": [S(X), S(X, 2), S(X, 0.5, 1.0), S(X, beta=2, threshold=0.5)],
    "prelu": [S(X, T(3)), S(X, T(1)), S(X, weight=T(3)), S(V, T(1))],
    "softsign": _ONE,
    **dict.fromkeys(("add", "sub", "rsub"), _TWO + _ALPHA),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), _TWO),
    **dict.fromkeys(("minimum", "maximum", "mul"), _TWO),
    **dict.fromkeys(("logical_and", "logical_or"), _BOOL + _TWO),
    **dict.fromkeys(("bitwise_and", "bitwise_or", "__and__", "__or__"), _BOOL),
    "bitwise_not": [S(MASK)],
    "truediv": _TWO,
    "div": [*_TWO, S(X, Y, rounding_mode=None)],
    "pow": [S(X, 2), S(X, 3.0), S(2, X), S(2.5, X), S(POSITIVE, Y), S(POSITIVE, exponent=0.5),
    S(input=X, exponent=-1), S(X, V), S(X, 0)],
    "clamp": _CLAMP,
    "clamp_min": [*_CLIP_ONE, S(X, min=0.5)],
    "clamp_max": [*_CLIP_ONE, S(X, max=0.5)],
    "where": _COND,
    "masked_fill": _FILL,
    "lerp": _WEIGHTED,
    "addcmul": _PRODUCT,
    "addcdiv": [*_PRODUCT[1:2], S(X, V, POSITIVE), S(input=X, tensor1=Y, tensor2=POSITIVE, value=3)],
    # copies
    "clone": [S(X), S(X, memory_format=torch.preserve_format),
    S(X.transpose(0, 1), memory_format=torch.contiguous_format)],
    "contiguous": [S(X), S(X.transpose(1, 2)), S(X.transpose(0, 1), memory_format=torch.contiguous_format)],
    "detach": [S(X)],
    "dropout": [S(X, 0.5, False), S(X[0], 0.5, False), S(X, 0.0, True), S(X, training=False),
    S(X, p=0.3, training=False, inplace=True), S(X, 0.0, train=True)],
    "pad": [S(X, (0, 0)), S(X, [0, 0, 0, 0], "constant"), S(X, (0, 0), "constant", 2.0),
    S(X, (0, 0), mode="constant", value=None)],
    "constant_pad_nd": [S(X, (0, 0)), S(X, [0, 0, 0, 0], 1.5), S(X, [0, 0], value=2)],
    "to": [*_KINDS, S(X, dtype=torch.float32), S(X, torch.float32, True),
    S(X, torch.float64, non_blocking=False, copy=True),
           S(X, torch.float32, memory_format=torch.preserve_format)],
    "type": [*_KINDS, S(X, dtype=torch.float32), S(X, torch.float32, non_blocking=True)],
    "type_as": [S(X, T(2).float()), S(X, Y)],
    "_to_copy": [S(X, dtype=torch.float32), S(X, dtype=torch.float64, non_blocking=True),
    S(X, dtype=torch.float16, memory_format=None)],
    **{n: [S(X), S(X, memory_format=torch.preserve_format)] for n in ("float", "double", "half", "bfloat16")},
    # shapes
    **dict.fromkeys(("reshape", "view"), _VIEW),
    "_unsafe_view": _VIEW,
    **{n: [S(X, T(6, 20))] for n in ("view_as", "reshape_as")},
    "flatten": [S(X), S(X, 1), S(X, -2, -1), S(X, start_dim=1, end_dim=2), S(ZERO_DIM)],
    "unflatten": [S(X, 2, (2, 2)), S(X, -2, [2, -1]), S(X, dim=2, sizes=(4, 1))],
    "squeeze": [S(X[:, :1]), S(X[:1, :, :1]), S(X[:, :1], 1), S(X[:, :1], -3), S(X[:1, :, :1], (0, 2)), S(X, 0),
    S(X[:, :1], dim=1)],
    "getitem": [S(V, (slice(None), None, None)), S(X, None), S(X, (..., None)), S(X, ...), S(X, slice(None)),
    S(X, (None, slice(None), None, ..., None, slice(None))), S(ZERO_DIM, (None, None))],
    "unsqueeze": [S(X, 0), S(X, -1), S(X, dim=2)],
    **{n: [S(X[:, :1], (6, 3, 4, 5)), S(X[:, :1], [-1, 3, -1, 5])] for n in ("expand", "broadcast_to")},
    "expand_as": [S(X[:, :1], X), S(V, X), S(ZERO_DIM, X)],
    "permute": [S(X, (0, 2, 3, 1)), S(X, 3, -2, 0, 1), S(X, [1, 0, 2, 3]), S(X, dims=(0, 1, 3, 2))],
    **{n: [*_SWAP, S(X, dim0=1, dim1=-1)] for n in ("transpose", "swapaxes", "swapdims")},
    # pools and convolutions
    **{f"max_pool{n}d": _max_pool(n, x) for n, x in _POOL},
    **{f"avg_pool{n}d": _avg_pool(n, x) for n, x in _POOL},
    **{f"adaptive_{kind}_pool{n}d": _adaptive(n, x) for n, x in _POOL for kind in ("avg", "max")},
    **{f"conv_transpose{n}d": _conv(n) for n in (1, 2, 3)},
    "convolution": [S(T(2, 4, 5), T(4, 3, 3), T(3), [2], [1], [2], True, [1], 1),
    S(T(2, 4, 5, 4), T(4, 1, 3, 2), None, (1,), (0,), (1,), True, (0,), 2)],
    # norms
    "batch_norm": [
        S(X, *_BN), S(X, *_BN[:2], None, None, False, 0.3, 1e-3),
        S(X, *_BN[:2], weight=_BN[2], bias=_BN[3], training=True, momentum=0.2, eps=1e-4),
        S(X, None, None, training=True), S(X, *_BN[2:], *_BN[:2], False, 0.1, 1e-3, False),
        S(X, *_BN[2:], None, None, True, 0.1, 1e-3, True),
        S(X, None, None, *_BN[:2], True, 0.1, 1e-3, False),
    ],
    "group_norm": [S(X, 3), S(X, 1, T(3), T(3)), S(X, 3, weight=T(3), bias=None, eps=1e-3), S(X, 1, None, None, 1e-2),
    S(X, 1, T(3), T(3), 1e-3, False)],
    "instance_norm": [
        S(X), S(X, weight=T(3), bias=T(3), eps=1e-3), S(X, None, None, T(3), None, True, 0.3, 1e-2),
        S(X, None, None, None, None, True, 0.1, 1e-3, False),
        S(X, T(3), T(3), None, None, True, 0.1, 1e-4, True),
    ],
    "layer_norm": [S(X, (5,)), S(X, [4, 5], T(4, 5), T(4, 5)), S(X, (5,), weight=V, bias=None, eps=1e-3),
    S(X, (3, 4, 5), None, None, 1e-2), S(X, (5,), V, V, 1e-3, False)],
    "rms_norm": [S(X, (5,)), S(X, [4, 5], T(4, 5)), S(X, (5,), weight=V, eps=1e-3), S(X, (3, 4, 5), None, 1e-2)],
    # products
    "linear": [S(T(2, 3), T(4, 3)), S(T(2, 3), T(4, 3), T(4)), S(input=T(1, 3), weight=T(1, 3), bias=T(1))],
    **{f"conv{n}d": _one_position(n) for n in (1, 2, 3)},
    # reductions
    "sum": _DIMS + _INTO,
    "mean": _DIMS + _INTO,
    "amax": _DIMS,
    "amin": _DIMS,
    "prod": [S(X, 1), S(X, -1, True), S(X, dim=0, keepdim=True), S(X, 1, dtype=torch.float64),
    S(X, 1, True, dtype=torch.float64)],
    "logsumexp": [S(X, 1), S(X, (1, 3)), S(X, [-1], True), S(X, dim=2, keepdim=True), S(X, axis=1), S(ZERO_DIM, 0)],
    "max": [S(X), S(X, Y), S(X, other=Y), S(input=X, other=V), S(X, ZERO_DIM)],
    "min": [S(X), S(X, Y), S(X, other=Y), S(input=X, other=V), S(X, ZERO_DIM)],
    "max_values": [S(X, 1), S(X, -1, True), S(X, dim=2, keepdim=True)],
    "min_values": [S(X, 1), S(X, -1, True), S(X, dim=2, keepdim=True)],
    "var": _SPREAD,
    "std": _SPREAD,
    "vector_norm": [*_DIMS[:1], S(X, 1), S(X, 3, 1), S(X, float("inf"), (1, 2), True), S(X, ord=-1, dim=3),
    S(X, 0, (0, 1)), S(X, 2, None, True, dtype=torch.float64)],
    "norm": [S(X), S(X, 1, 1), S(X, 3, dim=2, keepdim=True), S(X, float("inf"), -1), S(X, None, (1, 2)),
    S(X, ord=None, dim=(1, 2)), S(X, 2, 1, True, dtype=torch.float64),
             S(X, dim=1), S(X, "fro", (1, 2)), S(X, p=1.5, dim=(1, 2, 3)), S(X, p=2),
             S(X, 2, 3, False, torch.float64)],
    "normalize": [S(X), S(X, 1, -1), S(X, 3.0, (1, 2), 0.5), S(X, p=float("inf"), dim=2), S(X, eps=2.0)],
    "softmax": _softmax(),
    "log_softmax": _softmax(),
}  # fmt: skip
for _name in vocabulary.pointwise.UNARY:
    BY_NAME.setdefault(_name, _ONE)

#: other names of the same thing
ALIASES = {
    "true_divide": "div", "divide": "div", "__truediv__": "div", "multiply": "mul", "__mul__": "mul",
    "__rmul__": "mul", "subtract": "sub", "__sub__": "sub", "__rsub__": "rsub", "__add__": "add", "__radd__": "add",
    "__pow__": "pow",
    "__rpow__": "rsub", "negative": "neg", "__neg__": "neg", "absolute": "abs", "__abs__": "abs",
    "special_expit": "sigmoid", "expit": "sigmoid", "logsigmoid": "log_sigmoid", "_threshold": "threshold",
    "not_equal": "ne", "less": "lt", "less_equal": "le", "greater": "gt",
    "greater_equal": "ge", "__eq__": "eq", "__ne__": "ne", "__lt__": "lt", "__le__": "le", "__gt__": "gt",
    "__ge__": "ge", "clip": "clamp",
    "invert": "bitwise_not", "__invert__": "bitwise_not", "and_": "bitwise_and", "or_": "bitwise_or",
    "special_logsumexp": "logsumexp",
    "linalg_vector_norm": "vector_norm", "linalg_norm": "norm", "special_softmax": "softmax",
    "special_log_softmax": "log_softmax",
    "itruediv": "truediv", "iadd": "add", "isub": "sub", "imul": "mul", "ipow": "pow", "dropout1d": "dropout",
    "dropout2d": "dropout",
    "dropout3d": "dropout", "alpha_dropout": "dropout", "feature_dropout": "dropout",
    "feature_alpha_dropout": "dropout",
}  # fmt: skip


def samples_of(name: str) -> list[Sample]:
    """The samples of a function, method or aten operator of this name; KeyError where it has none."""
    for known in (name, name.removesuffix("_"), name.removeprefix("linalg_").removeprefix("special_")):
        if (found := ALIASES.get(known, known)) in BY_NAME:
            return BY_NAME[found]
    raise KeyError(f"tests/samples.py has no sample of {name}")


_D3, _D4, _D5 = T(4, 3, 5), T(4, 3, 5, 2), T(4, 3, 3, 2, 2)


def _pad(kind: Any, n: int) -> nn.Module:
    return kind(0, 1.5) if "Constant" in kind.__name__ else kind((0,) * 2 * n)


def _eval(m: nn.Module) -> nn.Module:
    return m.eval()


def _trained(m: nn.Module) -> nn.Module:
    """With parameters and statistics other than zeros and ones."""
    for number, t in enumerate((*m.parameters(), *m.buffers())):
        if t.is_floating_point():
            t.data = T(*t.shape, seed=20 + number).to(t.dtype).abs() + 0.5
    return m


#: per module class: modules in float64 and the arguments of their calls
MODULE_SAMPLES: dict[type[nn.Module], list[tuple[Callable[[], nn.Module], Sample]]] = {
    **{
        kind: [(kind, S(X)), (lambda kind=kind: kind(inplace=True), S(X))]
        for kind in (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.SELU)
    },
    **{
        kind: [(kind, S(X)), (kind, S(input=X))]
        for kind in (nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Softsign)
    },
    nn.LeakyReLU: [(lambda: nn.LeakyReLU(0.3), S(X)), (lambda: nn.LeakyReLU(0.3, True), S(X))],
    nn.ELU: [(lambda: nn.ELU(0.3), S(X)), (lambda: nn.ELU(2, True), S(X))],
    nn.CELU: [(lambda: nn.CELU(0.3), S(X)), (lambda: nn.CELU(2, True), S(X))],
    nn.GELU: [(nn.GELU, S(X)), (lambda: nn.GELU("tanh"), S(X))],
    nn.Hardtanh: [(lambda: nn.Hardtanh(-0.5, 2), S(X)), (lambda: nn.Hardtanh(-0.5, 2.0, True), S(X))],
    nn.Hardshrink: [(lambda: nn.Hardshrink(1.25), S(X))],
    nn.Softshrink: [(lambda: nn.Softshrink(1.25), S(X))],
    nn.Threshold: [(lambda: nn.Threshold(0.5, 2), S(X)), (lambda: nn.Threshold(0.5, 2, True), S(X))],
    nn.Softplus: [(lambda: nn.Softplus(2, 1.5), S(X))],
    nn.PReLU: [(nn.PReLU, S(X)), (lambda: _trained(nn.PReLU(3)), S(X))],
    nn.Identity: [(nn.Identity, S(X)), (lambda: nn.Identity(3, extra=1), S(X))],
    **{
        kind: [(lambda kind=kind: kind(0.0), S(_D3)), (lambda kind=kind: _eval(kind(0.5)),
        S(_D3)), (lambda kind=kind: _eval(kind(0.5, True)), S(_D3))]
        for kind in (nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    },
    nn.Dropout2d: [(lambda: _eval(nn.Dropout2d()), S(_D4)), (lambda: nn.Dropout2d(0.0), S(_D4))],
    nn.Dropout3d: [(lambda: _eval(nn.Dropout3d()), S(_D5)), (lambda: nn.Dropout3d(0.0), S(_D5))],
    **{
        kind: [(lambda kind=kind, n=n: _pad(kind, n), S((_D3, _D4, _D5)[n - 1]))]
        for n in (1, 2, 3)
        for kind in (getattr(nn, f"ZeroPad{n}d"), getattr(nn, f"ConstantPad{n}d"))
    },
    nn.Flatten: [(nn.Flatten, S(_D5)), (lambda: nn.Flatten(-2, -1), S(_D5))],
    nn.Unflatten: [(lambda: nn.Unflatten(1, (1, 3)), S(_D5)), (lambda: nn.Unflatten(2, (5, -1)), S(_D4))],
    **{
        getattr(nn, f"ConvTranspose{n}d"): [
            (lambda n=n: getattr(nn, f"ConvTranspose{n}d")(4, 3, 3), S(T(2, 4, *(4, 3, 2)[:n]))),
            (lambda n=n: getattr(nn, f"ConvTranspose{n}d")(4, 2, 3, 3, 1, 1, 2, False, 2), S(T(4, *(4, 3, 2)[:n]))),
            (lambda n=n: getattr(nn, f"ConvTranspose{n}d")(4, 3, 2, 2),
            S(T(2, 4, *(4, 3, 2)[:n]), output_size=(8, 7, 5)[:n])),
            (lambda n=n: getattr(nn, f"ConvTranspose{n}d")(4, 3, 2, 2),
            S(T(2, 4, *(4, 3, 2)[:n]), [2, 3, *(9, 6, 4)[:n]])),
        ]
        for n in (1, 2, 3)
    },
    **{
        getattr(nn, f"MaxPool{n}d"): [
            (lambda n=n: getattr(nn, f"MaxPool{n}d")(2), S(x)),
            (lambda n=n: getattr(nn, f"MaxPool{n}d")((3, 2, 2)[:n] if n > 1 else 3, 1, 1, 1, False, True), S(x)),
            (lambda n=n: getattr(nn, f"MaxPool{n}d")(2, 1, 0, 2), S(x[0])),
        ]
        for n, x in _POOL
    },
    **{
        getattr(nn, f"AvgPool{n}d"): [
            (lambda n=n: getattr(nn, f"AvgPool{n}d")(2), S(x)),
            (lambda n=n: getattr(nn, f"AvgPool{n}d")(3, 2, 1, True, False), S(x)),
        ]
        for n, x in _POOL
    },
    **{
        getattr(nn, f"Adaptive{kind}Pool{n}d"): [
            (lambda n=n, kind=kind, size=size: getattr(nn, f"Adaptive{kind}Pool{n}d")(size),
            S(x)) for size in (1, 2, (3, None, 2)[:n] if n > 1 else 4)
        ]
        for n, x in _POOL
        for kind in ("Avg", "Max")
    },
    **{
        kind: [
            (lambda kind=kind: _trained(kind(3)), S(x)),
            (lambda kind=kind: _eval(_trained(kind(3, 1e-3))), S(x)),
            (lambda kind=kind: _trained(kind(3, momentum=None, affine=False)), S(x)),
            (lambda kind=kind: _eval(_trained(kind(3, track_running_stats=False))), S(x)),
        ]
        for kind, x in ((nn.BatchNorm1d, _D3), (nn.BatchNorm2d, _D4), (nn.BatchNorm3d, _D5))
    },
    **{
        kind: [(lambda kind=kind: kind(3, 1e-3), S(x)), (lambda kind=kind: _eval(_trained(kind(3, affine=True))),
        S(x))]
        for kind, x in ((nn.InstanceNorm1d, _D3), (nn.InstanceNorm2d, _D4), (nn.InstanceNorm3d, _D5))
    },
    nn.GroupNorm: [(lambda: _trained(nn.GroupNorm(3, 3, 1e-3)), S(_D4)), (lambda: nn.GroupNorm(1, 3, affine=False),
        S(_D3))],
    nn.LayerNorm: [
        (lambda: _trained(nn.LayerNorm((5, 2), 1e-3)), S(_D4)),
        (lambda: _trained(nn.LayerNorm(5, bias=False)), S(_D3)),
        (lambda: nn.LayerNorm(2, elementwise_affine=False), S(_D4)),
    ],
    nn.RMSNorm: [(lambda: _trained(nn.RMSNorm((5, 2), 1e-3)),
        S(_D4)), (lambda: nn.RMSNorm(5, elementwise_affine=False), S(_D3))],
    nn.Linear: [(lambda: nn.Linear(3, 4), S(T(2, 3))), (lambda: nn.Linear(3, 4, bias=False), S(input=T(1, 3)))],
    **{
        getattr(nn, f"Conv{n}d"): [
            (lambda n=n: getattr(nn, f"Conv{n}d")(3, 4, 1), S(T(2, 3, *(1,) * n))),
            (lambda n=n: getattr(nn, f"Conv{n}d")(3, 1, 1, 2, bias=False), S(T(1, 3, *(1,) * n))),
        ]
        for n in (1, 2, 3)
    },
    nn.Softmax: [(lambda: nn.Softmax(1), S(X)), (lambda: nn.Softmax(-1), S(X))],
    nn.LogSoftmax: [(lambda: nn.LogSoftmax(1), S(X)), (lambda: nn.LogSoftmax(-1), S(X))],
    nn.Softmax2d: [(nn.Softmax2d, S(_D4)), (nn.Softmax2d, S(_D3))],
}  # fmt: skip


# --- what a call means ----------------------------------------------------------------------------
@dataclasses.dataclass
class Meaning:
    """The vocabulary's reading of one node: a call on real tensors, or a refusal."""

    call: Call | None
    refusal: str
    values: dict[fx.Node, Tensor]

    def run(self) -> Any:
        """Evaluate the meaning in plain torch; the first of several outputs."""
        assert self.call is not None, self.refusal
        operands = [self.values[o] if isinstance(o, fx.Node) else o for o in self.call.operands]
        result = vocabulary.lookup(self.call.op)(*operands, **self.call.attributes)
        return result[0] if isinstance(result, tuple) else result


def meaning(op: str, target: Any, sample: Sample, module: nn.Module | None = None) -> Meaning:
    """What a node ``op``/``target`` with these arguments means; every tensor becomes a placeholder."""
    graph, values = fx.Graph(), {}

    def placeholder(t: Tensor) -> fx.Node:
        for node, value in values.items():
            if value is t:
                return node
        node = graph.placeholder(f"t{len(values)}")
        values[node] = t
        return node

    args, kwargs = pytree.tree_map_only(Tensor, placeholder, (sample.args, sample.kwargs))
    if module is not None:
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        params = {name: placeholder(t.detach()) for name, t in tensors.items()}
    node = graph.create_node(op, target, args, kwargs)
    if module is not None:
        node.meta["fxfuse_params"] = params
    graph.output(node)
    values_only(graph)
    with isolated(), FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in values.values()]
        propagate(graph, {} if module is None else {str(target): module}, fakes)
    last = next(n for n in reversed(graph.nodes) if n.op != "output")
    return Meaning(facts(last).call, facts(last).refusal, values)


def same(a: Any, b: Any) -> bool:
    """Whether two tensors have the same dtype, shape and elements, NaN being equal to NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def overloads(key: str) -> Iterator[torch._ops.OpOverload]:
    """The aten overloads that a key of the table ATEN speaks of, without those that write to ``out``."""
    name, _, overload = key.partition(".")
    packet = getattr(torch.ops.aten, name)
    for each in [overload] if overload else packet.overloads():
        if (name, each) == ("view", "dtype"):  # takes any number for a dtype, and crashes
            continue
        found = getattr(packet, each)
        if not any(a.is_out or "Dimname" in str(a.type) for a in found._schema.arguments):
            yield found


def name_of(function: Any) -> str:
    return str(getattr(function, "__name__", function))


# --- torch's own ----------------------------------------------------------------------------------
def op_infos() -> list[Any]:
    """torch's own tests of the operators that the tables of spellings know."""
    try:
        from torch.testing._internal.common_methods_invocations import op_db
    except ImportError:
        return []
    return [
        info for info in op_db if info.supports_dtype(torch.float64, "cpu") and (info.op in FUNCTIONS or _name(info))
    ]


def _name(info: Any) -> str | None:
    """The method that is meant, where torch tests a lambda."""
    return info.name if info.name in METHODS else None


#: all of torch's samples are of kinds that are refused
ALL_REFUSED = {
    *("div_floor_rounding", "div_trunc_rounding", "round_decimals_0", "round_decimals_3", "round_decimals_neg_3"),
    *("max_reduction_with_dim", "min_reduction_with_dim", "norm_nuc", "constant_pad_nd_"),
    *(f"nn.functional.pad_{mode}" for mode in ("constant", "reflect", "replicate", "replicate_negative", "circular")),
}
