"""The operator behind every region, and the shorter way to it in eager calls.

``torch.ops.fxfuse.region(Tensor[] inputs, str region) -> Tensor[]`` is functional and complete: it
has a fake implementation and a backward, so that torch.compile, torch.export, AOTAutograd and
autograd treat it like any other operator. ``region`` is the text of a :class:`~fxfuse.region.Region`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse.chain import no_autocast
from fxfuse.kernels import execute, running
from fxfuse.kernels.plan import Path, by_torch, chain_of, choose
from fxfuse.kernels.runtime import recent
from fxfuse.region import Region

_library = torch.library.Library("fxfuse", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define("region(Tensor[] inputs, str region) -> Tensor[]", tags=_tags)
_library.define("region_backward(Tensor[] grads, Tensor[] inputs, str region, bool[] needs) -> Tensor[]", tags=_tags)


# --- watching -------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Run:
    """One execution of a region: which, and which way."""

    region: Region
    path: Path


_watchers: list[list[Run]] = []


@contextlib.contextmanager
def watch() -> Iterator[list[Run]]:
    """Collect the regions that run inside the block (of all threads): tests assert that they did."""
    runs: list[Run] = []
    _watchers.append(runs)
    try:
        yield runs
    finally:
        _watchers.remove(runs)


def _report(region: Region, path: Path) -> None:
    for runs in _watchers:
        runs.append(Run(region, path))


# --- the door in eager calls ----------------------------------------------------------------------
def run_region(inputs: Sequence[Tensor], text: str) -> Sequence[Tensor]:
    """Run the region that ``text`` spells: what a fused node of the graph calls.

    Plain tensors go the way that the plan chooses, past the dispatcher where no gradient needs it;
    anything that traces or transforms meets ``torch.ops.fxfuse.region`` itself.
    """
    known = recent.find(text, inputs)
    if known is not None and not _watchers:
        made = known.run(inputs)
        return made if known.apart else _separate(made, inputs)
    if not _plain(inputs):
        return torch.ops.fxfuse.region(inputs, text)  # type: ignore[no-any-return]
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        return _rewritten(text, inputs, remember=True)
    region = Region.parse(text)
    path = choose(region, inputs[0].device.type, gradients=True)
    if path is Path.RECOMPUTE:
        recent.note(text, as_written=False)
        return torch.ops.fxfuse.region(inputs, text)  # type: ignore[no-any-return]
    region.original.check(inputs)
    _report(region, path)
    with no_autocast() as casts, _precision(region):
        made = _separate(region.original.run(inputs), inputs)
    recent.note(text, as_written=region.precision is None and not casts.active)
    return made


def as_written(texts: Sequence[str]) -> Callable[[], bool] | None:
    """A function that tells whether a model of these regions does as well, in calls like the last one, without them;
    None where it does not: a region is rewritten, has kernels, or somebody watches."""
    return recent.as_written(texts, unless=_watchers)


def repeated(text: str, output: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """An output of :func:`run_region` for inputs that torch's guards do not tell apart from call to call, as the caller
    knows.
    """
    like: recent.Call | None = None  # a call with such inputs

    def run(inputs: Sequence[Tensor]) -> Tensor:
        nonlocal like
        if like is None or _watchers or not recent.holds(text, like):
            made = run_region(inputs, text)
            if like is None or like is not recent.last(text):
                like = recent.like(text, inputs)
            return made[output]
        known = like.runs
        made = known.run(inputs)
        return made[output] if known.apart else _separate(made, inputs)[output]

    return run


def traced_region(inputs: Sequence[Tensor], text: str) -> Sequence[Tensor]:
    """What a fused node means to AOTAutograd: the plan's choice, made while it traces.

    Where the plan keeps the original chain for the sake of a backward, its operators are traced, for
    the next compiler to fuse; everything else becomes ``torch.ops.fxfuse.region``.
    """
    region = Region.parse(text)
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    path = choose(region, inputs[0].device.type, gradients)
    known = all(
        None not in kind.shape for _, kind in region.original.inputs
    )  # Inductor's convolution_backward needs it
    if path is Path.ORIGINAL and known and region.precision is None:  # traced operators keep no precision
        with no_autocast():
            return _separate(region.original.run(inputs), inputs)
    return torch.ops.fxfuse.region(inputs, text)  # type: ignore[no-any-return]


def _plain(inputs: Sequence[Tensor]) -> bool:
    if torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling():
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    for t in inputs:  # noqa: SIM110 - a generator costs more, and this is on the way of every call
        if type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return False
    return True


def _precision(region: Region) -> contextlib.AbstractContextManager[Any]:
    """cuDNN's float32 class as the region asks for it; nothing to do for None."""
    if region.precision is None:
        return _NOTHING
    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        allow_tf32=region.precision == "tf32",
    )


_NOTHING = contextlib.nullcontext()


# --- the operator ---------------------------------------------------------------------------------
def _forward(inputs: Sequence[Tensor], text: str) -> list[Tensor]:
    return [_no_view(t) for t in _rewritten(text, inputs)]


def _rewritten(text: str, inputs: Sequence[Tensor], *, remember: bool = False) -> list[Tensor]:
    """The rewritten chain: with a kernel where one is worth it, else by torch's operators.

    ``remember``: calls of :func:`run_region` like this one may go the short way.
    """
    key = execute.key_of(text, inputs)
    prepared = execute.find(key, inputs)
    if prepared is not None and not prepared.asks_torch:  # nothing that autocast or a precision would change
        if _watchers:
            _report(Region.parse(text), Path.KERNEL)
        made = prepared.run(inputs)
        if remember:
            recent.note(text, as_written=False)
            recent.remember(text, inputs, prepared)
        return made if prepared.apart else _separate(made, inputs)
    region = Region.parse(text)
    region.rewritten.check(inputs)
    with no_autocast() as casts, _precision(region):
        outputs = prepared.run(inputs) if prepared is not None else execute.run(region, inputs, key)
        path, program = Path.KERNEL, region.rewritten
        if outputs is None:
            path = by_torch(region, inputs[0].device.type) if remember else Path.REWRITTEN
        _report(region, path)
        if outputs is None:
            program = chain_of(region, path)
            outputs = program.run(inputs, reuse=True)
            prepared = None
    if remember:
        known = not casts.active and region.precision is None
        for_good = known and prepared is None and execute.torch_for_good(region, inputs, key)
        recent.note(text, as_written=for_good and program == region.original)
        if known and prepared is not None:
            recent.remember(text, inputs, prepared)
        elif for_good:
            recent.remember(text, inputs, recent.ByTorch(program))
    return _separate(outputs, inputs)


def _no_view(tensor: Tensor) -> Tensor:
    """The same memory in a tensor that autograd does not take for a view: a model may write to it in place."""
    return tensor.new_empty(0).set_(tensor) if tensor._is_view() else tensor  # type: ignore[call-overload]


def _separate(outputs: list[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs in memory of their own: an operator may return neither an input nor two views of one tensor."""
    taken = {t.untyped_storage()._cdata for t in inputs}
    for i, out in enumerate(outputs):
        if out.untyped_storage()._cdata in taken:
            outputs[i] = out = out.clone()
        taken.add(out.untyped_storage()._cdata)
    return outputs


def _fake(inputs: Sequence[Tensor], text: str) -> list[Tensor]:
    with no_autocast():
        return _separate(Region.parse(text).rewritten.run(inputs), inputs)


def _backward(grads: Sequence[Tensor], inputs: Sequence[Tensor], text: str, needs: Sequence[bool]) -> list[Tensor]:
    """Gradients of the inputs that ``needs`` marks, from the original chain, run once more."""
    leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
    found = _differentiate(grads, leaves, text, needs)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    return _separate([_laid_out_like(t, g) for t, g in zip(wanted, found, strict=True)], [*inputs, *grads])


def _laid_out_like(like: Tensor, value: Tensor) -> Tensor:
    """``value`` with the strides that the fake implementation promises; a library's backward may choose others."""
    strides = torch.empty_like(like, device="meta").stride()
    if value.stride() == strides:
        return value
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)


def _differentiate(
    grads: Sequence[Tensor], leaves: Sequence[Tensor], text: str, needs: Sequence[bool], create_graph: bool = False
) -> list[Tensor]:
    """The chain rule through the original chain."""
    region = Region.parse(text)
    with torch.enable_grad(), no_autocast(), _precision(region):
        outputs = region.original.run(leaves)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        wanted = [t for t, need in zip(leaves, needs, strict=True) if need]
        found = torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, create_graph=create_graph
        )
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


def _fake_backward(grads: Sequence[Tensor], inputs: Sequence[Tensor], text: str, needs: Sequence[bool]) -> list[Tensor]:
    return [torch.empty_like(t) for t, need in zip(inputs, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[list[Tensor], str], output: list[Tensor]) -> None:
    tensors, text = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.text = text
    ctx.needs = [t.requires_grad for t in tensors]
    ctx.like = [(o.shape, o.dtype, o.device) for o in output]
    original = Region.parse(text).original
    reached = [original.differentiable_in([i]) for i in range(len(output))]
    constant = [out for out, of in zip(output, reached, strict=True) if not any(map(operator.and_, of, ctx.needs))]
    ctx.mark_non_differentiable(*constant)


def _autograd(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], None]:
    given = [
        torch.zeros(shape, dtype=dtype, device=device) if g is None else g
        for g, (shape, dtype, device) in zip(grads, ctx.like, strict=True)
    ]
    asked = [i for i, g in enumerate(grads) if g is not None]
    needs = list(map(operator.and_, ctx.needs, Region.parse(ctx.text).original.differentiable_in(asked)))
    if not any(needs):
        return [None] * len(needs), None
    if torch.is_grad_enabled():  # create_graph=True: gradients that can be differentiated once more
        leaves = [t.view_as(t) for t in ctx.saved_tensors]
        found = iter(_differentiate(given, leaves, ctx.text, needs, create_graph=True))
    else:
        found = iter(torch.ops.fxfuse.region_backward(given, list(ctx.saved_tensors), ctx.text, needs))
    return [next(found) if need else None for need in needs], None


_library.impl("region", _forward, "CompositeExplicitAutograd")
_library.impl("region_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fxfuse::region", _fake, lib=_library)
torch.library.register_fake("fxfuse::region_backward", _fake_backward, lib=_library)
torch.library.register_autograd("fxfuse::region", _autograd, setup_context=_setup_context, lib=_library)


def update_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    count: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | Tensor | None,
    kernels: bool = True,
) -> None:
    """What a training-mode BatchNorm does to its buffers, given the batch's mean and unbiased variance.

    ``running = (1 - f)*running + f*batch`` with f the momentum, or 1/count where it is None (the
    cumulative average); ``count``, where present, grows by one first. ``kernels``: one of ours may do it.
    """
    tensors = (running_mean, running_var, mean, var, *(() if count is None else (count,)))
    if kernels and _plain(tensors) and running.move(running_mean, running_var, count, mean, var, momentum):
        return
    # a block without gradients keeps an exported program from being saved; as a rule there are none to switch off
    given = (running_mean, running_var, momentum)
    with torch.no_grad() if any(isinstance(t, Tensor) and t.requires_grad for t in given) else _NOTHING:
        if count is not None:
            count.add_(1)
        factor = momentum
        if factor is None:
            assert count is not None
            factor = 1.0 / count.to(running_mean.dtype)
        for moved, batch in ((running_mean, mean), (running_var, var)):
            moved.mul_(1 - factor).add_(batch.detach().to(moved.dtype) * factor)
