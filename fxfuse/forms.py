"""Tensors without their elements, and what torch makes of them: each operator is asked once for operands of some forms.

Planning a call of new sizes asks again and again: versions of a program share most of their instructions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

#: operators on operands of certain forms whose results are known; beyond it all are forgotten
MOST_KNOWN = 4096


@dataclasses.dataclass(frozen=True)
class Form:
    """A tensor without its elements; strides in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: torch.device

    @staticmethod
    def of(value: Tensor | Form) -> Form:
        if isinstance(value, Form):
            return value
        return Form(value.dtype, tuple(value.shape), value.stride(), value.device)

    @property
    def known(self) -> bool:
        """Whether all of its sizes and strides are numbers."""
        return all(type(s) is int for s in (*self.shape, *self.strides))

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def lies_as(self, other: Form) -> bool:
        """Whether the two are the same but for the strides of dims of one element, which say nothing."""
        if (self.dtype, self.shape, self.device) != (other.dtype, other.shape, other.device):
            return False
        return all(s == 1 or a == b for s, a, b in zip(self.shape, self.strides, other.strides, strict=True))

    def numel(self) -> int:
        return math.prod(self.shape)

    def empty(self) -> Tensor:
        """A tensor of this form: a fake one where a mode that makes these is on."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


_known: dict[Any, tuple[Form, ...]] = {}


def key_of(op: str, attributes: Sequence[tuple[str, Any]], operands: Iterable[Any]) -> Any:
    """What the results of an operator depend on. ``operands``: forms and Python's numbers."""
    # 1, 1.0 and True are equal, and not the same: so are not the texts of attributes
    told = [o if isinstance(o, Form) else (type(o), o) for o in operands]
    settings = torch.get_default_dtype(), torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled
    return op, repr(tuple(attributes)), *told, settings


def recall(key: Any) -> tuple[Form, ...] | None:
    """The forms of the results, if torch was asked."""
    return _known.get(key)


def remember(key: Any, results: tuple[Form, ...]) -> None:
    if len(_known) >= MOST_KNOWN:
        _known.clear()
    _known[key] = results
