"""Reductions by the names that ``cuh/fold.cuh`` has for them. Pure: from instructions."""

from __future__ import annotations

import math
import struct

import torch

from fxfuse import vocabulary
from fxfuse.instr import Instr, TensorType
from fxfuse.kernels.codegen.arithmetic import held
from fxfuse.vocabulary import Kind

#: the largest number of a float
MOST_NUMBER = 3.4028234e38
_FOLDS = {
    "normalise": "Norm",
    "softmax_over": "Softmax",
    "prod": "Product",
    "var": "Variance",
    "std": "Deviation",
    "vector_norm": "Length",
    "normalize": "UnitNorm",
    "sum": "Sum",
    "mean": "Mean",
    "amax": "Maximum",
    "max": "Maximum",
    "amin": "Minimum",
    "min": "Minimum",
    "logsumexp": "LogSumExp",
    "softmax": "Softmax",
    "log_softmax": "LogSoftmax",
    "persistent": "Persistent",
}


def reduces(instr: Instr) -> bool:
    """Whether an instruction is a reduction, or derived of one."""
    return instr.op in _FOLDS or vocabulary.lookup(instr.op).kind is Kind.REDUCTION


def combine_of(reduction: Instr, kind: TensorType) -> str | None:
    """How kernels name a reduction of a value of this ``kind``; None for what they do not make."""
    attributes = dict(reduction.attributes)
    combine, number = _FOLDS.get(reduction.op), number_of(reduction, kind.dtype)
    if combine is None or abs(number or 0.0) > MOST_NUMBER:
        return None
    count = math.prod(kind.shape[d] or 0 for d in dims_of(reduction, kind))
    if combine in ("Length", "UnitNorm"):  # torch's is the magnitude of one element, however large its square
        return None if attributes["ord"] != 2 or count == 1 else combine
    if count <= attributes.get("correction", -1):
        return None  # torch divides zero by zero, where all that is left may be what rounding has
    if combine == "Norm":
        return "LayerNorm" if attributes["centred"] else "RMSNorm"
    return "LogSoftmax" if attributes.get("log") else combine


def dims_of(reduction: Instr, kind: TensorType) -> tuple[int, ...]:
    """The dims that a reduction is over."""
    attributes, rank = dict(reduction.attributes), len(kind.shape)
    if "count" in attributes:
        return tuple(range(rank - attributes["count"], rank))
    return tuple(attributes["dims"]) if "dims" in attributes else (attributes["dim"],)


def number_of(reduction: Instr, dtype: torch.dtype) -> float | None:
    """What is added to a norm's variance, what a length is at least, or what is taken from a variance's elements.

    ``dtype``: of these elements. A length has it, too: in float16 it may be less than 1e-12, which is zero there.
    """
    attributes = dict(reduction.attributes)
    found: float | None = attributes.get("eps", attributes.get("correction"))
    return held(found, dtype) if reduction.op == "normalize" and found is not None else found


def struct_of(combine: str, number: float | None) -> str:
    """The struct of ``cuh/fold.cuh``."""
    if number is None:
        return f"fxfuse::Fold{combine}"
    return f"fxfuse::Fold{combine}<{struct.unpack('=I', struct.pack('=f', number))[0]:#x}u>"


def keeps(combine: str) -> bool:
    """Whether every element has a result."""
    return combine.endswith(("Softmax", "Norm"))
