"""Random chains under all rules, those for finite values only included."""

from __future__ import annotations

from search import FINITE_ONLY, Seen, check, missing, search
from strategies import chains

from fxfuse.patterns import Legality

CHAINS = 600


def test_random_chains() -> None:
    seen = Seen()
    search(chains(in_line=True), lambda chain: check(chain, seen, allow=tuple(Legality)), CHAINS)
    assert missing(seen, FINITE_ONLY) == set()
