"""Random chains over the whole vocabulary, against eager mode: values, gradients, running statistics."""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from hypothesis import HealthCheck, Phase, given, settings
from strategies import Chain, chains
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.kernels.plan import Path, choose

#: FXFUSE_CHAINS=20000 searches longer
EXAMPLES = int(os.environ.get("FXFUSE_CHAINS", "300"))
SEARCH = settings(max_examples=EXAMPLES, deadline=None, derandomize="FXFUSE_CHAINS" not in os.environ,
                  suppress_health_check=list(HealthCheck), print_blob=False,
                  phases=(Phase.generate, Phase.shrink))  # fmt: skip
SEEN: collections.Counter[str] = collections.Counter()


class Outcome:
    """What a run leaves behind: outputs, gradients of the input and the parameters, buffers; by name."""

    def __init__(self, model: nn.Module, run: nn.Module, x: Tensor, *, gradients: bool) -> None:
        torch.manual_seed(0)
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
                loss = loss + (out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum()
        if isinstance(loss, Tensor):
            loss.backward()
        leaves = {"x": x, **dict(model.named_parameters())}
        self.tensors.update((f"gradient of {n}", t.grad.clone()) for n, t in leaves.items() if t.grad is not None)


def perturbed(chain: Chain, number: int) -> tuple[nn.Module, Tensor]:
    """The model and its input, with relative errors a thousand times those of float64."""
    model, x = chain.make()
    generator = torch.Generator().manual_seed(10 + number)
    with torch.no_grad():
        for t in (x, *model.parameters(), *model.buffers()):
            if t.is_floating_point():
                t.mul_(1 + 1e-12 * torch.randn(t.shape, generator=generator))
    return model, x


def disagreement(got: Outcome, expected: Outcome, others: Sequence[Outcome]) -> str | None:
    """Why two outcomes differ by more than rounding explains, as ``others`` show what it does."""
    if got.kinds != expected.kinds:
        return f"{got.kinds} where eager has {expected.kinds}"
    for name, value in got.tensors.items():
        truth = expected.tensors[name]
        if not value.is_floating_point():
            if not torch.equal(value, truth) and all(torch.equal(o.tensors[name], truth) for o in others):
                return f"{name}: other values"
            continue
        finite = truth.isfinite()
        if any(not torch.equal(o.tensors[name].isfinite(), finite) for o in others):
            continue  # unstable
        if not torch.equal(value.isfinite(), finite) or not torch.equal(value.isnan(), truth.isnan()):
            return f"{name}: Inf or NaN elsewhere"
        value, truth = value[finite], truth[finite]
        if not truth.numel():
            continue
        scale = max(1.0, float(truth.abs().max()))
        noise = torch.stack([(o.tensors[name][finite] - truth).abs() for o in others]).amax(0)
        if float(noise.max()) > 1e-6 * scale:
            continue  # unstable
        epsilon = 1e-11 if truth.dtype is torch.float64 else 1e-5
        error = (value - truth).abs() - 10 * noise.max() - epsilon * scale
        if float(error.max()) > 0:
            off = float((value - truth).abs().max())
            return f"{name}: {off:.2e} off, at a scale of {scale:.2e}, noise {float(noise.max()):.1e}"
    return None


def record(runs: Sequence[ops.Run]) -> None:
    for run in runs:
        SEEN.update(i.op for i in run.region.original.body)
        SEEN.update(run.region.rules)


def check(chain: Chain, allow: Any = None) -> None:
    model, x = chain.make()
    original = model.state_dict()
    kept = {k: v.clone() for k, v in original.items()}
    try:
        expected = Outcome(model, model, x, gradients=True)
        gradients = True
    except RuntimeError:  # eager mode cannot differentiate it
        model.load_state_dict(kept)
        expected, gradients = Outcome(model, model, x, gradients=False), False
    others = [Outcome(m, m, y, gradients=gradients) for m, y in (perturbed(chain, i) for i in range(3))]
    model.load_state_dict(kept)
    optimized = fxfuse.optimize(model, (x,), allow=allow)
    report = str(optimized.fxfuse_report)
    assert optimized.fxfuse_report.regions, report
    with ops.watch() as runs:
        plain = Outcome(model, optimized, x, gradients=False)
    assert runs, report
    assert {r.path for r in runs} == {Path.REWRITTEN}
    record(runs)
    plain.kinds = expected.kinds
    assert (problem := disagreement(plain, expected, others)) is None, f"without gradients, {problem}\n{report}"
    if gradients:
        if chain.export:  # an export is for one grad mode: the next call makes another
            Outcome(model, optimized, x, gradients=True)
        for path in (None, Path.RECOMPUTE):
            model.load_state_dict(kept)
            with ops.watch() as runs, mock.patch("fxfuse.ops.choose", lambda *a, p=path: p or choose(*a)):
                got = Outcome(model, optimized, x, gradients=True)
            assert runs
            problem = disagreement(got, Outcome_of(model, kept, x), others)
            assert problem is None, f"{path}: {problem}\n{report}"


def Outcome_of(model: nn.Module, state: dict[str, Tensor], x: Tensor) -> Outcome:  # noqa: N802
    model.load_state_dict(state)
    return Outcome(model, model, x, gradients=True)


def test_random_chains() -> None:
    @SEARCH
    @given(chains())
    def search(chain: Chain) -> None:
        check(chain)

    search()
    print(SEEN)
