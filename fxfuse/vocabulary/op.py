"""What an operator of the vocabulary is: a name, a kind, and its meaning in plain torch."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from typing import Any


class Kind(enum.Enum):
    """The role of an operator: what the partitioner and the kernels may do with it."""

    ANCHOR = "anchor"  #: a convolution that a region grows from
    POINTWISE = "pointwise"  #: one output element from the elements at the same (broadcast) position
    POOL = "pool"  #: a window over the spatial dims
    NORM = "norm"  #: statistics of the input, applied to the input
    PRODUCT = "product"  #: a vector per sample, times a matrix
    REDUCTION = "reduction"  #: dims folded into one value (softmax included: a reduction broadcast back)
    SHAPE = "shape"  #: the same elements under other indices
    DERIVED = "derived"  #: made by a rewrite rule only; no model spells it


class Op:
    """One operator. Calling it runs its reference meaning in plain torch.

    Positional parameters of ``fn`` are operands (tensors, Python scalars or None); keyword-only
    parameters are attributes (literals). ``outputs`` is how many tensors it returns.
    ``inplace``, where present, writes the same result over its first operand.
    ``view`` marks an operator whose result may share memory with its operand. ``differentiable`` says
    whether a gradient of the first output reaches the operands; one of the others never does.
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        fn: Callable[..., Any],
        *,
        outputs: int = 1,
        inplace: Callable[..., Any] | None = None,
        view: bool = False,
        differentiable: bool = True,
    ) -> None:
        self.name = self.__name__ = self.__qualname__ = name
        self.kind = kind
        self.fn = fn
        self.outputs = outputs
        self.inplace = inplace
        self.view = view
        self.differentiable = differentiable
        self.__doc__ = fn.__doc__
        parameters = inspect.signature(fn).parameters.values()
        #: how many operands it takes
        self.arity = sum(p.kind is not p.KEYWORD_ONLY for p in parameters)
        #: attribute name -> default (``inspect.Parameter.empty`` where it must be given)
        self.attributes = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def __call__(self, *operands: Any, **attributes: Any) -> Any:
        return self.fn(*operands, **attributes)

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __reduce__(self) -> tuple[Callable[[str], Op], tuple[str]]:
        return lookup, (self.name,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Op:
        return self

    def complete(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """All attributes, in the order of the signature, defaults filled in."""
        unknown = attributes.keys() - self.attributes.keys()
        if unknown:
            raise TypeError(f"{self.name} has no attribute {sorted(unknown)}; it has {sorted(self.attributes)}")
        full = {}
        for name, default in self.attributes.items():
            value = attributes.get(name, default)
            if value is inspect.Parameter.empty:
                raise TypeError(f"{self.name} needs the attribute {name!r}")
            full[name] = value
        return full


_OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Enter ``op`` into the vocabulary; its name must be new."""
    if op.name in _OPS:
        raise ValueError(f"the vocabulary already has an operator {op.name!r}")
    _OPS[op.name] = op
    return op


def define(kind: Kind, **more: Any) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: the function's name becomes the operator's (a trailing underscore is dropped).

    ``more`` are the keyword arguments of :class:`Op`.
    """

    def enter(fn: Callable[..., Any]) -> Op:
        return register(Op(fn.__name__.rstrip("_"), kind, fn, **more))

    return enter


def lookup(name: str) -> Op:
    """The operator called ``name``; KeyError with the known names otherwise."""
    try:
        return _OPS[name]
    except KeyError:
        raise KeyError(f"no operator {name!r} in the vocabulary; known: {', '.join(sorted(_OPS))}") from None


def names(kind: Kind | None = None) -> list[str]:
    """All operator names, or those of one kind, sorted."""
    return sorted(n for n, op in _OPS.items() if kind is None or op.kind is kind)
