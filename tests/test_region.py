"""Regions: two programs, their text, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import conv, program
from samples import T

from fxfuse.program import Program, ProgramError
from fxfuse.region import SCHEMA, Region

INPUTS = "x: f64[2, 2, 4], w: f64[2, 3, 2], b: f64[3]"
ORIGINAL = program(INPUTS, f"y = {conv()}\nc = clone(y)\nr = relu(c)\nr, y")
REWRITTEN = program(INPUTS, f"y = {conv()}\nr = relu(y)\nr, y")
REGION = Region(ORIGINAL, REWRITTEN, ("DropCopies",), "ieee", (1,))
TENSORS = [T(2, 2, 4), T(2, 3, 2), T(3)]


def test_the_text_of_a_region() -> None:
    plain = conv()
    assert str(REGION) == REGION.text == (
        "schema = 1\n"
        "rules = ('DropCopies',)\n"
        "precision = 'ieee'\n"
        "statistics = (1,)\n"
        "def original(x: f64[2, 2, 4], w: f64[2, 3, 2], b: f64[3]):\n"
        f"    y = {plain}\n"
        "    c = clone(y)\n"
        "    r = relu(c)\n"
        "    return r, y\n"
        "def rewritten(x: f64[2, 2, 4], w: f64[2, 3, 2], b: f64[3]):\n"
        f"    y = {plain}\n"
        "    r = relu(y)\n"
        "    return r, y\n"
    )  # fmt: skip


def test_an_unchanged_program_is_written_once() -> None:
    region = Region(ORIGINAL, ORIGINAL)
    assert "rewritten" not in region.text
    assert Region.parse(region.text) == region
    assert Region.parse(region.text).rewritten is Region.parse(region.text).original


def test_a_region_survives_its_text() -> None:
    parsed = Region.parse(REGION.text)
    assert parsed == REGION
    assert hash(parsed) == hash(REGION)
    assert parsed.text == REGION.text
    assert parsed.anchor == ORIGINAL.body[0]


def test_the_reference_runs_the_rewritten_program() -> None:
    changed = Region(ORIGINAL, program(INPUTS, f"y = {conv()}\nr = neg(y)\nr, y"))
    expected = torch.nn.functional.conv_transpose1d(*TENSORS)
    got = changed.reference(*TENSORS)
    assert torch.equal(got[0], -expected)
    assert torch.equal(got[1], expected)
    assert torch.equal(REGION.reference(*TENSORS)[0], expected.relu())


def test_the_reference_checks_its_tensors() -> None:
    with pytest.raises(ProgramError, match=r"^input b: shape \(4,\) where f64\[3\] is expected$"):
        REGION.reference(*TENSORS[:2], T(4))
    with pytest.raises(ProgramError, match=r"^2 tensors given; the program takes 3$"):
        REGION.reference(*TENSORS[:2])


@pytest.mark.parametrize("again", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))], ids=["deepcopy", "pickle"])
def test_copies(again: Any) -> None:
    REGION.reference(*TENSORS)
    hash(REGION)
    assert REGION.text
    copied = again(REGION)
    assert vars(copied).keys() == {f.name for f in dataclasses.fields(Region)}
    assert vars(copied.rewritten).keys() == {f.name for f in dataclasses.fields(Program)}
    assert copied == REGION
    assert hash(copied) == hash(REGION)
    assert torch.equal(copied.reference(*TENSORS)[0], REGION.reference(*TENSORS)[0])


def test_every_field_counts_in_comparisons() -> None:
    changes: list[dict[str, Any]] = [
        {"original": REWRITTEN}, {"rewritten": ORIGINAL}, {"rules": ()}, {"precision": None}, {"statistics": ()},
        {"kernels": False}, {"tune": True},
    ]  # fmt: skip
    regions = [REGION, *(dataclasses.replace(REGION, **change) for change in changes)]
    assert len(set(regions)) == len(regions)
    assert len({r.text for r in regions}) == len(regions)
    for region in regions:
        assert Region.parse(region.text) == region


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewritten": program("x: f64[2, 2, 4], w: f64[2, 3, 2]", f"y = {conv('x, w, None')}\ny, y")},
         "the rewritten program takes other inputs than the original"),
        ({"rewritten": program(INPUTS, f"y = {conv()}\ny")},
         "the rewritten program gives another number of outputs than the original"),
        ({"statistics": (2,)}, "statistics (2,) names an output that does not exist"),
        ({"statistics": (-1,)}, "statistics (-1,) names an output that does not exist"),
        ({"statistics": ("0",)}, "statistics ('0',) names an output that does not exist"),
        ({"statistics": 0}, "statistics 0 names an output that does not exist"),
        ({"rules": (1,)}, "rules (1,) must be names"),
        ({"rules": "Rule"}, "rules Rule must be names"),
        ({"kernels": 1}, "kernels 1 and tune False must be True or False"),
        ({"tune": "yes"}, "kernels True and tune 'yes' must be True or False"),
        ({"precision": "fp16"}, "precision 'fp16' is none of None, 'tf32', 'ieee'"),
        ({"original": program(INPUTS, "r = relu(x)\nr, r"), "rewritten": program(INPUTS, "r = relu(x)\nr, r")},
         "the region has no anchor"),
        ({"original": Program(ORIGINAL.inputs, ORIGINAL.body[1:], ("r",))}, "`c = clone(y)`: y is not defined here"),
        ({"rewritten": Program(ORIGINAL.inputs, ORIGINAL.body[1:], ("r",))}, "`c = clone(y)`: y is not defined here"),
    ],
)  # fmt: skip
def test_verify(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProgramError) as error:
        dataclasses.replace(REGION, **change).verify()
    assert str(error.value) == message


_TEXT = REGION.text
_OTHER_SCHEMA = "the region's text is not of schema 1: made by another version of fxfuse"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_TEXT.replace("schema = 1", "schema = 2"), _OTHER_SCHEMA),
        (_TEXT.replace("schema = 1\n", ""), _OTHER_SCHEMA),
        ("", _OTHER_SCHEMA),
        (_TEXT.partition("def")[0], "the region has no `original` program"),
        (_TEXT.replace("def original", "def first"), "unexpected in a region: def first(x: f64[2, 2, 4], "),
        (_TEXT.replace("rules", "rulez"), "unexpected in a region: rulez"),
        (_TEXT + "schema = 1\n", "unexpected in a region: schema = 1"),
        (_TEXT + _TEXT.partition("statistics = (1,)\n")[2], "unexpected in a region: def original("),
        (_TEXT + "import os\n", "unexpected in a region: import os"),
        (_TEXT + "a.b = 1\n", "unexpected in a region: a.b = 1"),
        (_TEXT + "print(1)\n", "unexpected in a region: print(1)"),
        (_TEXT.replace("(1,)", "[1]"), "not a literal: [1]"),
        (_TEXT.replace("(1,)", "(9,)"), "statistics (9,) names an output that does not exist"),
        (_TEXT.replace("'ieee'", "'half'"), "precision 'half' is none of None, 'tf32', 'ieee'"),
        (_TEXT.replace("relu", "rleu"), "in `r = rleu(c)`: no operator 'rleu' in the vocabulary"),
        (_TEXT.replace("return r, y", "return r", 1), "the rewritten program gives another number of outputs"),
        (_TEXT[:-20] + "(", "not the text of a program"),
    ],
)  # fmt: skip
def test_malformed_text(text: str, message: str) -> None:
    with pytest.raises(ProgramError) as error:
        Region.parse(text)
    assert str(error.value).startswith(message)


def test_nothing_is_executed(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    bomb = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    for text in (
        _TEXT + bomb,
        _TEXT.replace("(1,)", bomb),
        _TEXT.replace("relu(c)", bomb),
        f"schema = {bomb}\n{_TEXT}",
    ):
        with pytest.raises(ProgramError):
            Region.parse(text)
    assert not trap.exists()


def test_the_schema_is_the_one_that_is_written() -> None:
    assert REGION.text.startswith(f"schema = {SCHEMA}\n")
