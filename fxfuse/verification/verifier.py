"""Compare ways to run a model: outputs, gradients, what is written to, and every region by itself.

The truth is the model in float64. An optimised result may err by twice eager mode's own error, or by what
rounding explains in its dtype (:mod:`fxfuse.tolerance`), whichever is more.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxfuse.capture import CallForm, Capture
from fxfuse.chain import no_autocast
from fxfuse.compare import fresh, relative_error
from fxfuse.ops import watch
from fxfuse.pipeline import Options
from fxfuse.report import Report
from fxfuse.state import State
from fxfuse.tolerance import tf32_allowed
from fxfuse.verification.comparison import Comparison, Kind, Specials, compare
from fxfuse.verification.outcome import Outcome, Way, named_tensors, run
from fxfuse.verification.regions import SAMPLES, RegionCheck, check_regions, perturbed, specials_of, widened
from fxfuse.verification.report import VerifyReport

log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Baseline:
    """Eager mode's outcome and the truth's, without gradients or with them."""

    gradients: bool
    eager: Outcome
    truth: Outcome | None
    samples: list[Outcome] | None = None  #: eager mode with perturbed inputs and parameters, once they are asked for


@dataclasses.dataclass(frozen=True)
class _Terms:
    """What is asked of every tensor: of its Inf and NaN, and of float32 on a GPU."""

    specials: Specials
    tf32: bool


class Verifier:
    """The original on one set of arguments, against which any number of optimised ways can be checked."""

    def __init__(self, original: Way, form: CallForm, tensors: Sequence[Tensor]) -> None:
        """Run ``original`` in its own dtype and in float64, with gradients where these are on and needed."""
        self.original, self.form, self.tensors = original, form, list(tensors)
        self.name = type(original.module).__name__
        self.truth = "float64"
        self.dtypes: dict[str, torch.dtype] = {}
        self.baselines = [self._baseline(gradients=False)]
        needed = any(t.requires_grad for t in (*tensors, *named_tensors(original.module).values()))
        if torch.is_grad_enabled() and needed:
            self.baselines.append(self._baseline(gradients=True))

    def _baseline(self, *, gradients: bool) -> _Baseline:
        eager = run(self.original, self.form, self.tensors, {} if gradients else None)
        if gradients:
            self.dtypes = {n: t.dtype for n, t in eager.leaves.items() if isinstance(t, Tensor)}
        if eager.drew:
            self.truth = "eager mode (it draws random numbers)"
        return _Baseline(gradients, eager, self._exact(gradients) if self.truth == "float64" else None)

    def _exact(self, gradients: bool) -> Outcome | None:
        """The outcome in float64; None where the model does not run in it."""
        try:
            with no_autocast():
                model = copy.deepcopy(self.original.module).double()
                wide = [w.requires_grad_(t.requires_grad) for w, t in zip(self._wide(), self.tensors, strict=True)]
                return run(_called(model), self.form, wide, self.dtypes if gradients else None)
        except torch.OutOfMemoryError:
            self.truth = "eager mode (float64 does not fit into memory)"
        except Exception as error:  # noqa: BLE001 - a model need not run in another dtype than its own
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.truth = f"eager mode (it does not run in float64: {line})"
        log.info("%s is compared with %s", self.name, self.truth)
        return None

    def _wide(self) -> list[Tensor]:
        return [t.clone() if w is t else w for w, t in zip(widened(self.tensors), self.tensors, strict=True)]

    # --- checking -----------------------------------------------------------------------------------
    def check(
        self,
        optimised: Way,
        *,
        regions: Callable[[], list[RegionCheck]] | None = None,
        options: Options | None = None,
    ) -> VerifyReport:
        """Compare ``optimised``; ``regions`` gives the checks of its regions after it ran."""
        report = VerifyReport(self.name, self.truth)
        options = options or Options()
        held = [*self.tensors, *named_tensors(self.original.module).values()]
        terms = _Terms(specials_of(held, options.allow), tf32_allowed(options.precision))
        ran = 0
        for baseline in self.baselines:
            try:
                got, runs = self._run(optimised, baseline)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - a failure of the optimised model is a finding
                what = "a backward or forward" if baseline.gradients else "a forward"
                report.problems.append(f"{what} of the optimised model fails with {type(error).__name__}: {error}")
                continue
            ran = max(ran, runs)
            self._compare(report, baseline, got, terms)
        if regions is not None:
            report.regions = regions()
        if not ran:
            report.notes.append("no region of fxfuse ran: the optimised model may be the original")
        if len(self.baselines) == 1:
            report.notes.append("gradients were not compared: they are switched off, or nothing needs one")
        return report

    def _run(self, optimised: Way, baseline: _Baseline) -> tuple[Outcome, int]:
        """The outcome of a call, and how many regions ran."""
        dtypes = self.dtypes if baseline.gradients else None
        run(optimised, self.form, self.tensors, dtypes)  # the first call may be the model's own
        with watch() as runs:
            return run(optimised, self.form, self.tensors, dtypes), len(runs)

    def _compare(self, report: VerifyReport, baseline: _Baseline, got: Outcome, terms: _Terms) -> None:
        eager, suffix = baseline.eager, ", with gradients" if baseline.gradients else ""
        report.problems += [f"{p}{suffix}" for p in _problems(got, eager)]
        kinds = (
            (Kind.OUTPUT, got.leaves, eager.leaves, suffix),
            (Kind.GRADIENT, got.gradients, eager.gradients, ""),
            (Kind.STATE, got.written, eager.written, suffix),
        )
        for kind, found, wanted, after in kinds:
            for name in dict.fromkeys((*wanted, *found)):
                title = f"{name}{' afterwards' if kind is Kind.STATE else ''}{after}"
                if (name in found) != (name in wanted):
                    problem = _UNEXPECTED[kind] if name in found else _MISSING[kind]
                    report.comparisons.append(Comparison(title, kind, "", problem=problem))
                elif found[name] is not None or wanted[name] is not None:
                    report.comparisons.append(self._one(title, name, kind, found[name], wanted[name], baseline, terms))

    def _one(
        self, title: str, name: str, kind: Kind, got: Any, wanted: Any, baseline: _Baseline, terms: _Terms
    ) -> Comparison:
        if (got is None) != (wanted is None):
            return Comparison(title, kind, "", problem=(_UNEXPECTED if wanted is None else _MISSING)[kind])
        truth = baseline.truth.tensors().get(name) if baseline.truth is not None else None
        return compare(
            title,
            kind,
            got,
            wanted,
            truth if isinstance(truth, Tensor) and isinstance(wanted, Tensor) else None,
            tf32=terms.tf32 and isinstance(wanted, Tensor) and wanted.is_cuda,
            specials=terms.specials,
            noise=lambda: self._noise(name, wanted if truth is None else truth, baseline),
        )

    def _noise(self, name: str, truth: Tensor, baseline: _Baseline) -> float:
        """The largest error of eager mode over a few perturbations of inputs and parameters."""
        if baseline.samples is None:
            baseline.samples = list(self._perturbed(baseline.gradients))
        found = [s.tensors().get(name) for s in baseline.samples]
        return max((relative_error(t, truth) for t in found if isinstance(t, Tensor)), default=0.0)

    def _perturbed(self, gradients: bool) -> Iterator[Outcome]:
        for seed in range(SAMPLES):
            try:
                model = copy.deepcopy(self.original.module)
            except Exception:  # noqa: BLE001 - a model need not be one that can be copied
                return
            tensors = named_tensors(model)
            with torch.no_grad():
                for tensor, other in zip(tensors.values(), perturbed(list(tensors.values()), seed), strict=True):
                    tensor.copy_(other)
            given = perturbed(self.tensors, seed + SAMPLES)
            yield run(_called(model), self.form, given, self.dtypes if gradients else None)


_MISSING = {
    Kind.OUTPUT: "the optimised model has no such output",
    Kind.GRADIENT: "no gradient arrives where the original has one",
    Kind.STATE: "the original writes to it, the optimised model does not",
}
_UNEXPECTED = {
    Kind.OUTPUT: "the original has no such output",
    Kind.GRADIENT: "a gradient arrives where the original has none",
    Kind.STATE: "the optimised model writes to it, the original does not",
}


def _problems(got: Outcome, eager: Outcome) -> list[str]:
    """What differs beside tensors."""
    found = []
    if got.attributes != eager.attributes:
        names = sorted(set(got.attributes) ^ set(eager.attributes))
        found.append(f"a call changes the attributes {', '.join(names)} in one of the two models")
    same = len(got.generators) == len(eager.generators)
    if not same or any(not torch.equal(a, b) for a, b in zip(got.generators, eager.generators, strict=True)):
        found.append("it draws other random numbers than the original")
    return found


def _called(module: nn.Module) -> Way:
    return Way(lambda args, kwargs: module(*args, **kwargs), module)


# --- while optimising -----------------------------------------------------------------------------
def check(
    model: nn.Module,
    capture: Capture,
    fused: Callable[..., Any],
    lifted: Sequence[Tensor],
    tensors: Sequence[Tensor],
    report: Report,
    options: Options,
) -> VerifyReport:
    """Verify a freshly fused graph; VerificationError, which names the rule at fault, where it is off.

    ``fused`` is the ``forward`` of the graph's module; it takes ``tensors`` and ``lifted``.
    """
    module: fx.GraphModule = fused.__self__  # type: ignore[attr-defined]

    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return pytree.tree_unflatten(fused(*CallForm.of(args, kwargs)[1], *lifted), capture.out_spec)

    def regions() -> list[RegionCheck]:
        with State(model, tensors).kept():
            return check_regions(module, [*fresh(tensors), *lifted], report, options)

    eager = Way(lambda args, kwargs: model.forward(*args, **kwargs), model)
    found = Verifier(eager, capture.form, tensors).check(Way(call, model), regions=regions, options=options)
    log.info("%s", found)
    found.raise_for_failure()
    return found
