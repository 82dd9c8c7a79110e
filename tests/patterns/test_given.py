"""What may be passed as ``rules=``: everything else is named, with the remedy."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from torch import fx

from fxfuse import Rule
from fxfuse.patterns import DEFAULT_RULES, Builder, ComposeMaxPools, Legality, Match, P, Pat, X, given_rules, operands


class Swish(Rule):
    """x * sigmoid(x) = silu(x)"""

    legality = Legality.REASSOCIATING
    pattern = P("mul", Pat(name="x"), P("sigmoid", Pat(name="x")), commutative=True)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        return build.call("silu", match["x"])


@dataclasses.dataclass
class Below(Swish):
    """a rule with a choice of its own"""

    limit: float

    @property
    def name(self) -> str:
        return f"Below{self.limit:.0f}"


class Anything(Rule):
    """a rule that finds its matches in its own way"""

    legality = Legality.BITWISE

    def match(self, root: fx.Node) -> Match | None:
        return None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        return operands(match.root)[0]


def with_(**attributes: Any) -> Rule:
    return type("Odd", (Swish,), attributes)()


def test_rules_that_are_accepted() -> None:
    swish, one, two, anything = Swish(), Below(1), Below(2), Anything()
    assert given_rules(None, DEFAULT_RULES) == given_rules([], DEFAULT_RULES) == ()
    assert given_rules([swish, one, two, anything], DEFAULT_RULES) == (swish, one, two, anything)
    assert given_rules((swish,), DEFAULT_RULES) == (swish,)


def test_built_in_rules_are_well_formed() -> None:
    assert given_rules(DEFAULT_RULES, ()) == DEFAULT_RULES


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        (Swish(), TypeError, "rules must be a list: pass rules=[Swish(...)], not the rule itself"),
        (Swish, TypeError, "rules must be a list of rules, such as rules=[MyRule()], not <class"),
        ("Swish", TypeError, "rules must be a list of rules, such as rules=[MyRule()], not 'Swish'"),
        ({Swish()}, TypeError, "rules must be a list of rules, such as rules=[MyRule()], not {<"),
        ([Swish], TypeError, "rules holds the class Swish; pass an instance, rules=[Swish()]"),
        ([Swish(), 7], TypeError, "rules holds 7, a int; a rule is an instance of a subclass of fxfuse.Rule"),
        ([Swish(), Swish()], ValueError, "2 rules are called Swish; set `name` in one of them to tell them apart"),
        ([ComposeMaxPools()], ValueError, "ComposeMaxPools is the name of a built-in rule, which always applies"),
        ([with_(name="two words")], ValueError, "Odd.name is 'two words'; it must be an identifier"),
        ([with_(legality="bitwise")], TypeError, "Odd.legality is 'bitwise'; set it to one of Legality.BITWISE, "),
        ([with_(pattern="relu")], TypeError, "Odd.pattern is 'relu'; set it to a pattern with an operator"),
        ([with_(pattern=X)], TypeError, "set it to a pattern with an operator, such as P(\"relu\", X)"),
        ([with_(pattern=P("relu", "x"))], TypeError, "Odd.pattern holds 'x'; an operand is P(...), X, "),
        ([with_(pattern=P("relu", P("max_pol")))], ValueError, "no operator 'max_pol'; did you mean max_pool"),
        ([with_(pattern=P("zzz"))], ValueError, "no operator 'zzz'; fxfuse.vocabulary.names() lists those it has"),
        ([with_(pattern=P("relu", X, X))], ValueError, "Odd.pattern: relu has 1 operands, and 2 are listed"),
        ([with_(pattern=P("add", X, commutative=True))], ValueError, "commutative=True is for two operands, not 1"),
    ],
)  # fmt: skip
def test_rules_that_are_refused(rules: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        given_rules(rules, DEFAULT_RULES)


def test_a_rule_without_a_pattern() -> None:
    class Bare(Rule):
        legality = Legality.BITWISE

        def rewrite(self, match: Match, build: Builder) -> fx.Node:
            return match.root

    with pytest.raises(TypeError, match=r"Bare\.pattern is None"):
        given_rules([Bare()], DEFAULT_RULES)
