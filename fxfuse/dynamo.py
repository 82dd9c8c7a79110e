"""The backend of torch.compile: ``torch.compile(model, backend="fxfuse", options={...})``.

torch finds :func:`backend` through the entry point ``torch_dynamo_backends``, so that nothing needs
to be imported. It fuses the regions of a graph that Dynamo captured and hands the rest on: to
Inductor, or, with ``options={"remainder": "eager"}``, to torch's own operators.

``torch.compile`` takes either ``mode=`` or ``options=``; for both, give it the function::

    backend = functools.partial(fxfuse.dynamo.backend, mode="max-autotune", options={"precision": "ieee"})
    torch.compile(model, backend=backend)

``TORCH_LOGS="fxfuse"`` prints the report of every graph as it is compiled, ``"+fxfuse"`` every step.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import SymInt, Tensor, fx, nn
from torch._guards import CompileContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxfuse.ops import run_region, traced_region, update_running_statistics
from fxfuse.pipeline import Options, fuse
from fxfuse.propagate import UNKNOWN
from fxfuse.report import Report
from fxfuse.version import digest

log = logging.getLogger(__name__)

#: who may run what is not fused
REMAINDERS = ("inductor", "eager")
OPTIONS = ("remainder", "precision", "allow", "rules", "kernels", "tune")
#: how many reports are kept
KEPT = 64

_reports: collections.deque[Report] = collections.deque(maxlen=KEPT)


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph of Dynamo's; torch.compile calls this once per graph and set of guards.

    Args:
        gm: the captured graph, its weights among the placeholders. Belongs to the backend from here on.
        example_inputs: the tensors (and sizes) of the call that is being compiled.
        mode: Inductor's, as in ``torch.compile(mode=...)``: "default", "reduce-overhead", ...
        options: "remainder": who runs what is not fused, "inductor" (the default) or "eager";
            "precision", "allow", "rules", "kernels" and "tune": as in :func:`fxfuse.optimize`.

    Raises:
        ValueError, TypeError: an unknown mode or option, or a value that is not accepted; the message
            lists those that are. (torch.compile wraps it in its ``BackendCompilerFailed``.)
    """
    choices = Choices.make(mode, options)
    _fuse(gm, example_inputs, choices)
    if choices.remainder == "eager":
        return gm.forward
    from torch._inductor.compile_fx import compile_fx  # slow to import, and not needed for eager

    return compile_fx(gm, example_inputs, config_patches=choices.inductor)  # type: ignore[return-value]


#: the name that the entry point gives; in Python, say ``backend``
fxfuse = backend


def reports() -> list[Report]:
    """What was done to the most recently compiled graphs, the latest last; at most 64."""
    return list(_reports)


# --- mode and options -----------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Choices:
    """``mode=`` and ``options=``, checked. ``inductor`` are changes to Inductor's configuration."""

    options: Options
    remainder: str
    inductor: dict[str, Any]

    @staticmethod
    def make(mode: str | None, options: Mapping[str, Any] | None) -> Choices:
        given = dict(options or {})
        unknown = [name for name in given if name not in OPTIONS]
        if unknown:
            raise ValueError(f"options={{{unknown[0]!r}: ...}} is not known; known: {_listed(OPTIONS)}")
        remainder = given.pop("remainder", "inductor")
        if remainder not in REMAINDERS:
            raise ValueError(f'options={{"remainder": {remainder!r}}} is not one of {_listed(REMAINDERS)}')
        if remainder == "eager":
            if mode is not None and mode != "default":
                raise ValueError(f'mode={mode!r} is for Inductor, and options={{"remainder": "eager"}} leaves it out')
            patches = {}
        else:
            patches = _inductor(mode)
        return Choices(Options.make(**{"precision": None, "allow": None, **given}), remainder, patches)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _inductor(mode: str | None) -> dict[str, Any]:
    """Inductor's configuration for ``mode``, and what its caches may take for granted about our functions."""
    from torch._inductor import config, list_mode_options

    modes: dict[str, dict[str, Any]] = list_mode_options()
    if (mode or "default") not in modes:
        raise ValueError(f"mode={mode!r} is not one of {_listed(modes)}")
    known = dict(config.unsafe_marked_cacheable_functions)
    # they depend on their arguments and on this package alone
    known.update((f"{f.__module__}.{f.__name__}", digest()) for f in (traced_region, update_running_statistics))
    return {**modes[mode or "default"], "unsafe_marked_cacheable_functions": known}


# --- one graph ------------------------------------------------------------------------------------
def _fuse(gm: fx.GraphModule, example_inputs: Sequence[Any], choices: Choices) -> None:
    """Fuse the regions of ``gm``, in place, and keep the report; a graph that fails stays untouched."""
    target = run_region if choices.remainder == "eager" else traced_region
    reason = _unsupported(gm.graph, example_inputs)
    if reason is not None:
        return _remember(Report(notes=[f"left alone: {reason}"]))
    try:
        graph = _copy(gm.graph)
        inputs = _fake_inputs(graph, example_inputs)
        with _unguarded(inputs):
            report = fuse(graph, dict(gm.named_modules()), inputs, choices.options, target)
    except Exception as error:  # whatever it is, the model must run
        log.warning("compiling a graph failed, and it goes on as it is; please report this", exc_info=True)
        return _remember(Report(notes=[f"left alone: the compiler failed with {type(error).__name__}: {error}"]))
    for node in graph.nodes:
        for key in ("fxfuse", "fxfuse_val"):
            node.meta.pop(key, None)
    if report.regions:
        gm.graph = graph
    report.graph_before, report.graph_after = _bare(report.graph_before), _bare(graph)
    return _remember(report)


def _remember(report: Report) -> None:
    report.model = f"graph {CompileContext.current_compile_id() or ''}".strip()
    _reports.append(report)
    log.info("%s", report)


def _unsupported(graph: fx.Graph, example_inputs: Sequence[Any]) -> str | None:
    """Why a graph goes on as it is."""
    for value in example_inputs:
        if isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter, FakeTensor):
            return f"an input is of class {type(value).__name__}, a subclass of Tensor"
    for node in graph.nodes:
        if node.op == "call_function" and "_functorch" in (getattr(node.target, "__module__", None) or ""):
            return f"{node.name} is part of a torch.func transform"
    return None


def _copy(graph: fx.Graph) -> fx.Graph:
    """A copy with what Dynamo attached to the placeholders beside their ``meta``."""
    new = copy.deepcopy(graph)
    for old, placeholder in zip(graph.nodes, new.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            placeholder._dynamo_source = old._dynamo_source
    return new


def _bare(graph: fx.Graph | None) -> fx.Graph | None:
    """A copy to look at: nodes without the fake tensors and stack traces that Dynamo keeps there."""
    new = copy.deepcopy(graph)
    for node in new.nodes if new is not None else ():
        node.meta = {k: v for k, v in node.meta.items() if k == "fxfuse_region"}
    return new


def _fake_inputs(graph: fx.Graph, example_inputs: Sequence[Any]) -> list[Any]:
    """One fake value per placeholder: Dynamo's own, which know the sizes that vary as symbols."""
    mode = FakeTensorMode()
    values = []
    for node, value in zip(graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        fake = node.meta.get("example_value", value)
        if isinstance(fake, Tensor):
            if not isinstance(fake, FakeTensor):  # not from Dynamo
                fake = mode.from_tensor(fake)
            sizes = itertools.zip_longest(fake.shape, value.shape)
            if any(s != t for s, t in sizes if not isinstance(s, SymInt) and not isinstance(t, SymInt)):
                fake = UNKNOWN  # the graph changes its shape, and Dynamo has run the graph
        values.append(fake)
    return values


@contextlib.contextmanager
def _unguarded(inputs: Sequence[Any]) -> Iterator[None]:
    """What asks for the value of an unknown size fails, instead of fixing it by a guard; new symbols are discarded."""
    environments = {v.fake_mode.shape_env for v in inputs if isinstance(v, FakeTensor)}
    with contextlib.ExitStack() as stack:
        for shape_env in environments:
            if shape_env is None:
                continue
            stack.enter_context(shape_env.ignore_fresh_unbacked_symbols())
            if hasattr(shape_env, "error_on_new_guards"):  # not in every torch
                stack.enter_context(shape_env.error_on_new_guards())
        yield
