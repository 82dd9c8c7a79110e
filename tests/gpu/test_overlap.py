"""Kernels of a call begin while those in front of them still run: the same bits as one behind the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from place import CUDA, DEVICE, kernels_always, needs, needs_gpu
from stages import LAST, NORMS, Stages, made, spread
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.kernels import execute
from fxfuse.kernels.plan import Path
from fxfuse.kernels.runtime import launch

pytest.importorskip("cuda.bindings")
pytestmark = needs((9, 0))

#: calls that are queued one behind the other: launches are late where the GPU waits for them
CALLS = 200 if CUDA else 4


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with kernels_always():
        yield


def block(dims: int, *behind: nn.Module | Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> nn.Module:
    return spread(Stages(made(dims, 8, 16, 3, stride=2, padding=1, dtype=dtype), *behind)).to(DEVICE, dtype).eval()


#: what is launched: with a pool, a reduction, statistics and what is made of them, small tensors, torch's operators
MODELS: dict[str, Callable[[], nn.Module]] = {
    "pool": lambda: block(3, F.leaky_relu, nn.MaxPool3d(2)),
    "pool of its own": lambda: block(3, F.silu, lambda y: F.max_pool3d(y, 3, 2)),
    "statistics": lambda: block(3, NORMS["group"](16, 3), F.silu),
    "running statistics": lambda: block(3, NORMS["batch"](16, 3), F.hardswish).train(),
    "folded": lambda: block(3, NORMS["batch"](16, 3), F.relu),
    "torch between": lambda: block(3, lambda y: y.softmax(2), lambda y: F.max_pool3d(y, 3)),
    "2-D, float16": lambda: block(2, NORMS["instance"](16, 2), dtype=torch.float16),
    "2-D, channels last": lambda: block(2, F.silu, lambda y: y.softmax(1)).to(memory_format=LAST[4]),
}


def inputs(model: nn.Module) -> list[Tensor]:
    """Some whose samples half precision cannot carry, and one whose largest values lie between those looked at."""
    weight = next(model.parameters())
    found = []
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(3, 8, *[6] * (weight.dim() - 2)) * 4.0**seed
        x[seed % 3, 1, 2, 3] = (1.0, 1e30, 0.0, float("nan"), 300.0)[seed]
        layout = (
            LAST[4] if weight.dim() == 4 and weight.is_contiguous(memory_format=LAST[4]) else torch.contiguous_format
        )
        found.append(x.to(DEVICE, weight.dtype).contiguous(memory_format=layout))
    return found


def bits(model: nn.Module) -> list[Tensor]:
    """The results of many calls in a row, every input followed by every other one."""
    fast, given = fxfuse.optimize(model), inputs(model)
    with torch.no_grad(), ops.watch() as runs:
        for x in given[:2]:
            fast(x)
        results = [fast(given[(i + i // len(given)) % len(given)]) for i in range(CALLS)]
    assert runs[-1].path is Path.KERNEL
    return [r.view(torch.int32 if r.dtype is torch.float32 else torch.int16).cpu() for r in results]


#: an emulated GPU runs one kernel behind the other, so that a few of them show that this file works
EMULATED = ("pool", "2-D, float16")


@pytest.mark.parametrize("name", [n if n in EMULATED else pytest.param(n, marks=needs_gpu) for n in MODELS])
def test_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    model = MODELS[name]()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    together = bits(model)
    monkeypatch.setattr(launch.OVERLAP, "value", 0)
    execute.forget()  # graphs that overlap
    model.load_state_dict(state)
    apart = bits(model)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    assert not torch.equal(together[0], together[1])


@needs_gpu
def test_a_captured_call_overlaps() -> None:
    """Edges of the graph let a kernel begin when the one in front of it allows it; those into the first do not."""
    from cuda.bindings import driver

    model = MODELS["pool"]()
    fast, (x, *_) = fxfuse.optimize(model), inputs(model)
    with torch.no_grad():
        fast(x), fast(x)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            first = x * 1.0
            held = fast(first)
        status, _, _, edges, count = driver.cuGraphGetEdges(driver.CUgraph(graph.raw_cuda_graph()), 64)
        assert int(status) == 0
        programmatic = driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
        assert [e.type == programmatic for e in edges[:count]].count(
            True
        ) == 3  # of measure, prepare, convolution, direct
        graph.instantiate()
        for _ in range(20):
            graph.replay()
        assert torch.equal(held, fast(x))
