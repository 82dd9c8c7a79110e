"""What a rewrite rule is, and the engine that applies rules to a fixed point.

A rule is a class: its docstring states the identity, ``legality`` what it may change, ``pattern``
what it looks for, ``check`` refuses with a sentence what the identity does not cover, ``rewrite``
builds the replacement. A refused match is data: it ends up in the report.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import logging
import operator
import os
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from torch import fx
from torch.fx.experimental import symbolic_shapes

from fxfuse.chain import Builder, eliminate_dead, op_name, same_type, sort

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
    the pattern does not list are free. ``commutative`` tries both orders of two operands.
    ``output`` asks for that output of an operator of several.
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
    """The nodes of one match: ``match["name"]`` for the bound ones, ``match.root`` for the last."""

    def __init__(self, root: fx.Node) -> None:
        self.root = root
        self.nodes: list[fx.Node] = []
        self.bound: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def escaping(self) -> fx.Node | None:
        """An interior node whose value is used outside the match, or None."""
        for node in self.nodes:
            if node is self.root:
                continue
            if any(user not in self.nodes for user in node.users):
                return node
        return None


class Rule(abc.ABC):
    """One algebraic identity, applied left to right.

    ``forward_only`` marks an identity whose two sides route gradients differently (ties in a max
    pool): it must not be used to derive a backward.
    """

    legality: ClassVar[Legality]
    forward_only: ClassVar[bool] = False
    pattern: ClassVar[Pat]

    @property
    def name(self) -> str:
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
        """The replacement of ``match.root``: a node, or one per output."""


def _match(pattern: Pat, value: Any, match: Match) -> bool:
    if pattern.name:
        match.bound[pattern.name] = value
    if not pattern.ops:
        return True
    if pattern.output is not None:
        if not (isinstance(value, fx.Node) and value.target is operator.getitem and value.args[1] == pattern.output):
            return False
        match.nodes.append(value)
        value = value.args[0]
        if pattern.name:
            match.bound[pattern.name] = value
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


# --- the engine -----------------------------------------------------------------------------------
class RewriteError(RuntimeError):
    """The rules do not come to an end, or one of them built something of another type."""


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


def apply_rules(build: Builder, rules: Sequence[Rule], settings: Settings) -> tuple[list[Application], list[Rejection]]:
    """Apply ``rules`` to the graph until none fires. Raises RewriteError when they do not come to an end.

    After each rewrite the matching starts again on the new graph, so that a chain of three pools
    never meets a stale match. ``settings.fuel`` is used up in place. A graph that changed is sorted at
    the end: rules that lead to the same operators in any order lead to the same program.
    """
    applied: list[Application] = []
    limit = 16 * (len(build.graph.nodes) + len(rules))
    while True:
        fired, rejected = _fire_one(build, rules, settings)
        if fired is None:
            if applied:
                sort(build.graph)
            return applied, rejected
        applied.append(fired)
        if len(applied) > limit:
            cycle = sorted({a.rule for a in applied[-limit // 2 :]})
            raise RewriteError(f"no end after {limit} rewrites; these rules undo each other: {', '.join(cycle)}")


def _fire_one(build: Builder, rules: Sequence[Rule], settings: Settings) -> tuple[Application | None, list[Rejection]]:
    """Apply the first rule that fires anywhere; None and all near misses where none does."""
    rejected: dict[tuple[str, str], Rejection] = {}
    for rule in rules:
        for node in [n for n in build.graph.nodes if op_name(n)]:
            label = label_of(node)
            try:
                match = rule.match(node)
                if match is None:
                    continue
                refusal = _may_fire(rule, match, settings) or _replace(rule, match, build)
            except Exception as error:  # noqa: BLE001 - a rule's own defect must not break a user's model
                refusal = _failure(rule, node, error)
            if refusal is not None:
                where = label_of(refusal.node) if refusal.node is not None else label
                rejected[rule.name, label] = Rejection(rule.name, where, refusal.reason)
                continue
            log.debug("%s fired at %s", rule.name, label)
            if settings.fuel is not None:
                settings.fuel -= 1
            return Application(rule.name, label, rule.identity), []
    return None, list(rejected.values())


#: raised where an operator asks for the value of a size that is not known
_UNKNOWN_SIZE = tuple(
    getattr(symbolic_shapes, name)
    for name in ("_ShapeEnvGuardError", "GuardOnDataDependentSymNode")
    if hasattr(symbolic_shapes, name)
)


def _failure(rule: Rule, node: fx.Node, error: Exception) -> Reject:
    if isinstance(error, _UNKNOWN_SIZE):
        return Reject("it needs a size that is not known before the call")
    return _defect(rule, node, f"{type(error).__name__}: {error}")


def _defect(rule: Rule, node: fx.Node, problem: str) -> Reject:
    log.warning("the rule %s is defective at %s: %s", rule.name, label_of(node), problem)
    return Reject(f"the rule is defective: {problem}")


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


def _replace(rule: Rule, match: Match, build: Builder) -> Reject | None:
    """Build the replacement and put it in; one that fails or is of another type is taken back."""
    root = match.root
    before = set(build.graph.nodes)
    try:
        with build.graph.inserting_before(root):
            new = rule.rewrite(match, build)
        refusal = _fits(rule, root, new, [n for n in build.graph.nodes if n not in before])
    except Exception as error:  # noqa: BLE001 - a rule's own defect must not break a user's model
        refusal = _failure(rule, root, error)
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


def _fits(rule: Rule, root: fx.Node, new: fx.Node | tuple[fx.Node, ...], added: Sequence[fx.Node]) -> Reject | None:
    """Why ``new``, which needed the nodes ``added``, cannot take the place of ``root``."""
    replaced = {root} if isinstance(new, fx.Node) else {root, *root.users}
    if any(n in replaced for a in added for n in a.all_input_nodes) or new is root:
        return _defect(rule, root, "the replacement reads what it replaces")
    wanted = root.meta["val"]
    got = new.meta["val"] if isinstance(new, fx.Node) else tuple(n.meta["val"] for n in new)
    if same_type(wanted, got):
        return None
    if _unknown_sizes(wanted, got):
        return Reject("with sizes that are not known, the replacement cannot be shown to have the same shape")
    return _defect(rule, root, f"it gives {got} where {wanted} is expected")


def _unknown_sizes(wanted: Any, got: Any) -> bool:
    """Whether two fake values may differ in sizes that are not known, and in nothing else."""
    if isinstance(wanted, tuple) or isinstance(got, tuple):
        if not isinstance(wanted, tuple) or not isinstance(got, tuple) or len(wanted) != len(got):
            return False
        return all(same_type(a, b) or _unknown_sizes(a, b) for a, b in zip(wanted, got, strict=True))
    if (wanted.dtype, wanted.device, wanted.dim()) != (got.dtype, got.device, got.dim()):
        return False
    sizes = zip(wanted.shape, got.shape, strict=True)
    return all(not isinstance(a, int) or not isinstance(b, int) or a == b for a, b in sizes)
