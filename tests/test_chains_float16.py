"""Random chains in float16, where less is rewritten, and some of it otherwise."""

from __future__ import annotations

import torch
from search import NARROW, Seen, check, missing, search
from strategies import Chain, chains
from torch.nn.modules.conv import _ConvTransposeNd

CHAINS = 150


def reads_outside(chain: Chain) -> bool:
    """torch 2.13's float16 backward on the CPU ends the process, or not, where a kernel of one element is padded."""
    layers = [m for m in chain.model().modules() if isinstance(m, _ConvTransposeNd)]
    return any(k == 1 and p for m in layers for k, p in zip(m.kernel_size, m.padding, strict=True))


def test_random_chains() -> None:
    seen = Seen()

    def each(chain: Chain) -> None:
        if not reads_outside(chain):
            check(chain, seen, dtype=torch.float16)

    search(chains(in_line=True), each, CHAINS, seen=seen, wanted=NARROW)
    assert missing(seen, NARROW) == set()
