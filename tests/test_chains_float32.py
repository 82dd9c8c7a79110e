"""Random chains over the whole vocabulary in float32."""

from __future__ import annotations

import torch
from search import OPERATORS, RULES, Seen, check, missing, search
from strategies import chains

CHAINS = 700


def test_random_chains() -> None:
    seen = Seen()
    wanted = OPERATORS | RULES
    search(chains(), lambda chain: check(chain, seen, dtype=torch.float32), CHAINS, seen=seen, wanted=wanted)
    assert missing(seen, wanted) == set()
