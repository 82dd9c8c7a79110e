"""Is the optimised model right? Outputs, gradients, buffers and regions against a float64 truth."""

from fxfuse.verification.comparison import Comparison, Element, Kind
from fxfuse.verification.regions import BrokenRule, RegionCheck
from fxfuse.verification.report import VerificationError, VerifyReport

__all__ = ["BrokenRule", "Comparison", "Element", "Kind", "RegionCheck", "VerificationError", "VerifyReport"]
