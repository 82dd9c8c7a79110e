"""Random chains under the rules in other orders: the same program each time."""

from __future__ import annotations

import dataclasses
import random

from harness import rewrite
from search import RULES, search
from strategies import Chain, chains

import fxfuse
from fxfuse.patterns import DEFAULT_RULES

CHAINS, ORDERS = 400, 2
#: what random ones seldom have
FLAT = Chain(
    (2, 2, 3, 3), (("m0", "nn.ConvTranspose2d(2, 3, 2)"),), (), ("v0 = self.m0(x).flatten(2).mean(-1)",), ("v0",)
)
EXPANDED = dataclasses.replace(FLAT, lines=("y = self.m0(x)", "v0 = y.mean((2, 3), True).expand_as(y) * y"))
#: numbers that merge to one, which goes, or move behind the mean one by one
NUMBERS = dataclasses.replace(FLAT, lines=("v0 = (F.relu(self.m0(x)) / 2 * 2).mean((2, 3))",))


def test_the_order_of_the_rules_does_not_matter() -> None:
    fired: set[str] = set()

    def check(chain: Chain) -> None:
        model, x = dataclasses.replace(chain, export=False).make()
        for region in fxfuse.optimize(model, (x,)).fxfuse_report.regions:
            if not region.region.rules:
                continue
            first = rewrite(region.region.original, DEFAULT_RULES)
            fired.update(first.rules)
            for seed in range(ORDERS):
                rules = random.Random(seed).sample(DEFAULT_RULES, len(DEFAULT_RULES))
                other = rewrite(region.region.original, rules)
                assert other.text == first.text, (first.rules, other.rules)

    check(FLAT)
    check(EXPANDED)
    check(NUMBERS)
    search(chains(in_line=True), check, CHAINS, seen=fired, wanted=RULES)
    assert fired >= RULES
