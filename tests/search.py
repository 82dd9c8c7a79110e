"""Random chains against eager mode: values, gradients, running statistics; and what was seen on the way."""

from __future__ import annotations

import collections
import contextlib
import gc
import itertools
import os
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any
from unittest import mock

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from strategies import Chain
from torch import Tensor, nn

import fxfuse
from fxfuse import ops, vocabulary
from fxfuse.kernels.plan import Path, choose
from fxfuse.patterns import DEFAULT_RULES, Legality

#: FXFUSE_CHAINS=20000 searches longer, from another seed each time; FXFUSE_SEED=7 repeats one
LONGER = os.environ.get("FXFUSE_CHAINS")
SEED = int(os.environ.get("FXFUSE_SEED", "0" if LONGER is None else random.SystemRandom().randrange(2**32)))
#: after ten examples hypothesis varies the ones that it has, which says little more about other operators
BATCH = 10
#: times as many chains as asked for, at most, until all that they should show is seen
MORE = 4


def search(
    strategy: Any,
    check: Callable[[Chain], None],
    examples: int,
    *,
    seen: Collection[str] = (),
    wanted: Collection[str] = (),
) -> None:
    """Check that many different chains, and more until ``wanted`` is ``seen``. A failure is made small and printed.

    Which chains a seed makes also depends on the modules that are loaded: hypothesis draws constants of them.
    """
    checked: set[str] = set()
    least = examples if LONGER is None else int(LONGER)
    print(f"FXFUSE_SEED={SEED}")

    def each(chain: Chain) -> None:
        if repr(chain) not in checked:
            check(chain)
            checked.add(repr(chain))

    with rare_collections():
        for batch in itertools.count():
            if len(checked) >= least and (not missing(seen, wanted) or len(checked) >= MORE * least):
                return
            once = given(strategy)(lambda chain: each(chain))
            hypothesis.seed(SEED * 2**32 + batch)(BATCHES(once))()


def missing(seen: Collection[str], wanted: Collection[str]) -> set[str]:
    """What should have been seen; random seeds promise nothing."""
    return set() if LONGER is not None else {*wanted} - {*seen}


BATCHES = settings(max_examples=BATCH, deadline=None, database=None, print_blob=False,
                   suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink))  # fmt: skip


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Leave torch's hundreds of thousands of objects out of the garbage collector's rounds: a seventh of the time."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


#: what the chains must have shown: all rules and operators, but those that other dtypes, options or kernels ask for
NARROW = {"CollapseNarrowMean"}
FINITE_ONLY = {r.name for r in DEFAULT_RULES if r.legality is Legality.FINITE_ONLY} | {"window_sums"}
KERNELS_ONLY = {"normalise", "softmax_over", "statistics", "exponentials", "extremes", "exp_below", "persistent"}
RULES = {r.name for r in DEFAULT_RULES} - FINITE_ONLY - NARROW
OPERATORS = set(vocabulary.names()) - FINITE_ONLY - KERNELS_ONLY


# --- what a run leaves behind -----------------------------------------------------------------------
class Outcome:
    """Outputs, gradients of the input and the parameters, buffers; by name."""

    def __init__(
        self,
        model: nn.Module,
        run: nn.Module,
        x: Tensor,
        *,
        gradients: bool,
        upstream: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """``upstream`` changes the gradients that the outputs are given."""
        torch.manual_seed(0)
        self._upstream = upstream or (lambda gradient: gradient)
        x = x.clone().requires_grad_(gradients)
        model.zero_grad(set_to_none=True)
        self.tensors: dict[str, Tensor] = {}
        with torch.set_grad_enabled(gradients):
            result = run(x)
        outputs = result if isinstance(result, tuple) else (result,)
        self.kinds = [(o.shape, o.dtype, o.requires_grad) for o in outputs]
        self.tensors.update((f"output {i}", o.detach().clone()) for i, o in enumerate(outputs))
        if gradients:
            self._differentiate(model, x, outputs)
        self.tensors.update((f"buffer {n}", b.detach().clone()) for n, b in model.named_buffers())

    def _differentiate(self, model: nn.Module, x: Tensor, outputs: Sequence[Tensor]) -> None:
        generator = torch.Generator().manual_seed(4)
        loss: Any = 0.0
        for out in outputs:
            if out.requires_grad:
                gradient = torch.randn(out.shape, generator=generator).to(out.dtype)
                loss = loss + (out * self._upstream(gradient)).sum()
        if isinstance(loss, Tensor):
            loss.backward()
        leaves = {"x": x, **dict(model.named_parameters())}
        self.tensors.update((f"gradient of {n}", t.grad.clone()) for n, t in leaves.items() if t.grad is not None)


class Eager:
    """What eager mode makes of a chain, and how much of that is rounding: found out where it matters."""

    #: per dtype: the relative errors that are tried, the part of the scale that is always let pass
    RELATIVE = {torch.float64: (1e-12, 1e-11), torch.float32: (1e-6, 2e-5), torch.float16: (2e-3, 5e-3)}

    def __init__(self, chain: Chain, dtype: torch.dtype) -> None:
        self.chain, self.dtype = chain, dtype
        self.gradients = True
        self._others: list[Outcome] = []
        self._exact: Outcome | None = None
        try:
            self.outcome = self._run()
        except RuntimeError:  # eager mode cannot differentiate it
            self.gradients = False
            self.outcome = self._run()

    def _run(self, number: int | None = None) -> Outcome:
        model, x = self.chain.make(self.dtype)
        if number is None:
            return Outcome(model, model, x, gradients=self.gradients)
        generator = torch.Generator().manual_seed(10 + number)

        def off(t: Tensor) -> Tensor:
            noise = torch.randn(t.shape, generator=generator).to(t.dtype)
            return t * (1 + self.RELATIVE[self.dtype][0] * noise)

        with torch.no_grad():
            for t in (x, *model.parameters(), *model.buffers()):
                if t.is_floating_point():
                    t.copy_(off(t))
        return Outcome(model, model, x, gradients=self.gradients, upstream=off)

    @property
    def others(self) -> list[Outcome]:
        """The same with the input, the parameters and the outputs' gradients a little off."""
        if not self._others:
            self._others = [self._run(i) for i in range(8)]
        return self._others

    def disagreement(self, got: Outcome) -> str | None:
        """Why an outcome differs by more than rounding explains; None where it does not."""
        for name, value in got.tensors.items():
            problem = self._differs(value, name)
            if problem is not None:
                return f"{name}: {problem}"
        return None

    def _differs(self, value: Tensor, name: str) -> str | None:
        truth = self.outcome.tensors[name]
        if not value.is_floating_point():
            same = torch.equal(value, truth)
            return None if same or self._unstable(name, lambda o: not torch.equal(o, truth)) else "other values"
        finite = truth.isfinite()
        if not torch.equal(value.isfinite(), finite) or not torch.equal(value.isnan(), truth.isnan()):
            # where a value of another size overflows, too
            other = self._unstable(name, lambda o: not torch.equal(o.isfinite(), finite))
            return None if other else "Inf or NaN elsewhere"
        if not bool(finite.any()):
            return None
        relative, epsilon = self.RELATIVE[self.dtype]
        scale = max(1.0, float(truth[finite].abs().max()))
        off = float((value - truth)[finite].abs().max())
        if off <= epsilon * scale or self._unstable(name, lambda o: not torch.equal(o.isfinite(), finite)):
            return None
        noise = max(float((o.tensors[name] - truth)[finite].abs().max()) for o in self.others)
        if off <= epsilon * scale + 10 * noise or noise > 1e6 * relative * scale:
            return None
        if self._nearer(value, name):
            return None
        return f"{off:.2e} off, at a scale of {scale:.2e}, noise {noise:.1e}"

    def _nearer(self, value: Tensor, name: str) -> bool:
        """Whether a value is as near to that of float64 as eager mode's is: sums that cancel leave it noise alone."""
        if self._exact is None:
            model, x = self.chain.make(self.dtype)
            self._exact = Outcome(model.double(), model, x.double(), gradients=self.gradients)
        exact = self._exact.tensors[name]
        return float((value - exact).abs().max()) <= float((self.outcome.tensors[name] - exact).abs().max())

    def _unstable(self, name: str, other: Callable[[Tensor], bool]) -> bool:
        return any(other(o.tensors[name]) for o in self.others)


# --- the check --------------------------------------------------------------------------------------
class Seen(collections.Counter[str]):
    """How often each operator of the vocabulary and each rule was part of a region that ran."""

    def record(self, runs: Sequence[ops.Run]) -> None:
        for run in runs:
            programs = (run.region.original, run.region.rewritten)
            self.update({i.op for program in programs for i in program.body} | set(run.region.rules))


def check(
    chain: Chain, seen: Seen, *, dtype: torch.dtype = torch.float64, allow: Collection[Legality] | None = None
) -> None:
    """Optimise a chain; compare it with eager mode without gradients, and with them on both ways to them."""
    try:
        eager = Eager(chain, dtype)
    except RuntimeError:  # a cast to float64 meets a layer of float32; not every operator takes float16
        hypothesis.assume(dtype is torch.float64)
        raise
    model, x = chain.make(dtype)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    optimized = fxfuse.optimize(model, (x,), allow=allow)
    report = str(optimized.fxfuse_report)
    assert optimized.fxfuse_report.regions, report
    with ops.watch() as runs:
        plain = Outcome(model, optimized, x, gradients=False)
    assert {r.path for r in runs} == {Path.REWRITTEN}, report
    seen.record(runs)
    assert [k[:2] for k in plain.kinds] == [k[:2] for k in eager.outcome.kinds], report
    assert (problem := eager.disagreement(plain)) is None, f"without gradients, {problem}\n{report}"
    if not eager.gradients:
        return
    if chain.export:  # an export is for one grad mode: the next call makes another
        Outcome(model, optimized, x, gradients=True)
    for path in (None, Path.RECOMPUTE):
        model.load_state_dict(kept)
        with ops.watch() as runs, mock.patch("fxfuse.ops.choose", lambda *a, p=path, **k: p or choose(*a, **k)):
            got = Outcome(model, optimized, x, gradients=True)
        assert runs, report
        assert got.kinds == eager.outcome.kinds, f"{path}: {got.kinds}, eager has {eager.outcome.kinds}\n{report}"
        assert got.tensors.keys() == eager.outcome.tensors.keys(), f"{path}: other gradients\n{report}"
        assert (problem := eager.disagreement(got)) is None, f"{path}: {problem}\n{report}"
