"""Random chains over the whole vocabulary in float64: every operator and every rule is part of some."""

from __future__ import annotations

from search import OPERATORS, RULES, Seen, check, missing, search
from strategies import chains

CHAINS = 1000


def test_random_chains() -> None:
    seen = Seen()
    search(chains(), lambda chain: check(chain, seen), CHAINS, seen=seen, wanted=OPERATORS | RULES)
    assert missing(seen, OPERATORS | RULES) == set()
