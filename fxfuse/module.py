"""The modules that `optimize` returns: views of the original that share all of its state."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fxfuse.pipeline import Options
from fxfuse.report import Report
from fxfuse.runtime import Runtime, overrides_call

#: what nn.Module keeps in dicts of an instance; a view holds the same dict objects
_SHARED = tuple(name for name, value in nn.Module().__dict__.items() if isinstance(value, (dict, set)))
#: what a view has of its own, although nn.Module would keep it on the instance
_OWN = ("_compiled_call_impl",)


class View(nn.Module):
    """A module that is another module, but for what a subclass changes.

    Parameters, buffers, submodules, hooks and plain attributes are the original's own, read and
    written through; so are ``training``, ``state_dict`` and moves between devices.
    """

    def __init__(self, original: nn.Module) -> None:
        # not nn.Module.__init__: it would make state of its own
        shared = {name: original.__dict__[name] for name in _SHARED if name in original.__dict__}
        self.__dict__.update(shared)
        self.__dict__["_fxfuse_original"] = original

    def __getattr__(self, name: str) -> Any:
        if name == "_fxfuse_original":  # while being unpickled
            raise AttributeError(name)
        return getattr(self._fxfuse_original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            self.__dict__[name] = value
        else:
            setattr(self._fxfuse_original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._fxfuse_original, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._fxfuse_original)})

    def train(self, mode: bool = True) -> View:
        self._fxfuse_original.train(mode)
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> View:
        self._fxfuse_original.apply(fn)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> View:
        self._fxfuse_original._apply(fn, recurse)
        return self

    def _replicate_for_data_parallel(self) -> Any:
        return self._fxfuse_original._replicate_for_data_parallel()  # what was captured is bound to one device

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._fxfuse_original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._fxfuse_original.load_state_dict(*args, **kwargs)


class OptimizedModule(View):
    """A model whose calls run as a rewritten, fused graph. Made by :func:`fxfuse.optimize`.

    ``fxfuse_report`` tells what was done for the most recent new form of call.
    """

    def __new__(cls, original: nn.Module, options: Options, verify: bool = False) -> OptimizedModule:
        return object.__new__(_delegating(cls, type(original)))  # type: ignore[arg-type]

    def __init__(self, original: nn.Module, options: Options, verify: bool = False) -> None:
        super().__init__(original)
        self.__dict__["_fxfuse_runtime"] = Runtime(original, options, verify)
        self.__dict__["_fxfuse_made"] = (options, verify)

    @property
    def fxfuse_report(self) -> Report:
        return self._fxfuse_runtime.report  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._fxfuse_call(args, kwargs)
        return self._fxfuse_runtime(args, kwargs)

    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="fxfuse has captured it already; to export it: torch.export.export(..., strict=False)"
    )
    def _fxfuse_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._fxfuse_runtime(args, kwargs)

    def extra_repr(self) -> str:
        return f"fxfuse: {self.fxfuse_report.headline}"

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy compiles anew: what was captured belongs to the modules it was captured from
        return OptimizedModule, (self._fxfuse_original, *self._fxfuse_made)


# --- what the original's class has of its own -----------------------------------------------------
#: methods that containers have and nn.Module has not; Python looks them up on the class
_CONTAINER = ("__len__", "__iter__", "__getitem__", "__setitem__", "__delitem__", "__contains__", "__reversed__")


@functools.lru_cache(maxsize=256)
def _delegating(cls: type[OptimizedModule], kind: type[nn.Module]) -> type[OptimizedModule]:
    """``cls``, with what ``kind`` overrides of nn.Module's methods, or has as a container, passed on."""
    own = {
        name
        for name in dir(nn.Module)
        if not name.startswith("_") and name != "forward" and getattr(kind, name) is not getattr(nn.Module, name)
    }
    names = {*own, *(n for n in _CONTAINER if hasattr(kind, n))} - {*View.__dict__, *cls.__dict__}
    if overrides_call(kind):
        names.add("__call__")
    if not names:
        return cls
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, **{n: _passed_on(kind, n) for n in names}})


def _passed_on(kind: type[nn.Module], name: str) -> Any:
    if not callable(getattr(kind, name)):  # a property, a constant
        return property(lambda self: getattr(self._fxfuse_original, name))

    @functools.wraps(getattr(kind, name))
    def method(self: View, *args: Any, **kwargs: Any) -> Any:
        original = self._fxfuse_original
        result = getattr(type(original), name)(original, *args, **kwargs)
        return self if result is original else result

    return method


# --- parts of a model -----------------------------------------------------------------------------
class PartView(View):
    """A view in which some submodules are optimised. Its class is made by :func:`_part_view`.

    ``forward`` is that of the original's class (next in the resolution order), run on the view.
    """

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        return modules[name] if name in modules else super().__getattr__(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _part_view, (self._fxfuse_original, self._fxfuse_paths, *self._fxfuse_made)

    @property
    def fxfuse_report(self) -> Report:
        return merged_report(self)

    def _follow(self) -> None:
        """Let ``_modules`` be the original's, with optimised submodules in place of those that were chosen."""
        modules, original = self.__dict__["_modules"], self._fxfuse_original._modules
        views = {
            name: view
            for name, view in modules.items()
            if isinstance(view, View) and view._fxfuse_original is original.get(name)
        }
        wanted = {
            name: views[name] if name in views else self._chosen(name, module) for name, module in original.items()
        }
        if list(wanted.items()) != list(modules.items()):
            modules.clear()
            modules.update(wanted)
        for view in modules.values():
            if isinstance(view, PartView):
                view._follow()

    def _chosen(self, name: str, module: nn.Module | None) -> nn.Module | None:
        if name not in self._fxfuse_paths or module is None:
            return module
        below, (options, verify) = self._fxfuse_paths[name], self._fxfuse_made
        if below is None:
            return OptimizedModule(module, options, verify)
        return _part_view(module, below, options, verify)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._follow()
        return super().__call__(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        self._follow()
        yield from super().named_modules(*args, **kwargs)


#: submodule -> the same for what is to be optimised below it; None where it is to be optimised itself
Paths = dict[str, Any]


def _part_view(module: nn.Module, paths: Paths, options: Options, verify: bool) -> nn.Module:
    """A view of ``module``, an instance of its class, whose submodules at ``paths`` are optimised."""
    kind = type(module)
    view_kind = type(kind.__name__, (PartView, kind), {"__module__": kind.__module__})
    view: Any = object.__new__(view_kind)
    View.__init__(view, module)
    view.__dict__.update(_modules=dict(module._modules), _fxfuse_paths=paths, _fxfuse_made=(options, verify))
    view._follow()
    return view  # type: ignore[no-any-return]


def merged_report(module: nn.Module) -> Report:
    """One report for all optimised parts below ``module``."""
    report = Report(type(module).__name__)
    parts = [(path, part.fxfuse_report) for path, part in module.named_modules() if isinstance(part, OptimizedModule)]
    for path, own in parts:
        report.notes += [f"{path}: {note}" for note in own.notes]
        report.regions += own.regions
        report.rules += own.rules
        report.rejected += own.rejected
    if len(parts) == 1:
        report.graph_before, report.graph_after = parts[0][1].graph_before, parts[0][1].graph_after
        report.nodes = parts[0][1].nodes
    else:
        report.parts = dict(parts)
    return report


def optimize_parts(model: nn.Module, patterns: Sequence[str], options: Options, verify: bool) -> nn.Module:
    """A view of ``model`` whose submodules that match ``patterns`` (as in a shell) are optimised.

    Of modules within one another the outermost is taken; of a container that has no ``forward``
    (ModuleList, ModuleDict) its elements.
    """
    if isinstance(patterns, str):
        raise ValueError(f"submodules must be a list of names or patterns, such as [{patterns!r}]")
    if not patterns:
        raise ValueError("submodules=[] names no part to optimise; leave it out to optimise the whole model")
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"submodules holds names or patterns, not {type(pattern).__name__}")
        if not fnmatch.filter(names, pattern):
            some = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise ValueError(
                f"submodules: {pattern!r} matches no submodule of {type(model).__name__}; it has {some or 'none'}"
            )
    chosen = [n for p in patterns for n in fnmatch.filter(names, p)]
    paths: Paths = {}
    for name in sorted({leaf for n in chosen for leaf in _callable(model, n)}, key=lambda n: n.count(".")):
        below: Paths | None = paths
        *parents, last = name.split(".")
        for parent in parents:
            below = below.setdefault(parent, {}) if below is not None else None
        if below is not None:  # otherwise within one that is chosen
            below[last] = None
    return _part_view(model, paths, options, verify)


def _callable(model: nn.Module, name: str) -> list[str]:
    """``name``, or what it contains where it cannot be called."""
    module = model.get_submodule(name)
    if type(module).forward is not nn.Module.forward:
        return [name]
    return [leaf for child in module._modules for leaf in _callable(model, f"{name}.{child}")]
