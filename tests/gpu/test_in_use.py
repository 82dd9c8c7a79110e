"""A model as it is used: weights change, batches change, modules are shared, moved, copied, called by several threads.

Each with every way to run a region that has more than one launch to keep right.
"""

from __future__ import annotations

import concurrent.futures
import copy
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from place import DEVICE, kernels_always, needs
from stages import Stages, made, sample, steps_run, trained
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.dynamo import backend
from fxfuse.kernels.plan import Path

pytest.importorskip("cuda.bindings")
pytestmark = needs((9, 0))


def halved(y: Tensor) -> Tensor:
    return F.avg_pool3d(F.avg_pool3d(y, 2), 2)


def softmax(y: Tensor) -> Tensor:
    return y.softmax(1).sigmoid()


def block(channels: int, *stages: str | Callable[[Tensor], Tensor]) -> nn.Module:
    return trained(made(3, channels, 8, 3, stride=2, padding=1), *stages)


def behind_a_norm() -> nn.Module:
    return Stages(nn.GroupNorm(2, 12).to(DEVICE), nn.LeakyReLU(0.1), made(3, 12, 8, 3, stride=2, padding=1)).train()


#: a model for x (N, C, D, H, W), C, and a word of the schedule
WAYS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "means": (lambda: block(4, halved), 4, "avg_pool 4x4x4"),
    "products": (lambda: block(3, "batch", halved), 3, "from products of x"),
    "softmax": (lambda: block(4, softmax), 4, "conv_transpose > softmax > sigmoid"),
    "front": (behind_a_norm, 12, "leaky_relu > conv_transpose"),
    "twice": (lambda: block(8, "instance", F.hardswish), 8, "the convolution again"),
}


@pytest.fixture(autouse=True)
def always_twice() -> Iterator[None]:
    """Statistics come from products of x where there are such, or from a first run."""
    with kernels_always(twice=True):
        yield


class Used:
    """A model of one of the ways, its optimised twin, which shares nothing with it, and their input."""

    def __init__(self, way: str) -> None:
        make, self.channels, self.word = WAYS[way]
        torch.manual_seed(0)
        self.eager = make()
        self.model = copy.deepcopy(self.eager)
        self.fast = fxfuse.optimize(self.model, self.input(2))

    def input(self, batch: int = 2, size: tuple[int, int, int] = (3, 4, 4)) -> Tensor:
        return sample(batch, self.channels, *size)

    def agrees(self, x: Tensor, fast: nn.Module | None = None, *, new: bool = False) -> Tensor:
        """What the optimised one gives, by kernels, which is what the model gives; buffers move alike.

        ``new``: nothing was captured for such calls yet, so that the first one runs the model itself.
        """
        fast = self.fast if fast is None else fast
        with torch.no_grad():
            for turn in range(1 + new):
                with ops.watch() as runs:
                    got = fast(x)
                close(got, self.eager(x))
                assert [r.path for r in runs] == ([Path.KERNEL] if turn == new else [])
        assert self.word in steps_run()
        for a, b in zip(fast.buffers(), self.eager.buffers(), strict=True):
            close(a, b)
        return got


def close(got: Tensor, like: Tensor) -> None:
    assert got.dtype is like.dtype and got.stride() == like.stride()
    torch.testing.assert_close(got, like, rtol=1e-2, atol=1e-2)


each_way = pytest.mark.parametrize("way", WAYS)
some_ways = pytest.mark.parametrize("way", ["products", "twice"])


# --- weights ----------------------------------------------------------------------------------------
@each_way
def test_weights_that_change(way: str) -> None:
    used, x = Used(way), sample(2, WAYS[way][1], 3, 4, 4)
    results = [used.agrees(x)]

    def step(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
        for p in model.parameters():
            p.grad = torch.ones_like(p) * torch.linspace(-1, 1, p.numel(), device=DEVICE).view_as(p)
        optimizer.step()

    def write(model: nn.Module) -> None:
        for p in model.parameters():
            p.data.mul_(-1.5)

    def other(model: nn.Module) -> None:
        for p in model.parameters():
            p.data = p.data.flip(0).clone()

    def load(model: nn.Module) -> None:
        made_anew = {k: v.flip(0) * 0.5 if v.dim() else v for k, v in model.state_dict().items()}
        model.load_state_dict({k: v.abs() if "var" in k else v for k, v in made_anew.items()})

    def assign(model: nn.Module) -> None:
        model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True)

    changes: list[Callable[[nn.Module], None]] = [step, write, other, load, assign]
    for change in changes:
        change(used.eager), change(used.model)
        results.append(used.agrees(x))
    for before, after in itertools.pairwise(results):
        assert not torch.allclose(before, after, rtol=1e-2, atol=1e-2)


# --- modules ----------------------------------------------------------------------------------------
class TwiceUsed(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) - self.part(x * 3 + 1)


@each_way
def test_a_module_used_twice(way: str) -> None:
    used = Used(way)
    used.eager, used.model = TwiceUsed(used.eager), TwiceUsed(used.model)
    fast, x = fxfuse.optimize(used.model, used.input()), used.input()
    for _ in range(2):
        with torch.no_grad(), ops.watch() as runs:
            close(fast(x), used.eager(x))
        assert [r.path for r in runs] == [Path.KERNEL] * 2
        for a, b in zip(used.model.buffers(), used.eager.buffers(), strict=True):
            close(a, b)


@each_way
def test_to_double_and_back(way: str) -> None:
    used = Used(way)
    used.agrees(used.input())
    x = used.input()
    with torch.no_grad():
        used.eager.double(), used.fast.double()
        torch.testing.assert_close(used.fast(x.double()), used.eager(x.double()))
        used.eager.float(), used.fast.float()
    used.agrees(x)


@each_way
def test_copies(way: str) -> None:
    """A deepcopy behind a call has parameters of its own, which it follows."""
    used, x = Used(way), sample(2, WAYS[way][1], 3, 4, 4)
    used.agrees(x)
    copied = copy.deepcopy(used.fast)
    used.agrees(x, copied, new=True)
    with torch.no_grad():
        for p in used.model.parameters():
            p.zero_()
    used.agrees(x, copied)


# --- batches ----------------------------------------------------------------------------------------
@each_way
def test_batches_that_change(way: str) -> None:
    used = Used(way)
    for batch in (2, 1, 3, 2, 1):
        used.agrees(used.input(batch))
    with torch.no_grad():
        x = used.input(0)
        try:
            like = used.eager(x)
        except (ValueError, RuntimeError, IndexError) as error:
            with pytest.raises(type(error)):
                used.fast(x)
        else:
            close(used.fast(x), like)
    used.agrees(used.input(3))


@some_ways
def test_compiled_for_any_batch(way: str) -> None:
    torch._dynamo.reset()
    used = Used(way)
    compiled = torch.compile(used.model, backend=backend, dynamic=True, options={"remainder": "eager"})
    for batch in (2, 3, 5, 1):
        used.agrees(used.input(batch), compiled)


# --- threads ----------------------------------------------------------------------------------------
@some_ways
def test_threads(way: str) -> None:
    """Four of them with inputs of one size, which then are of two."""
    used = Used(way)
    for m in used.model.modules():
        if isinstance(m, nn.BatchNorm3d):
            m.momentum = 0.0  # or the order of calls is seen
    inputs = [[used.input(), used.input(), used.input(1 + i % 2)] for i in range(4)]
    with torch.no_grad():
        expected = [[used.eager(x) for x in each] for each in inputs]
        used.fast(inputs[0][0])

    def work(each: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [used.fast(x) for x in each]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found, like in zip(pool.map(work, inputs), expected, strict=True):
            for got, wanted in zip(found, like, strict=True):
                close(got, wanted)
