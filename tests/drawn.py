"""Random layers with chains around them, of sizes for kernels, written out as Python source.

A :class:`Drawn` is a function of its seed: layer, two to six stages, numerics class, memory format, train or
eval mode, and several input shapes. ``python tests/many_chains.py`` runs them; tests compile their kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from strategies import POINTWISE, Chain
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: numerics classes: dtype, and whether float32 may round its factors to TF32
CLASSES = {
    "tf32": (torch.float32, True),
    "ieee": (torch.float32, False),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}
LAST = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}
#: elements of the convolution's output
LARGEST = 2**21
#: part of the stages that are products with matrices
PRODUCED = 0.04
#: continuous ones: where the others jump, rounding shows
SMOOTH = (
    *("relu", "add", "sub", "mul", "neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sin"),
    *("cos", "erf", "sigmoid", "tanh", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "silu", "mish"),
    *("hardswish", "hardsigmoid", "hardtanh", "softshrink", "tanhshrink", "softplus", "softsign", "log_sigmoid"),
    *("clamp", "minimum", "maximum", "lerp", "addcmul", "div", "square"),
)
NORMS = (
    "nn.BatchNorm{n}d({c})", "nn.BatchNorm{n}d({c}, affine=False)", "nn.InstanceNorm{n}d({c}, affine=True)",
    "nn.InstanceNorm{n}d({c})", "nn.GroupNorm({g}, {c})", "nn.GroupNorm(1, {c}, affine=False)",
    "F.layer_norm({v}, {v}.shape[1:])", "F.layer_norm({v}, {v}.shape[-1:])", "F.layer_norm({v}, {v}.shape[2:])",
    "F.rms_norm({v}, {v}.shape[-1:], None, 1e-3)",
)  # fmt: skip
#: {t} the convolution's stride, or twice that
POOLS = (
    "F.max_pool{n}d({v}, {t})", "F.avg_pool{n}d({v}, {t})", "F.max_pool{n}d({v}, {t}, ceil_mode=True)",
    "F.max_pool{n}d({v}, 2)", "F.avg_pool{n}d({v}, 2)", "F.max_pool{n}d({v}, 3, 2, 1)", "F.avg_pool{n}d({v}, 3, 2, 1)",
    "F.avg_pool{n}d({v}, 3, 2, 1, count_include_pad=False)", "F.avg_pool{n}d({v}, 2, 1)", "F.max_pool{n}d({v}, 3)",
    "F.avg_pool{n}d({v}, 3, 2, 1, ceil_mode=True)", "F.max_pool{n}d({v}, 2, 1, 0, 2)",
    "F.adaptive_avg_pool{n}d({v}, 1)", "F.adaptive_avg_pool{n}d({v}, 3)", "F.adaptive_max_pool{n}d({v}, 2)",
)  # fmt: skip
FOLDS = (
    "{v}.softmax(1)", "{v}.log_softmax(1)", "{v}.logsumexp(1, True)", "{v}.sum(1, keepdim=True)", "{v}.mean(1, True)",
    "{v}.amax(1, True)", "{v}.min(1, True).values", "{v} / (1 + {v}.abs().sum(1, keepdim=True))",
    "{v}.logsumexp(1)", "{v}.sum(1)", "{v}.amax(1)", "{v} / (1 + {v}.norm(dim=1, keepdim=True))", "{v}.var(1)",
)  # fmt: skip
OVER_SPACE = (
    "{v}.mean({space}, keepdim=True)", "{v} - {v}.mean({space}, keepdim=True)", "{v}.amax({space}, True)",
    "{v}.sum({space}, keepdim=True)", "{v} * {v}.mean({space}, keepdim=True).sigmoid()", "{v}.mean({space})",
    "{v}.flatten(2).softmax(-1).reshape({v}.shape)", "{v}.mean((0, *{space}), keepdim=True)", "{v}.flatten(2).mean(-1)",
    "{v} / (1 + {v}.std({space}, correction=0, keepdim=True))", "{v}.softmax(2)", "{v}.mean((1, *{space}))",
    "{v}.log_softmax(-1)", "{v}.logsumexp({space}, True)", "{v} - {v}.amin({space}, True)", "{v}.logsumexp({space})",
    "F.adaptive_max_pool{n}d({v}, 1)", "{v} * ({v}.amax({space}, True) - {v}.mean({space}, keepdim=True)).sigmoid()",
    "{v}.flatten(2).log_softmax(-1).reshape({v}.shape)",
)  # fmt: skip
#: {down}, {up}, {square}: matrices between channels and a few hidden features; {few}, {many}: as vectors
PRODUCTS = (
    "{v} * F.linear(F.relu(F.linear({v}.mean({space}), {down}, {few})), {up}).sigmoid()[(..., *{none})]",
    "{v} * F.linear(F.silu(F.linear({v}.flatten(2).mean(-1), {down})), {up}, {many}).tanh().view(-1, {c}, *{one})",
    "{v} + F.linear(F.linear({v}.amax({space}), {down}), {up}).reshape({v}.shape[0], {c}, *{one})",
    "{v} * F.conv{n}d(F.relu(F.conv{n}d(F.adaptive_avg_pool{n}d({v}, 1), {down}[(..., *{none})], {few})),"
    " {up}[(..., *{none})]).sigmoid()",
    "{v} - F.linear({v}.var({space}, correction=0), {square}).sigmoid()[(..., *{none})]",
    "F.linear({v}.mean({space}), {square}, {many})[(..., *{none})] * {v}.relu()",
)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A chain, how it runs, and what on.

    ``last``: x and the weights have channels as neighbours; every third shape is the other way round.
    ``anchored``: the engine may make the convolution; else torch makes it, and kernels run behind it.
    ``scale``: of x, so that the convolution's results are about one.
    """

    seed: int
    numerics: str
    chain: Chain
    shapes: tuple[tuple[int, ...], ...]
    last: bool
    anchored: bool
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        return CLASSES[self.numerics][0]

    @property
    def allow_tf32(self) -> bool:
        return CLASSES[self.numerics][1]

    def model(self, device: str) -> nn.Module:
        model, _ = self.chain.make(self.dtype)
        if self.last:
            for p in model.parameters():
                p.data = p.data.contiguous(memory_format=LAST.get(p.dim(), torch.contiguous_format))
        return model.to(device)

    def inputs(self, device: str) -> Iterator[Tensor]:
        for i, shape in enumerate(self.shapes):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + i)) * self.scale
            last = self.last != (i == 2)
            yield (
                x.to(self.dtype).to(device).contiguous(memory_format=LAST[x.dim()] if last else torch.contiguous_format)
            )

    def __str__(self) -> str:
        """What a person needs to see it again."""
        return "\n".join([
            f"# python tests/many_chains.py --seed {self.seed}",
            f"# numerics={self.numerics} train={self.chain.train} last={self.last} anchored={self.anchored}",
            f"# x: {' or '.join(map(str, self.shapes))}, randn * {self.scale:.3g}",
            self.chain.source(),
        ])  # fmt: skip


class _Checked(TorchFunctionMode):
    """Without memory, torch's softmax takes a dim that there is not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.softmax:
            args[0].size(args[1])
        return func(*args, **(kwargs or {}))


class _Drawing:
    """A chain in the making; every line is run without memory, for all shapes, so that none is refused later."""

    def __init__(self, seed: int) -> None:
        self.pick = pick = random.Random(seed)
        self.dims = pick.choice([1, 2, 3, 3, 3, 3])
        self.modules: list[tuple[str, str]] = []
        self.parameters: list[tuple[str, tuple[int, ...]]] = []
        self.lines: list[str] = []
        self.before = 0  #: lines in front of the layer
        self.products = random.Random(f"products {seed}")
        self._layer(random.Random(-1 - seed))

    def _layer(self, front: random.Random) -> None:
        """``front``: of what is in front of it."""
        pick, dims = self.pick, self.dims
        while True:
            groups = pick.choice([1, 1, 1, 1, 2, 3])
            self.stride = pick.choice([(1,) * dims, (2,) * dims, (2,) * dims, self._each([1, 2, 3])])
            kernel = pick.choice([self._each([1, 2, 3, 4, 5]), (3,) * dims, (2,) * dims, (4,) * dims])
            dilation = pick.choice([(1,) * dims, (1,) * dims, self._each([1, 2])])
            reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            padding = tuple(pick.randint(0, min(r, 3)) for r in reach)
            extra = tuple(pick.randint(0, max(s, d) - 1) for s, d in zip(self.stride, dilation, strict=True))
            inside = groups * pick.choice([1, 3, 8, 16, 16, 20, 32, 48])
            self.channels = groups * pick.choice([1, 2, 5, 8, 12, 16, 24, 32, 70])
            sizes = [tuple(pick.randint(*self._range(i)) for _ in range(dims)) for i in range(3)]
            made = max(math.prod(a * s + r for a, s, r in zip(each, self.stride, reach, strict=True)) for each in sizes)
            batches = [pick.choice([1, 2, 3]), pick.choice([2, 4, 5]), pick.choice([1, 3])]
            if max(batches) * made * self.channels <= LARGEST:
                break
        self.shapes = tuple((n, inside, *size) for n, size in zip(batches, sizes, strict=True))
        self.scale = 2 / math.sqrt(inside / groups * max(1.0, math.prod(kernel) / math.prod(self.stride)))
        bias = pick.random() < 0.7
        layer = (
            f"nn.ConvTranspose{dims}d({inside}, {self.channels}, {kernel}, {self.stride}, {padding}, {extra}, {groups},"
            f" {bias}, {dilation})"
        )
        self._front(inside, front)
        self._convolve(layer)
        if not self._runs(train=False):  # what a pool leaves of x is too small for it
            self.modules, self.parameters, self.lines, self.before = [], [], [], 0
            self._convolve(layer)

    def _convolve(self, layer: str) -> None:
        name, given = f"m{len(self.modules)}", self._last()
        self.modules.append((name, layer))
        self.lines.append(f"v{len(self.lines)} = self.{name}({given})")

    def _front(self, channels: int, pick: random.Random) -> None:
        """Up to three stages in front of the layer, mostly none."""
        own, made = self.pick, self.channels
        self.pick, self.channels = pick, channels
        for _ in range(pick.choice([0, 0, 0, 0, 1, 2, 3])):
            kind = pick.random()
            self._add(None if kind < 0.6 else NORMS if kind < 0.75 else POOLS[:-3], train=False)
        self.pick, self.channels, self.before = own, made, len(self.lines)

    def _last(self) -> str:
        return f"v{len(self.lines) - 1}" if self.lines else "x"

    def _each(self, values: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.pick.choice(values) for _ in range(self.dims))

    def _range(self, number: int) -> tuple[int, int]:
        """Sizes per dim: the second shape is larger in one dim or two."""
        small, large = {1: ((17, 70), (60, 300)), 2: ((7, 30), (9, 60)), 3: ((5, 15), (5, 24))}[self.dims]
        return large if number == 1 else small

    # --- stages -------------------------------------------------------------------------------------
    def stage(self, train: bool) -> None:
        if self.products.random() < PRODUCED:
            self._product(train)
            return
        kind = self.pick.random()
        tables = ((0.42, None), (0.6, NORMS), (0.78, POOLS), (0.9, FOLDS), (1.0, OVER_SPACE))
        table = next(t for most, t in tables if kind <= most)
        if len(self.lines) < self.before + 3 and max(self.stride) > 1 and kind < 0.2:
            table = POOLS[:3]  # residue classes make these
        self._add(table, train)

    def _product(self, train: bool) -> None:
        own, self.pick = self.pick, self.products
        self._add(PRODUCTS, train)
        self.pick = own

    def _add(self, table: Sequence[str] | None, train: bool) -> None:
        """A line of a ``table``, None for pointwise operators, if it runs."""
        if table is None:
            table = [t for t in POINTWISE[self.pick.choice(SMOOTH)] if "_(" not in t and "True" not in t]
        marks = len(self.modules), len(self.parameters), len(self.lines)
        text = self._filled(self.pick.choice(list(table)))
        self.lines.append(f"v{len(self.lines)} = {text}")
        if not self._runs(train):
            del self.modules[marks[0] :], self.parameters[marks[1] :], self.lines[marks[2] :]

    def _filled(self, text: str) -> str:
        pick, value = self.pick, self._last()
        times = pick.choice([1, 1, 2])
        low, high = pick.choice([-1, -0.5, 0.0]), pick.choice([0.5, 1, 2.0, 6])
        groups = [g for g in (1, 2, 3, 4, 8) if self.channels % g == 0]
        words: dict[str, object] = {
            "{n}": self.dims, "{c}": self.channels, "{g}": pick.choice(groups), "{lo}": low, "{hi}": high,
            "{t}": tuple(s * times for s in self.stride), "{space}": tuple(range(2, self.dims + 2)),
            "{s}": pick.choice([2, 0.5, -1, 1.5, -0.25, 3]), "{p}": pick.choice([1, 0.5, 2.5]),
        }  # fmt: skip
        if "{none}" in text or "{one}" in text:
            words |= {"{none}": (None,) * self.dims, "{one}": (1,) * self.dims}
            many, few = self.channels, pick.choice([1, 3, 8])
            shapes_of = {"{down}": (few, many), "{up}": (many, few), "{square}": (many, many), "{few}": (few,)}
            words |= {w: self._parameter(s) for w, s in {**shapes_of, "{many}": (many,)}.items() if w in text}
        if "{a}" in text:
            words["{a}"] = self._parameter((pick.choice([1, self.channels]),))
        if "{w}" in text:
            shapes = [(self.channels, *[1] * self.dims), (1, self.channels, *[1] * self.dims), (1,)]
            earlier = f"v{pick.randrange(len(self.lines))}" if self.lines else "x"
            words["{w}"] = earlier if pick.random() < 0.5 else self._parameter(pick.choice(shapes))
        for word, meaning in words.items():
            text = text.replace(word, str(meaning))
        if text.startswith("nn."):
            self.modules.append((f"m{len(self.modules)}", text))
            text = f"self.m{len(self.modules) - 1}({{v}})"
        return text.replace("{v}", value)

    def _parameter(self, shape: tuple[int, ...]) -> str:
        self.parameters.append((f"p{len(self.parameters)}", shape))
        return f"self.p{len(self.parameters) - 1}"

    def _runs(self, train: bool) -> bool:
        """Whether the chain so far has results for all shapes."""
        with torch.device("meta"):
            model = self.chain(train).model()
        with contextlib.suppress(RuntimeError, ValueError, IndexError), torch.no_grad(), _Checked():
            results = [model(torch.empty(shape, device="meta")) for shape in self.shapes]
            return all(0 < r.numel() <= LARGEST for r in results)
        return False

    def chain(self, train: bool) -> Chain:
        last = f"v{len(self.lines) - 1}"
        return Chain(
            self.shapes[0], tuple(self.modules), tuple(self.parameters), tuple(self.lines), (last,), train=train
        )


def draw(seed: int) -> Drawn:
    """The chain of a seed."""
    drawing = _Drawing(seed)
    pick = drawing.pick
    train, wanted = pick.random() < 0.5, pick.randint(1, 6)
    for _ in range(3 * wanted):
        if len(drawing.lines) - drawing.before <= wanted:
            drawing.stage(train)
    numerics = ("tf32", "float16", "ieee", "bfloat16", "tf32")[seed % 5]
    return Drawn(
        seed, numerics, drawing.chain(train), drawing.shapes, pick.random() < 0.4, pick.random() < 0.75, drawing.scale
    )
