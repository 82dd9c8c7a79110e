"""What the convolution's kernel gathers over all of space, on a GPU or an emulated one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from place import kernels_always, needs
from stages import Stages, check, made, sample
from torch import Tensor

pytest.importorskip("cuda.bindings")
pytestmark = needs((9, 0))

SPACE = (2, 3, 4)
#: what is behind the convolution, and the kinds that are gathered
BEHIND: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "softmax": (lambda y: y.flatten(2).softmax(-1).view(y.shape) * 100, "exponentials"),
    "log_softmax": (lambda y: y.flatten(2).log_softmax(-1).view(y.shape), "exponentials"),
    "logsumexp": (lambda y: F.relu(y).logsumexp(SPACE), "exponentials"),
    "a window": (lambda y: F.adaptive_max_pool3d(y, 1), "extremes"),
    "a minimum": (lambda y: y - y.amin(SPACE, True), "extremes"),
    "maximum and mean": (
        lambda y: y * torch.sigmoid(y.amax(SPACE, True) + y.mean(SPACE, True)), "statistics and extremes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BEHIND)
def test_over_space(name: str, dtype: torch.dtype, stride: int, twice: bool) -> None:
    torch.manual_seed(5)
    behind, kinds = BEHIND[name]
    model = Stages(made(3, 16, 40, 3, stride, 1, dtype=dtype), behind)
    with kernels_always(twice=twice, gathered=True):
        check(model, sample(3, 16, 5, 9, 11, dtype=dtype), f"{kinds} of", "gathered on the way")
