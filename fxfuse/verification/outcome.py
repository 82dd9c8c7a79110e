"""What one call of a model leaves behind: results, gradients, and what it wrote to. The model is left as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxfuse.capture import CallForm
from fxfuse.compare import fresh
from fxfuse.replica import unwrapped
from fxfuse.state import State, tensors_of


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to run a model: ``call(args, kwargs)``, with the tensors that hang on ``module``."""

    call: Callable[[tuple[Any, ...], dict[str, Any]], Any]
    module: nn.Module


@dataclasses.dataclass
class Outcome:
    """``leaves`` of the result by name, ``gradients`` (None where none arrives), tensors ``written`` to, and
    ``attributes`` of modules that changed; ``generators`` are the random generators' states afterwards."""

    leaves: dict[str, Any]
    gradients: dict[str, Tensor | None]
    written: dict[str, Tensor]
    attributes: list[str]
    generators: list[Tensor]
    drew: bool

    def tensors(self) -> dict[str, Any]:
        """All of it by name."""
        return {**self.leaves, **self.gradients, **self.written}


def behind(module: nn.Module) -> nn.Module:
    """The module that a view, or a result of torch.compile, runs; or ``module`` itself."""
    return unwrapped(module.__dict__.get("_modules", {}).get("_orig_mod", module))


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and other tensors of ``module``, by name; what torch.compile adds to names is left out."""
    named = [*module.named_parameters(), *module.named_buffers()]
    found = {name.replace("_orig_mod.", ""): t for name, t in named}
    known = {id(t) for t in found.values()}
    rest = [t for t in tensors_of(module) if id(t) not in known]
    return {**found, **{f"tensor {i}": t for i, t in enumerate(rest)}}


def run(way: Way, form: CallForm, tensors: Sequence[Tensor], dtypes: dict[str, torch.dtype] | None) -> Outcome:
    """Call the model on copies of ``tensors``; ``dtypes`` None means without gradients.

    Else the gradients are those of a weighted sum of the results. The weights are random, the same ones for
    every way to run the model, and are rounded to ``dtypes`` (by name; the result's own where it is not named).
    """
    state = State(way.module, tensors)
    with state.kept(), torch.set_grad_enabled(dtypes is not None):
        given = fresh(tensors)
        args, kwargs = form.arguments(given)
        leaves = named_leaves(way.call(args, kwargs))
        drew, generators, attributes = state.draws(), state.generators(), state.attributes.changed()
        gradients = {} if dtypes is None else _gradients(way, leaves, given, dtypes)
        written = {f"input {i}": t for i, (t, old) in enumerate(zip(given, tensors, strict=True)) if _changed(t, old)}
        changed = {id(t) for t in state.written()}
        written.update((name, t) for name, t in named_tensors(way.module).items() if id(t) in changed)
        kept = {t.untyped_storage()._cdata for t in (*given, *tensors_of(way.module)) if t.layout is torch.strided}
        return Outcome(
            {name: _detached(leaf, kept) for name, leaf in leaves.items()},
            gradients,
            {name: t.detach().clone() for name, t in written.items()},
            attributes,
            generators,
            drew,
        )


def named_leaves(result: Any, name: str = "output") -> dict[str, Any]:
    """The leaves of a nested result, those in dataclasses included: ``output``, ``output[0]``, ``output['x'].y``."""
    found: dict[str, Any] = {}
    for path, leaf in pytree.tree_flatten_with_path(result)[0]:
        place = name + pytree.keystr(path)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                found.update(named_leaves(getattr(leaf, field.name, None), f"{place}.{field.name}"))
        else:
            found[place] = leaf
    return found


def _detached(leaf: Any, kept: set[int]) -> Any:
    """A leaf that putting the model back does not change."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach()
    return leaf.clone() if leaf.layout is torch.strided and leaf.untyped_storage()._cdata in kept else leaf


def _changed(now: Tensor, before: Tensor) -> bool:
    return now.shape != before.shape or not torch.allclose(now, before, rtol=0, atol=0, equal_nan=True)


def _gradients(
    way: Way, leaves: dict[str, Any], given: Sequence[Tensor], dtypes: dict[str, torch.dtype]
) -> dict[str, Tensor | None]:
    outputs = {n: t for n, t in leaves.items() if isinstance(t, Tensor) and t.requires_grad and t.is_floating_point()}
    wanted = {f"gradient of input {i}": t for i, t in enumerate(given) if t.requires_grad}
    wanted.update(
        (f"gradient of {n}", t) for n, t in named_tensors(way.module).items() if t.requires_grad and t.is_leaf
    )
    if not outputs or not wanted:
        return {}
    weights = [_weight(i, t).to(dtypes.get(n, t.dtype)).to(t.dtype) for i, (n, t) in enumerate(outputs.items())]
    found = torch.autograd.grad(list(outputs.values()), list(wanted.values()), weights, allow_unused=True)
    return {name: None if g is None else g.detach() for name, g in zip(wanted, found, strict=True)}


def _weight(number: int, like: Tensor) -> Tensor:
    generator = torch.Generator(like.device)
    generator.manual_seed(number)
    return torch.randn(like.shape, generator=generator, device=like.device)
