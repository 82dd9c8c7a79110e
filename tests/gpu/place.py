"""Where kernels run: on a GPU where there is one, else on the emulated one, as if it were a Hopper GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from emulator.device import emulated, needs_compiler

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


def needs(capability: tuple[int, int]) -> pytest.MarkDecorator:
    """A GPU of at least this capability, or the emulated one."""
    if not CUDA:
        return needs_compiler
    return pytest.mark.skipif(torch.cuda.get_device_capability() < capability, reason=f"needs sm_{capability[0]}x")


@contextlib.contextmanager
def kernels_always(*, any_size: bool = True) -> Iterator[None]:
    """TF32 is allowed; kernels run whether they are the faster or not, behind convolutions on values of any size."""
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        if not CUDA:
            stack.enter_context(emulated())
        for module in ("tail", "schedule") if any_size else ():
            patch.setattr(f"fxfuse.kernels.{module}.LEAST_ELEMENTS", 1)
        patch.setattr("fxfuse.kernels.execute.slower", lambda *_: None)
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
