"""Where kernels run: on a GPU where there is one, else on the emulated one, as if it were a Hopper GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import many_chains
import pytest
import torch
from emulator.device import emulated, needs_compiler
from emulator.graphs import graphs_of

from fxfuse.kernels import execute
from fxfuse.kernels.convolution import planar

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


def needs(capability: tuple[int, int]) -> pytest.MarkDecorator:
    """A GPU of at least this capability, or the emulated one."""
    if not CUDA:
        return needs_compiler
    return pytest.mark.skipif(torch.cuda.get_device_capability() < capability, reason=f"needs sm_{capability[0]}x")


@contextlib.contextmanager
def kernels_always(
    *,
    twice: bool = False,
    any_size: bool = True,
    planes: bool = True,
    graphs: bool = False,
    spread: bool = False,
    gathered: bool = False,
) -> Iterator[None]:
    """As :func:`many_chains.kernels_always`; TF32 is allowed, and nothing is prepared before or stays so afterwards.

    Not ``planes``: no kernel reads x as it lies. ``graphs``: calls are replayed on the emulated GPU, as on one.
    """
    with contextlib.ExitStack() as stack:
        if not CUDA:
            device = stack.enter_context(emulated())
            if graphs:
                stack.enter_context(graphs_of(device))
        if not planes:
            stack.enter_context(mock.patch.object(planar, "MOST_CHANNELS", 0))
        execute.forget()
        stack.callback(execute.forget)
        always = many_chains.kernels_always(twice=twice, any_size=any_size, spread=spread, gathered=gathered)
        stack.enter_context(always)
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=True))
        yield


@contextlib.contextmanager
def what_torch_has() -> Iterator[None]:
    """Skip where torch's CPU operators do not take a dtype that its CUDA operators take."""
    try:
        yield
    except NotImplementedError as error:
        if CUDA:
            raise
        pytest.skip(str(error))
