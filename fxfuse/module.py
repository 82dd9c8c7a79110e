"""The modules that `optimize` returns: views of the original that share all of its state."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fxfuse.pipeline import Options
from fxfuse.report import Report
from fxfuse.runtime import Runtime

#: what nn.Module keeps in dicts of an instance; a view holds the same dict objects
_SHARED = tuple(name for name, value in nn.Module().__dict__.items() if isinstance(value, (dict, set)))


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
        setattr(self._fxfuse_original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._fxfuse_original, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._fxfuse_original)})

    def train(self, mode: bool = True) -> View:
        self._fxfuse_original.train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> View:
        self._fxfuse_original._apply(fn, recurse)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._fxfuse_original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._fxfuse_original.load_state_dict(*args, **kwargs)


class OptimizedModule(View):
    """A model whose calls run as a rewritten, fused graph. Made by :func:`fxfuse.optimize`.

    ``fxfuse_report`` tells what was done for the most recent new form of call.
    """

    def __init__(self, original: nn.Module, options: Options, verify: bool = False) -> None:
        super().__init__(original)
        self.__dict__["_fxfuse_runtime"] = Runtime(original, options, verify)
        self.__dict__["_fxfuse_made"] = (options, verify)

    @property
    def fxfuse_report(self) -> Report:
        return self._fxfuse_runtime.report  # type: ignore[no-any-return]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._fxfuse_runtime(args, kwargs)

    def extra_repr(self) -> str:
        return f"fxfuse: {self.fxfuse_report.headline}"

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy compiles anew: what was captured belongs to the modules it was captured from
        return OptimizedModule, (self._fxfuse_original, *self._fxfuse_made)


# --- parts of a model -----------------------------------------------------------------------------


def _with_children(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """A view of ``module``, an instance of its class, in which ``children`` replace some of its own."""
    kind = type(module)
    view_kind = type(kind.__name__, (_PartView, kind), {"__module__": kind.__module__})
    view: nn.Module = object.__new__(view_kind)
    View.__init__(view, module)  # type: ignore[arg-type]
    view.__dict__["_modules"] = {**module._modules, **children}
    view.__dict__["_fxfuse_children"] = children
    return view


class _PartView(View):
    """``forward`` is that of the module's class (next in the resolution order), run on the view."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _with_children, (self._fxfuse_original, self._fxfuse_children)

    @property
    def fxfuse_report(self) -> Report:
        return merged_report(self)


def merged_report(module: nn.Module) -> Report:
    """One report for all optimised parts below ``module``."""
    report = Report(type(module).__name__)
    for path, part in module.named_modules():
        if isinstance(part, OptimizedModule):
            own = part.fxfuse_report
            report.notes += [f"{path}: {note}" for note in own.notes]
            report.regions += own.regions
            report.rules += own.rules
            report.rejected += own.rejected
    return report


def optimize_parts(model: nn.Module, patterns: Sequence[str], options: Options, verify: bool) -> nn.Module:
    """A view of ``model`` whose submodules that match ``patterns`` (as in a shell) are optimised."""
    if isinstance(patterns, str):
        raise ValueError(f"submodules must be a list of names or patterns, such as [{patterns!r}]")
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            some = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise ValueError(
                f"submodules: {pattern!r} matches no submodule of {type(model).__name__}; it has {some or 'none'}"
            )
    chosen = {n for p in patterns for n in fnmatch.filter(names, p)}
    outermost = {n for n in chosen if not any(n.startswith(f"{m}.") for m in chosen)}
    return _replace(model, sorted(outermost), options, verify)


def _replace(module: nn.Module, paths: Sequence[str], options: Options, verify: bool) -> nn.Module:
    children: dict[str, nn.Module] = {}
    for name in dict.fromkeys(p.split(".", 1)[0] for p in paths):
        child = module.get_submodule(name)
        below = [p.split(".", 1)[1] for p in paths if p.startswith(f"{name}.")]
        children[name] = (
            OptimizedModule(child, options, verify) if name in paths else _replace(child, below, options, verify)
        )
    return _with_children(module, children)
