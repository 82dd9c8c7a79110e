"""What a rewrite rule is, and the engine that applies rules to a fixed point.

A rule is a class: its docstring states the identity, ``legality`` what it may change, ``pattern``
what it looks for, ``check`` refuses with a sentence what the identity does not cover, ``rewrite``
builds the replacement. A refused match is data: it ends up in the report. So does a rule's own
defect, which never breaks a model: the chain goes on without that rewrite, or as it was written.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import enum
import functools
import logging
import operator
import os
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from torch import fx
from torch.fx.experimental import symbolic_shapes

from fxfuse.chain import Builder, eliminate_dead, op_name, sort
from fxfuse.patterns.replacement import Snapshot, differs_in_unknown_sizes, misfit

log = logging.getLogger(__name__)


class Legality(enum.Enum):
    """What a rewrite may change about the result."""

    #: the same bits, but for the sign of a zero
    BITWISE = "bitwise"
    #: floating-point operations in another order. Inf and NaN come out where they did; only where a finite
    #: intermediate result overflows or underflows in one order and not in the other may this differ. An
    #: Inf *parameter* still makes Inf or NaN of what it made Inf or NaN of, but not always the same one.
    REASSOCIATING = "reassociating"
    #: as reassociating, but only for finite values
    FINITE_ONLY = "finite-only"

    @staticmethod
    def parse(allow: Collection[str | Legality] | None) -> frozenset[Legality]:
        """The classes that ``allow`` names; None is the default, bitwise and reassociating."""
        if allow is None:
            return frozenset((Legality.BITWISE, Legality.REASSOCIATING))
        if isinstance(allow, str):
            raise ValueError(f"allow must be a collection of names, such as {{{allow!r}}}, not the string {allow!r}")
        known = {x.value for x in Legality}
        for item in allow:
            if not isinstance(item, Legality) and item not in known:
                raise ValueError(f"allow={item!r} is not a legality class; known: {', '.join(sorted(known))}")
        return frozenset(Legality(x) for x in allow)


@dataclasses.dataclass(frozen=True)
class Reject:
    """Why a match was left alone: a sentence, and the node it speaks of (the root where None)."""

    reason: str
    node: fx.Node | None = None


@dataclasses.dataclass(frozen=True)
class Pat:
    """A tree pattern: an operator out of ``ops`` whose leading operands match ``operands``.

    ``name`` binds the node (or, for a pattern without ops, any operand) in the match. Operands that
    the pattern does not list are free. A name that occurs twice matches the same operand twice.
    ``commutative`` tries both orders of two operands. ``output`` asks for that output of an operator
    of several.
    """

    ops: tuple[str, ...] = ()
    operands: tuple[Pat, ...] = ()
    name: str = ""
    commutative: bool = False
    output: int | None = None


def P(  # noqa: N802 - reads as the pattern that it makes
    ops: str | Sequence[str], *operands: Pat, name: str = "", commutative: bool = False, output: int | None = None
) -> Pat:
    """Shorthand for a :class:`Pat` with operators: ``P("max_pool", P("max_pool", X, name="inner"))``."""
    return Pat((ops,) if isinstance(ops, str) else tuple(ops), operands, name, commutative, output)


#: matches any operand, bound to nothing
X = Pat()


class Match:
    """One match: ``match["name"]`` is what a name of the pattern is bound to, ``match.root`` the last node.

    ``nodes`` are those that the replacement makes superfluous: the value of each but the root must not
    be used outside the match. A rule with a ``match`` of its own fills ``nodes`` and ``bound`` itself.
    """

    def __init__(self, root: fx.Node) -> None:
        self.root = root
        self.nodes: list[fx.Node] = []
        self.bound: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        try:
            return self.bound[name]
        except KeyError:
            raise KeyError(f"the pattern binds no {name!r}; it binds {sorted(self.bound)}") from None

    def escaping(self) -> fx.Node | None:
        """An interior node whose value is used outside the match, or None."""
        for node in self.nodes:
            if node is self.root:
                continue
            if any(user not in self.nodes for user in node.users):
                return node
        return None


class Rule(abc.ABC):
    """One algebraic identity, applied left to right: the base class of every rewrite rule.

    The first line of the docstring is the identity, as reports print it. A subclass sets ``legality``
    and ``pattern``, and defines :meth:`rewrite`; where the identity holds under conditions only,
    :meth:`check`, too. A rule keeps nothing between matches, and edits no node: it builds new ones.
    ``forward_only`` marks an identity whose two sides route gradients differently (ties in a max
    pool): it must not be used to derive a backward.
    """

    #: what the rewrite may change about the result; it is applied only where the caller allows that
    legality: ClassVar[Legality]
    forward_only: ClassVar[bool] = False
    #: the chain of operators that it looks for, its last one outermost
    pattern: ClassVar[Pat]

    @property
    def name(self) -> str:
        """How reports and FXFUSE_DISABLE call the rule: its class's name."""
        return type(self).__name__

    @property
    def identity(self) -> str:
        """The first line of the docstring: the mathematics in one line."""
        return (type(self).__doc__ or self.name).strip().splitlines()[0]

    def match(self, root: fx.Node) -> Match | None:
        """The match whose last node is ``root``, or None."""
        match = Match(root)
        return match if _match(self.pattern, root, match) else None

    def check(self, match: Match) -> Reject | None:
        """None where the identity holds and is worth it, otherwise why not."""
        return None

    @abc.abstractmethod
    def rewrite(self, match: Match, build: Builder) -> fx.Node | tuple[fx.Node, ...]:
        """The replacement of ``match.root``: a node, or one per output, of the same shape and dtype.

        ``build.call("relu", x)`` adds an operator of the vocabulary. Any other effect on the graph
        takes back the whole rewriting of the chain.
        """


def _match(pattern: Pat, value: Any, match: Match) -> bool:
    if pattern.output is not None:
        if not (isinstance(value, fx.Node) and value.target is operator.getitem and value.args[1] == pattern.output):
            return False
        match.nodes.append(value)
        value = value.args[0]
    if pattern.name:
        if pattern.name in match.bound and not _same_operand(match.bound[pattern.name], value):
            return False
        match.bound[pattern.name] = value
    if not pattern.ops:
        return True
    if op_name(value) not in pattern.ops:
        return False
    match.nodes.append(value)
    count = len(pattern.operands)
    if len(value.args) < count:
        return False
    orders = [value.args[:count]]
    if pattern.commutative:
        orders.append(value.args[:count][::-1])
    for order in orders:
        nodes, bound = list(match.nodes), dict(match.bound)
        if all(_match(p, o, match) for p, o in zip(pattern.operands, order, strict=True)):
            return True
        match.nodes, match.bound = nodes, bound
    return False


def _same_operand(a: Any, b: Any) -> bool:
    """The same node, or the same number (1 is not True, and NaN is no number's equal)."""
    return a is b if isinstance(a, fx.Node) or isinstance(b, fx.Node) else type(a) is type(b) and bool(a == b)


# --- the engine -----------------------------------------------------------------------------------
class RewriteError(RuntimeError):
    """The rules do not come to an end, or one of them edited the chain itself: it goes on as it was written."""


@dataclasses.dataclass(frozen=True)
class Application:
    """A rule that fired: where (a readable name) and the identity it used."""

    rule: str
    node: str
    identity: str


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A near miss: the rule, the node and a sentence."""

    rule: str
    node: str
    reason: str


@dataclasses.dataclass
class Settings:
    """What the rules may do: legality classes, rules switched off by name, applications left."""

    allow: frozenset[Legality] = dataclasses.field(default_factory=lambda: Legality.parse(None))
    disabled: frozenset[str] = frozenset()
    fuel: int | None = None

    @staticmethod
    def from_environment(allow: frozenset[Legality]) -> Settings:
        """FXFUSE_DISABLE=Rule1,Rule2 switches rules off; FXFUSE_FUEL=n stops after n applications per graph."""
        fuel = os.environ.get("FXFUSE_FUEL")
        if fuel is not None and not fuel.isdecimal():
            raise ValueError(f"FXFUSE_FUEL={fuel!r} must be a whole number: how many rewrites may happen")
        disabled = frozenset(filter(None, os.environ.get("FXFUSE_DISABLE", "").replace(" ", "").split(",")))
        return Settings(allow, disabled, None if fuel is None else int(fuel))

    def warn_of_unknown(self, rules: Sequence[Rule]) -> None:
        """A name in FXFUSE_DISABLE that none of ``rules`` has switches nothing off: say so, once per name."""
        names = [rule.name for rule in rules]
        for name in sorted(self.disabled.difference(names)):
            _warn_of_unknown(name, next(iter(difflib.get_close_matches(name, names, 1)), None))


@functools.cache
def _warn_of_unknown(name: str, close: str | None) -> None:
    log.warning("FXFUSE_DISABLE: there is no rule %s%s", name, f"; did you mean {close}?" if close else "")


def apply_rules(build: Builder, rules: Sequence[Rule], settings: Settings) -> tuple[list[Application], list[Rejection]]:
    """Apply ``rules`` to the graph until none fires. Raises RewriteError when they do not come to an end.

    After each rewrite the matching starts again on the new graph, so that a chain of three pools
    never meets a stale match. ``settings.fuel`` is used up in place. A graph that changed is sorted at
    the end: rules that lead to the same operators in any order lead to the same program.
    """
    applied: list[Application] = []
    warned: set[str] = set()
    limit = 16 * (len(build.graph.nodes) + len(rules))
    while True:
        fired, rejected = _fire_one(build, rules, settings, warned)
        if fired is None:
            if applied:
                sort(build.graph)
            return applied, rejected
        applied.append(fired)
        if len(applied) > limit:
            cycle = sorted({a.rule for a in applied[-limit // 2 :]})
            why = "these rules undo each other" if len(cycle) > 1 else "this rule matches again what it makes"
            raise RewriteError(f"no end after {limit} rewrites; {why}: {', '.join(cycle)}")


def _fire_one(
    build: Builder, rules: Sequence[Rule], settings: Settings, warned: set[str]
) -> tuple[Application | None, list[Rejection]]:
    """Apply the first rule that fires anywhere; None and all near misses where none does."""
    rejected: dict[tuple[str, str], Rejection] = {}
    before = Snapshot(build.graph)
    for rule in rules:
        for node in [n for n in build.graph.nodes if op_name(n)]:
            label = label_of(node)
            try:
                match = rule.match(node)
                if match is None:
                    continue
                refusal = _may_fire(rule, match, settings) or _replace(rule, match, build, before)
            except RewriteError:
                raise
            except Exception as error:  # noqa: BLE001 - a rule's own defect must not break a user's model
                refusal = _failure(error)
            if refusal is not None:
                _warn(rule, label, refusal, warned)
                where = label_of(refusal.node) if refusal.node is not None else label
                rejected[rule.name, label] = Rejection(rule.name, where, refusal.reason)
                continue
            log.debug("%s fired at %s", rule.name, label)
            if settings.fuel is not None:
                settings.fuel -= 1
            return Application(rule.name, label, rule.identity), []
        _refuse_edits(rule, before)
    return None, list(rejected.values())


#: raised where an operator asks for the value of a size that is not known
_UNKNOWN_SIZE = tuple(
    getattr(symbolic_shapes, name)
    for name in ("_ShapeEnvGuardError", "GuardOnDataDependentSymNode")
    if hasattr(symbolic_shapes, name)
)


@dataclasses.dataclass(frozen=True)
class _Defect(Reject):
    """A refusal that is the rule's own fault."""

    def __str__(self) -> str:
        return self.reason.removeprefix(_DEFECTIVE)


_DEFECTIVE = "the rule is defective: "


def _failure(error: Exception) -> Reject:
    if isinstance(error, _UNKNOWN_SIZE):
        return Reject("it needs a size that is not known before the call")
    log.debug("a rule failed", exc_info=error)
    return _defect(f"{type(error).__name__}: {error}")


def _defect(problem: str) -> Reject:
    return _Defect(_DEFECTIVE + problem)


def _warn(rule: Rule, label: str, refusal: Reject, warned: set[str]) -> None:
    """Warn of a defect, once per rule and place: what is refused is tried again after every rewrite."""
    if isinstance(refusal, _Defect):
        message = f"the rule {rule.name} is defective at {label}: {refusal}"
        if message not in warned:
            log.warning("%s", message)
        warned.add(message)


def _refuse_edits(rule: Rule, before: Snapshot) -> None:
    edited = before.edited()
    if edited is not None:
        raise RewriteError(
            f"the rule {rule.name} edited {label_of(edited)}, a node of the chain; "
            "a rule builds new nodes, and returns the one that takes the root's place"
        )


def label_of(node: fx.Node) -> str:
    """How a report calls a node: the name it has in the model's graph, or else its own."""
    return str(node.meta.get("label", node.name))


def _may_fire(rule: Rule, match: Match, settings: Settings) -> Reject | None:
    if rule.name in settings.disabled:
        return Reject("switched off by FXFUSE_DISABLE")
    escaping = match.escaping()
    if escaping is not None:
        return Reject(f"the value of {label_of(escaping)} is also used elsewhere", escaping)
    refusal = rule.check(match)
    if refusal is not None:
        return refusal
    if rule.legality not in settings.allow:
        return Reject(f"it is {rule.legality.value}: pass allow={{..., {rule.legality.value!r}}} to permit it")
    if settings.fuel is not None and settings.fuel <= 0:
        return Reject("FXFUSE_FUEL is used up")
    return None


def _replace(rule: Rule, match: Match, build: Builder, snapshot: Snapshot) -> Reject | None:
    """Build the replacement and put it in; one that fails or is of another type is taken back."""
    root = match.root
    before = snapshot.nodes
    try:
        with build.graph.inserting_before(root):
            new = rule.rewrite(match, build)
        _refuse_edits(rule, snapshot)
        problem = misfit(root, new, [n for n in build.graph.nodes if n not in before])
        refusal = None if problem is None else _defect(problem)
        if refusal is None and differs_in_unknown_sizes(root, new):
            refusal = Reject("with sizes that are not known, the replacement cannot be shown to have the same shape")
    except RewriteError:
        raise
    except Exception as error:  # noqa: BLE001 - a rule's own defect must not break a user's model
        _refuse_edits(rule, snapshot)
        refusal = _failure(error)
    if refusal is not None:
        for node in reversed(build.graph.nodes):
            if node not in before:
                build.graph.erase_node(node)
        return refusal
    if isinstance(new, fx.Node):
        new.meta.setdefault("label", label_of(root))
        root.replace_all_uses_with(new)
    else:
        for item in list(root.users):
            position: Any = item.args[1]
            item.replace_all_uses_with(new[position])
        for node in (new[0], *new[0].all_input_nodes):  # the operator that stands for the root, or its first output
            if node not in before:
                node.meta.setdefault("label", label_of(root))
    eliminate_dead(build.graph)
    return None
