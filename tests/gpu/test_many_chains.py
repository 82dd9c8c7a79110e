"""The property of the compiler on a GPU: hundreds of random chains are right, and run as kernels."""

from __future__ import annotations

import json
import os
from unittest import mock

import many_chains
import pytest
import torch
from drawn import draw
from many_chains import Outcome, search, summary

#: FXFUSE_CHAINS=2000 searches longer; FXFUSE_SEED=5000 begins elsewhere
COUNT, FIRST = int(os.environ.get("FXFUSE_CHAINS", "320")), int(os.environ.get("FXFUSE_SEED", "0"))
#: parts of the chains that must run as kernels, that eager mode may refuse, that may say little
FUSED, REFUSED, NOISY = 0.9, 0.03, 0.03
#: kinds of kernels, and how many there must be of each among 320 chains
KINDS = {
    "convolution, stored": 300, "convolution, maximum": 20, "convolution, sum": 10, "convolution that gathers": 60,
    "keeps nothing": 10, "channels_last": 100, "map": 200, "pool": 100, "adaptive pool": 20, "statistics": 100,
    "fold": 150, "exponentials": 5, "extremes": 10,
}  # fmt: skip


@pytest.mark.serial  # it starts processes of its own
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
def test_on_a_gpu() -> None:
    pytest.importorskip("cuda.bindings")
    found = search(range(FIRST, FIRST + COUNT), "cuda", min(16, os.cpu_count() or 1))
    check(found, COUNT)


def check(outcomes: list[Outcome], count: int) -> None:
    """Every chain was checked and none failed; and that says something."""
    facts = summary(outcomes)
    print(json.dumps(facts, indent=1))
    assert len({o.seed for o in outcomes}) == len({repr(draw(o.seed).chain) for o in outcomes}) == count
    failures = [f"=== seed {o.seed}\n{o.failure}" for o in outcomes if o.failure is not None]
    assert not failures, "\n\n".join(failures)
    assert facts["refused by eager mode"] <= REFUSED * count
    assert facts["fused"] >= FUSED * (count - facts["refused by eager mode"])
    assert facts["noisy"] <= NOISY * count
    for word, least in KINDS.items():
        assert sum(n for kind, n in facts["kinds"].items() if word in kind) >= least * count / 320 - 1, word


# --- the search itself, on a CPU ------------------------------------------------------------------
def test_a_few_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the schedules that a GPU would have; eager mode on a CPU refuses some dtypes."""
    monkeypatch.setitem(globals(), "REFUSED", 0.5)
    monkeypatch.setitem(globals(), "FUSED", 0.8)
    monkeypatch.setitem(globals(), "KINDS", {"convolution, stored": 160, "map": 60, "pool": 60})
    check(search(range(6), "cpu", 1), 6)


@pytest.mark.parametrize("seed", [8, 10])
def test_what_is_wrong_is_found(seed: int) -> None:
    """One element of the result, by a fifth of the largest."""

    def off(got: torch.Tensor, _again: torch.Tensor) -> bool:
        got[(0,) * got.dim()] += 0.2 * got.abs().max()
        return True

    with mock.patch.object(many_chains, "_same_bits", off):
        outcome = many_chains.run(seed, "cpu")
    assert outcome.failure is not None and "errors of" in outcome.failure
    assert f"--seed {seed}" in outcome.failure and "class Model(nn.Module)" in outcome.failure


def test_other_bits_are_found() -> None:
    with mock.patch.object(many_chains, "_same_bits", return_value=False):
        outcome = many_chains.run(10, "cpu")
    assert outcome.failure is not None and "other bits in run 2" in outcome.failure


def test_processes_that_die_are_one_chains_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_chains, "__file__", "no such file.py")
    outcomes = search(range(3), "cpu", 2)
    assert [o.seed for o in outcomes] == [0, 1, 2]
    assert all(o.failure is not None and "the process ended with 2" in o.failure for o in outcomes)


@pytest.mark.parametrize("seed", [20011, 20121])
def test_a_softmax_has_its_dim(seed: int) -> None:
    """Drawn without memory, where torch takes any."""
    assert search([seed], "cpu", 1)[0].failure is None


def test_seeds_mean_the_same_chain_everywhere() -> None:
    assert draw(3) == draw(3) != draw(4)
