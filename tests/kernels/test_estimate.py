"""Estimates of a convolution's epilogue, and of the ways to run a region, next to what was measured."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import pytest
import torch
from reports import explained

from fxfuse.bench import chains
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.specialisation import CONSUMERS
from fxfuse.kernels.convolution.specialise import specialise
from fxfuse.kernels.convolution.tiling import CLOCK, PROCESSORS, seconds, tile
from fxfuse.kernels.execute import candidates
from fxfuse.kernels.planning.estimate import works
from fxfuse.kernels.planning.observe import examples
from fxfuse.models import CASES

WAYS = json.loads((pathlib.Path(__file__).parents[2] / "benchmarks/results/h100_ways.json").read_text())["rows"]
#: measured before its samples lay side by side: to be measured again
BEFORE = {"generator"}
ONE, SIZE = (1, 1, 1), (32, 32, 32)
MADE = specialise(Layer(32, 64, 1, (3, 3, 3), ONE, ONE, ONE), pooled=False)


def told(**more: float) -> float:
    return seconds(MADE, 16, SIZE, SIZE, 0, 4, **more)  # type: ignore[arg-type]


def test_products_hide_an_epilogue() -> None:
    """Those of the other warpgroup; what is beyond them shows."""
    products = len(tile(MADE, SIZE).row_base) * MADE.pass_cycles * (CONSUMERS - 1) / CONSUMERS
    hidden = products / (MADE.rows * MADE.columns)
    assert told(epilogue=0.99 * hidden) == told() < told(epilogue=1.01 * hidden)
    tiles = 16 * MADE.column_tiles * math.prod(tile(MADE, SIZE).counts)
    more = told(epilogue=2 * hidden) - told()
    assert more == pytest.approx(-(-tiles // PROCESSORS) * products / CLOCK)


def test_what_is_not_stored_costs_no_store() -> None:
    stored = 16 * 64 * 32**3 * 4
    assert told() - told(keeps=False) == pytest.approx(stored / PROCESSORS / 2e10, rel=0.1)


@pytest.mark.parametrize(
    "row", [r for r in WAYS if r["model"] not in BEFORE], ids=lambda r: "-".join((r["model"], r["mode"], r["dtype"]))
)
def test_what_is_chosen_is_near_the_best(row: dict[str, Any]) -> None:
    """Within 15 % of the fastest way that was measured; and the times of ours are what the estimate says, roughly."""
    case = next(c for c in (*chains.CHAINS, *CASES) if c.name == row["model"])
    model = case.make().train(row["mode"] == "train")
    program = explained(model, case.shape, dtype=getattr(torch, row["dtype"])).regions[0].region.rewritten
    found = list(candidates(program, examples(program), exact=False, hopper=True))
    measured = {c.name: row["ms"][c.name] / 1e3 for c in found if c.name in row["ms"]}
    assert measured[found[0].name] <= 1.15 * min(measured.values())
    for c in found:
        if c.schedule is not None and c.name in ("engine", "twice", "products") and c.refusal is None:
            parts = works(dict(program.inputs), c.schedule, c.convolution, c.measuring, exact=False)
            assert math.isclose(sum(w.seconds for _, w in parts), measured[c.name], rel_tol=0.45), c.name
