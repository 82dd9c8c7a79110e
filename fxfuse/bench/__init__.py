"""Measuring: peers side by side on the same inputs, verified before they are timed, against what the machine can do."""

from fxfuse.bench.cases import SETS, modes
from fxfuse.bench.measure import PROTOCOL, Row, measure
from fxfuse.bench.peers import PEERS, Peer
from fxfuse.bench.roofline import Machine
from fxfuse.bench.rowfile import RowFile

__all__ = ["PEERS", "PROTOCOL", "SETS", "Machine", "Peer", "Row", "RowFile", "measure", "modes"]
