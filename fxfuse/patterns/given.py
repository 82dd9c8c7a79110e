"""Rules of a caller's own: whether they are rules, before any of them meets a model."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from fxfuse import vocabulary
from fxfuse.patterns.rule import Legality, Pat, Rule


def given_rules(rules: Any, built_in: Sequence[Rule]) -> tuple[Rule, ...]:
    """``rules`` as a tuple, () for None. TypeError or ValueError names what is wrong, and the remedy."""
    if rules is None:
        return ()
    if isinstance(rules, Rule):
        raise TypeError(f"rules must be a list: pass rules=[{type(rules).__name__}(...)], not the rule itself")
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        raise TypeError(f"rules must be a list of rules, such as rules=[MyRule()], not {rules!r}")
    for rule in rules:
        _check(rule)
    known = {r.name for r in built_in}
    for name, count in Counter(r.name for r in rules).items():
        if name in known:
            raise ValueError(f"rules: {name} is the name of a built-in rule, which always applies; choose another one")
        if count > 1:
            raise ValueError(f"rules: {count} rules are called {name}; set `name` in one of them to tell them apart")
    return tuple(rules)


def _check(rule: Any) -> None:
    if isinstance(rule, type) and issubclass(rule, Rule):
        raise TypeError(f"rules holds the class {rule.__name__}; pass an instance, rules=[{rule.__name__}()]")
    kind = type(rule).__name__
    if not isinstance(rule, Rule):
        raise TypeError(f"rules holds {rule!r}, a {kind}; a rule is an instance of a subclass of fxfuse.Rule")
    if not isinstance(rule.name, str) or not rule.name.isidentifier():
        raise ValueError(f"{kind}.name is {rule.name!r}; it must be an identifier, as FXFUSE_DISABLE lists names")
    legality = getattr(rule, "legality", None)
    if not isinstance(legality, Legality):
        raise TypeError(
            f"{kind}.legality is {legality!r}; set it to one of {', '.join(map(str, Legality))}: "
            "what the rewrite may change about the result"
        )
    pattern = getattr(rule, "pattern", None)
    if pattern is None and type(rule).match is not Rule.match:
        return  # it finds its matches in its own way
    if not isinstance(pattern, Pat) or not pattern.ops:
        raise TypeError(f'{kind}.pattern is {pattern!r}; set it to a pattern with an operator, such as P("relu", X)')
    for part in _parts(kind, pattern):
        _check_operators(kind, part)


def _parts(kind: str, pattern: Any) -> Iterator[Pat]:
    if not isinstance(pattern, Pat):
        raise TypeError(f"{kind}.pattern holds {pattern!r}; an operand is P(...), X, or Pat(name=...)")
    yield pattern
    for operand in pattern.operands:
        yield from _parts(kind, operand)


def _check_operators(kind: str, pattern: Pat) -> None:
    known = vocabulary.names()
    for name in pattern.ops:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3)
            remedy = f"did you mean {', '.join(near)}?" if near else "fxfuse.vocabulary.names() lists those it has"
            raise ValueError(f"{kind}.pattern: the vocabulary has no operator {name!r}; {remedy}")
        arity = vocabulary.lookup(name).arity
        if len(pattern.operands) > arity:
            raise ValueError(f"{kind}.pattern: {name} has {arity} operands, and {len(pattern.operands)} are listed")
    if pattern.commutative and len(pattern.operands) != 2:
        raise ValueError(f"{kind}.pattern: commutative=True is for two operands, not {len(pattern.operands)}")
