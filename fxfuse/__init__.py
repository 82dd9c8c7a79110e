"""fxfuse: rewrites and fuses what follows ConvTranspose3d in PyTorch models."""

from fxfuse.api import explain, optimize, verify
from fxfuse.patterns import Legality, Rule
from fxfuse.region import Region
from fxfuse.report import Report
from fxfuse.tuning import Tuning, tune
from fxfuse.verification import VerificationError, VerifyReport
from fxfuse.version import __version__

__all__ = [
    "Legality",
    "Region",
    "Report",
    "Rule",
    "Tuning",
    "VerificationError",
    "VerifyReport",
    "__version__",
    "explain",
    "optimize",
    "tune",
    "verify",
]
