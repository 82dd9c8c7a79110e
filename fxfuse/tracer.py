"""torch.fx's tracer, with an eye on what a trace would lose or bake in without a word."""

from __future__ import annotations

import dis
import operator
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxfuse.call import HOOKS
from fxfuse.replica import unwrapped
from fxfuse.state import tensors_of


class CaptureError(RuntimeError):
    """A model that cannot be captured this way; the message says why."""


class _Proxy(fx.Proxy):
    """A proxy that records what is written in place, and notices what would be lost.

    ``isinstance`` of a proxy ends in asking it for its ``__class__``.
    """

    tracer: Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        caller = sys._getframe(1)
        where = str(caller.f_globals.get("__name__", ""))
        if (where.startswith(_ASKS_FOR_USERS) or not where.startswith(_TORCH)) and _asks_for_class(caller):
            self.tracer.refuse(f"{where} asks with isinstance what a value is, and a trace would give a wrong answer")
        return type(self)

    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            self.tracer.refuse(f"the forward sets {name} of a tensor")
        object.__setattr__(self, name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _Attribute(fx.proxy.Attribute, _Proxy):
    """``proxy.name``, as watchful."""


def _inplace(function: Callable[..., Any]) -> Callable[..., Any]:
    """``proxy += other``, which torch.fx would trace as ``proxy = proxy + other``."""

    def method(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
):
    setattr(_Proxy, f"__i{_name}__", _inplace(getattr(operator, f"__i{_name}__")))


def _asks_for_class(frame: types.FrameType) -> bool:
    """Whether it is the code of ``frame`` that asks, and not an operator of torch that it calls."""
    code = frame.f_code
    if dis.opname[code.co_code[frame.f_lasti]] in ("MATCH_CLASS", "LOAD_ATTR"):
        return True
    return any("isinstance" in name for name in (*code.co_names, *code.co_varnames, *code.co_freevars))


_TORCH = ("torch.", "fxfuse.")
#: modules of torch that ask on behalf of a user
_ASKS_FOR_USERS = ("torch.jit", "torch._jit_internal")


class Tracer(fx.Tracer):
    """Traces ``flat``, a wrapper around a replica of ``model``. Other threads may run modules meanwhile."""

    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module, flat: nn.Module) -> None:
        super().__init__()
        self.refusal: str | None = None
        self._model = model
        self._flat = flat
        self._modes: Any = None
        self._thread = threading.get_ident()
        self._paths = {unwrapped(m): f"model.{path}" for path, m in model.named_modules() if path}

    def trace_all(self) -> fx.Graph:
        """The graph; raises CaptureError, or whatever else stopped the trace."""
        try:
            with _Constants(self, self._model), torch.enable_grad():  # so that a no_grad block shows
                self._modes = _modes()
                return self.trace(self._flat)
        finally:
            if self.refusal is not None:  # the first one, although the forward may have caught it
                raise CaptureError(self.refusal)

    def refuse(self, reason: str) -> None:
        self.refusal = self.refusal or reason

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse("the forward decides by the value or the size of a tensor")
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Any:
        try:
            return super().iter(obj)
        except fx.proxy.TraceError:
            self.refuse("the forward iterates over a tensor or its shape")
            raise

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        opaque = isinstance(m, torch.jit.ScriptModule) or any(getattr(m, h) for h in HOOKS)
        return opaque or super().is_leaf_module(m, module_qualified_name)

    def path_of_module(self, mod: nn.Module) -> str:
        """Its path; an object that is no module may call a live one instead of its copy."""
        return self._paths[mod] if mod in self._paths else super().path_of_module(mod)

    # the patches on nn.Module that call these are seen by all threads
    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise CaptureError("the forward changes grad mode or autocast on the way, which a trace would lose")
        return super().create_node(*args, **kwargs)


def _modes() -> tuple[Any, ...]:
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return (_is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


_is_grad_enabled = torch.is_grad_enabled


class Watch:
    """While it is on, refuses what no graph can hold, and notes whether this thread asks for the grad mode."""

    def __init__(self) -> None:
        self.asks_grad = False
        self._thread = threading.get_ident()
        self._saved: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Watch:
        apply = torch.autograd.Function.__dict__["apply"].__func__
        register_hook = Tensor.register_hook

        def watched_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
            self._refuse(f"the forward calls {cls.__name__}, whose backward a graph would lose")
            return apply(cls, *args, **kwargs)

        def watched_register_hook(tensor: Tensor, hook: Any) -> Any:
            self._refuse("the forward registers a hook on a tensor")
            return register_hook(tensor, hook)

        def watched_is_grad_enabled() -> bool:
            mine = threading.get_ident() == self._thread
            self.asks_grad |= mine and not _module_of_caller(2).startswith(_TORCH)
            return _is_grad_enabled()

        self._patch(torch.autograd.Function, "apply", classmethod(watched_apply))
        self._patch(Tensor, "register_hook", watched_register_hook)
        self._patch(torch, "is_grad_enabled", watched_is_grad_enabled)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, value in reversed(self._saved):
            setattr(owner, name, value)

    def _patch(self, owner: Any, name: str, value: Any) -> None:
        self._saved.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, value)

    def _refuse(self, reason: str) -> None:
        if threading.get_ident() == self._thread:
            raise CaptureError(reason)


def _module_of_caller(depth: int) -> str:
    return str(sys._getframe(depth).f_globals.get("__name__", ""))


class _Constants(TorchDispatchMode):
    """Watches the operators that run for real during a trace: their results become constants of the graph."""

    def __init__(self, tracer: Tracer, model: nn.Module) -> None:
        super().__init__()
        self._tracer = tracer
        self._owned = {t.untyped_storage()._cdata for t in tensors_of(model) if t.layout is torch.strided}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.layout is torch.strided]
        if any(t.untyped_storage()._cdata in self._owned for t in given):
            self._tracer.refuse("it computes with a tensor of the model that the trace took for a constant")
        elif torch.Tag.nondeterministic_seeded in func.tags:
            self._tracer.refuse("it draws random numbers that the trace took for a constant")
        return func(*args, **(kwargs or {}))
