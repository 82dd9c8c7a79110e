"""How models spell the vocabulary: one adapter per operator and dialect, tables only.

An adapter has the signature of the spelling that it reads, so that arguments bind as they do in
torch, and returns a :class:`~fxfuse.call.Call`, or refuses with a sentence what it does not cover.
"""

from fxfuse.call import ATEN, FUNCTIONS, INPLACE_FUNCTIONS, METHODS, MODULES
from fxfuse.spellings import anchors, arithmetic, copies, norms, pointwise, pools, products, reductions, shapes
from fxfuse.spellings.inplace import enter_inplace_functions

enter_inplace_functions()

__all__ = [
    "ATEN",
    "FUNCTIONS",
    "INPLACE_FUNCTIONS",
    "METHODS",
    "MODULES",
    "anchors",
    "arithmetic",
    "copies",
    "norms",
    "pointwise",
    "pools",
    "products",
    "reductions",
    "shapes",
]
