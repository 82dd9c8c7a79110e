"""The public functions: optimize, explain and verify."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.capture import CallForm
from fxfuse.compare import fresh
from fxfuse.module import OptimizedModule, View, optimize_parts
from fxfuse.patterns import Legality, Rule
from fxfuse.pipeline import Options
from fxfuse.replica import unwrapped
from fxfuse.report import Report
from fxfuse.state import State
from fxfuse.verification import VerifyReport
from fxfuse.verification.outcome import Way, behind
from fxfuse.verification.parts import check_parts, is_optimised
from fxfuse.verification.verifier import Verifier


def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    precision: str | None = None,
    allow: Collection[str | Legality] | None = None,
    rules: Sequence[Rule] | None = None,
    kernels: bool = True,
    tune: bool = False,
    submodules: Sequence[str] | None = None,
    verify: bool = False,
) -> nn.Module:
    """Rewrite and fuse what follows the transposed convolutions of ``model``.

    The model itself is not changed, and neither are its buffers. The result shares its modules and
    parameters, has the same ``state_dict`` keys in the same order, and follows later weight updates,
    ``train()``/``eval()`` and ``to()``. Its ``fxfuse_report`` says what was done.

    Args:
        model: any ``nn.Module``.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
            With them the model is captured here and now, and the capture's result compared with the
            model's. Without, the first real call runs the model itself, compares, and returns the
            model's own result.
        precision: numerics class of float32 convolutions on a GPU, "tf32" or "ieee"; None follows
            torch's settings at call time.
        allow: legality classes of rewrites, out of "bitwise", "reassociating", "finite-only". The
            default is the first two.
        rules: rewrite rules of your own, instances of subclasses of :class:`fxfuse.Rule`. They come before
            the built-in ones: they see a chain as the model wrote it, and again after every rewrite.
        kernels: False leaves generated kernels out, and torch's operators run the rewritten chains.
        tune: measure the ways to run a region on the GPU, in the first call without gradients for its shapes
            (here and now for ``example_inputs``), where no choice is kept on disk: see :func:`fxfuse.tune`.
        submodules: names or shell patterns ("decoder.*"): only these parts are optimised, for models
            that cannot be captured whole.
        verify: for each new set of shapes do what :func:`verify` does, and raise VerificationError,
            which names the rule at fault, where the result is further off than rounding explains.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``rules`` holds something else than rules.
        ValueError: an argument has a value that is not accepted; the message lists those that are.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize() takes an nn.Module, not {type(model).__name__}; wrap a function in a module")
    model = unwrapped(model)
    options = Options.make(precision, allow, kernels, tune, rules=rules)
    if submodules is not None:
        result: nn.Module = optimize_parts(model, submodules, options, verify)
    else:
        result = OptimizedModule(model, options, verify)
    if example_inputs is not None:
        args, kwargs = _arguments(example_inputs)
        if isinstance(result, OptimizedModule):
            result._fxfuse_runtime.prepare(args, kwargs)
        else:
            _run_once(result, args, kwargs)
        if tune:
            with torch.no_grad():
                _run_once(result, args, kwargs)
    return result


def explain(model: nn.Module, *example_inputs: Any, **kwargs: Any) -> Report:
    """What :func:`optimize` does to ``model`` for these inputs, as a :class:`Report`; the model is not changed.

    For other than the default choices, explain an optimised model: ``explain(optimize(model, rules=...), x)``.

    Args:
        model: any ``nn.Module``; one that cannot be captured has a report that says why.
        example_inputs, kwargs: the arguments of one call, of any shapes, dtypes and device; they are not written to.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        Exception: what ``model`` itself raises for these inputs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain() takes an nn.Module, not {type(model).__name__}; wrap a function in a module")
    options, _ = model._fxfuse_made if isinstance(model, View) else (Options.make(None, None), False)
    optimized = OptimizedModule(unwrapped(model), options)
    optimized._fxfuse_runtime.prepare(example_inputs, kwargs)
    return optimized.fxfuse_report


def verify(original: nn.Module | None, optimised: nn.Module, *inputs: Any, **kwargs: Any) -> VerifyReport:
    """Compare ``optimised`` with ``original`` on one set of arguments; both are left as they are.

    Compared are results, what the call writes to (running statistics, inputs) and, where gradients are
    switched on, the gradients of inputs and parameters that require them: with the same in float64, beside
    eager mode's own error. Whole numbers and booleans must be equal. Of a result of :func:`optimize`, each
    region is checked by itself as well, and a wrong rewrite is named. Where the model draws random numbers or
    does not run in float64, eager mode is the truth, and the report says so.

    Args:
        original: the model as it was written; None where ``optimised`` is what :func:`optimize` or
            ``torch.compile`` returned, which shares the modules of the original.
        optimised: any module that should do the same: of :func:`optimize`, of ``torch.compile``, written by hand.
        inputs, kwargs: the arguments of one call of both.

    Returns:
        A report: ``report.ok``, ``str(report)`` is a table, ``report.raise_for_failure()``.

    Raises:
        TypeError: an argument is not a module, or ``original`` is None and ``optimised`` does not share one.
        ValueError: both are the same module.
    """
    for name, module in (("original", original), ("optimised", optimised)):
        if not isinstance(module, nn.Module) and (module is not None or name == "optimised"):
            raise TypeError(f"verify() takes modules; {name} is a {type(module).__name__}")
    shared = behind(optimised)
    if original is None and shared is optimised:
        raise TypeError(
            "verify(None, ...) needs a result of optimize() or torch.compile(); pass the original model first"
        )
    original = shared if original is None else unwrapped(original)
    if original is optimised:
        raise ValueError("original and optimised are the same module: there is nothing to compare")
    form, tensors = CallForm.of(inputs, kwargs)
    verifier = Verifier(Way(lambda a, k: original(*a, **k), original), form, tensors)
    way = Way(lambda a, k: optimised(*a, **k), shared)
    if any(is_optimised(m) for m in optimised.modules()):
        options = optimised._fxfuse_made[0] if isinstance(optimised, View) else None
        return verifier.check(way, regions=lambda: check_parts(optimised, form, tensors), options=options)
    return verifier.check(way)


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise TypeError(f"example_inputs must be a tensor, a tuple or a dict, not {type(example_inputs).__name__}")


def _run_once(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let every part meet its real inputs twice (compare, then specialise); leave no other trace."""
    form, tensors = CallForm.of(args, kwargs)
    with State(model, tensors).kept():
        for _ in range(2):
            again, named = form.arguments(fresh(tensors))
            model(*again, **named)
