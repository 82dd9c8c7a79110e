"""The five starting models on a CUDA device: results, gradients, autocast, streams and graph capture."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import ops
from fxfuse.compare import relative_error
from fxfuse.models import CASES, Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
#: relative L2 error against float64 that the dtype's rounding (TF32 for float32) explains
LIMIT = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def _model(case: Case, train: bool, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return case.make().cuda().to(dtype).train(train), torch.randn(case.small, device="cuda", dtype=dtype)


@cases
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["contiguous", "last"])
def test_as_close_to_float64_as_eager(case: Case, dtype: torch.dtype, train: bool, layout: torch.memory_format) -> None:
    model, x = _model(case, train, dtype)
    x = x.contiguous(memory_format=layout)
    model = model.to(memory_format=layout)
    eager, truth = copy.deepcopy(model), copy.deepcopy(model).double()(x.double())
    fast = fxfuse.optimize(model, (x,))
    with torch.no_grad(), ops.watch() as runs:
        got, expected = fast(x), eager(x)
    assert len(runs) == 1
    assert relative_error(got, truth) <= max(2 * relative_error(expected, truth), LIMIT[dtype])
    for a, b in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2)


@cases
def test_gradients(case: Case) -> None:
    model, x = _model(case, train=True)
    with torch.backends.cudnn.flags(allow_tf32=False):
        eager = copy.deepcopy(model)
        fast = fxfuse.optimize(model, (x,))
        for network in (eager, fast):
            network(x).square().mean().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        difference = float((a.grad - b.grad).abs().max())
        assert relative_error(a.grad, b.grad) < 1e-3 or difference < 1e-6, name


@cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_gives_eager_dtypes(case: Case, dtype: torch.dtype) -> None:
    model, x = _model(case, train=False)
    eager = copy.deepcopy(model)
    fast = fxfuse.optimize(model)
    with torch.no_grad(), torch.autocast("cuda", dtype), ops.watch() as runs:
        fast(x)
        got, expected = fast(x), eager(x)
    assert len(runs) == 1
    assert got.dtype is expected.dtype
    assert relative_error(got, expected) < 4 * LIMIT[dtype]


@cases
def test_ieee_precision(case: Case) -> None:
    model, x = _model(case, train=False)
    truth = copy.deepcopy(model).double()(x.double())
    with torch.no_grad():
        assert relative_error(fxfuse.optimize(model, (x,), precision="ieee")(x), truth) < 2e-6


@cases
def test_captured_in_a_cuda_graph(case: Case) -> None:
    model, x = _model(case, train=False)
    fast = fxfuse.optimize(model, (x,))
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                fast(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fast(x)
        x.copy_(torch.randn_like(x))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)  # a replay sees new weights
        graph.replay()
        assert relative_error(captured, fast(x)) < LIMIT[torch.float32]


def test_moved_after_optimize() -> None:
    torch.manual_seed(0)
    model, x = CASES[3].make().eval(), torch.randn(CASES[3].small)
    fast = fxfuse.optimize(model, (x,))
    with torch.no_grad():
        expected = fast(x)
        fast.cuda()
        fast(x.cuda())
        assert relative_error(fast(x.cuda()).cpu(), expected) < LIMIT[torch.float32]
        assert fast.cpu()(x).device.type == "cpu"
