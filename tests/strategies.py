"""Random models around a transposed convolution, written out as Python source that can be pasted into a test."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Draw = Callable[[Any], Any]
LARGEST = 3000  #: elements of a value


# --- models as source -----------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, repr=False)
class Chain:
    """A model: submodules and parameters by name, and the lines of its forward, one of which is the convolution."""

    shape: tuple[int, ...]
    modules: tuple[tuple[str, str], ...]
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    lines: tuple[str, ...]
    outputs: tuple[str, ...]
    train: bool = False
    export: bool = False

    def __repr__(self) -> str:
        return f"\n{self.source()}\n# train={self.train}, x: {self.shape}"

    def source(self) -> str:
        made = [f"        self.{name} = {text}" for name, text in self.modules]
        made += [f"        self.{name} = nn.Parameter(torch.randn({shape}))" for name, shape in self.parameters]
        decides = (
            ["        if x.shape[0] < 0:", "            return x"] if self.export else []
        )  # no trace survives that
        return "\n".join(
            [
                *("class Model(nn.Module):", "    def __init__(self):", "        super().__init__()", *made, ""),
                *("    def forward(self, x):", *decides, *(f"        {line}" for line in self.lines)),
                f"        return {', '.join(self.outputs)}",
            ]
        )

    def make(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
        """The model and an input: the same ones each time."""
        model = self.model()
        randomize(model)
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return model.to(dtype), x.to(dtype)

    def model(self) -> nn.Module:
        """The model with torch's own parameters."""
        space: dict[str, Any] = {"torch": torch, "F": F, "nn": nn}
        exec(self.source(), space)
        model: nn.Module = space["Model"]()
        return model.train(self.train)


def randomize(module: nn.Module) -> None:
    """Parameters and statistics that are neither zeros nor ones."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=generator) * 0.5)
                if name.endswith("running_var"):
                    t.abs_().add_(0.5)


class Growing:
    """A chain in the making: every line is run at once, so that the next stage knows the shapes."""

    def __init__(self, shape: tuple[int, ...], train: bool) -> None:
        self.shape, self.train = shape, train
        self.modules: list[tuple[str, str]] = []
        self.parameters: list[tuple[str, tuple[int, ...]]] = []
        self.lines: list[str] = []
        self.holder = nn.Module()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.space: dict[str, Any] = {"torch": torch, "F": F, "nn": nn, "self": self.holder, "x": x}
        self.count = 0

    def value(self, name: str) -> Tensor:
        return self.space[name]  # type: ignore[no-any-return]

    def values(self) -> list[str]:
        return [f"v{i}" for i in range(self.count)]

    def module(self, text: str) -> str:
        name = f"m{len(self.modules)}"
        made = eval(text, self.space)
        randomize(made)
        setattr(self.holder, name, made.double().train(self.train))
        self.modules.append((name, text))
        return f"self.{name}"

    def parameter(self, shape: tuple[int, ...]) -> str:
        name = f"p{len(self.parameters)}"
        generator = torch.Generator().manual_seed(3)
        setattr(self.holder, name, nn.Parameter(torch.randn(shape, generator=generator).double() * 0.5))
        self.parameters.append((name, shape))
        return f"self.{name}"

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Take everything back where torch refuses it, or where the value is of no use for a comparison."""
        marks = len(self.modules), len(self.parameters), len(self.lines), self.count
        kept = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.space.items()}
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                yield
            if self.count == marks[3] and len(self.lines) > marks[2]:
                return
            value = self.value(f"v{self.count - 1}")
            good = isinstance(value, Tensor) and 0 < value.numel() <= LARGEST
            if good and (not value.is_floating_point() or bool((value.abs() < 1e4).all())):
                return
        except (RuntimeError, ValueError, TypeError, IndexError):
            pass
        del self.modules[marks[0] :], self.parameters[marks[1] :], self.lines[marks[2] :]
        self.count = marks[3]
        self.space = kept

    def assign(self, expression: str) -> None:
        self.run(f"v{self.count} = {expression}")
        self.count += 1

    def run(self, line: str) -> None:
        exec(line, self.space)
        self.lines.append(line)

    def finish(self, outputs: tuple[str, ...], export: bool) -> Chain:
        modules, parameters = tuple(self.modules), tuple(self.parameters)
        if self.train and any("BatchNorm" in text and "None" in text for _, text in modules):
            export = False  # torch.export refuses momentum=None, which reads the number of batches
        return Chain(self.shape, modules, parameters, tuple(self.lines), outputs, self.train, export)


# --- pointwise operators, in all their spellings --------------------------------------------------
#: {v} a value, {w} another one, {s} a number, {p} a positive one, {lo} < {hi}; nn.* makes a module
POINTWISE: dict[str, tuple[str, ...]] = {
    "relu": ("F.relu({v})", "nn.ReLU()", "torch.relu({v})", "{v}.relu()", "nn.ReLU(inplace=True)", "{v}.relu_()",
             "F.relu({v}, inplace=True)", "torch.relu_({v})"),
    "add": ("{v} + {s}", "{v} + {w}", "torch.add({v}, {s})", "{v}.add({w})", "{s} + {v}", "{v}.add_({s})", "torch.add({w}, {v})"),
    "sub": ("{v} - {s}", "{s} - {v}", "{v} - {w}", "{v}.sub({w})", "torch.rsub({v}, {s})", "{v}.sub_({s})", "{w} - {v}"),
    "mul": ("{v} * {s}", "{v} * {w}", "torch.mul({v}, {w})", "{s} * {v}", "{v}.mul_({s})", "{v}.multiply({w})"),
    "div": ("{v} / {p}", "{p} / ({v}.abs() + 1)", "torch.div({v}, {p})", "{v} / ({w}.abs() + {p})", "{v}.div_({p})"),
    "neg": ("-{v}", "torch.neg({v})", "{v}.neg_()"),
    "abs": ("torch.abs({v})", "{v}.abs()", "abs({v})"),
    "square": ("torch.square({v})", "{v}.square()"),
    "pow": ("{v} ** 2", "torch.pow({v}, 3)", "({v}.abs() + {p}).pow({w})", "({v}.abs() + {p}) ** 0.5", "{p} ** {v}.clamp(-3, 3)"),
    "sign": ("torch.sign({v})",),
    "exp": ("torch.exp({v} * 0.1)", "{v}.clamp(max=2).exp()"),
    "expm1": ("torch.expm1({v} * 0.1)",),
    "log": ("torch.log({v}.abs() + {p})", "({v} * {v} + {p}).log()"),
    "log1p": ("torch.log1p({v}.abs())",),
    "sqrt": ("torch.sqrt({v}.abs() + {p})", "({v}.square() + {p}).sqrt()"),
    "rsqrt": ("torch.rsqrt({v}.abs() + {p})",),
    "reciprocal": ("torch.reciprocal({v}.abs() + {p})",),
    "sin": ("torch.sin({v})", "{v}.sin()"),
    "cos": ("torch.cos({v})", "{v}.cos()"),
    "erf": ("torch.erf({v})",),
    "floor": ("torch.floor({v} * 3)",),
    "ceil": ("torch.ceil({v} * 3)",),
    "round": ("torch.round({v} * 3)",),
    "sigmoid": ("torch.sigmoid({v})", "nn.Sigmoid()", "F.sigmoid({v})", "{v}.sigmoid_()", "{v} * {v}.sigmoid()"),
    "tanh": ("torch.tanh({v})", "nn.Tanh()", "{v}.tanh()", "torch.tanh_({v})"),
    "relu6": ("F.relu6({v})", "nn.ReLU6()"),
    "leaky_relu": ("F.leaky_relu({v}, 0.2)", "nn.LeakyReLU({s})", "F.leaky_relu({v}, 0.1, inplace=True)", "nn.LeakyReLU(0.3, True)"),
    "prelu": ("F.prelu({v}, {a})", "nn.PReLU()", "torch.prelu({v}, {a})"),
    "elu": ("F.elu({v})", "nn.ELU(0.7)", "F.elu_({v}, 0.5)"),
    "celu": ("F.celu({v}, 0.7)", "nn.CELU()"),
    "selu": ("torch.selu({v})", "nn.SELU()"),
    "gelu": ("F.gelu({v})", "F.gelu({v}, approximate='tanh')", "nn.GELU('tanh')"),
    "silu": ("F.silu({v})", "nn.SiLU(inplace=True)"),
    "mish": ("F.mish({v})", "nn.Mish()"),
    "hardswish": ("F.hardswish({v})", "nn.Hardswish(inplace=True)"),
    "hardsigmoid": ("F.hardsigmoid({v})", "nn.Hardsigmoid()"),
    "hardtanh": ("F.hardtanh({v}, {lo}, {hi})", "nn.Hardtanh({lo}, {hi})", "F.hardtanh({v}, {lo}, {hi}, True)"),
    "hardshrink": ("F.hardshrink({v}, 0.3)", "nn.Hardshrink()"),
    "softshrink": ("F.softshrink({v}, 0.3)", "nn.Softshrink(0.2)"),
    "tanhshrink": ("F.tanhshrink({v})", "nn.Tanhshrink()"),
    "threshold": ("F.threshold({v}, {s}, {s})", "nn.Threshold({s}, 0.5)"),
    "softplus": ("F.softplus({v})", "F.softplus({v}, 2, 1.5)", "nn.Softplus(0.5)"),
    "softsign": ("F.softsign({v})", "nn.Softsign()"),
    "log_sigmoid": ("F.logsigmoid({v})", "nn.LogSigmoid()"),
    "clamp": ("torch.clamp({v}, {lo}, {hi})", "{v}.clamp(min={s})", "torch.clamp_max({v}, {s})", "{v}.clip({lo}, {hi})", "{v}.clamp_({lo}, {hi})",
              "torch.clamp({v}, min={w})", "{v}.clamp({lo}, {hi}).clamp(min={s})"),
    "minimum": ("torch.minimum({v}, {w})", "torch.min({v}, {w})"),
    "maximum": ("torch.maximum({v}, {w})", "{v}.maximum({w})"),
    "where": ("torch.where({v} > {s}, {v}, {w})", "torch.where({v} < {w}, {v}, {s})", "torch.where({v} >= {s}, 0.5, {v})"),
    "masked_fill": ("{v}.masked_fill({v} <= {s}, {s})", "{v}.masked_fill({w} != {w}, 0.5)"),
    "eq": ("{v} * ({v} == {v})",),
    "ne": ("{v} * torch.ne({v}, {w})",),
    "le": ("{v} * ({s} <= {v})",),
    "ge": ("{v} * {v}.ge({s})",),
    "lt": ("{v} + ({v} < {w})",),
    "gt": ("{v} * ({v} > {w})",),
    "isnan": ("{v}.masked_fill(torch.isnan({v}), {s})",),
    "isinf": ("{v}.masked_fill(torch.isinf({v} / {w}), {s})",),
    "isfinite": ("torch.where(torch.isfinite({v}), {v}, {s})",),
    "logical_not": ("torch.where(torch.logical_not({v} > {s}), {v}, {w})", "torch.where(~({v} > {s}), {v}, 1.0)"),
    "logical_and": ("{v}.masked_fill(torch.logical_and({v} > {lo}, {v} < {hi}), {s})", "{v}.masked_fill(({v} > {lo}) & ({w} < {hi}), 0)"),
    "logical_or": ("{v}.masked_fill(torch.logical_or({v} < {lo}, {v} > {hi}), {s})",),
    "lerp": ("torch.lerp({v}, {w}, 0.3)", "{v}.lerp({w}, {w}.sigmoid())"),
    "addcmul": ("torch.addcmul({v}, {v}, {w}, value={s})",),
    "addcdiv": ("torch.addcdiv({v}, {w}, {v}.abs() + {p}, value={s})",),
    "cast": ("{v}.to(torch.float32).double()", "{v}.float().to(torch.float64)"),
    "clone": ("{v}.clone()", "nn.Identity()", "F.pad({v}, (0, 0))", "nn.Dropout(0.0)", "{v}.to(torch.float64)", "{v}.contiguous()",
              "F.dropout({v}, 0.5, False)", "nn.Dropout3d(0.0)"),
    "detach": ("{v} * {v}.detach()",),
}  # fmt: skip
INPLACE = ("_(", "inplace=True", ", True)")
NUMBERS = (2, 0.5, -1, 1, 1.5, -0.25, 0.0, 3)


def fill(draw: Draw, g: Growing, template: str, v: str) -> str:
    """A template with its places filled; a module where it makes one."""
    low, high = sorted(draw(st.tuples(st.sampled_from((-1, -0.5, 0.0, 0.25)), st.sampled_from((0.5, 1, 2.0, 6)))))
    filled = template.replace("{lo}", str(low)).replace("{hi}", str(high))
    while "{s}" in filled:
        filled = filled.replace("{s}", str(draw(st.sampled_from(NUMBERS))), 1)
    while "{p}" in filled:
        filled = filled.replace("{p}", str(draw(st.sampled_from((1, 0.5, 2.5)))), 1)
    if "{a}" in filled:  # the slope of prelu: one, or one per channel
        filled = filled.replace("{a}", g.parameter((draw(st.sampled_from((1, *g.value(v).shape[1:2]))),)))
    if "{w}" in filled:
        filled = filled.replace("{w}", other(draw, g, v))
    if filled.startswith("nn."):
        return f"{g.module(filled)}({v})"
    return filled.replace("{v}", v)


def other(draw: Draw, g: Growing, v: str) -> str:
    """A second operand that broadcasts with ``v``: an earlier value, a parameter, the value itself."""
    shape = tuple(g.value(v).shape)
    same = [n for n in g.values() if g.value(n).shape == shape and g.value(n).dtype == g.value(v).dtype]
    channels = tuple(s if d == 1 else 1 for d, s in enumerate(shape))
    shapes = [
        shape,
        channels,
        channels[1:],
        shape[-1:],
        (),
        (1,),
        tuple(1 if d % 2 else s for d, s in enumerate(shape)),
    ]
    kind = draw(st.sampled_from(["parameter", "view", "value", "value"]))
    if kind == "value":
        return str(draw(st.sampled_from(same)))
    wanted = draw(st.sampled_from(shapes))
    if kind == "parameter" or not wanted:
        return g.parameter(wanted)
    flat, turned = g.parameter((math.prod(wanted),)), g.parameter(wanted[::-1])
    views = [
        f"{flat}.view{wanted}",
        f"{turned}.permute{tuple(reversed(range(len(wanted))))}",
        f"{flat}[:, None].reshape({wanted})",
    ]
    if max(wanted) == math.prod(wanted):
        views.append(f"{flat}[{', '.join(':' if s == max(wanted) else 'None' for s in wanted)}]")
    return str(draw(st.sampled_from(views)))


def pointwise(draw: Draw, g: Growing, v: str) -> str:
    return fill(draw, g, draw(st.sampled_from(POINTWISE[draw(st.sampled_from(sorted(POINTWISE)))])), v)


# --- pools, norms, reductions, shapes -------------------------------------------------------------
def _sizes(draw: Draw, n: int, low: int, high: int) -> Any:
    one = st.integers(low, high)
    return draw(one) if draw(st.booleans()) else tuple(draw(one) for _ in range(n))


def pool(draw: Draw, g: Growing, v: str) -> str | None:
    n = g.value(v).dim() - 2
    if n not in (1, 2, 3):
        return None
    kind = draw(st.sampled_from(["max", "avg", "adaptive_avg", "adaptive_max"]))
    if kind.startswith("adaptive"):
        size = _sizes(draw, n, 1, 3)
        if n > 1 and draw(st.booleans()):
            size = (None, *size[1:]) if isinstance(size, tuple) else 1
        name = f"adaptive_{kind[9:]}_pool{n}d"
        module = f"nn.Adaptive{kind[9:].capitalize()}Pool{n}d({size})"
        return fill(draw, g, module, v) if draw(st.booleans()) else f"F.{name}({v}, {size})"
    kernel, stride = _sizes(draw, n, 1, 3), draw(st.sampled_from([None, 1, 2, 3]))
    smallest = kernel if isinstance(kernel, int) else min(kernel)
    padding, ceil = draw(st.integers(0, smallest // 2)), draw(st.booleans())
    if kind == "max":
        arguments = f"{kernel}, {stride}, {padding}, {draw(st.sampled_from([1, 1, 1, 2]))}, ceil_mode={ceil}"
    else:
        arguments = f"{kernel}, {stride}, {padding}, {ceil}, {draw(st.booleans())}"
        arguments += f", {draw(st.sampled_from([None, None, 3]))}" if n > 1 else ""
    if draw(st.booleans()):
        return f"F.{kind}_pool{n}d({v}, {arguments})"
    return fill(draw, g, f"nn.{kind.capitalize()}Pool{n}d({arguments})", v)


def norm(draw: Draw, g: Growing, v: str) -> str | None:
    shape = tuple(g.value(v).shape)
    n, affine = len(shape) - 2, draw(st.booleans())
    if len(shape) < 2:
        return None
    c, eps = shape[1], draw(st.sampled_from([1e-5, 1e-2]))
    kind = draw(st.sampled_from(["batch", "group", "instance", "layer", "rms"]))
    trailing = shape[draw(st.integers(1, len(shape) - 1)) :]
    groups = draw(st.sampled_from([d for d in (1, c, 2, 3) if c % d == 0]))
    functional = draw(st.booleans())
    weight, bias = (g.parameter((c,)), g.parameter((c,))) if functional and affine else ("None", "None")
    if kind == "batch" and 0 <= n <= 3:
        if functional and n:
            return f"F.batch_norm({v}, None, None, {weight}, {bias}, True, 0.1, {eps})"
        momentum, track = draw(st.sampled_from([0.1, None, 0.7])), draw(st.sampled_from([True, True, False]))
        return fill(draw, g, f"nn.BatchNorm{max(n, 1)}d({c}, {eps}, {momentum}, {affine}, {track})", v)
    if kind == "group":
        if functional:
            return f"F.group_norm({v}, {groups}, {weight}, {bias}, {eps})"
        return fill(draw, g, f"nn.GroupNorm({groups}, {c}, {eps}, {affine})", v)
    if kind == "instance" and 1 <= n <= 3:
        if functional:
            return f"F.instance_norm({v}, weight={weight}, bias={bias}, eps={eps})"
        return fill(draw, g, f"nn.InstanceNorm{n}d({c}, {eps}, affine={affine})", v)
    if kind == "layer":
        if functional:
            return f"F.layer_norm({v}, {trailing}, {g.parameter(trailing) if affine else None}, None, {eps})"
        return fill(draw, g, f"nn.LayerNorm({trailing}, {eps}, {affine})", v)
    if functional:
        return f"F.rms_norm({v}, {trailing}, {g.parameter(trailing) if affine else None}, {eps})"
    return fill(draw, g, f"nn.RMSNorm({trailing}, {eps}, {affine})", v)


def _dims(draw: Draw, rank: int) -> tuple[int, ...]:
    spatial = tuple(range(2, rank))
    subsets = st.lists(st.integers(-rank, rank - 1), min_size=1, max_size=rank, unique_by=lambda d: d % rank).map(tuple)
    return tuple(draw(st.one_of(st.just(spatial or (0,)), subsets, st.just((1 % rank,)))))


REDUCTIONS = (
    "{v}.mean({dims}, keepdim={k})", "torch.mean({v}, {dims}, {k})", "{v}.sum({dims}, {k})", "torch.sum({v}, dim={dims}, keepdim={k})", "{v}.amax({dims}, {k})",
    "torch.amin({v}, {dims}, {k})", "torch.logsumexp({v}, {dims}, {k})", "{v}.var({dims}, keepdim={k})", "torch.var({v}, {dims}, correction=0, keepdim={k})",
    "({v} + {v}.std({dims}, unbiased=False, keepdim=True))", "torch.std({v}, {dims}, keepdim={k})", "torch.linalg.vector_norm({v}, {ord}, {dims}, {k})",
    "torch.norm({v}, {ord}, {dims}, {k})", "{v}.max({dim}, {k}).values", "{v}.min({dim}, {k})[0]", "torch.max({v}, {dim}, keepdim={k})[0]", "torch.prod({v}, {dim}, {k})",
    "{v} - {v}.mean({dims}, keepdim=True)", "{v} / ({v}.abs().amax({dims}, keepdim=True) + 1)", "{v} * torch.rsqrt({v}.square().mean({dims}, keepdim=True) + 1)",
    "F.softmax({v}, dim={dim})", "{v}.softmax({dim})", "torch.log_softmax({v}, {dim})", "nn.Softmax({dim})", "nn.LogSoftmax({dim})", "F.softmax({v} + {s}, {dim})",
    "F.normalize({v}, dim={dim})", "F.normalize({v}, {ord}, {dims}, 0.5)", "{v} / {v}.norm(dim={dim}, keepdim=True).clamp_min(1e-3).expand_as({v})",
    "{v}.sum({dim}, {k})", "{v}.max()", "{v}.mean()", "{v}.sum()",
)  # fmt: skip


def reduction(draw: Draw, g: Growing, v: str) -> str | None:
    rank = g.value(v).dim()
    if rank == 0:
        return None
    template = draw(st.sampled_from(REDUCTIONS)).replace("{k}", str(draw(st.sampled_from([True, True, False]))))
    template = template.replace("{dims}", str(_dims(draw, rank))).replace(
        "{dim}", str(draw(st.integers(-rank, rank - 1)))
    )
    return fill(draw, g, template.replace("{ord}", str(draw(st.sampled_from(["2", "1", "3", "float('inf')"])))), v)


def product(draw: Draw, g: Growing, v: str) -> str | None:
    """Squeeze and excitation, by linear layers or by convolutions of one position."""
    shape = tuple(g.value(v).shape)
    n, hidden = len(shape) - 2, draw(st.integers(1, 3))
    if n not in (1, 2, 3) or not g.value(v).dtype.is_floating_point:
        return None
    space, ones = tuple(range(2, n + 2)), (1,) * n
    weights = [g.parameter((hidden, shape[1])), g.parameter((shape[1], hidden))]
    bias = draw(st.sampled_from([None, g.parameter((hidden,))]))
    if draw(st.booleans()):
        inside = f"F.relu(F.linear({v}.mean({space}), {weights[0]}, {bias}))"
        return f"{v} * F.linear({inside}, {weights[1]}).sigmoid().view({v}.shape[0], {shape[1]}, *{ones})"
    weights = [f"{w}[(..., *{(None,) * n})]" for w in weights]
    inside = f"F.conv{n}d({v}.mean({space}, keepdim=True), {weights[0]}, {bias})"
    return f"{v} * F.conv{n}d({inside}.relu(), {weights[1]}).sigmoid()"


SHAPES = (
    "{v}.flatten(1)", "torch.flatten({v}, 2)", "nn.Flatten()", "{v}.unsqueeze({new})", "torch.squeeze({v})", "{v}.squeeze({dim})", "{v}.transpose({dim}, {dim2})",
    "torch.transpose({v}, {dim}, {dim2})", "{v}.permute({order})", "torch.permute({v}, ({order}))", "{v}.reshape({v}.shape[0], -1)", "{v}.view({v}.shape[0], -1)",
    "{v}.permute({order}).contiguous()", "{v}.flatten(2).softmax(-1).reshape({v}.shape)", "{v}.view({v}.size())", "torch.reshape({v}, (-1,))",
    "{v}.unflatten({dim}, (1, -1))", "{v}[:, None]", "{v}[..., None]", "{v}.mean(({dim},), keepdim=True).view({v}.shape[0], -1)",
)  # fmt: skip


def shape(draw: Draw, g: Growing, v: str) -> str | None:
    rank = g.value(v).dim()
    if rank == 0:
        return None
    order = ", ".join(map(str, draw(st.permutations(range(rank)))))
    dims = st.integers(-rank, rank - 1)
    template = draw(st.sampled_from(SHAPES)).replace("{order}", order).replace("{new}", str(draw(st.integers(0, rank))))
    return fill(draw, g, template.replace("{dim}", str(draw(dims))).replace("{dim2}", str(draw(dims))), v)


#: what the rewrite rules look for: {c} a parameter of one value per channel, {n} the number of spatial dims, {space} these
ALGEBRA = (
    "{v} * {s}", "{v} / {p}", "{v} + {s}", "{v} - {s}", "{s} - {v}", "-{v}", "{v} * {c}", "{v} + {c}", "{v} - {c}", "{v} / ({c}.abs() + {p})",
    "F.relu({v})", "{v}.clamp({lo}, {hi})", "nn.LeakyReLU(0.3)", "{v}.clone()", "F.relu6({v})", "F.hardtanh({v}, {lo}, {hi})",
    "nn.BatchNorm{n}d({ch})", "nn.BatchNorm{n}d({ch})", "nn.BatchNorm{n}d({ch}, affine=False)", "nn.InstanceNorm{n}d({ch})", "nn.GroupNorm({ch}, {ch})",
    "F.max_pool{n}d({v}, 2)", "F.max_pool{n}d({v}, 3, 2, 1)", "F.max_pool{n}d({v}, 2, 1)", "F.max_pool{n}d({v}, 2, 2, 1)", "nn.MaxPool{n}d(3, 2, ceil_mode=True)",
    "F.avg_pool{n}d({v}, 2)", "F.avg_pool{n}d({v}, 2, 1)", "F.avg_pool{n}d(F.avg_pool{n}d({v}, 2), {avg})", "F.max_pool{n}d(F.max_pool{n}d({v}, {max}), {max})", "F.max_pool{n}d(F.max_pool{n}d({v}, {max}), {max})", "F.adaptive_avg_pool{n}d({v}, 1)", "nn.AdaptiveAvgPool{n}d(2)",
    "{v}.mean({space}, keepdim=True)", "{v}.mean({space})", "{v}.sum({space}, True)", "{v}.mean(2, True)", "{v}.mean(-1)", "{v}.sum(1, keepdim=True)", "{v}.mean(1)",
    "torch.softmax({v} + {s}, 1)", "F.log_softmax({v} - {s}, -1)", "{v}.clamp({lo}, {hi}) * {p}",
)  # fmt: skip


def algebra(draw: Draw, g: Growing, v: str) -> str | None:
    """An operator with which a rule can do something; the value has space."""
    shape = tuple(g.value(v).shape)
    n = len(shape) - 2
    if n not in (1, 2, 3):
        return None
    template = draw(st.sampled_from(ALGEBRA)).replace("{n}", str(n)).replace("{ch}", str(shape[1]))
    while "{max}" in template:
        template = template.replace("{max}", draw(st.sampled_from(("2, 1", "2", "3, 2, 1", "3, 1, 1", "1, 2"))), 1)
    template = template.replace("{avg}", draw(st.sampled_from(("2, 1", "2", "3, 1", "1"))))
    if "{c}" in template:
        view = draw(st.booleans())
        column = (shape[1], *(1 for _ in range(n)))
        template = template.replace("{c}", f"{g.parameter(column[:1])}.view{column}" if view else g.parameter(column))
    return fill(draw, g, template.replace("{space}", str(tuple(range(2, n + 2)))), v)


OUTSIDE = (
    "torch.cumsum({v}, 0)", "torch.roll({v}, 1, -1)", "{v}.flip(0)", "torch.atan({v})", "{v}[..., :1]", "torch.cat([{v}, {v}], 0)",
    "nn.Dropout(0.5)", "F.dropout({v}, 0.3, True)", "torch.cummax({v}, 0)[0]", "{v}.tile(1)", "{v}[:]", "torch.randn_like({v}) * {v}",
    "torch.atan2({v}, {v}.abs() + 1)", "torch.diff({v}, dim=0, append={v}[:1])",
)  # fmt: skip


def outside(draw: Draw, g: Growing, v: str) -> str:
    """An operator that is not in the vocabulary: the region must end, or go around it."""
    return fill(draw, g, draw(st.sampled_from(OUTSIDE)), v)


def convolution(draw: Draw, g: Growing, v: str) -> str | None:
    """A transposed convolution with random arguments over all dims but the first two."""
    n, cin = g.value(v).dim() - 2, g.value(v).shape[1] if g.value(v).dim() > 1 else 0
    if n not in (1, 2, 3):
        return None
    groups = draw(st.sampled_from([1, 1, cin]))
    cout = groups * draw(st.integers(1, 3 if groups == 1 else 2))
    kernel, stride, dilation = _sizes(draw, n, 1, 3), _sizes(draw, n, 1, 3), draw(st.sampled_from([1, 1, 1, 2]))
    padding = draw(st.integers(0, 1))
    smallest = min((stride,) if isinstance(stride, int) else stride)
    extra = draw(st.integers(0, max(smallest, dilation) - 1))
    arguments = f"{cin}, {cout}, {kernel}, {stride}, {padding}, {extra}, {groups}, {draw(st.booleans())}, {dilation}"
    return fill(draw, g, f"nn.ConvTranspose{n}d({arguments})", v)


WRITES = (
    "{v}[..., 0] = {s}",
    "{v}.cumsum_(-1)",
    "{v} += {s}",
    "{v} *= {w}",
    "{v}.zero_()",
    "{v}.clamp_(min={s})",
    "F.relu({v}, inplace=True)",
)
KINDS: tuple[Any, ...] = (
    pointwise,
    pointwise,
    pointwise,
    pool,
    norm,
    reduction,
    shape,
    pointwise,
    outside,
    convolution,
    product,
)
ALGEBRAIC: tuple[Any, ...] = (algebra, algebra, algebra, algebra, algebra, pool, pointwise)


#: what may be in front of a convolution
FRONT: tuple[Any, ...] = (pointwise, pointwise, pool, norm, outside)


def front(draw: Draw, g: Growing) -> None:
    """Up to three stages in front of the convolution, mostly none. Their values keep the dims that it takes."""
    for _ in range(draw(st.sampled_from([0] * 6 + [1, 2, 3]))):
        with g.attempt():
            if not g.count:
                g.assign("x.clone()")  # others write to it in place
                continue
            v = draw(st.sampled_from(g.values()))
            text = draw(st.sampled_from(FRONT))(draw, g, v)
            if text is not None:
                g.assign(text)
                made = g.value(f"v{g.count - 1}")
                if made.dim() != g.value("x").dim() or made.dtype != g.value("x").dtype:
                    raise ValueError("a convolution takes another value")


@st.composite
def chains(draw: Draw, stages: int = 6, in_line: bool | None = None) -> Chain:
    """A transposed convolution in one to three dims, sometimes with something in front, then up to ``stages`` stages.

    ``in_line``: each stage takes the one before it, and most are such that a rule applies; drawn where None.
    """
    n = draw(st.integers(1, 3))
    if in_line is None:
        in_line = draw(st.booleans())
    size = {1: 8, 2: 5, 3: 4}[n] if in_line else {1: 6, 2: 4, 3: 3}[n]
    batch, cin = draw(st.sampled_from([2, 1, 3])), draw(st.sampled_from([2, 1, 4]))
    g = Growing((batch, cin, *(draw(st.integers(1, size)) for _ in range(n))), draw(st.booleans()))
    g.space["v"] = g.space["x"]
    front(draw, g)
    before = g.count
    while g.count == before:
        with g.attempt():
            g.assign(str(convolution(draw, g, f"v{g.count - 1}" if g.count else "x")))
    wanted = len(g.lines) - 1 + draw(st.integers(1, stages))
    for _ in range(2 * wanted):  # some attempts come to nothing
        if len(g.lines) > wanted:
            break
        values = [v for v in g.values()[before:] if g.value(v).is_floating_point()]
        last = in_line or draw(st.sampled_from([True, True, True, False]))
        v = values[-1] if last else draw(st.sampled_from(values))
        with g.attempt():
            if draw(st.sampled_from([False] * 14 + [True])):
                g.run(fill(draw, g, draw(st.sampled_from(WRITES)), v))
                continue
            text = draw(st.sampled_from(ALGEBRAIC if in_line else KINDS))(draw, g, v)
            if text is not None:
                g.assign(text)
    final = f"v{g.count - 1}"
    more = (
        draw(st.lists(st.sampled_from(g.values()), max_size=2, unique=True))
        if draw(st.sampled_from([0, 0, 0, 1]))
        else []
    )
    return g.finish((*(m for m in more if m != final), final), draw(st.sampled_from([False] * 7 + [True])))
