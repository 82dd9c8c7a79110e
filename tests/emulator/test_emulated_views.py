"""Parameters that a model reads through views: kernels read them where they lie, and nothing runs for the views."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from emulator.device import needs_compiler
from emulator.test_emulated_folds import F16, F32, LIMIT, Then, assert_near, layer, run_prepared
from torch import Tensor, nn

from fxfuse.kernels.stages.steps import Bundle, Torch

pytestmark = needs_compiler

TWO = {"stride": 2, "padding": 1}
#: what is behind a convolution whose result is (2, 12, 5, 7, 9); the shapes of its parameters; how many
#: kernels on small tensors there are in float32
CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], int]] = {
    "per channel": (lambda y, g, h: F.relu(y) * g.view(-1, 1, 1, 1) + h[:, None, None, None], [(12,), (12,)], 0),
    "folded into the weights": (
        lambda y, g, h: F.max_pool3d(y * g.view(-1, 1, 1, 1), 2) * h[None, :, None, None, None],
        [(12,), (12,)],
        1,
    ),
    "turned, of another order": (
        lambda y, g: y.sigmoid() * g.permute(1, 0).unsqueeze(2).unsqueeze(3) + g.t()[..., None, None], [(1, 12)], 0
    ),
    "a dim that becomes two": (
        lambda y, g, h: y.tanh() + g.view(1, 5, 7, 1) + h.detach().view(7, 12, 1, 9).permute(1, 2, 0, 3),
        [(35,), (12 * 63,)], 0,
    ),
    "behind a norm": (
        lambda y, g, h: F.instance_norm(y) * g.view(1, 12, 1, 1, 1) + h.view(12, 1, 1, 1), [(12,), (12,)], 1
    ),
    "of a softmax": (lambda y, g, h: (y * g[:, None, None, None]).softmax(1) * h.view(5, 7, 9), [(12,), (315,)], 1),
}  # fmt: skip


def _views(bundle: Bundle) -> set[str]:
    """What a kernel would copy."""
    return {i.outs[0] for i in bundle.body if i.op in ("reshape", "permute", "detach")}


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_nothing_runs_for_a_view(name: str, dtype: torch.dtype) -> None:
    behind, shapes, bundles = CASES[name]
    torch.manual_seed(5)
    model: nn.Module = Then(layer(8, 12, 3, **TWO), behind, *(torch.rand(s) + 0.5 for s in shapes)).to(dtype).eval()
    got, expected, made = run_prepared(model, torch.randn(2, 8, 3, 4, 5, dtype=dtype))
    assert not made.asks_torch
    schedule = made.schedule
    parts = [*schedule.ahead, *schedule.between, *schedule.steps]
    assert dtype is not F32 or sum(isinstance(p, Bundle) for p in parts) == bundles, schedule
    assert not any({*p.makes} & _views(p) for p in parts if isinstance(p, Bundle)), schedule
    assert all(
        {i.op for i in p.program.body} <= {"reshape", "permute", "detach"} for p in parts if isinstance(p, Torch)
    )
    assert_near(got, expected, LIMIT[dtype])
