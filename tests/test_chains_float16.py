"""Random chains in float16, where less is rewritten, and some of it otherwise."""

from __future__ import annotations

import torch
from search import NARROW, Seen, check, missing, search
from strategies import chains

CHAINS = 150


def test_random_chains() -> None:
    seen = Seen()
    search(chains(in_line=True), lambda chain: check(chain, seen, dtype=torch.float16), CHAINS)
    assert missing(seen, NARROW) == set()
