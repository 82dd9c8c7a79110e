"""The vocabulary: every operator that a region can hold, each with its meaning in plain torch.

Models spell an operator in many ways (``nn.ReLU()``, ``F.relu``, ``y.relu_()``, ``aten.relu``);
:mod:`fxfuse.normalize` maps all of them here, so that rules and kernels see one spelling.
"""

from fxfuse.vocabulary import conv, derived, norms, pointwise, pools, products, reductions, shapes
from fxfuse.vocabulary.op import Kind, Op, lookup, names

__all__ = [
    "Kind",
    "Op",
    "conv",
    "derived",
    "lookup",
    "names",
    "norms",
    "pointwise",
    "pools",
    "products",
    "reductions",
    "shapes",
]
