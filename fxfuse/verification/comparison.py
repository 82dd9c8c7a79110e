"""One tensor of the optimised model beside eager mode's and the truth: the error, and where it is worst."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse.chain import type_of
from fxfuse.compare import leaf_disagreement, relative_error
from fxfuse.tolerance import allowed

#: worst elements that a comparison names
WORST = 3
#: times of eager mode's error under perturbed inputs that an error may be
NOISE_FACTOR = 4.0


class Kind(enum.Enum):
    """What is compared."""

    OUTPUT = "output"
    GRADIENT = "gradient"
    STATE = "state"  #: a buffer, a parameter or an input that the call writes to
    REGION = "region"


class Specials(enum.Enum):
    """What must hold of Inf and NaN."""

    SAME = enum.auto()  #: the same ones at the same places
    EITHER = enum.auto()  #: at the same places, one may be the other: parameters or inputs hold some
    ANY = enum.auto()  #: rewrites for finite values only are permitted, and there are others


@dataclasses.dataclass(frozen=True)
class Element:
    """One element: its index and its three values."""

    index: tuple[int, ...]
    truth: float
    eager: float
    optimised: float

    def __str__(self) -> str:
        place = ", ".join(map(str, self.index))
        return f"[{place}] truth {self.truth:.8g}, eager {self.eager:.8g}, optimised {self.optimised:.8g}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The verdict on one tensor.

    ``error`` and ``own`` are the relative L2 errors of the optimised model and of eager mode against the truth,
    over elements that are finite; ``limit`` is the most that is accepted (0 for whole numbers, which are exact).
    ``mismatches`` counts elements with another Inf or NaN, or another whole number. ``problem`` is a sentence
    where there is nothing to compare: another shape, no gradient.
    """

    what: str
    kind: Kind
    type: str
    error: float = 0.0
    own: float = 0.0
    limit: float = 0.0
    mismatches: int = 0
    worst: tuple[Element, ...] = ()
    problem: str | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None and self.mismatches == 0 and self.error <= self.limit

    @property
    def reason(self) -> str | None:
        """Why this is not ok, as a sentence; None where it is."""
        if self.problem is not None:
            return f"{self.what}: {self.problem}"
        if self.mismatches:
            what = "Inf or NaN where the original has none, or the other way round" if self.limit else "another value"
            return f"{self.what}: {self.mismatches} {'element has' if self.mismatches == 1 else 'elements have'} {what}"
        if not self.ok:
            return (
                f"{self.what} is {self.error:.2e} from the truth, eager mode {self.own:.2e}; "
                f"at most {self.limit:.2e} is expected"
            )
        return None


def compare(
    what: str,
    kind: Kind,
    got: Any,
    eager: Any,
    truth: Tensor | None,
    *,
    tf32: bool = False,
    specials: Specials = Specials.SAME,
    noise: Callable[[], float] | None = None,
) -> Comparison:
    """Compare ``got`` with ``eager`` and ``truth`` (None: eager mode is the truth).

    ``noise``, asked only where the error is too large, gives the largest error of eager mode when its inputs
    change by a rounding: where results cancel, it is much more than the error of one run tells.
    """
    if not isinstance(got, Tensor) or not isinstance(eager, Tensor):
        reason = "no tensor" if isinstance(eager, Tensor) else leaf_disagreement(got, eager)
        return Comparison(what, kind, type(eager).__name__, problem=reason)
    described = str(type_of(eager))
    for name in ("shape", "dtype", "device"):
        if getattr(got, name) != getattr(eager, name):
            problem = f"{name} {getattr(got, name)} where the original gives {getattr(eager, name)}"
            return Comparison(what, kind, described, problem=problem)
    if not (got.is_floating_point() or got.is_complex()):
        return _exact(what, kind, described, got, eager)
    got, eager, dtype = _real(got), _real(eager), eager.dtype
    truth = eager if truth is None else _real(truth).to(got.device)
    wrong = _special_mismatches(got, eager, truth, specials)
    error, own = _finite_error(got, truth), _finite_error(eager, truth)
    limit = allowed(own, dtype, tf32=tf32)
    if error > limit and noise is not None:
        limit = max(limit, NOISE_FACTOR * noise())
    count = int(wrong.sum())
    worst = () if count == 0 and error <= limit else _worst(got, eager, truth, wrong)
    return Comparison(what, kind, described, error, own, limit, count, worst)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()


def _exact(what: str, kind: Kind, described: str, got: Tensor, eager: Tensor) -> Comparison:
    wrong = got != eager
    count = int(wrong.sum())
    worst = _worst(got, eager, eager, wrong) if count else ()
    return Comparison(what, kind, described, mismatches=count, worst=worst)


def _finite_error(value: Tensor, truth: Tensor) -> float:
    """The relative error over the elements that are finite in both."""
    finite = value.isfinite() & truth.isfinite()
    if bool(finite.all()):
        return relative_error(value, truth)
    return relative_error(value[finite], truth[finite])


def _special_mismatches(got: Tensor, eager: Tensor, truth: Tensor, specials: Specials) -> Tensor:
    """Where ``got`` has another Inf or NaN than eager mode and than the truth."""
    if specials is Specials.ANY or all(bool(t.isfinite().all()) for t in (got, eager)):
        return torch.zeros_like(got, dtype=torch.bool)
    code = _special_code if specials is Specials.SAME else Tensor.isfinite
    found = code(got)
    return (found != code(eager)) & (found != code(truth))


def _special_code(tensor: Tensor) -> Tensor:
    """0 for a finite element, 1 for NaN, 2 and 3 for Inf and -Inf."""
    return tensor.isnan().byte() + tensor.isposinf().byte() * 2 + tensor.isneginf().byte() * 3


def _worst(got: Tensor, eager: Tensor, truth: Tensor, wrong: Tensor) -> tuple[Element, ...]:
    """The elements that differ most from the truth; those with another Inf or NaN first."""
    distance = (got.double() - truth.double()).abs().nan_to_num(0.0, posinf=0.0)
    distance = torch.where(wrong, math.inf, distance).reshape(-1)
    _, places = distance.topk(min(WORST, distance.numel()))
    return tuple(_element(p, got, eager, truth) for p in places.tolist() if float(distance[p]) > 0)


def _element(place: int, *tensors: Tensor) -> Element:
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), tensors[0].shape))
    optimised, eager, truth = (float(t.reshape(-1)[place]) for t in tensors)
    return Element(index, truth, eager, optimised)


def severity(comparison: Comparison) -> tuple[bool, float]:
    """How near a comparison is to failing, or how much it fails, for sorting."""
    return not comparison.ok, comparison.error / comparison.limit if comparison.limit else 0.0


def worst_of(comparisons: Sequence[Comparison]) -> Comparison:
    """The one that is nearest to failing, or fails by most."""
    return max(comparisons, key=severity)
