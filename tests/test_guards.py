"""What a model's guards notice: everything that a capture read, hooks, the tree; and what is only made anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxfuse.guards import Guards


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(2, 4, 2, bias=False)
        self.acts = nn.ModuleDict({"a": nn.ReLU(), "b": nn.Dropout(0.25)})
        self.sizes, self.scale, self.steps = [1, 2], 1000, 0
        self.up.register_forward_hook(lambda *_: None)


def guards_of(model: Model) -> Guards:
    reads = {"sizes", "scale", "missing", "training"}
    return Guards(model, {id(model): reads, id(model.acts): set(), id(model.acts.a): {"inplace"}})


CHANGES: dict[str, Callable[[Model], Any]] = {
    "an attribute": lambda m: setattr(m, "scale", 1001),
    "of another type": lambda m: setattr(m, "scale", 1000.0),
    "of the same value, in a bool": lambda m: setattr(m.acts.a, "inplace", 0),
    "an attribute that is gone": lambda m: delattr(m, "scale"),
    "one that was not there": lambda m: setattr(m, "missing", None),
    "one of a module without reads": lambda m: setattr(m.up, "stride", (2, 2, 2)),
    "what a container holds": lambda m: m.sizes.append(3),
    "the mode": lambda m: m.acts.eval(),
    "a parameter that was None": lambda m: setattr(m.up, "bias", nn.Parameter(torch.zeros(4))),
    "a hook": lambda m: m.acts.b.register_forward_pre_hook(lambda *_: None),
    "another hook": lambda m: m.up.register_forward_hook(lambda *_: None),
    "hooks that are gone": lambda m: m.up._forward_hooks.clear(),
    "a submodule": lambda m: m.acts.update({"b": nn.ReLU()}),
    "one more": lambda m: m.acts.update({"c": nn.ReLU()}),
    "the first of a module": lambda m: m.up.add_module("x", nn.ReLU()),
    "their order": lambda m: m.acts.update({"a": m.acts.pop("a")}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changes_are_noticed(what: str) -> None:
    model = Model()
    guards = guards_of(model)
    assert guards.hold() and guards.difference() is None
    CHANGES[what](model)
    assert not guards.hold()


def test_what_is_made_anew_is_the_same() -> None:
    model = Model()
    guards = guards_of(model)
    model.scale, model.up.stride = int("1000"), (*[1] * 3,)
    model.sizes[:] = [int("1"), int("2")]
    model.steps = 5  # which nothing has read
    model.up.weight = nn.Parameter(torch.zeros_like(model.up.weight))
    assert guards.hold()
    model.scale = 1
    assert not guards.hold()
    model.scale = 1000
    assert guards.hold()


def test_names_that_are_no_identifiers() -> None:
    model = Model()
    for name in ("a b", "it's", "class", "o0"):
        model.acts.add_module(name, nn.ReLU())
        model.__dict__[name] = 7
    guards = Guards(model, {})
    assert guards.hold()
    model.__dict__["it's"] = 8
    assert not guards.hold()


def test_large_trees() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.ReLU(), nn.BatchNorm3d(1)) for _ in range(500)])
    guards = Guards(model, {})
    assert guards.hold()
    model[499][1].momentum = 0.5
    assert not guards.hold() and guards.difference() == "momentum"
