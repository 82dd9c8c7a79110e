"""Every region by itself, on the tensors that it really meets: what runs, the algebra, and the rule that broke it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxfuse.chain import eliminate_dead, no_autocast, to_graph, to_program
from fxfuse.instr import Instr
from fxfuse.kernels.plan import Path
from fxfuse.ops import watch
from fxfuse.patterns import Application, Legality, Settings, apply_rules
from fxfuse.pipeline import Options
from fxfuse.program import Program
from fxfuse.propagate import isolated
from fxfuse.region import Region
from fxfuse.report import RegionReport, Report
from fxfuse.tolerance import tf32_allowed
from fxfuse.verification.comparison import Comparison, Kind, Specials, compare, worst_of

log = logging.getLogger(__name__)

#: runs of eager mode on perturbed inputs, where an error is doubted
SAMPLES = 3


@dataclasses.dataclass(frozen=True)
class BrokenRule:
    """The application of a rule after which a chain computes something else.

    ``number`` counts the applications of the region from 1; ``error`` is the chain's from the original in float64.
    """

    application: Application
    number: int
    error: float

    def __str__(self) -> str:
        a = self.application
        return (
            f"{a.rule} at {a.node} is wrong here: after it the chain is {self.error:.1e} from the original in float64 "
            f"({a.identity}). FXFUSE_DISABLE={a.rule} switches it off; please report it"
        )


@dataclasses.dataclass(frozen=True)
class RegionCheck:
    """One region on the tensors of a real call.

    ``ran`` compares what runs with the chain as the model wrote it; ``reference`` the rewritten chain in torch's
    operators; ``algebra`` the rewritten chain with the original one, both in float64 (None where that does not
    run). Of several outputs each is the worst. ``path`` is the way it ran; ``broken`` the rule at fault.
    """

    anchor: str
    stages: str
    path: Path | None
    ran: Comparison
    reference: Comparison
    algebra: Comparison | None
    broken: BrokenRule | None = None

    @property
    def ok(self) -> bool:
        return self.ran.ok and (self.algebra is None or self.algebra.ok)

    @property
    def reason(self) -> str | None:
        """Whose fault it is where this is not ok, as a sentence."""
        if self.ok:
            return None
        if self.broken is not None:
            return f"region {self.anchor}: the rule {self.broken}"
        if self.algebra is not None and not self.algebra.ok:
            return f"region {self.anchor}: the rewritten chain computes something else; {self.algebra.reason}"
        if not self.reference.ok:
            return f"region {self.anchor}: right in float64, the rewritten chain loses accuracy; {self.ran.reason}"
        what = "its kernels are" if self.path is Path.KERNEL else "what runs it is"
        hint = "; FXFUSE_KERNELS=0 leaves them out" if self.path is Path.KERNEL else ""
        return f"region {self.anchor}: the rewrites are right and {what} not; {self.ran.reason}{hint}; please report it"


def check_regions(
    module: fx.GraphModule, tensors: Sequence[Tensor], report: Report, options: Options, *, where: str = ""
) -> list[RegionCheck]:
    """Run a fused graph node by node and check its regions, without gradients. It may write to ``tensors``.

    ``report`` is the graph's; ``where`` goes before the names of anchors, for a part of a model.
    """
    interpreter = _Interpreter(module, {id(r.region): r for r in report.regions}, options, where)
    with torch.no_grad():
        interpreter.run(*tensors)
    return interpreter.checks


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, reports: dict[int, RegionReport], options: Options, where: str) -> None:
        super().__init__(module)
        self.checks: list[RegionCheck] = []
        self._reports, self._options, self._where = reports, options, where

    def run_node(self, n: fx.Node) -> Any:
        region = n.meta.get("fxfuse_region")
        if region is None:
            return super().run_node(n)
        inputs, _ = self.fetch_args_kwargs_from_env(n)[0]
        with watch() as runs:
            got = super().run_node(n)
        check = _Check(self._reports[id(region)], inputs, self._options)
        path = next((r.path for r in runs if r.region == region), None)
        self.checks.append(check.run(list(got), path, self._where))
        return got


class _Check:
    """A region, its inputs, and both chains in float64."""

    def __init__(self, report: RegionReport, inputs: Sequence[Tensor], options: Options) -> None:
        self.report, self.inputs, self.options = report, inputs, options
        self.region: Region = report.region
        self.specials = specials_of(inputs, options.allow)
        self.wide = self._wide(self.region.original, inputs)

    def run(self, got: list[Tensor], path: Path | None, where: str) -> RegionCheck:
        with no_autocast():
            eager = self.region.original.run(self.inputs)
            reference = self.region.reference(*self.inputs)
        changed = self.region.rewritten != self.region.original
        algebra = self._algebra(self.region.rewritten) if changed else None
        broken = self._broken() if algebra is not None and not algebra.ok else None
        return RegionCheck(
            f"{where}{self.report.anchor}",
            " > ".join(self.report.visible_stages),
            path,
            self._compare(got, eager),
            self._compare(reference, eager),
            algebra,
            broken,
        )

    def _compare(self, got: Sequence[Tensor], eager: Sequence[Tensor]) -> Comparison:
        tf32 = self.inputs[0].is_cuda and tf32_allowed(self.region.precision)

        def one(number: int) -> Comparison:
            truth = self.wide[number] if self.wide is not None else None

            def noise() -> float:
                samples = [self._perturbed(seed)[number] for seed in range(SAMPLES)]
                exact = eager[number] if truth is None else truth
                return max(compare("", Kind.REGION, s, s, exact).own for s in samples)

            e = eager[number]
            return compare(
                self._name(number), Kind.REGION, got[number], e, truth, tf32=tf32, specials=self.specials, noise=noise
            )

        return worst_of([one(i) for i in range(len(eager))])

    def _name(self, number: int) -> str:
        return "its output" if len(self.region.original.outputs) == 1 else f"its output {number}"

    def _perturbed(self, seed: int) -> list[Tensor]:
        with no_autocast():
            return self.region.original.run(perturbed(self.inputs, seed))

    # --- in float64 ---------------------------------------------------------------------------------
    def _wide(self, program: Program, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        try:
            with no_autocast():
                return _without_casts(program).run(widened(inputs))
        except torch.OutOfMemoryError:
            log.info("region %s does not fit into memory in float64", self.report.anchor)
            return None

    def _algebra(self, program: Program) -> Comparison | None:
        """``program`` against the original chain."""
        results = self._wide(program, self.inputs) if self.wide is not None else None
        if results is None or self.wide is None:
            return None

        def one(number: int, got: Tensor, exact: Tensor) -> Comparison:
            def noise() -> float:
                own = [self._wide(self.region.original, perturbed(widened(self.inputs), s)) for s in range(SAMPLES)]
                return max(compare("", Kind.REGION, o[number], o[number], exact).own for o in own if o is not None)

            return compare(self._name(number), Kind.REGION, got, exact, exact, specials=self.specials, noise=noise)

        pairs = zip(results, self.wide, strict=True)
        return worst_of([one(i, got, exact) for i, (got, exact) in enumerate(pairs)])

    def _broken(self) -> BrokenRule | None:
        """The first application after which the chain is off; None where a replay does not tell."""
        for number, application in enumerate(self.report.rules, 1):
            program, applied = replay(self.region.original, self.inputs, self.options, number)
            if [a.rule for a in applied] != [a.rule for a in self.report.rules[:number]]:
                return None
            found = self._algebra(program)
            if found is None:
                return None
            if not found.ok:
                return BrokenRule(application, number, found.error)
        return None


def replay(
    program: Program, inputs: Sequence[Tensor], options: Options, fuel: int
) -> tuple[Program, list[Application]]:
    """``program`` after the first ``fuel`` rewrites, and these."""
    settings = dataclasses.replace(Settings.from_environment(options.allow), fuel=fuel)
    with isolated(), FakeTensorMode():
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in inputs]
        build = to_graph(program, fakes)
        eliminate_dead(build.graph)  # as the first time: outputs of an operator of several that nothing reads
        applied, _ = apply_rules(build, options.rules, settings)
        return to_program(build.graph), applied


# --- tensors --------------------------------------------------------------------------------------
def widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values in float64; whole numbers stay what they are."""
    return [t.detach().double() if t.is_floating_point() else t.detach() for t in tensors]


def perturbed(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Copies in which floating-point values are off by up to a rounding of their dtype; same needs for gradients."""
    return [_perturbed(t, 1000 * seed + i) if t.is_floating_point() else t for i, t in enumerate(tensors)]


def _perturbed(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(tensor.device)
    generator.manual_seed(seed)
    unit = torch.rand(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float64) * 2 - 1
    changed = tensor.detach().double() * (1 + torch.finfo(tensor.dtype).eps * unit)
    return changed.to(tensor.dtype).requires_grad_(tensor.requires_grad)


def specials_of(tensors: Sequence[Tensor], allow: frozenset[Legality]) -> Specials:
    """What must hold of Inf and NaN in results of these tensors."""
    if all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point() or t.is_complex()):
        return Specials.SAME
    return Specials.ANY if Legality.FINITE_ONLY in allow else Specials.EITHER


def _without_casts(program: Program) -> Program:
    """``program`` for float64: what it casts to another floating-point dtype stays in float64."""
    return dataclasses.replace(program, body=tuple(map(_without_cast, program.body)))


def _without_cast(instr: Instr) -> Instr:
    return dataclasses.replace(instr, attributes=tuple((k, _widest(v)) for k, v in instr.attributes))


def _widest(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value
