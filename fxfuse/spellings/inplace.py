"""Functions that write over their first operand, by the plain function that they are twins of."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F

from fxfuse.call import FUNCTIONS, INPLACE_FUNCTIONS
from fxfuse.vocabulary.pointwise import UNARY

_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
}
_WITH_ATTRIBUTES = ("leaky_relu", "elu", "celu", "hardtanh", "threshold", "clamp", "clip", "clamp_min", "clamp_max")


def enter_inplace_functions() -> None:
    """Enter torch.relu_, F.elu_, operator.iadd and their like; their plain twins must be there."""
    twins = dict(_OPERATORS)
    for name in (*UNARY, *_WITH_ATTRIBUTES):
        for space in (torch, F):
            twin, plain = getattr(space, f"{name}_", None), getattr(space, name, None)
            if twin is not None and plain is not None:
                twins[twin] = plain
    for twin, plain in twins.items():
        FUNCTIONS[twin] = FUNCTIONS[plain]
        INPLACE_FUNCTIONS.add(twin)
