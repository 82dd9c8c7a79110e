"""Programs on small tensors by one kernel on a GPU: the bits of torch's operators, and whole models without those."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from place import DEVICE, kernels_always, needs, needs_gpu
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.compare import relative_error
from fxfuse.instr import TensorType
from fxfuse.kernels import execute
from fxfuse.kernels.plan import Path
from fxfuse.kernels.planning.observe import observe
from fxfuse.kernels.runtime.tail_engine import prepare
from fxfuse.kernels.stages.emit_bundle import emit_bundle
from fxfuse.kernels.stages.steps import Bundle
from fxfuse.program import Program

pytest.importorskip("cuda.bindings")
pytestmark = needs((8, 0))


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with kernels_always(any_size=False):
        yield


# --- one kernel -----------------------------------------------------------------------------------
#: operators of which ours have torch's bits: the others are as near to the truth, see docs/numerics.md
LINES = """
    a = add(x, y)
    b = mul(a, v)
    c = sub(b, x)
    d = div(c, p)
    e = rsqrt(p)
    f = mul(d, e)
    g = relu(f)
    h = maximum(g, y)
    i = gt(h, 0.3)
    j = where(i, h, a)
    k = permute(j, dims=(1, 0, 2))
    l = reshape(k, shape=(6, 20))
    m = cast(l, dtype=f16)
    n = mul(m, 0.7)
    o = add(n, 1e-3)
    q = cast(o, dtype=bf16)
    r = scale_weight(w, v, groups=1)
    s = to_channels(v, x, channels=5)
"""


@needs_gpu
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_bits_of_torchs_operators(dtype: str) -> None:
    head = f"x: {dtype}[4, 6, 5], y: {dtype}[6, 5], v: {dtype}[5], p: {dtype}[4, 1, 5], w: {dtype}[300, 5, 3, 3]"
    chain = Program.parse(f"def f({head}):{LINES}    return a, c, d, f, j, k, l, o, q, r, s")[1]
    torch.manual_seed(0)
    inputs = [torch.randn([s or 0 for s in k.shape], device="cuda").to(k.dtype) for _, k in chain.inputs]
    inputs[3] = inputs[3].abs() + 0.5
    values = observe(chain, inputs)
    types = {n: TensorType(t.dtype, tuple(t.shape)) for n, t in values.items()}
    strides = {n: t.stride() for n, t in values.items()}
    kinds = tuple(types[n] for n in chain.outputs)
    bundle = Bundle(chain, emit_bundle(chain, types, strides), kinds, tuple(strides[n] for n in chain.outputs))
    given = dict(zip((n for n, _ in chain.inputs), inputs, strict=True))
    prepare(bundle, torch.device("cuda", torch.cuda.current_device()), {}, set())(given)
    for name, expected in zip(chain.outputs, chain.run(inputs), strict=True):
        assert torch.equal(given[name], expected), name


# --- models ---------------------------------------------------------------------------------------
class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(16, 24, 3, stride=2, padding=1, output_padding=1)
        self.scale, self.shift = (nn.Parameter(torch.rand(24, 1, 1, 1) + 0.5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(self.up(x) * self.scale + self.shift, 2)


def up(groups: int = 1) -> nn.Module:
    return nn.ConvTranspose3d(16, 24, 3, stride=2, padding=1, output_padding=1, groups=groups)


def block(norm: nn.Module, groups: int = 1) -> nn.Module:
    return nn.Sequential(up(groups), norm, nn.ReLU())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch_norm_eval": lambda: block(nn.BatchNorm3d(24)).eval(),
    "batch_norm_eval_pool": lambda: nn.Sequential(block(nn.BatchNorm3d(24), 2), nn.MaxPool3d(2)).eval(),
    "batch_norm_train": lambda: block(nn.BatchNorm3d(24)).train(),
    "instance_norm": lambda: block(nn.InstanceNorm3d(24, affine=True)),
    "scaled": Scaled,
    "mean_of_one_group": lambda: nn.Sequential(up(), nn.GroupNorm(1, 24), nn.AdaptiveAvgPool3d(1)),
    "mean_train": lambda: nn.Sequential(up(), nn.BatchNorm3d(24), nn.AdaptiveAvgPool3d(1)).train(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_torch_has_nothing_to_do(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("stages.tail", "planning.schedule"):
        monkeypatch.setattr(f"fxfuse.kernels.{module}.LEAST_ELEMENTS", 2**12)  # vectors are small, samples are not
    execute.forget()  # what other tests have run
    torch.manual_seed(0)
    model = MODELS[name]().to(DEVICE, dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            for t in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(t, 0.5, 1.5)
    x = torch.randn(2, 16, 8, 9, 10, device=DEVICE).to(dtype)
    eager, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    fast = fxfuse.optimize(copy.deepcopy(model), (x,))
    with torch.no_grad():
        for _ in range(3):  # weights may change between calls: nothing of a bundle is kept
            with ops.watch() as runs:
                got = fast(x)
            assert [r.path for r in runs] == [Path.KERNEL]
            assert not any(p.asks_torch for p in execute._prepared.values() if p is not None), name
            expected, exact = eager(x), truth(x.double())
            limit = 2e-3 if dtype is torch.float32 else 5e-3
            assert relative_error(got, exact) <= max(2 * relative_error(expected, exact), limit)
            for each in (fast, eager, truth):
                for p in each.parameters():
                    p.mul_(0.75)
        for a, b in zip(fast.buffers(), truth.buffers(), strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=5e-3, atol=1e-2)
