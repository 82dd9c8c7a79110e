"""The rewrite rules, one module per family, listed here in order and explicitly.

The order is a matter of taste: the result is the same fixed point for any order of the rules that are
on by default. Those for finite values only come last.
"""

from fxfuse.patterns.affine import (
    CancelBiasBeforeStatistics,
    FoldBatchNormIntoConvTranspose,
    FoldScaleIntoConvTranspose,
    FoldShiftIntoConvTranspose,
)
from fxfuse.patterns.dead import DropCopies, DropDeadOutputs
from fxfuse.patterns.linear import DropShiftBeforeSoftmax, FoldAvgPoolIntoConvTranspose, FoldChannelSumIntoConvTranspose
from fxfuse.patterns.means import (
    CollapseMeanOfConvTranspose,
    CollapseNarrowMean,
    MoveAffineBehindAvgPool,
    MoveAffineBehindMean,
    SplitBatchNormBeforeMean,
)
from fxfuse.patterns.pointwise import MergeClamps, MergeNumbers
from fxfuse.patterns.pools import ComposeAvgPools, ComposeMaxPools, MoveMonotoneBehindMaxPool
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

#: every rule that `optimize` applies
DEFAULT_RULES: tuple[Rule, ...] = (
    DropCopies(),
    MergeClamps(),
    MergeNumbers(),
    ComposeMaxPools(),
    ComposeAvgPools(),
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
]
