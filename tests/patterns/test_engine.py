"""Matching, legality, switches, defects, and the fixed point that does not depend on the order of the rules."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from harness import EVERYTHING, agree, avg_pool, body, conv, fakes, max_pool, program, rewrite, rewrite_graph
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import fxfuse
from fxfuse import vocabulary
from fxfuse.chain import Builder, attributes, operands, to_graph, to_program
from fxfuse.patterns import (
    DEFAULT_RULES,
    ComposeMaxPools,
    FoldScaleIntoConvTranspose,
    Legality,
    Match,
    P,
    Pat,
    Reject,
    RewriteError,
    Rule,
    Settings,
    X,
    apply_rules,
)
from fxfuse.patterns.rule import _warn_of_unknown
from fxfuse.program import Program

TWO = program("x: f64[2, 3], t: f64[2, 3]", "a = tanh(x)\nb = sigmoid(a)\nb")


class TanhOfSigmoid(Rule):
    """sigmoid(tanh(x)) = relu(x), which is wrong and no matter here"""

    legality = Legality.BITWISE
    pattern = P("sigmoid", P("tanh", X, name="inner"), name="outer")

    def rewrite(self, match: Match, build: Builder) -> Any:
        return build.call("relu", operands(match["inner"])[0])


# --- matching -------------------------------------------------------------------------------------
def matches(pattern: Pat, source: Program) -> dict[str, dict[str, str]]:
    """Per matched root, what the names are bound to."""

    class Bare(TanhOfSigmoid):
        pass

    Bare.pattern = pattern
    found = {}
    for node in to_graph(source, fakes(source)).graph.nodes:
        match = Bare().match(node)
        if match is not None:
            found[node.name] = {k: str(v) for k, v in match.bound.items()}
    return found


def test_operands_that_the_pattern_does_not_list_are_free() -> None:
    source = program("x: f64[4], t: f64[4]", "a = relu(x)\nb = add(a, t)\nc = clamp(b, 0.0, t)\nc")
    assert matches(P(("add", "clamp"), P(("relu", "add"), name="in")), source) == {
        "add": {"in": "relu"},
        "clamp": {"in": "add"},
    }
    assert matches(P("relu"), source) == {"relu": {}}


def test_a_commutative_pattern_tries_both_orders() -> None:
    source = program("x: f64[4], t: f64[4]", "a = relu(x)\nb = add(t, a)\nc = sub(t, a)\nd = add(a, 2.0)\nb, c, d")
    pattern = P(("add", "sub"), P("relu", name="r"), Pat(name="other"), commutative=True)
    assert matches(pattern, source) == {
        "add": {"r": "relu", "other": "t"},
        "sub": {"r": "relu", "other": "t"},
        "add_1": {"r": "relu", "other": "2.0"},
    }
    assert matches(P(("add", "sub"), P("relu", name="r"), Pat(name="other")), source).keys() == {"add_1"}


def test_commutative_patterns_nest_and_forget_what_failed() -> None:
    """The first order binds the left operand before its right one fails: nothing of that may stay."""
    source = program("x: f64[4], t: f64[4]", "a = relu(x)\nb = mul(t, a)\nc = add(a, b)\nc")
    inner = P("mul", P("relu", name="r"), Pat(name="scale"), commutative=True)
    found = matches(P("add", inner, P("relu", name="second"), commutative=True), source)
    assert found == {"add": {"r": "relu", "scale": "t", "second": "relu"}}

    class Count(TanhOfSigmoid):
        pattern = P("add", inner, P("relu"), commutative=True)

    (root,) = (n for n in to_graph(source, fakes(source)).graph.nodes if n.name == "add")
    match = Count().match(root)
    assert match is not None and sorted(n.name for n in match.nodes) == ["add", "mul", "relu", "relu"]


def test_a_name_that_occurs_twice_binds_the_same_operand() -> None:
    source = program(
        "x: f64[4], t: f64[4]",
        "a = sigmoid(x)\nb = mul(x, a)\nc = mul(a, t)\nd = mul(a, x)\ne = mul(a, a)\nb, c, d, e",
    )
    pattern = P("mul", Pat(name="v"), P("sigmoid", Pat(name="v")), commutative=True)
    assert matches(pattern, source) == {"mul": {"v": "x"}, "mul_2": {"v": "x"}}
    source = program("x: f64[4]", "a = add(x, 1)\nb = add(a, 1)\nc = add(b, 1.0)\nd = add(c, True)\nd")
    twice = P("add", P("add", X, Pat(name="n")), Pat(name="n"))
    assert matches(twice, source).keys() == {"add_1"}
    pair = P("batch_norm_train", X, name="n", output=1)
    source = program("x: f64[4, 3]", "a, m, v = batch_norm_train(x, None, None, eps=0.1)\nb = add(m, m)\nb, a, v")
    assert matches(P("add", pair, pair), source) == {"add": {"n": "batch_norm_train"}}


def test_a_name_that_the_pattern_does_not_bind() -> None:
    match = Match(fx.Graph().placeholder("x"))
    match.bound = {"inner": 1, "outer": 2}
    with pytest.raises(KeyError, match=r"binds no 'iner'; it binds \['inner', 'outer'\]"):
        match["iner"]


def test_a_pattern_on_one_output_of_several() -> None:
    source = program(
        "x: f64[4, 3]", "a, m, v = batch_norm_train(x, None, None, eps=0.1)\nb = relu(a)\nc = relu(m)\nb, c, v"
    )
    assert matches(P("relu", P("batch_norm_train", X, name="n", output=1)), source) == {
        "relu_1": {"n": "batch_norm_train"}
    }
    assert matches(P("relu", P("batch_norm_train", X)), source) == {}


def test_the_outputs_of_an_operator_of_several_are_replaced() -> None:
    class Swap(Rule):
        """batch_norm_train(x) = x, and its statistics changed places"""

        legality = Legality.BITWISE
        pattern = P("batch_norm_train", X, name="norm")

        def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
            x = operands(match["norm"])[0]
            new = build.call("centre", x)
            return build.output(new, 0), build.output(new, 2), build.output(new, 1)

    source = program("x: f64[4, 3]", "a, m, v = batch_norm_train(x, None, None, eps=0.1)\nb = relu(a)\nv, b, m")
    assert rewrite(source, [Swap()]).text == ("v0_0, v0_1, v0_2, v0_3 = centre(x0)\nv1 = relu(v0_0)\nv0_1, v1, v0_2")


def test_an_interior_value_that_is_used_elsewhere_blocks() -> None:
    for end in ("a, b", "c = relu(a)\nb, c", "b, a, a"):
        result = rewrite(program("x: f64[2]", f"a = tanh(x)\nb = sigmoid(a)\n{end}"), [TanhOfSigmoid()])
        assert result.reason("TanhOfSigmoid") == "the value of tanh is also used elsewhere"
        assert result.rejected[0].node == "tanh"
    assert (
        rewrite(program("x: f64[2]", "a = tanh(x)\nb = sigmoid(a)\nb, b"), [TanhOfSigmoid()]).text
        == "v0 = relu(x0)\nv0, v0"
    )


# --- legality -------------------------------------------------------------------------------------
@pytest.mark.parametrize("legality", Legality)
def test_a_rule_fires_where_its_class_is_allowed(legality: Legality) -> None:
    class Dummy(TanhOfSigmoid):
        pass

    Dummy.legality = legality
    for allowed in ({"bitwise"}, {"bitwise", "reassociating"}, {"finite-only"}, None):
        result = rewrite(TWO, [Dummy()], allow=Legality.parse(allowed))
        if legality in Legality.parse(allowed):
            assert result.text == "v0 = relu(x0)\nv0"
        else:
            assert result.text == body(to_program(to_graph(TWO, fakes(TWO)).graph))
            assert result.reason("Dummy") == (
                f"it is {legality.value}: pass allow={{..., '{legality.value}'}} to permit it"
            )


def test_the_classes_that_are_allowed_by_default() -> None:
    assert Legality.parse(None) == {Legality.BITWISE, Legality.REASSOCIATING}
    assert Legality.parse(["bitwise", Legality.FINITE_ONLY]) == {Legality.BITWISE, Legality.FINITE_ONLY}
    assert Legality.parse(()) == frozenset()
    with pytest.raises(ValueError, match="'fast' is not a legality class; known: bitwise, finite-only, reassociating"):
        Legality.parse({"bitwise", "fast"})
    with pytest.raises(ValueError, match="not the string 'bitwise'"):
        Legality.parse("bitwise")


def test_reassociating_rules_need_leave_and_bitwise_ones_do_not() -> None:
    source = program(
        "x: f64[2, 2, 9], w: f64[2, 2, 3]",
        f"y = {conv('x, w, None')}\nz = mul(y, 2.0)\nr = relu(z)\nq = {max_pool('r', 2, 2)}\nq",
    )
    result = rewrite(source, DEFAULT_RULES, allow=Legality.parse({"bitwise"}))
    assert result.rules == ["MoveMonotoneBehindMaxPool"]
    reason = "it is reassociating: pass allow={..., 'reassociating'} to permit it"
    assert result.reason("FoldScaleIntoConvTranspose") == reason
    assert "FoldScaleIntoConvTranspose" in rewrite(source, DEFAULT_RULES).rules


def test_every_rule_says_what_it_is() -> None:
    assert len({r.name for r in DEFAULT_RULES}) == len(DEFAULT_RULES)
    for rule in DEFAULT_RULES:
        assert isinstance(rule.legality, Legality)
        assert 10 < len(rule.identity) <= 120 and not rule.identity.endswith(".")


# --- switches -------------------------------------------------------------------------------------
def test_rules_are_switched_off_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_DISABLE", " ComposeMaxPools , TanhOfSigmoid,")
    settings = Settings.from_environment(Legality.parse(None))
    assert settings.disabled == {"ComposeMaxPools", "TanhOfSigmoid"} and settings.fuel is None
    result = rewrite(TWO, [TanhOfSigmoid()], disabled=settings.disabled)
    assert result.reason("TanhOfSigmoid") == "switched off by FXFUSE_DISABLE"


def test_names_of_no_rule_are_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_unknown.cache_clear()
    monkeypatch.setenv("FXFUSE_DISABLE", "ComposeMaxPool,MergeClamps,Nothing")
    for _ in range(2):
        fxfuse.explain(nn.ConvTranspose3d(1, 1, 1), torch.ones(1, 1, 2, 2, 2))
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "FXFUSE_DISABLE: there is no rule ComposeMaxPool; did you mean ComposeMaxPools?",
        "FXFUSE_DISABLE: there is no rule Nothing",
    ]


@pytest.mark.parametrize(("fuel", "rules"), [(0, 0), (1, 1), (2, 2), (9, 3)])
def test_fuel_stops_after_so_many_rewrites(fuel: int, rules: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_FUEL", str(fuel))
    settings = Settings.from_environment(Legality.parse(None))
    source = program(
        "x: f64[1, 1, 64]",
        "\n".join(f"m{i} = {max_pool('x' if i == 0 else f'm{i - 1}', 2, 2)}" for i in range(4)) + "\nm3",
    )
    result = rewrite(source, [ComposeMaxPools()], fuel=settings.fuel)
    assert len(result.rules) == rules
    assert [r.reason for r in result.rejected] == ["FXFUSE_FUEL is used up"] * (3 - rules)
    agree(result, bitwise=True)


def test_fuel_is_shared_by_the_graphs_of_one_compilation() -> None:
    settings = Settings(Legality.parse(None), fuel=1)
    for expected in (1, 0):
        build = to_graph(TWO, fakes(TWO))
        assert len(apply_rules(build, [TanhOfSigmoid()], settings)[0]) == expected


@pytest.mark.parametrize("fuel", ["many", "-1", "1.5", ""])
def test_fuel_must_be_a_number(fuel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_FUEL", fuel)
    with pytest.raises(ValueError, match=r"FXFUSE_FUEL=.* must be a whole number"):
        Settings.from_environment(Legality.parse(None))


# --- defects --------------------------------------------------------------------------------------
def fails(*_: Any) -> Any:
    raise KeyError("oops")


def partly(match: Match, build: Builder) -> fx.Node:
    build.call("relu", operands(match["inner"])[0])
    raise KeyError("oops")


def of_shape(match: Match, build: Builder) -> fx.Node:
    return build.call("sum", operands(match["inner"])[0], dims=(0,), keepdim=True)


def of_dtype(match: Match, build: Builder) -> fx.Node:
    return build.call("cast", operands(match["inner"])[0], dtype=torch.float32)


def of_itself(match: Match, build: Builder) -> fx.Node:
    return build.call("relu", match["outer"])


def the_same(match: Match, build: Builder) -> fx.Node:
    return match.root


def of_a_reader(match: Match, build: Builder) -> fx.Node:
    (reader,) = match.root.users
    (further,) = reader.users
    return build.call("relu", further)


def a_reader(match: Match, build: Builder) -> fx.Node:
    (reader,) = match.root.users
    return reader


def of_an_erased_one(match: Match, build: Builder) -> fx.Node:
    inner = operands(match["inner"])[0]
    lost = build.call("relu", inner)
    build.graph.erase_node(lost)
    return build.call("relu", lost)


def two_of_them(match: Match, build: Builder) -> tuple[fx.Node, ...]:
    return match["inner"], match["inner"]


def nothing(match: Match, build: Builder) -> Any:
    return None


@pytest.mark.defective
@pytest.mark.parametrize(
    ("method", "function", "problem"),
    [
        ("match", fails, "KeyError: 'oops'"),
        ("check", fails, "KeyError: 'oops'"),
        ("rewrite", fails, "KeyError: 'oops'"),
        ("rewrite", partly, "KeyError: 'oops'"),
        ("rewrite", of_shape, "it gives FakeTensor(..., size=(1, 3), dtype=torch.float64) where"),
        ("rewrite", of_dtype, "it gives FakeTensor(..., size=(2, 3)) where"),
        ("rewrite", of_itself, "the replacement reads what it replaces"),
        ("rewrite", the_same, "the replacement reads what it replaces"),
        ("rewrite", of_a_reader, "the replacement reads what it replaces"),
        ("rewrite", a_reader, "the replacement reads what it replaces"),
        ("rewrite", of_an_erased_one, "the replacement reads a node that is not in the chain"),
        ("rewrite", two_of_them, "it gives (FakeTensor("),
        ("rewrite", nothing, "rewrite() returned None, not a node or a tuple of nodes"),
    ],
)
def test_a_defective_rule_is_taken_back(
    method: str, function: Any, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(TanhOfSigmoid):
        pass

    setattr(Broken, method, staticmethod(function))
    source = program("x: f64[2, 3], t: f64[2, 3]", "a = tanh(x)\nb = sigmoid(a)\nc = neg(b)\nd = cos(c)\nd")
    build = to_graph(source, fakes(source))
    before = str(build.graph)
    result = rewrite_graph(build, [Broken(), ComposeMaxPools()], Settings())
    assert str(build.graph) == before
    assert result.reason("Broken").startswith(f"the rule is defective: {problem}")
    assert "the rule Broken is defective at" in caplog.text


@pytest.mark.defective
def test_other_rules_go_on_beside_a_defective_one() -> None:
    class Broken(TanhOfSigmoid):
        check = staticmethod(fails)

    result = rewrite(TWO, [Broken(), TanhOfSigmoid()])
    assert result.text == "v0 = relu(x0)\nv0" and result.rules == ["TanhOfSigmoid"]


def test_rules_that_undo_each_other_are_named() -> None:
    class There(Rule):
        """relu = tanh"""

        legality = Legality.BITWISE
        pattern = P("relu", X)
        into = "tanh"

        def rewrite(self, match: Match, build: Builder) -> fx.Node:
            return build.call(self.into, operands(match.root)[0])

    class Back(There):
        """tanh = relu"""

        pattern = P("tanh", X)
        into = "relu"

    with pytest.raises(RewriteError, match=r"no end after \d+ rewrites; these rules undo each other: Back, There"):
        rewrite(TWO, [ComposeMaxPools(), There(), Back()])


def test_a_rule_that_matches_what_it_makes_is_named() -> None:
    class Grow(Rule):
        """sigmoid(x) = sigmoid(x) + 0"""

        legality = Legality.BITWISE
        pattern = P("sigmoid", X)

        def rewrite(self, match: Match, build: Builder) -> fx.Node:
            return build.call("add", build.call("sigmoid", operands(match.root)[0]), 0.0)

    with pytest.raises(RewriteError, match=r"no end after \d+ rewrites; this rule matches again what it makes: Grow"):
        rewrite(TWO, [ComposeMaxPools(), Grow()])


def replaces_an_operand(match: Match, *_: Any) -> Any:
    match.root.replace_input_with(match["inner"], operands(match["inner"])[0])


def retargets(match: Match, *_: Any) -> Any:
    match["inner"].target = vocabulary.lookup("relu")


def erases(match: Match, *_: Any) -> Any:
    (user,) = match.root.users
    user.replace_input_with(match.root, match["inner"])
    match.root.graph.erase_node(match.root)
    return match["inner"]


@pytest.mark.defective
@pytest.mark.parametrize("fail", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("edit", [replaces_an_operand, retargets, erases])
@pytest.mark.parametrize("method", ["check", "rewrite"])
def test_a_rule_may_not_edit_the_chain(method: str, edit: Any, fail: bool) -> None:
    def edits(*given: Any) -> Any:
        edit(*given)
        if fail:
            raise KeyError("oops")
        return Reject("not today") if method == "check" else given[0]["inner"]

    class Editor(TanhOfSigmoid):
        pass

    setattr(Editor, method, staticmethod(edits))
    node = "tanh" if edit is retargets else "sigmoid"
    with pytest.raises(
        RewriteError, match=f"the rule Editor edited ({node}|output), a node of the chain; a rule builds"
    ):
        rewrite(TWO, [ComposeMaxPools(), Editor(), TanhOfSigmoid()])


@pytest.mark.defective
def test_a_defect_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(TanhOfSigmoid):
        rewrite = staticmethod(fails)

    source = program("x: f64[1, 1, 64]", "\n".join(CASCADE) + "\na = tanh(m3)\nb = sigmoid(a)\nb")
    result = rewrite(source, [Broken(), ComposeMaxPools()])
    assert len(result.rules) == 3 and len(result.rejected) == 1
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "the rule Broken is defective at sigmoid: KeyError: 'oops'"
    ]


#: four stacked pools
CASCADE = [f"m{i} = {max_pool('x' if i == 0 else f'm{i - 1}', 2, 2)}" for i in range(4)]


def test_a_refusal_names_the_node_that_it_speaks_of() -> None:
    class Picky(TanhOfSigmoid):
        def check(self, match: Match) -> Reject | None:
            return Reject("no tanh today", match["inner"])

    build = to_graph(TWO, fakes(TWO))
    for node in build.graph.nodes:
        node.meta["label"] = f"layers.{node.name}"
    (rejection,) = rewrite_graph(build, [Picky()], Settings()).rejected
    assert (rejection.rule, rejection.node, rejection.reason) == ("Picky", "layers.tanh", "no tanh today")
    (application,) = rewrite_graph(build, [TanhOfSigmoid()], Settings()).applied
    assert application.node == "layers.sigmoid" and application.identity.startswith("sigmoid(tanh(x)) = relu(x)")
    assert [n.meta.get("label") for n in build.graph.nodes if n.name == "relu"] == ["layers.sigmoid"]


# --- sizes that are not known ---------------------------------------------------------------------
def symbolic(inputs: list[tuple[tuple[int, ...], set[int]]]) -> list[Tensor]:
    """Fake float64 tensors whose named dims are dynamic."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    tensors = []
    for shape, dynamic in inputs:
        kinds = [DimDynamic.DYNAMIC if d in dynamic else DimDynamic.STATIC for d in range(len(shape))]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        tensors.append(mode.from_tensor(torch.zeros(shape, dtype=torch.float64), symbolic_context=context))
    return tensors


LAYER = "x: f64[_, 3, _], w: f64[3, 4, 3], b: f64[4], mean: f64[4], var: f64[4], g: f64[4], h: f64[4], c: f64[4, 1]"
SHAPES = [((2, 3, 11), {0, 2}), ((3, 4, 3), set()), *[((4,), set())] * 5, ((4, 1), set())]


@pytest.mark.parametrize(
    ("chain", "fired"),
    [
        ("z = mul(y, c)\nr = add(z, 1.0)\nr", ["FoldScaleIntoConvTranspose", "FoldShiftIntoConvTranspose"]),
        ("r = batch_norm(y, mean, var, g, h, eps=0.1)\nr", ["FoldBatchNormIntoConvTranspose"]),
        ("r = instance_norm(y, g, h, eps=0.1)\nr", ["CancelBiasBeforeStatistics"]),
        ("z = clone(y)\ns = relu(z)\nr = relu6(s)\nr", ["DropCopies", "MergeClamps"]),
        (f"z = relu(y)\nr = {max_pool('z', 2, 2)}\nr", ["MoveMonotoneBehindMaxPool"]),
        (
            "z = tanh(y)\ns = mul(z, 2.0)\nt = mul(s, 3.0)\nr = mean(t, dims=(2,), keepdim=True)\nr",
            ["MergeNumbers", "MoveAffineBehindMean"],
        ),
        ("z = tanh(y)\ns = neg(z)\nr = mean(s, dims=(2,), keepdim=False)\nr", ["MoveAffineBehindMean"]),
        (f"z = tanh(y)\ns = sub(c, z)\nr = {avg_pool('s', 2, 2)}\nr", ["MoveAffineBehindAvgPool"]),
        ("z = add(y, 2.0)\nr = softmax(z, dim=1)\nr", ["DropShiftBeforeSoftmax"]),
        (
            "n, m, v = batch_norm_train(y, g, h, eps=0.1)\nr = mean(n, dims=(2,), keepdim=True)\nr, m, v",
            ["CancelBiasBeforeStatistics", "SplitBatchNormBeforeMean", "MoveAffineBehindMean", "MoveAffineBehindMean"],
        ),
    ],
)
def test_rules_that_need_no_sizes_fire_without(chain: str, fired: list[str]) -> None:
    source = program(LAYER, f"y = {conv()}\n{chain}")
    result = rewrite(source, DEFAULT_RULES, inputs=symbolic(SHAPES))
    assert result.rules == fired
    known = program(LAYER.replace("[_, 3, _]", "[2, 3, 11]"), f"y = {conv()}\n{chain}")
    tensors = [torch.randn(shape, dtype=torch.float64).abs() + 0.1 for shape, _ in SHAPES]
    for a, b in zip(known.run(tensors), result.rewritten.run(tensors), strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize(
    ("chain", "rule", "reason"),
    [
        (
            "r = mean(y, dims=(2,), keepdim=True)\nr",
            "CollapseMeanOfConvTranspose",
            "the boxes of inputs need sizes that are known",
        ),
        (
            "z = tanh(y)\ns = sub(z, c)\nr = mean(s, dims=(2,), keepdim=False)\nr",
            "MoveAffineBehindMean",
            "dropped dims need sizes that are known",
        ),
        (
            f"r = {max_pool('y', 2, 2)}\nr",
            "DropDeadOutputs",
            "which outputs are dead depends on sizes that are not known",
        ),
        (
            f"z = {max_pool('y', 2, 2)}\nr = {max_pool('z', 2, 2, 1)}\nr",
            "ComposeMaxPools",
            "padding or ceil_mode of the outer pool needs sizes that are known",
        ),
        (
            "z = tanh(y)\ns = neg(z)\nr = adaptive_avg_pool(s, size=(3,))\nr",
            "MoveAffineBehindAvgPool",
            "it is not known to have fewer outputs than inputs",
        ),
        (
            f"r = {avg_pool('y', 2, 1)}\nr",
            "FoldAvgPoolIntoConvTranspose",
            "the merged kernel needs sizes that are known",
        ),
        (
            f"z = {avg_pool('y', 3, 3)}\nr = mean(z, dims=(2,), keepdim=True)\nr",
            "MergeAvgPoolIntoMean",
            "which positions windows read depends on sizes that are not known",
        ),
        (
            "r = sum(y, dims=(1,), keepdim=False)\nr",
            "FoldChannelSumIntoConvTranspose",
            "dropped dims need sizes that are known",
        ),
        (
            "n, m, v = batch_norm_train(y, g, h, eps=0.1)\nr = mean(n, dims=(2,), keepdim=False)\nr, m, v",
            "SplitBatchNormBeforeMean",
            "dropped dims need sizes that are known",
        ),
    ],
)
def test_rules_that_need_sizes_say_so(chain: str, rule: str, reason: str) -> None:
    source = program(LAYER, f"y = {conv()}\n{chain}")
    result = rewrite(source, DEFAULT_RULES, inputs=symbolic(SHAPES), allow=EVERYTHING)
    assert result.reason(rule) == reason


def test_a_replacement_whose_shape_cannot_be_compared_is_no_defect() -> None:
    class Wider(Rule):
        """avg_pool with padding for avg_pool without: never the same, but only numbers would show it"""

        legality = Legality.BITWISE
        pattern = P("avg_pool", X)

        def rewrite(self, match: Match, build: Builder) -> fx.Node:
            return build.call("avg_pool", *operands(match.root), **{**attributes(match.root), "padding": (1,)})

    source = program("x: f64[_, 3, _]", f"r = {avg_pool('x', 2, 1)}\nr")
    result = rewrite(source, [Wider()], inputs=symbolic(SHAPES[:1]))
    reason = "with sizes that are not known, the replacement cannot be shown to have the same shape"
    assert result.reason("Wider") == reason


def test_pools_compose_where_only_the_batch_is_dynamic() -> None:
    source = program("x: f64[_, 3, 13]", f"z = {max_pool('x', 3, 2, 1)}\nr = {max_pool('z', 3, 2, 1)}\nr")
    result = rewrite(source, [ComposeMaxPools()], inputs=symbolic([((2, 3, 13), {0})]))
    assert result.reason("ComposeMaxPools") == "padding or ceil_mode of the outer pool needs sizes that are known"
    source = program("x: f64[_, 3, 13]", f"z = {max_pool('x', 3, 2, 1)}\nr = {max_pool('z', 3, 2)}\nr")
    assert rewrite(source, [ComposeMaxPools()], inputs=symbolic([((2, 3, 13), {0})])).rules == ["ComposeMaxPools"]


def test_no_guard_is_added_by_rewriting() -> None:
    inputs = symbolic(SHAPES)
    source = program(
        LAYER,
        f"y = {conv()}\nz = mul(y, c)\nr = relu(z)\nq = {max_pool('r', 2, 2)}\nm = mean(q, dims=(2,), keepdim=True)\nm",
    )
    build = to_graph(source, inputs)
    env = build.mode.shape_env
    before = len(env.guards)
    apply_rules(build, DEFAULT_RULES, Settings())
    assert len(env.guards) == before


# --- any order ------------------------------------------------------------------------------------
NET = (
    "x: f64[{n}, 2, 9], w: f64[2, 3, 4], b: f64[3], "
    "mean: f64[3], var: f64[3], g: f64[3], h: f64[3], c: f64[3, 1], z: f64[()]"
)
TRAIN = "batch_norm_train({}, g, h, eps=0.125)"
EVAL = "batch_norm({}, mean, var, g, h, eps=0.125)"


def chain(*steps: str, also: str = "") -> str:
    """A convolution, then the steps, each of the value before it (``{}``); ``also`` names further outputs."""
    lines = [f"v0 = {conv()}"]
    for i, step in enumerate(steps, 1):
        outs = f"v{i}, m{i}, s{i}" if step == TRAIN else f"v{i}"
        also += f", m{i}, s{i}" if step == TRAIN else ""
        lines.append(f"{outs} = {step.format(f'v{i - 1}')}")
    return "\n".join([*lines, f"v{len(steps)}{also}"])


CHAINS = [
    chain("mul({}, 2.0)", "clone({})", "add({}, c)", max_pool("{}", 2, 2)),
    chain("relu({})", max_pool("{}", 3, 2), "add({}, 1.0)", max_pool("{}", 3, 1, 1), "relu({})"),
    chain(max_pool("{}", 3, 2), "relu({})", max_pool("{}", 2, 2, 1), max_pool("{}", 2, 1, ceil_mode=True)),
    chain("clone({})", "mul({}, 2.0)", EVAL, "mean({}, dims=(2,), keepdim=False)"),
    chain("sub(1.0, {})", TRAIN, "div({}, 4.0)", "mean({}, dims=(2,), keepdim=True)"),
    chain("clone({})", "add({}, 1.0)", TRAIN, "mean({}, dims=(2,), keepdim=True)"),
    chain(
        "add({}, c)", avg_pool("{}", 2, 2), "mul({}, c)", avg_pool("{}", 2, 2), "mean({}, dims=(0, 2), keepdim=True)"
    ),
    chain("tanh({})", "mul({}, 2.0)", avg_pool("{}", 2, 2), "mul({}, 0.25)", avg_pool("{}", 2, 2)),
    chain("add({}, 1.0)", "clone({})", "add({}, 0.5)", "softmax({}, dim=1)"),
    chain(
        "clamp({}, -1.0, 1.0)",
        max_pool("{}", 2, 4),
        "relu({})",
        "mul({}, 2.0)",
        "mul({}, 2.0)",
        "sum({}, dims=(1,), keepdim=True)",
    ),
    chain(
        "neg({})",
        "mul({}, z)",
        "instance_norm({}, g, h, eps=0.125)",
        "leaky_relu({}, negative_slope=0.25)",
        max_pool("{}", 2, 3),
        also=", v0",
    ),
    chain(
        "mul({}, 2.0)", "add({}, 1.0)", "mul({}, 2.0)", "sub({}, c)", "sum({}, dims=(2,), keepdim=True)", also=", v2"
    ),
    chain("add({}, 1.0)", "mul({}, c)", "mean({}, dims=(2,), keepdim=True)"),
    chain("mul({}, 2.0)", "clamp({}, -1.0, 3.0)", "clone({})", "div({}, -2.0)", "relu({})", max_pool("{}", 2, 2)),
]


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("steps", CHAINS)
def test_the_order_of_the_rules_does_not_matter(steps: str, batch: int) -> None:
    source = program(NET.format(n=batch), steps)
    first = rewrite(source, DEFAULT_RULES)
    assert first.rules
    agree(first)
    again = rewrite(first.rewritten, DEFAULT_RULES)
    assert again.rules == [] and again.rewritten == first.rewritten
    rules = list(DEFAULT_RULES)
    for seed in range(5):
        random.Random(seed).shuffle(rules)
        other = rewrite(source, rules)
        assert other.text == first.text, (first.rules, other.rules)


def test_sorting_leaves_an_unchanged_graph_alone() -> None:
    source = program("x: f64[4], t: f64[4]", "a = tanh(t)\nb = relu(x)\nc = add(b, a)\nc")
    assert rewrite(source, [FoldScaleIntoConvTranspose()]).text == "v0 = tanh(x1)\nv1 = relu(x0)\nv2 = add(v1, v0)\nv2"
