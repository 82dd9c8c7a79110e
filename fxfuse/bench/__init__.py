"""Measuring: peers side by side on the same inputs, verified before they are timed, against what the machine can do."""

from fxfuse.bench.cases import SETS, modes
from fxfuse.bench.measure import PROTOCOL, Row, measure
from fxfuse.bench.peers import PEERS
from fxfuse.bench.roofline import Machine

__all__ = ["PEERS", "PROTOCOL", "SETS", "Machine", "Row", "measure", "modes"]
