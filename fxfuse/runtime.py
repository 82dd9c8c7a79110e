"""From a call of the model to the graph that serves it: captures, checks them, specialises per shape.

* A *capture* is made per form of call (how arguments nest, dtypes, devices) and mode of the modules;
  it is trusted only after its result was compared with the model's own, once.
* A *specialisation* is the fused graph for one set of shapes; rules that depend on shapes are
  decided here.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from fxfuse import capture as capturing
from fxfuse.capture import CallForm, Capture, CaptureError, Lifted, graph_module
from fxfuse.compare import State, disagreement, fresh
from fxfuse.guards import Guards
from fxfuse.pipeline import Options, fuse
from fxfuse.propagate import isolated
from fxfuse.report import Report
from fxfuse.verify import check

log = logging.getLogger(__name__)

#: fused graphs kept per capture; the least recently used goes first
SPECIALISATIONS = 64
#: captures kept per form of call, for as many states of the modules' attributes
ENTRIES = 8


@dataclasses.dataclass
class Specialisation:
    """The fused graph for one set of shapes, dtypes and layouts."""

    run: fx.GraphModule | None  #: None where the model runs as it is
    lifted: list[Lifted]
    report: Report
    verified: bool = False


@dataclasses.dataclass
class Entry:
    """What is known about one form of call: a trusted capture, or the reason why there is none."""

    guards: Guards
    capture: Capture | None
    notes: list[str]
    specialisations: collections.OrderedDict[Any, Specialisation] = dataclasses.field(
        default_factory=collections.OrderedDict
    )


class Runtime:
    """Serves the calls of one model. Safe to use from several threads."""

    def __init__(self, model: nn.Module, options: Options, verify: bool) -> None:
        self.model = model
        self.options = options
        self.verify = verify
        self.report = Report(type(model).__name__, ["nothing is captured yet: the first call decides"])
        self._entries: dict[Any, list[Entry]] = {}
        self._lock = threading.RLock()

    # --- calls --------------------------------------------------------------------------------
    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        form, tensors = CallForm.of(args, kwargs)
        reason = _unsupported(tensors)
        if reason is not None:
            self._note(reason)
            return self.model.forward(*args, **kwargs)
        key = _form_key(form, tensors)
        entry = next((e for e in self._entries.get(key, ()) if e.guards.hold()), None)
        if entry is None:
            if _tracing(tensors):
                self._note("a call is being traced that was never run for real: the original operators are traced")
                return self.model.forward(*args, **kwargs)
            with self._lock:
                result, entry = self._first_call(form, tensors)
                self._remember(key, entry)
            return result
        if entry.capture is None:
            return self.model.forward(*args, **kwargs)
        special = self._specialisation(entry, tensors)
        if special is None:
            return self.model.forward(*args, **kwargs)
        assert special.run is not None
        flat = special.run(*tensors, *[t.fetch() for t in special.lifted])
        return pytree.tree_unflatten(flat, entry.capture.out_spec)

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture and specialise for these arguments, leaving buffers, generators and arguments as they are."""
        form, tensors = CallForm.of(args, kwargs)
        reason = _unsupported(tensors)
        if reason is not None:
            self._note(reason)
            return
        state = State.of(self.model, tensors)
        try:
            with self._lock:
                _, entry = self._first_call(form, fresh(tensors))
                self._remember(_form_key(form, tensors), entry)
                if entry.capture is not None:
                    self._specialisation(entry, tensors)
        finally:
            state.restore()

    def _remember(self, key: Any, entry: Entry) -> None:
        """Keep the most recent entries per form of call: one for train(), one for eval(), and some more."""
        self._entries[key] = [entry, *self._entries.get(key, ())][:ENTRIES]

    # --- capture ------------------------------------------------------------------------------
    def _first_call(self, form: CallForm, tensors: list[Tensor]) -> tuple[Any, Entry]:
        """Run the model itself, and look for a capture that does the same."""
        guards = Guards(self.model)
        before, inputs = State.of(self.model, tensors), fresh(tensors)
        args, kwargs = form.arguments(tensors)
        result = self.model.forward(*args, **kwargs)
        after = State.of(self.model, tensors)
        changed = guards.changed()
        notes: list[str] = []
        found: Capture | None = None
        if changed is not None:
            notes.append(f"left alone: a call changes {changed} of a module, which a graph would not do")
        else:
            with after.kept():
                found = self._find_capture(form, inputs, (result, tensors), before, after, notes)
        entry = Entry(Guards(self.model), found, notes)
        self.report = Report(type(self.model).__name__, list(notes))
        return result, entry

    def _find_capture(
        self, form: CallForm, inputs: list[Tensor], expected: Any, before: State, after: State, notes: list[str]
    ) -> Capture | None:
        def trace() -> Capture:
            return capturing.symbolic_trace(self.model, form)

        def export() -> Capture:
            return capturing.export(self.model, form, fresh(inputs))

        for name, attempt in (("torch.fx.symbolic_trace", trace), ("torch.export", export)):
            before.restore()
            try:
                candidate = attempt()
                before.restore()
                given = fresh(inputs)
                reason = disagreement((candidate.run(given), given), expected)
                reason = reason or State.of(self.model, inputs).differs(after)
            except CaptureError as error:
                reason = str(error)
            except Exception as error:  # noqa: BLE001 - a graph that cannot run is not a capture
                reason = f"its graph fails with {type(error).__name__}: {error}"
            if reason is None:
                notes.append(f"captured with {name}; its result was compared with the model's")
                return candidate
            log.info("%s does not capture %s: %s", name, type(self.model).__name__, reason)
            notes.append(f"{name} refused: {reason}")
        notes.append("left alone: the model runs as it is; submodules=[...] can optimise parts of it")
        return None

    # --- specialisation -----------------------------------------------------------------------
    def _specialisation(self, entry: Entry, tensors: Sequence[Tensor]) -> Specialisation | None:
        capture = entry.capture
        assert capture is not None
        lifted = [t.fetch() for t in capture.lifted]
        key = (tuple(map(_type_key, tensors)), tuple(map(_type_key, lifted)))
        special = entry.specialisations.get(key)
        if special is None:
            if _tracing(tensors) and capture.how == "torch.export":
                return None
            with self._lock:
                special = self._specialise_or_leave(capture, tensors, lifted, entry)
                entry.specialisations[key] = special
                while len(entry.specialisations) > SPECIALISATIONS:
                    entry.specialisations.popitem(last=False)
            self.report = special.report
        if special.run is None:
            return None
        if self.verify and not special.verified and not _tracing(tensors):
            check(self.model, capture, special.run, [t.fetch() for t in special.lifted], tensors)
            special.verified = True
        return special

    def _specialise_or_leave(
        self, capture: Capture, tensors: Sequence[Tensor], lifted: Sequence[Tensor], entry: Entry
    ) -> Specialisation:
        """A defect of the compiler must not break a model: it is logged, and the model runs as it is."""
        try:
            return self._specialise(capture, tensors, lifted, entry.notes)
        except Exception as error:
            log.exception("compiling %s failed; it runs as it is", type(self.model).__name__)
            note = f"left alone for these shapes: the compiler failed with {type(error).__name__}: {error}"
            return Specialisation(None, [], Report(type(self.model).__name__, [*entry.notes, note]))

    def _specialise(
        self, capture: Capture, tensors: Sequence[Tensor], lifted: Sequence[Tensor], notes: list[str]
    ) -> Specialisation:
        if capture.how == "torch.export" and not _same_shapes(capture, tensors):
            capture = capturing.export(self.model, capture.form, fresh(tensors))
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(capture.graph, env))
        with isolated(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            inputs = [_fake(mode, t) for t in (*tensors, *lifted)]
        for old, new in env.items():
            if "fxfuse_params" in old.meta:
                new.meta["fxfuse_params"] = {name: env[node] for name, node in old.meta["fxfuse_params"].items()}
        report = fuse(graph, capture.modules, inputs, self.options)
        report.model, report.notes = type(self.model).__name__, list(notes)
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        kept = []
        for node, source in zip(placeholders[len(tensors) :], capture.lifted, strict=True):
            if node.users:
                kept.append(source)
            else:
                graph.erase_node(node)
        return Specialisation(graph_module(capture.modules, graph), kept, report)

    def _note(self, reason: str) -> None:
        if reason not in self.report.notes:
            log.info("%s: %s", type(self.model).__name__, reason)
            self.report.notes.append(reason)


def _unsupported(tensors: Sequence[Tensor]) -> str | None:
    """Why a call with these tensors goes to the model itself."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter, FakeTensor) and not _is_tracing_tensor(tensor):
            return f"inputs of class {type(tensor).__name__}, a subclass of Tensor, run as they are"
        if tensor.layout is not torch.strided:
            return f"inputs of layout {tensor.layout} run as they are"
    if torch._C._functorch.maybe_current_level() is not None:
        return "under a torch.func transform the original operators run"
    if any(not isinstance(s, int) for t in tensors for s in t.shape):
        return "with symbolic shapes the original operators are traced"
    return None


def _is_tracing_tensor(tensor: Tensor) -> bool:
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(tensor, FunctionalTensor)


def _tracing(tensors: Sequence[Tensor]) -> bool:
    return bool(torch._C._len_torch_dispatch_stack()) or any(type(t) not in (Tensor, nn.Parameter) for t in tensors)


def _form_key(form: CallForm, tensors: Sequence[Tensor]) -> Any:
    constants = tuple((i, type(c), c if c.__hash__ else repr(c)) for i, c in form.constants)
    # autocast belongs to the key: a trace does not see a block that switches off what is off
    return form.spec, constants, tuple((t.dtype, t.device) for t in tensors), _autocast_key()


def _type_key(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _autocast_key() -> Any:
    return tuple(torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in ("cpu", "cuda"))


def _same_shapes(capture: Capture, tensors: Sequence[Tensor]) -> bool:
    placeholders = [n for n in capture.graph.nodes if n.op == "placeholder"]
    return all(n.meta["val"].shape == t.shape for n, t in zip(placeholders, tensors, strict=False))


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A fake tensor of the same type, layout and device, whatever mode ``tensor`` belongs to."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
