"""From a call of the model to the graph that serves it: captures, checks them, specialises per shape.

* A *capture* is made per form of call (how arguments nest, dtypes, devices, autocast) and state of
  the modules; it is trusted only after its result was compared with the model's own, once.
* A *specialisation* is the fused graph for one set of shapes; rules that depend on shapes are
  decided here.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree as pytree

from fxfuse import trusted
from fxfuse.again import Again
from fxfuse.capture import CallForm, Capture, graph_module
from fxfuse.compare import edges, fresh
from fxfuse.guards import Guards
from fxfuse.ops import as_written, run_region, update_running_statistics
from fxfuse.patterns import Settings
from fxfuse.pipeline import Options, fuse
from fxfuse.propagate import facts, isolated
from fxfuse.report import Report
from fxfuse.state import State
from fxfuse.straight import Straight
from fxfuse.verification.verifier import check

log = logging.getLogger(__name__)

#: fused graphs kept per capture; the oldest goes first
SPECIALISATIONS = 64
#: captures kept per form of call, for as many states of the modules' attributes
ENTRIES = 8
#: captures after which a model must have been served more often than captured to be captured again
CAPTURES = 32


@dataclasses.dataclass
class Specialisation:
    """The fused graph for one set of shapes and strides.

    ``kept`` are positions of the capture's lifted tensors that it takes; ``written`` those of its
    inputs that it writes to, which must not share memory with another one.
    """

    run: Callable[..., Any] | None  #: None where the model runs as it is
    kept: tuple[int, ...]
    written: tuple[int, ...]
    report: Report
    verified: bool = False
    straight: Straight | None = None
    texts: tuple[str, ...] = ()  #: of its regions


#: runs a call of what was taken of it
Way = Callable[[Sequence[Tensor]], Any]


#: an entry and a specialisation of it; what tells calls that are like the one before, where there is such a thing, and
#: how these go on: by a shorter way, or by the model itself as long as a function says so
_Last = tuple["Entry", Specialisation, Again | None, Way | None, Callable[[], bool] | None]


@dataclasses.dataclass
class Entry:
    """What is known about one form of call: a trusted capture, or the reason why there is none."""

    guards: Guards
    capture: Capture | None
    notes: list[str]
    fits: Any  #: what :func:`_fits` says of the call that it was made for
    specialisations: dict[Any, Specialisation] = dataclasses.field(default_factory=dict)


class Runtime:
    """Serves the calls of one model. Safe to use from several threads."""

    def __init__(self, model: nn.Module, options: Options, verify: bool) -> None:
        self.model = model
        self.options = options
        self.verify = verify
        self.report = Report(type(model).__name__, ["nothing is captured yet: the first call decides"])
        self._entries: dict[Any, list[Entry]] = {}
        self._lock = threading.RLock()
        self._served = self._captured = 0
        self._last: _Last | None = None  # what served the call before
        if overrides_call(type(model)):
            self._note(f"left alone: {type(model).__name__} overrides __call__, which runs before forward")

    # --- calls --------------------------------------------------------------------------------
    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._last is not None and not kwargs:
            entry, special, again, way, as_it_is = self._last
            given = None if again is None else again.given(args)
            if given is not None:
                if as_it_is is None:
                    self._served += 1
                    return self._run(entry, special, given, args, kwargs) if way is None else way(given)
                if as_it_is():
                    self._served += 1
                    return self.model.forward(*args)
        return self._long_way(args, kwargs)

    def _long_way(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        form, tensors = CallForm.of(args, kwargs)
        reason = _unsupported(form, tensors)
        if reason is not None:
            self._note(reason)
            return self.model.forward(*args, **kwargs)
        key = _form_key(form, tensors)
        found = self._find(key, tensors)
        if found is None:
            reason = self._uncapturable(tensors) or self._restless(key)
            if reason is not None:
                self._note(reason)
                return self.model.forward(*args, **kwargs)
            with self._lock:
                found = self._find(key, tensors)  # another thread may have been faster
                if found is None:
                    result, entry = self._first_call(form, tensors)
                    self._remember(key, entry)
                    return result
        entry, lifted = found
        self._served += 1
        if entry.capture is None:
            return self.model.forward(*args, **kwargs)
        special = self._specialisation(entry, tensors, lifted)
        last, again, way = self._last, None, None
        second = last is not None and last[1] is special  # of its kind in a row
        if second and form.positional and self._needs_no_more(special, key, (*tensors, *lifted)):
            count, straight = len(tensors), special.straight
            taken = (*range(count), *[count + i for i in special.kept])
            if straight is not None and entry.capture.out_spec.is_leaf():
                taken, way = tuple([taken[i] for i in straight.takes]), straight.way()
            again = Again.of(entry.capture, entry.guards, taken, tensors, lifted)
        self._last = entry, special, again, way, None
        result = self._run(entry, special, [*tensors, *[lifted[i] for i in special.kept]], args, kwargs)
        if again is not None and (way is None or torch.is_grad_enabled()):  # the model itself, where nothing is better
            self._last = entry, special, again, way, as_written(special.texts)
        return result

    def _needs_no_more(self, special: Specialisation, key: Any, tensors: Sequence[Tensor]) -> bool:
        """Whether calls like this one need nothing that :class:`Again` does not do."""
        *_, autocast = key  # torch's guards tell whether it is on, but not its dtype
        return autocast is None and (special.verified or not self.verify) and not _tracing(tensors)

    def _run(
        self,
        entry: Entry,
        special: Specialisation,
        given: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if special.run is None or (special.written and _shared(given, special.written)):
            return self.model.forward(*args, **kwargs)
        assert entry.capture is not None
        flat, spec = special.run(*given), entry.capture.out_spec
        return flat[0] if spec.is_leaf() else pytree.tree_unflatten(flat, spec)

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture and specialise for these arguments, leaving the model, generators and arguments as they are."""
        form, tensors = CallForm.of(args, kwargs)
        if overrides_call(type(self.model)):
            return
        reason = _unsupported(form, tensors) or self._uncapturable(tensors)
        if reason is not None:
            self._note(reason)
            return
        with self._lock, State(self.model, tensors).kept():
            _, entry = self._first_call(form, fresh(tensors))
            self._remember(_form_key(form, tensors), entry)

    def serving(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Specialisation, list[Tensor]] | None:
        """What served a call like this one, and the tensors of the model that it takes; None where the model runs."""
        form, tensors = CallForm.of(args, kwargs)
        found = None if _unsupported(form, tensors) else self._find(_form_key(form, tensors), tensors)
        special = found[0].specialisations.get(_sizes(tensors)) if found else None
        if found is None or special is None or special.run is None:
            return None
        return special, [found[1][i] for i in special.kept]

    def _find(self, key: Any, tensors: Sequence[Tensor]) -> tuple[Entry, list[Tensor]] | None:
        """The entry that speaks for this call, and its lifted tensors."""
        for entry in self._entries.get(key, ()):
            if not entry.guards.hold():
                continue
            capture = entry.capture
            if capture is None:
                return entry, []
            try:
                lifted = [t.fetch() for t in capture.lifted]
                if entry.fits == _fits(capture, tensors, lifted):
                    return entry, lifted
            except (KeyError, AttributeError):  # a tensor of the model is gone, or None
                continue
        return None

    def _remember(self, key: Any, entry: Entry) -> None:
        """Keep the most recent entries per form of call: one for train(), one for eval(), and some more."""
        limit = CAPTURES if entry.capture is not None and entry.capture.exact else ENTRIES
        self._entries[key] = [entry, *self._entries.get(key, ())][:limit]

    # --- capture ------------------------------------------------------------------------------
    def _uncapturable(self, tensors: Sequence[Tensor]) -> str | None:
        """Why this is no time to capture the model."""
        if _tracing(tensors):
            return "a call is being traced that was never run for real: the original operators are traced"
        if any(nn.parameter.is_lazy(t) for t in (*self.model.parameters(), *self.model.buffers())):
            return "nothing is captured yet: parameters have no shape before the first call"
        return None

    def _restless(self, key: Any) -> str | None:
        """Why capturing the model once more would be of no use."""
        if self._captured < CAPTURES or self._captured <= self._served:
            return None
        what = next((e.guards.difference() for e in self._entries.get(key, ())), None)
        return f"{what or 'its arguments'} changed from call to call, and {self._captured} captures were of little use"

    def _first_call(self, form: CallForm, tensors: list[Tensor]) -> tuple[Any, Entry]:
        """Run the model itself, and look for a capture that does the same."""
        self._captured += 1
        before, inputs, came_from = State(self.model, tensors), fresh(tensors), edges(tensors)
        args, kwargs = form.arguments(tensors)
        result = self.model.forward(*args, **kwargs)
        changed = before.attributes.changed()
        notes: list[str] = []
        found: Capture | None = None
        if changed:
            notes.append(f"left alone: a call changes {changed[0]} of a module, which a graph would not do")
        elif before.draws_elsewhere():
            notes.append("left alone: a call draws random numbers of Python or NumPy, which a graph would not do")
        else:
            after = State(self.model, tensors)
            with after.kept():
                found = trusted.find(self.model, form, inputs, (result, tensors, came_from), before, after, notes)
        self.report = Report(type(self.model).__name__, list(notes))
        if found is None:
            return result, Entry(Guards(self.model, None), None, notes, None)
        lifted = [t.fetch() for t in found.lifted]
        entry = Entry(Guards(self.model, found.reads), found, notes, _fits(found, inputs, lifted))
        self._specialisation(entry, inputs, lifted)
        return result, entry

    # --- specialisation -----------------------------------------------------------------------
    def _specialisation(self, entry: Entry, tensors: Sequence[Tensor], lifted: Sequence[Tensor]) -> Specialisation:
        capture = entry.capture
        assert capture is not None
        key = _sizes(tensors)
        special = entry.specialisations.get(key)
        if special is None:
            with self._lock:
                special = self._specialise_or_leave(capture, tensors, lifted, entry)
                if len(entry.specialisations) >= SPECIALISATIONS:
                    del entry.specialisations[next(iter(entry.specialisations))]
                entry.specialisations[key] = special
            self.report = special.report
        if self.verify and not special.verified and special.run is not None and not _tracing(tensors):
            check(
                self.model,
                capture,
                special.run,
                [lifted[i] for i in special.kept],
                tensors,
                special.report,
                self.options,
            )
            special.verified = True
        return special

    def _specialise_or_leave(
        self, capture: Capture, tensors: Sequence[Tensor], lifted: Sequence[Tensor], entry: Entry
    ) -> Specialisation:
        """A defect of the compiler must not break a model: it is logged, and the model runs as it is."""
        Settings.from_environment(self.options.allow)  # what a user got wrong is raised
        try:
            return self._specialise(capture, tensors, lifted, entry.notes)
        except Exception as error:
            log.exception("compiling %s failed, and it runs as it is; please report this", type(self.model).__name__)
            note = f"left alone for these shapes: the compiler failed with {type(error).__name__}: {error}"
            return Specialisation(None, (), (), Report(type(self.model).__name__, [*entry.notes, note]))

    def _specialise(
        self, capture: Capture, tensors: Sequence[Tensor], lifted: Sequence[Tensor], notes: list[str]
    ) -> Specialisation:
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(capture.graph, env))
        with isolated(), FakeTensorMode(allow_non_fake_inputs=True):
            inputs = [_fake(t) for t in (*tensors, *lifted)]
        for old, new in env.items():
            if "fxfuse_params" in old.meta:
                new.meta["fxfuse_params"] = {name: env[node] for name, node in old.meta["fxfuse_params"].items()}
        for node in graph.find_nodes(op="placeholder")[len(tensors) :]:
            node.meta["fxfuse_lifted"] = True  # no input of the call: a parameter, a buffer, a constant
        report = fuse(graph, capture.modules, inputs, self.options)
        report.model, report.notes = type(self.model).__name__, list(notes)
        if not report.regions:
            return Specialisation(None, (), (), report)
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        kept = [i for i, node in enumerate(placeholders[len(tensors) :]) if node.users]
        for node in placeholders[len(tensors) :]:
            if not node.users:
                graph.erase_node(node)
        run = graph_module(capture.modules, graph).forward
        texts = tuple(n.args[1] for n in graph.nodes if n.target is run_region)
        return Specialisation(run, tuple(kept), _written(graph), report, straight=Straight.of(graph), texts=texts)

    def _note(self, reason: str) -> None:
        if reason not in self.report.notes:
            log.info("%s: %s", type(self.model).__name__, reason)
            self.report.notes.append(reason)


def overrides_call(kind: type[nn.Module]) -> bool:
    """Whether calling a module of this class does more than nn.Module's hooks and ``forward``."""
    return kind.__call__ is not nn.Module.__call__ and not issubclass(kind, fx.GraphModule)


# asked on every call
_functorch_level = torch._C._functorch.maybe_current_level
_jit_tracing_state = torch._C._get_tracing_state
_any_autocast = torch._C._is_any_autocast_enabled


def _unsupported(form: CallForm, tensors: Sequence[Tensor]) -> str | None:
    """Why a call with these arguments, here and now, goes to the model itself."""
    for tensor in tensors:
        if type(tensor) is not Tensor and (reason := _special(tensor)):
            return reason
        if tensor.layout is not torch.strided:
            return f"inputs of layout {tensor.layout} run as they are"
    if form.constants and form.opaque is not None:
        return f"an argument of class {form.opaque}, which may change unseen, runs as it is"
    if _functorch_level() is not None:
        return "under a torch.func transform the original operators run"
    if _jit_tracing_state() is not None:
        return "under torch.jit.trace the original operators are traced"
    if forward_ad._current_level >= 0:
        return "under forward-mode differentiation the original operators run"
    if _has_any_global_hook():
        return "with hooks on all modules the original modules run"
    return None


def _special(tensor: Tensor) -> str | None:
    """Why a tensor of a class of its own is not supported."""
    from torch._subclasses.functional_tensor import FunctionalTensor

    if type(tensor) not in (nn.Parameter, FakeTensor, FunctionalTensor):
        return f"inputs of class {type(tensor).__name__}, a subclass of Tensor, run as they are"
    if not all(isinstance(s, int) for s in tensor.shape):
        return "with symbolic shapes the original operators are traced"
    return None


def _tracing(tensors: Sequence[Tensor]) -> bool:
    return bool(torch._C._len_torch_dispatch_stack()) or any(type(t) not in (Tensor, nn.Parameter) for t in tensors)


def _form_key(form: CallForm, tensors: Sequence[Tensor]) -> Any:
    """What a capture holds for: nesting, constants, types of tensors, which are the same, and torch's switches."""
    types = tuple([(t.dtype, t.device) for t in tensors])
    places = [*map(id, tensors)]
    same = tuple(map(places.index, places)) if len({*places}) < len(places) else None
    # autocast belongs to the key: a trace does not see a block that switches off what is off
    return form.key, types, same, torch.get_default_dtype(), _autocast_key()


def _autocast_key() -> Any:
    if not _any_autocast():
        return None
    return tuple(torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in ("cpu", "cuda"))


def _sizes(tensors: Sequence[Tensor]) -> Any:
    return tuple([(t.shape, t.stride()) for t in tensors])


def _fits(capture: Capture, tensors: Sequence[Tensor], lifted: Sequence[Tensor]) -> Any:
    """What must be as it was for ``capture`` to speak for a call, beyond the call's form."""
    types = [(t.shape, t.stride(), t.dtype, t.device) for t in lifted]
    grad = torch.is_grad_enabled() if capture.asks_grad else None
    if not capture.exact:
        return types, grad
    return types, grad, _sizes(tensors), [t.requires_grad for t in (*tensors, *lifted)]


def _fake(tensor: Tensor) -> Tensor:
    """A tensor of the same type, layout and device, fake in whatever mode is on."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


# --- memory ---------------------------------------------------------------------------------------
def _written(graph: fx.Graph) -> tuple[int, ...]:
    """Positions of the placeholders that ``graph`` writes to."""
    written: set[int] = set()
    for node in graph.nodes:
        if node.target is update_running_statistics:
            written.update(*(facts(n).holds for n in node.all_input_nodes if n.op == "placeholder"))
        elif "fxfuse" in node.meta:
            written |= facts(node).writes
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    return tuple(i for i, node in enumerate(placeholders) if facts(node).holds & written)


def _shared(tensors: Sequence[Tensor], written: Sequence[int]) -> bool:
    """Whether a tensor that is written to shares memory with another one."""
    memory = [t.untyped_storage()._cdata for t in tensors]
    return len({*memory}) < len(memory) and any(memory.count(memory[i]) > 1 for i in written)
