"""Random chains under all rules, those for finite values only included."""

from __future__ import annotations

import functools

from search import FINITE_ONLY, Seen, check, missing, search
from strategies import chains

from fxfuse.patterns import Legality

CHAINS = 500


def test_random_chains() -> None:
    seen = Seen()
    each = functools.partial(check, seen=seen, allow=tuple(Legality))
    search(chains(in_line=True), each, CHAINS, seen=seen, wanted=FINITE_ONLY)
    assert missing(seen, FINITE_ONLY) == set()
