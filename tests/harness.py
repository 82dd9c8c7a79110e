"""What the tests of the rewrite rules share: programs from a few words, rewriting, comparison with the truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxfuse.chain import Builder, to_graph, to_program
from fxfuse.compare import relative_error
from fxfuse.patterns import Application, Legality, Rejection, Rule, Settings, apply_rules
from fxfuse.program import Program
from fxfuse.tolerance import allowed

#: every legality class, for tests of rules that are off by default
EVERYTHING = frozenset(Legality)


def program(inputs: str, body: str) -> Program:
    """``inputs`` are typed names, ``body`` lines of assignments; the last line names the outputs."""
    *lines, outputs = [line.strip() for line in body.strip().splitlines()]
    text = "\n".join([f"def chain({inputs}):", *(f"    {line}" for line in lines), f"    return {outputs}"])
    return Program.parse(text)[1]


def conv(
    operands: str = "x, w, b",
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    dims: int = 1,
    extent: tuple[int, ...] | None = None,
) -> str:
    """The text of a transposed convolution; one number serves all ``dims`` spatial dims."""
    named = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
    geometry = ", ".join(f"{k}={_each(v, dims)}" for k, v in named.items())
    last = "" if extent is None else f", extent={extent}"
    return f"conv_transpose({operands}, {geometry}, groups={groups}{last})"


def max_pool(
    operand: str,
    kernel: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] = 0,
    *,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    dims: int = 1,
) -> str:
    named = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    geometry = ", ".join(f"{k}={_each(v, dims)}" for k, v in named.items())
    return f"max_pool({operand}, {geometry}, ceil_mode={ceil_mode})"


def avg_pool(
    operand: str,
    kernel: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] = 0,
    *,
    ceil_mode: bool = False,
    divisor: int | None = None,
    dims: int = 1,
) -> str:
    geometry = ", ".join(
        f"{k}={_each(v, dims)}" for k, v in {"kernel": kernel, "stride": stride, "padding": padding}.items()
    )
    return f"avg_pool({operand}, {geometry}, ceil_mode={ceil_mode}, count_include_pad=True, divisor_override={divisor})"


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


# --- rewriting ------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Rewriting:
    """A program, what rules made of it, where they fired and where they refused."""

    original: Program
    rewritten: Program
    applied: list[Application]
    rejected: list[Rejection]

    @property
    def text(self) -> str:
        """The body of the rewritten program: ``v0 = relu(x0); v0``."""
        return body(self.rewritten)

    @property
    def rules(self) -> list[str]:
        return [a.rule for a in self.applied]

    def reason(self, rule: str) -> str:
        """Why ``rule``, which must not have fired, refused; the last near miss of several."""
        assert rule not in self.rules, self.text
        return {r.rule: r.reason for r in self.rejected}[rule]


def body(program: Program) -> str:
    """A program's instructions and outputs, one line each."""
    return "\n".join([*map(str, program.body), ", ".join(program.outputs)])


def rewrite(
    original: Program,
    rules: Sequence[Rule],
    *,
    allow: frozenset[Legality] | None = None,
    disabled: frozenset[str] = frozenset(),
    fuel: int | None = None,
    inputs: Sequence[Tensor] | None = None,
) -> Rewriting:
    """Apply ``rules`` to a copy of ``original``, on fake ``inputs`` of its types where none are given."""
    build = to_graph(original, fakes(original) if inputs is None else inputs)
    return rewrite_graph(build, rules, Settings(allow or Legality.parse(None), disabled, fuel), original)


def rewrite_graph(
    build: Builder, rules: Sequence[Rule], settings: Settings, original: Program | None = None
) -> Rewriting:
    before = to_program(build.graph) if original is None else original
    applied, rejected = apply_rules(build, rules, settings)
    build.graph.lint()
    rewritten = to_program(build.graph)
    rewritten.verify()
    return Rewriting(before, rewritten, applied, rejected)


def fakes(original: Program) -> list[Tensor]:
    with FakeTensorMode():
        return [torch.empty([s or 0 for s in kind.shape], dtype=kind.dtype) for _, kind in original.inputs]


# --- comparing ------------------------------------------------------------------------------------
def data(original: Program, seed: int = 0) -> list[Tensor]:
    """Random inputs; those whose name starts with ``var`` are positive, as variances are."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for name, kind in original.inputs:
        t = torch.randn([s or 0 for s in kind.shape], dtype=torch.float64, generator=generator)
        tensors.append((t.abs() + 0.5 if name.startswith("var") else t).to(kind.dtype))
    return tensors


def agree(result: Rewriting, tensors: Sequence[Tensor] | None = None, *, bitwise: bool = False) -> None:
    """Both programs give the same on ``tensors``: to the bit, or as near to the float64 truth as eager mode."""
    tensors = data(result.original) if tensors is None else tensors
    before, after = result.original.run(tensors), result.rewritten.run(tensors)
    truth = result.original.run([t.double() if t.is_floating_point() else t for t in tensors])
    for a, b, t in zip(before, after, truth, strict=True):
        assert a.dtype is b.dtype and a.shape == b.shape
        if bitwise:
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
        wide = torch.float64 if a.dtype is torch.float64 else torch.float32  # a narrower one has eager mode's error
        own, error = relative_error(a, t), relative_error(b, t)
        assert error <= allowed(own, wide), (result.text, error, own)


def same_special(result: Rewriting, tensors: Sequence[Tensor]) -> None:
    """Inf and NaN come out at the same places, the same ones, and the finite rest agrees."""
    for a, b in zip(result.original.run(tensors), result.rewritten.run(tensors), strict=True):
        assert relative_error(b, a) <= 1e-10, (result.text, a, b)


def same_nonfinite(result: Rewriting, tensors: Sequence[Tensor]) -> None:
    """What is finite is so in both, and agrees; Inf and NaN may take each other's place."""
    for a, b in zip(result.original.run(tensors), result.rewritten.run(tensors), strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()), (result.text, a, b)
        assert relative_error(b[a.isfinite()], a[a.isfinite()]) <= 1e-10


def same_gradients(result: Rewriting, tensors: Sequence[Tensor] | None = None, outputs: int = 1) -> None:
    """The gradients of the first outputs agree in float64, zero where nothing depends on an input.

    Inputs named ``mean...`` and ``var...`` are given statistics, to which torch passes no gradient.
    """
    tensors = data(result.original) if tensors is None else tensors
    assert all(t.dtype is torch.float64 for t in tensors)
    names = [n for n, _ in result.original.inputs]
    needs = [not n.startswith(("mean", "var")) for n in names]
    before, after = (gradients(p, tensors, needs, outputs) for p in (result.original, result.rewritten))
    for name, a, b in zip([n for n, need in zip(names, needs, strict=True) if need], before, after, strict=True):
        scale = max(float(a.abs().max()), 1e-3)
        assert float((a - b).abs().max()) <= 1e-9 * scale, (name, result.text)


def gradients(program: Program, tensors: Sequence[Tensor], needs: Sequence[bool], outputs: int = 1) -> list[Tensor]:
    """Gradients, of the inputs that need them, of a weighted sum of the first outputs."""
    leaves = [t.detach().clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    loss = torch.zeros((), dtype=torch.float64)
    for out in program.run(leaves)[:outputs]:
        loss = loss + (out * torch.linspace(0.5, 2, out.numel(), dtype=torch.float64).reshape(out.shape)).sum()
    wanted = [t for t in leaves if t.requires_grad]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


# --- sampling -------------------------------------------------------------------------------------
NAN, INF = float("nan"), float("inf")


@dataclasses.dataclass(frozen=True)
class Conv:
    """A sampled transposed convolution: the inputs of a program, the call, and the shape of its result."""

    inputs: str
    call: str
    shape: tuple[int, ...]
    dims: int
    batched: bool

    @property
    def channels(self) -> int:
        return self.shape[-self.dims - 1]

    @property
    def column(self) -> str:
        """The type of one value per channel that broadcasts with the result."""
        return f"f64[{', '.join(map(str, (self.channels, *(1 for _ in range(self.dims)))))}]"


def draw_conv(
    draw: st.DataObject,
    *,
    batched: bool | None = True,
    bias: bool | None = None,
    sizes: tuple[int, int] = (3, 6),
    dtype: str = "f64",
) -> Conv:
    """Any stride, padding, output padding, dilation, groups, with a bias or without; kernels of 1 to 3."""
    pick = draw.draw
    dims = pick(st.integers(1, 2))
    with_batch, with_bias = (pick(st.booleans()) if given is None else given for given in (batched, bias))
    groups, per_in, per_out = pick(st.integers(1, 2)), pick(st.integers(1, 2)), pick(st.integers(1, 3))
    geometry: dict[str, list[int]] = {k: [] for k in ("stride", "padding", "output_padding", "dilation")}
    lengths, kernel, out = [], [], []
    for _ in range(dims):
        length, k = pick(st.integers(*sizes)), pick(st.integers(1, 3))
        s, d = pick(st.integers(1, 3)), pick(st.integers(1, 2))
        full = (length - 1) * s + d * (k - 1) + 1
        p, extra = pick(st.integers(0, min((full - 1) // 2, 3))), pick(st.integers(0, max(s, d) - 1))
        for name, value in zip(geometry, (s, p, extra, d), strict=True):
            geometry[name].append(value)
        lengths.append(length)
        kernel.append(k)
        out.append(full - 2 * p + extra)
    batch = (pick(st.integers(1, 3)),) if with_batch else ()
    x, w = (*batch, groups * per_in, *lengths), (groups * per_in, per_out, *kernel)
    inputs = [f"x: {dtype}[{_list(x)}]", f"w: {dtype}[{_list(w)}]"]
    if with_bias:
        inputs.append(f"b: {dtype}[{groups * per_out}]")
    call = conv("x, w, b" if with_bias else "x, w, None", **geometry, groups=groups, dims=dims)
    return Conv(", ".join(inputs), call, (*batch, groups * per_out, *out), dims, with_batch)


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def salted(tensor: Tensor, seed: int, values: Sequence[float] = (NAN, INF, -INF, 0.0), part: float = 0.05) -> Tensor:
    """A copy in which each of ``values`` takes the place of some elements, at least of one."""
    generator = torch.Generator().manual_seed(seed)
    copy = tensor.clone()
    for value in values:
        copy[torch.rand(copy.shape, generator=generator) < part] = value
    place = int(torch.randint(copy.numel(), (), generator=generator))
    copy.view(-1)[place] = values[int(torch.randint(len(values), (), generator=generator))]
    return copy
