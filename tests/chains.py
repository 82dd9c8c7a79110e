"""Random models for the property test: source text of a module, grown one stage at a time.

Failures show the module that a person could have written; hypothesis shrinks it stage by stage.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

#: names that the text of a model may use
SPACE = {"torch": torch, "nn": nn, "F": F, "math": math}


@dataclasses.dataclass
class Source:
    """The text of a module in the making, run line by line so that every stage knows its input's shape."""

    dims: int
    train: bool
    members: list[str] = dataclasses.field(default_factory=list)
    lines: list[str] = dataclasses.field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    last: str = "x"

    def text(self) -> str:
        members = "\n".join(f"        {line}" for line in self.members)
        lines = "\n".join(f"        {line}" for line in self.lines)
        return (
            "class Chain(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            f"{members}\n    def forward(self, x, s):\n{lines}\n        return {self.last}"
        )

    def member(self, made: str) -> str:
        """A submodule, or a parameter of the module, by name."""
        name = f"m{len(self.members)}"
        self.members.append(f"self.{name} = {made}")
        return f"self.{name}"

    def add(self, expression: str, inputs: dict[str, Tensor]) -> bool:
        """Append ``name = expression``; False, and nothing changed, where it does not run or is empty."""
        name = f"v{len(self.lines)}"
        kept = len(self.members), self.last
        self.lines.append(f"{name} = {expression}")
        self.last = name
        try:
            with torch.no_grad():
                out = make(self).train(self.train)(**inputs)
            fits = isinstance(out, Tensor) and 0 < out.numel() <= 20000 and out.is_floating_point()
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
            fits = False
        if fits:
            self.shapes[name] = tuple(out.shape)
            return True
        self.lines.pop()
        self.last = kept[1]
        return False


def make(source: Source) -> nn.Module:
    """The module that ``source`` spells, with the same weights every time."""
    space: dict[str, Any] = dict(SPACE)
    exec(source.text(), space)  # noqa: S102 - text made here
    torch.manual_seed(7)
    module: nn.Module = space["Chain"]().double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module


Draw = Callable[[st.SearchStrategy[Any]], Any]


# --- stages: each gives an expression of the value `v` ---------------------------------------------
def _call(name: str, v: str, more: str, draw: Draw) -> str:
    """One of the spellings of a function of one tensor: torch's, F's, or the tensor's own."""
    spellings = [f"{space}.{name}({v}{more})" for space in ("torch", "F") if hasattr(SPACE[space], name)]
    if hasattr(Tensor, name):
        spellings.append(f"{v}.{name}({more.removeprefix(', ')})")
    return str(draw(st.sampled_from(spellings)))


def unary(source: Source, v: str, draw: Draw) -> str:
    names = (
        "abs neg sigmoid tanh relu selu square softsign logsigmoid silu mish hardswish hardsigmoid relu6 sin cos erf"
    )
    return _call(draw(st.sampled_from(names.split())), v, "", draw)


def attributed(source: Source, v: str, draw: Draw) -> str:
    number = draw(st.sampled_from([-1.5, -0.5, 0.1, 0.5, 2.0]))
    positive = abs(number)
    return str(
        draw(
            st.sampled_from(
                [
                    f"F.leaky_relu({v}, {number})",
                    f"F.elu({v}, {positive})",
                    f"F.celu({v}, alpha={positive})",
                    f"F.gelu({v}, approximate={draw(st.sampled_from(['none', 'tanh']))!r})",
                    f"F.hardtanh({v}, {-positive}, {positive})",
                    f"F.hardshrink({v}, {positive})",
                    f"F.softshrink({v}, {positive})",
                    f"F.threshold({v}, {number}, {positive})",
                    f"F.softplus({v}, {positive}, 10)",
                    f"{v}.clamp(min={number})",
                    f"torch.clamp({v}, max={number})",
                    f"torch.clamp({v}, {-positive}, {positive})",
                ]
            )
        )
    )


MODULES = (
    "ReLU() LeakyReLU(0.2) ELU(0.7) GELU() SiLU() Sigmoid() Tanh() Hardswish() PReLU() Identity() Softplus() Mish() "
    "CELU(0.5) ReLU6() Hardtanh(-0.5,0.7) Softsign() LogSigmoid() Threshold(0.1,0.2) Dropout(0.0) Hardsigmoid() SELU()"
).split()  # noqa: SIM905 - a table


def module(source: Source, v: str, draw: Draw) -> str:
    return f"{source.member(f'nn.{draw(st.sampled_from(MODULES))}')}({v})"


def inplace(source: Source, v: str, draw: Draw) -> str:
    written = draw(
        st.sampled_from(["F.relu({v}, inplace=True)", "{v}.mul_(1.5)", "{v}.clamp_(min=-0.5)", "{v}.add_(0.25)"])
    )
    if draw(st.booleans()):
        return f"{source.member('nn.LeakyReLU(0.1, inplace=True)')}({v})"
    return str(written.format(v=v))


def arithmetic(source: Source, v: str, draw: Draw) -> str:
    number = draw(st.sampled_from(["2.0", "-0.5", "3", "0.0", "1"]))
    symbol = draw(st.sampled_from(["+", "-", "*"]))
    shape = source.shapes[v]
    if len(shape) == source.dims + 2 and draw(st.booleans()):
        column = [shape[1], *(1 for _ in range(source.dims))]
        number = source.member(f"nn.Parameter(torch.zeros({column}))")
    choices = [f"{v} {symbol} {number}", f"{number} {symbol} {v}", f"{v} / 2", f"{v} / -4.0", f"1.0 - {v}"]
    return str(draw(st.sampled_from(choices)))


def twice(source: Source, v: str, draw: Draw) -> str:
    """The value itself several times, or an earlier value of the same shape."""
    other = draw(st.sampled_from([n for n, s in source.shapes.items() if s == source.shapes[v]]))
    choices = [f"{v} * torch.sigmoid({v})", f"{v} + {other}", f"{v} * {other}", f"torch.maximum({v}, {other})"]
    choices += [f"torch.where({v} > 0, {v}, {other})", f"({v} + {other} + {v}) * 0.5", f"torch.lerp({v}, {other}, 0.3)"]
    choices += [f"torch.addcmul({v}, {other}, {v}, value=0.5)", f"{v}.masked_fill({other} < 0, 0.25)", f"{v} + s"]
    return str(draw(st.sampled_from(choices)))


def pool(source: Source, v: str, draw: Draw) -> str:
    n = source.dims
    kernel = [draw(st.integers(1, 3)) for _ in range(n)]
    stride = [draw(st.integers(1, 3)) for _ in range(n)]
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    ceil_mode = draw(st.booleans())
    window = f"{tuple(kernel)}, {tuple(stride)}, {draw(st.sampled_from([tuple(padding), (0,) * n]))}"
    sizes = tuple(draw(st.integers(1, 3)) for _ in range(n))
    choices = [
        f"F.max_pool{n}d({v}, {window}, ceil_mode={ceil_mode})",
        f"F.max_pool{n}d({v}, {kernel[0]})",
        f"{source.member(f'nn.MaxPool{n}d({window}, dilation={draw(st.integers(1, 2))}, ceil_mode={ceil_mode})')}({v})",
        f"F.avg_pool{n}d({v}, {window}, ceil_mode={ceil_mode}, count_include_pad={draw(st.booleans())})",
        f"{source.member(f'nn.AvgPool{n}d({kernel[0]})')}({v})",
        f"F.adaptive_avg_pool{n}d({v}, {draw(st.sampled_from([1, sizes]))})",
        f"F.adaptive_max_pool{n}d({v}, {draw(st.sampled_from([1, sizes]))})",
    ]
    return str(draw(st.sampled_from(choices)))


def norm(source: Source, v: str, draw: Draw) -> str:
    shape, n = source.shapes[v], source.dims
    channels = shape[1] if len(shape) > 1 else 1
    affine = draw(st.booleans())
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    trailing = shape[-draw(st.integers(1, len(shape))) :] if shape else (1,)
    momentum = draw(st.sampled_from([0.1, None, 0.5]))
    made = [
        f"nn.BatchNorm{n}d({channels}, momentum={momentum}, affine={affine})",
        f"nn.BatchNorm{n}d({channels}, track_running_stats=False)",
        f"nn.InstanceNorm{n}d({channels}, affine={affine})",
        f"nn.GroupNorm({groups}, {channels}, affine={affine})",
        f"nn.LayerNorm({list(trailing)}, elementwise_affine={affine})",
        f"nn.RMSNorm({list(trailing)}, eps=1e-5)",
    ]
    return f"{source.member(draw(st.sampled_from(made)))}({v})"


def reduction(source: Source, v: str, draw: Draw) -> str:
    rank = len(source.shapes[v])
    dims = tuple(sorted(draw(st.sets(st.integers(0, max(rank - 1, 0)), min_size=1))))
    if rank == source.dims + 2 and draw(st.booleans()):
        dims = draw(st.sampled_from([tuple(range(2, rank)), (1,), (2,)]))
    keep = draw(st.booleans())
    one = draw(st.integers(-rank, max(rank - 1, 0)))
    name = draw(st.sampled_from(["sum", "mean", "amax", "amin", "logsumexp"]))
    choices = [
        f"torch.{name}({v}, dim={dims}, keepdim={keep})",
        f"{v}.{name}({dims}, keepdim={keep})",
        f"{v}.prod({one}, keepdim={keep})",
        f"torch.var({v}, dim={dims}, unbiased=False, keepdim={keep})",
        f"{v}.std({dims}, correction=0, keepdim={keep})",
        f"torch.linalg.vector_norm({v}, dim={dims}, keepdim={keep})",
        f"F.softmax({v}, dim={one})",
        f"torch.log_softmax({v}, {one})",
        f"{v} - {v}.mean({dims}, keepdim=True)",
        f"torch.max({v}, dim={one}, keepdim={keep})[0]",
        f"{v}.min({one}, {keep}).values",
    ]
    return str(draw(st.sampled_from(choices)))


def reshaping(source: Source, v: str, draw: Draw) -> str:
    shape = source.shapes[v]
    order = draw(st.permutations(range(len(shape))))
    choices = [f"{v}.flatten({draw(st.integers(0, max(len(shape) - 1, 0)))})", f"torch.flatten({v}, -1)"]
    choices += [
        f"{v}.unsqueeze(-1)",
        f"{v}.squeeze()",
        f"{v}.permute({tuple(order)})",
        f"{v}.reshape({shape[0] if shape else 1}, -1)",
    ]
    return str(draw(st.sampled_from(choices)))


STAGES: Sequence[Callable[[Source, str, Draw], str]] = (
    unary,
    attributed,
    module,
    inplace,
    arithmetic,
    arithmetic,
    twice,
    pool,
    pool,
    norm,
    norm,
    reduction,
    reduction,
    reshaping,
)


@st.composite
def models(draw: Draw) -> tuple[Source, dict[str, Tensor]]:
    """A transposed convolution and one to six stages behind it, with inputs for it."""
    dims = draw(st.integers(1, 3))
    source = Source(dims, draw(st.booleans()))
    groups = draw(st.sampled_from([1, 1, 2]))
    channels, out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    each = [dims * [draw(st.integers(1, 3))] if draw(st.booleans()) else [draw(st.integers(1, 3)) for _ in range(dims)]]
    kernel = each[0]
    stride = [draw(st.integers(1, 3)) for _ in range(dims)]
    dilation = draw(st.sampled_from([1, 1, 2]))
    padding = [draw(st.integers(0, min(2, dilation * (k - 1)))) for k in kernel]
    extra = [draw(st.integers(0, max(s, dilation) - 1)) for s in stride]
    torch.manual_seed(draw(st.integers(0, 5)))
    x = torch.randn(
        draw(st.integers(1, 3)), channels, *(draw(st.integers(2, 4)) for _ in range(dims)), dtype=torch.float64
    )
    inputs = {"x": x, "s": torch.randn((), dtype=torch.float64)}
    made = (
        f"nn.ConvTranspose{dims}d({channels}, {out}, {tuple(kernel)}, {tuple(stride)}, {tuple(padding)}, "
        f"{tuple(extra)}, {groups}, {draw(st.booleans())}, {dilation})"
    )
    if draw(st.integers(0, 9)) == 0:  # a trace refuses this, so that the aten spellings of an export are met
        source.lines.append("t = [size for size in x.shape]")
    if not source.add(f"{source.member(made)}(x)", inputs):
        source.members[-1] = f"self.m0 = nn.ConvTranspose{dims}d({channels}, {out}, 3, groups={groups})"
        assert source.add("self.m0(x)", inputs)
    for _ in range(draw(st.integers(1, 6))):
        stage = draw(st.sampled_from(STAGES))
        source.add(stage(source, source.last, draw), inputs)
    return source, inputs
