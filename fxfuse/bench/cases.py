"""What is measured: sets of models by name, and the modes that say something about each."""

from __future__ import annotations

from torch import nn

from fxfuse.bench.chains import CHAINS, TRAINED
from fxfuse.models import CASES, Case

#: the project's five models; decoder blocks as networks have them
SETS: dict[str, tuple[Case, ...]] = {"seeds": CASES, "chains": CHAINS, "all": (*CASES, *CHAINS)}


def modes(case: Case) -> tuple[str, ...]:
    """The modes to measure a case of a set in: "eval", and "train" where BatchNorm makes it another computation."""
    if case.name in TRAINED:
        return ("train",)
    if case in CASES and any(isinstance(m, nn.BatchNorm3d) for m in case.make().modules()):
        return ("train", "eval")
    return ("eval",)
