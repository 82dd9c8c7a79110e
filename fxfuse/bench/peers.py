"""The ways to run a model that are measured beside each other."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.api import optimize

#: per number of dims of the input, the layout with the channels last
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclasses.dataclass(frozen=True)
class Peer:
    """A way to run a model: what it is called in results, whether its channels are last, and how it is made.

    ``ours``: it is fxfuse, and not one of those that it is compared with.
    """

    label: str
    channels_last: bool
    prepare: Callable[[nn.Module], Any]
    ours: bool = False

    def make(self, model: nn.Module, layout: torch.memory_format) -> Any:
        """A copy of ``model`` to be called in this way; its first call may compile."""
        own = copy.deepcopy(model)
        if self.channels_last:
            own = own.to(memory_format=layout)  # type: ignore[call-overload]
        return self.prepare(own)

    def lay_out(self, x: Tensor, layout: torch.memory_format) -> Tensor:
        """An input as this way takes it."""
        return x.contiguous(memory_format=layout) if self.channels_last and _CHANNELS_LAST.get(x.dim()) is layout else x


def _eager(model: nn.Module) -> nn.Module:
    return model


def _max_autotune(model: nn.Module) -> Any:
    return torch.compile(model, mode="max-autotune")


#: the peers that a user may name; labels are those of the results
PEERS: dict[str, Peer] = {
    "eager": Peer("eager", False, _eager),
    "channels_last": Peer("channels_last_3d", True, _eager),
    "compile": Peer("compile", False, torch.compile),
    "compile_channels_last": Peer("compile channels_last_3d", True, torch.compile),
    "max_autotune": Peer("max_autotune", False, _max_autotune),
}
OURS = (Peer("fxfuse", False, optimize, ours=True), Peer("fxfuse channels_last_3d", True, optimize, ours=True))


def layout_of(inputs: Sequence[Tensor]) -> torch.memory_format | None:
    """The layout with the channels last for these inputs; None where they have none."""
    return next((_CHANNELS_LAST[x.dim()] for x in inputs if x.dim() in _CHANNELS_LAST), None)
