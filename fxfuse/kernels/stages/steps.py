"""What a schedule consists of: the convolution's launch, and the steps in front of it and behind it."""

from __future__ import annotations

import dataclasses

import torch

from fxfuse.instr import Instr, TensorType
from fxfuse.kernels.codegen.chains import layout_of
from fxfuse.kernels.codegen.expression import Expression
from fxfuse.kernels.codegen.reductions import Fold, Rows, Window
from fxfuse.kernels.codegen.statistics import kinds_of
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.specialisation import Shared
from fxfuse.kernels.stages.collapsed import Sums
from fxfuse.kernels.stages.contraction import Contraction
from fxfuse.kernels.stages.emit_bundle import Emitted
from fxfuse.program import Program


@dataclasses.dataclass(frozen=True)
class Launch:
    """The convolution kernel. Names are values of the program.

    ``scales``: the numbers that it multiplies the weights and the bias by.
    ``x_layout``: the memory format of x; "" for none. ``planes``: it may be read as it lies. ``extents``: sizes of
    the convolution's own output, three of them, as in ``layer``. ``stored``: the value that it writes, of the type
    ``kind`` and with ``strides``. ``combine``, ``factor``: what it makes of all residue classes of a position ("",
    "Maximum", "Sum"), or of so many positions per dim (``step``). ``before``, ``after``: the expressions in front
    of that and behind it. ``fold``: the reduction over channels of all that, with the expression ``behind`` it;
    ``squeezed``: the stored value has no dim of channels. ``along``: a reduction over w in front of ``combine``, if
    there is one; ``after`` is behind it then. ``apart``: why a reduction that follows is none of this kernel's.
    ``front``: what is made of elements of x on the way, which in memory are of the dtype ``given``. ``stages`` are for
    a person to read. ``gathers``: the kinds of statistics of which it makes parts of the value; ``keeps``: it stores
    that. ``correlates``: instead of a convolution, products of x with itself make the statistics
    (:mod:`fxfuse.kernels.convolution.correlation`). ``shares``: what it uses of what a first run has made of x and
    the weights.
    """

    layer: Layer
    x: str
    weight: str
    bias: str | None
    dtype: torch.dtype
    bias_dtype: torch.dtype
    extents: tuple[int, int, int]
    stored: str
    kind: TensorType
    strides: tuple[int, ...]
    stages: tuple[str, ...]
    scales: tuple[float, float] = (1.0, 1.0)
    x_layout: str = ""
    planes: bool = False
    combine: str = ""
    factor: float = 1.0
    step: tuple[int, int, int] = (1, 1, 1)
    before: Expression | None = None
    after: Expression | None = None
    fold: Fold | None = None
    behind: Expression | None = None
    squeezed: bool = False
    along: Rows | None = None
    apart: str | None = None
    front: Expression | None = None
    given: torch.dtype | None = None
    gathers: tuple[str, ...] = ()
    keeps: bool = True
    correlates: bool = False
    shares: Shared = Shared.NOTHING

    @property
    def reads(self) -> tuple[str, ...]:
        """Every value that the kernel reads."""
        return tuple(dict.fromkeys([self.x, *self.operands]))

    @property
    def operands(self) -> tuple[str, ...]:
        """What it reads besides x, which may be among it."""
        operands = [f.value for e in self.expressions if e is not None for f in e.fields]
        return (self.weight, *([] if self.bias is None else [self.bias]), *operands)

    @property
    def expressions(self) -> tuple[Expression | None, ...]:
        """Those whose operands its kernels read, in the order in which they are given them."""
        return self.before, self.after, self.behind, self.front

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Spatial sizes of the stored value, three of them."""
        d, h, w = (1, 1, 1, *(s or 0 for s in self.kind.shape[1 if self.squeezed else 2 :]))[-3:]
        return d, h, w

    @property
    def monotone(self) -> bool:
        """Whether only the largest and the smallest value of a maximum go through what is ``before`` it. What that is
        not true of is left to a kernel that float32 has alone."""
        before = self.before
        told = before is not None and before.monotone and (before.always or self.dtype is torch.float32)
        return told and self.combine == "Maximum" and self.along is None

    @property
    def reduces(self) -> bool:
        """Whether it reduces what the convolution makes, over channels or over w."""
        return self.fold is not None or self.along is not None

    @property
    def in_place(self) -> bool:
        """Whether x, of 16-bit numbers, is to lie as rows of channels: none are made unless they have padding."""
        return self.x_layout == "channels_last" and self.dtype is not torch.float32 and self.front is None

    @property
    def layout(self) -> str:
        """The memory format of the stored value: "contiguous" or "channels_last"."""
        return "contiguous" if self.squeezed else layout_of(self.kind.shape, self.strides) or ""

    def __str__(self) -> str:
        if self.correlates:
            return f"statistics of {' > '.join(self.stages)} from products of {self.x} with itself"
        made = [*([str(self.kind)] if self.keeps else []), *self.gathers]
        given = f", from the first run's {self.shares.value}" if self.shares is not Shared.NOTHING else ""
        return f"{' > '.join(self.stages)} -> {' and '.join(made)}{given}"


@dataclasses.dataclass(frozen=True)
class Map:
    """One kernel: reads ``value``, which is ``given``, and operands; stores ``stored``, of the type ``kind``.

    Both are dense, in the memory formats ``layouts``, which differ only where there is a ``window`` or a ``fold``.
    There is at most one of ``window``, ``fold`` and ``rows``, or a ``window`` and a ``fold`` behind it, or ``rows`` and
    a ``window`` behind them. ``before`` is in front of the first of them, ``after`` behind it, ``behind`` the second.
    ``body``: the instructions that it stands for. ``viewed``: ``given`` has the elements of a contiguous value in other
    dims, in which what is reduced are channels.
    """

    value: str
    given: TensorType
    stored: str
    kind: TensorType
    strides: tuple[int, ...]
    layouts: tuple[str, str]
    stages: tuple[str, ...]
    before: Expression | None = None
    window: Window | None = None
    fold: Fold | None = None
    rows: Rows | None = None
    after: Expression | None = None
    behind: Expression | None = None
    body: tuple[Instr, ...] = ()
    viewed: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        operands = [f.value for e in (self.before, self.after, self.behind) if e is not None for f in e.fields]
        return tuple(dict.fromkeys([self.value, *operands]))

    @property
    def makes(self) -> tuple[str, ...]:
        return (self.stored,)

    @property
    def pointwise(self) -> bool:
        """Whether every element is made of the one at its place."""
        return self.window is None and self.fold is None and self.rows is None

    def __str__(self) -> str:
        return f"one kernel: {' > '.join(self.stages)} -> {self.kind}"


@dataclasses.dataclass(frozen=True)
class Gather:
    """The statistics of ``value``: of all ``instrs``, from one pass over it.

    ``layout``: the memory format of ``value``; "" where the kernel that makes it gathers on its way.
    """

    value: str
    kind: TensorType
    layout: str
    instrs: tuple[Instr, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.value,)

    @property
    def makes(self) -> tuple[str, ...]:
        return tuple(o for i in self.instrs for o in i.outs)

    @property
    def gathers(self) -> tuple[str, ...]:
        """Their kinds."""
        return kinds_of(self.instrs)

    def __str__(self) -> str:
        where = f"one pass over {self.value}" if self.layout else "gathered on the way"
        return f"{' and '.join(self.gathers)} of {self.value}, {where}"


@dataclasses.dataclass(frozen=True)
class Torch:
    """Instructions by torch's operators."""

    program: Program

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(n for n, _ in self.program.inputs)

    @property
    def makes(self) -> tuple[str, ...]:
        return self.program.outputs

    def __str__(self) -> str:
        return " > ".join(i.op for i in self.program.body)


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Pointwise operators on small tensors, and views, as one kernel that stands for ``program``.

    ``kinds``, ``strides``: of the outputs, none of which shares memory with an input. ``doubtful``: inputs that torch
    makes, with the strides that the kernel takes them to have; where they have others, torch runs the program.
    """

    program: Program
    made: Emitted
    kinds: tuple[TensorType, ...]
    strides: tuple[tuple[int, ...], ...]
    doubtful: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(n for n, _ in self.program.inputs)

    @property
    def makes(self) -> tuple[str, ...]:
        return self.program.outputs

    @property
    def body(self) -> tuple[Instr, ...]:
        return self.program.body

    def __str__(self) -> str:
        return f"one kernel on small tensors: {' > '.join(i.op for i in self.body)}"


Step = Map | Gather | Torch | Bundle | Sums | Contraction


@dataclasses.dataclass(frozen=True)
class Schedule:
    """``first``, then ``kernel``, if there is one, then ``rest``: the chain's outputs.

    ``ahead``, ``steps``: what ``first`` and ``rest`` are cut into. ``measuring``: the same convolution, run before for
    the statistics of its value alone, or what makes those without it; ``between``: the steps that make of them what
    ``kernel`` reads. See :mod:`fxfuse.kernels.planning.twice`.
    """

    first: Program
    kernel: Launch | None
    rest: Program
    steps: tuple[Step, ...]
    ahead: tuple[Step, ...] = ()
    measuring: Launch | None = None
    between: tuple[Step, ...] = ()

    @property
    def launches(self) -> list[Launch]:
        """The runs of the convolution, in order: two, one or none."""
        return [k for k in (self.measuring, self.kernel) if k is not None]

    def __str__(self) -> str:
        first = [f"first {s}" for s in self.ahead]
        run = self.measuring
        measuring = [f"{'two kernels' if run.correlates else 'one kernel'}: {run}"] if run is not None else []
        again = "one kernel" if run is None else f"then the convolution{'' if run.correlates else ' again'}"
        kernel = [f"{again}: {self.kernel}"] if self.kernel is not None else []
        between, steps = ([f"then {s}" for s in each] for each in (self.between, self.steps))
        return "; ".join([*first, *measuring, *between, *kernel, *steps])
