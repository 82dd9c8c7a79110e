"""How far a result may be from the truth: what rounding explains, per dtype and numerics class.

Errors are relative L2 errors (:func:`fxfuse.compare.relative_error`).
"""

from __future__ import annotations

import torch

#: what other orders of summation explain in a result of this dtype
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
#: the same for a float32 result where convolutions may round their factors to TF32, or a library another algorithm
TF32 = 2e-3
#: for dtypes that are not listed, such as the 8-bit ones
OTHER = 0.1
#: an optimised result may be so many times as far from the truth as eager mode's
FACTOR = 2.0


def rounding(dtype: torch.dtype, *, tf32: bool = False) -> float:
    """The relative error that rounding alone explains."""
    return TF32 if tf32 and dtype is torch.float32 else ROUNDING.get(dtype, OTHER)


def allowed(own: float, dtype: torch.dtype, *, tf32: bool = False) -> float:
    """The largest relative error of a result of ``dtype`` where eager mode's own is ``own``."""
    return max(FACTOR * own, rounding(dtype, tf32=tf32))


def tf32_allowed(precision: str | None = None) -> bool:
    """Whether float32 convolutions on a GPU may use TF32: as ``precision`` says, or else torch's settings."""
    if precision is not None:
        return precision == "tf32"
    # past torch.backends.cudnn, since every call asks; allow_tf32 raises once the newer conv.fp32_precision was used,
    # which follows both
    return _cudnn_enabled() and _fp32_precision("cuda", "conv") == "tf32"


_cudnn_enabled, _fp32_precision = torch._C._get_cudnn_enabled, torch._C._get_fp32_precision_getter
