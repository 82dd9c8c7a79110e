"""The rewrite rules, and what a rule of one's own is made of.

A rule needs from here: :class:`Rule`, :class:`Legality` and :class:`Reject`; :func:`P`, :data:`X` and :class:`Pat`
for its pattern; what its methods are given, a :class:`Match` and a :class:`Builder`; and to read the nodes of a
match :func:`op_name`, :func:`operands`, :func:`attributes`, :func:`sizes` and :func:`dtype`. Pass it as
``fxfuse.optimize(model, x, rules=[MyRule()])``.

The built-in rules, one module per family, are listed below in order and explicitly. The order is a matter of
taste: the result is the same fixed point for any order of the rules that are on by default. Those for finite
values only come last.
"""

from fxfuse.chain import Builder, attributes, dtype, op_name, operands, sizes
from fxfuse.patterns.affine import (
    CancelBiasBeforeStatistics,
    FoldBatchNormIntoConvTranspose,
    FoldScaleIntoConvTranspose,
    FoldShiftIntoConvTranspose,
)
from fxfuse.patterns.dead import DropCopies, DropDeadOutputs
from fxfuse.patterns.given import given_rules
from fxfuse.patterns.linear import DropShiftBeforeSoftmax, FoldAvgPoolIntoConvTranspose, FoldChannelSumIntoConvTranspose
from fxfuse.patterns.means import (
    CollapseMeanOfConvTranspose,
    CollapseNarrowMean,
    MoveAffineBehindAvgPool,
    MoveAffineBehindMean,
    SplitBatchNormBeforeMean,
)
from fxfuse.patterns.pointwise import MergeClamps, MergeNumbers, MoveScaleBeforeClamp
from fxfuse.patterns.pools import ComposeAvgPools, ComposeMaxPools, MergeAvgPoolIntoMean, MoveMonotoneBehindMaxPool
from fxfuse.patterns.rule import (
    Application,
    Legality,
    Match,
    P,
    Pat,
    Reject,
    Rejection,
    RewriteError,
    Rule,
    Settings,
    X,
    apply_rules,
)
from fxfuse.patterns.views import DropExpansions, ReduceBeforeReshape

#: every rule that `optimize` applies
DEFAULT_RULES: tuple[Rule, ...] = (
    DropCopies(),
    DropExpansions(),
    ReduceBeforeReshape(),
    MergeClamps(),
    MergeNumbers(),
    MoveScaleBeforeClamp(),
    ComposeMaxPools(),
    ComposeAvgPools(),
    MergeAvgPoolIntoMean(),
    MoveMonotoneBehindMaxPool(),
    FoldScaleIntoConvTranspose(),
    FoldShiftIntoConvTranspose(),
    FoldBatchNormIntoConvTranspose(),
    CancelBiasBeforeStatistics(),
    SplitBatchNormBeforeMean(),
    MoveAffineBehindMean(),
    MoveAffineBehindAvgPool(),
    CollapseMeanOfConvTranspose(),
    CollapseNarrowMean(),
    DropShiftBeforeSoftmax(),
    DropDeadOutputs(),
    FoldChannelSumIntoConvTranspose(),
    FoldAvgPoolIntoConvTranspose(),
)

__all__ = [
    "DEFAULT_RULES",
    "Application",
    "Builder",
    "Legality",
    "Match",
    "P",
    "Pat",
    "Reject",
    "Rejection",
    "RewriteError",
    "Rule",
    "Settings",
    "X",
    "apply_rules",
    "attributes",
    "dtype",
    "given_rules",
    "op_name",
    "operands",
    "sizes",
]
