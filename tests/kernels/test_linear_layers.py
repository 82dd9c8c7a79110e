"""Products with a matrix among operators on small tensors: the kernel, and what it takes."""

from __future__ import annotations

import pytest
import torch
from emulator.device import needs_compiler
from harness import program
from reports import explained
from test_bundle import check, emitted, run, tensor
from torch import Tensor, nn

from fxfuse.bench.idioms import Excite
from fxfuse.kernels.codegen.arithmetic import NotEmittable
from fxfuse.kernels.compilation import jit
from fxfuse.kernels.stages.emit_bundle import MOST_PRODUCTS, MOST_PRODUCTS_OF_ALL
from fxfuse.program import Program

#: inputs, and lines behind them
PROGRAMS = {
    "one": ("x: f32[3, 5], w: f32[7, 5], b: f32[7]", "y = linear(x, w, b)\ny"),
    "squeeze and excitation": (
        "x: f32[3, 12], w: f32[4, 12], b: f32[4], v: f32[12, 4]",
        "y = linear(x, w, b)\nz = relu(y)\nu = linear(z, v, None)\ng = sigmoid(u)\n"
        "o = reshape(g, shape=(3, 12, 1, 1, 1))\no",
    ),
    "of one position": (
        "x: f32[2, 6, 1, 1, 1], w: f32[5, 6, 1, 1, 1], b: f32[5], v: f32[6, 5, 1, 1, 1]",
        "y = linear(x, w, b)\nz = tanh(y)\nu = linear(z, v, None)\nt = add(u, x)\ny, t",
    ),
    "of arithmetic on both sides": (
        "x: f32[2, 6], m: f32[6], w: f32[5, 6], s: f32[5, 1], b: f32[5]",
        "c = sub(x, m)\nk = mul(w, s)\nd = neg(b)\ny = linear(c, k, d)\ny",
    ),
    "one number": ("x: f32[1, 1], w: f32[1, 1], b: f32[1]", "y = linear(x, w, b)\nz = linear(y, w, None)\nz"),
    "one sample of many": ("x: f32[1, 300], w: f32[2, 300], b: f32[2]", "y = linear(x, w, b)\ny"),
    "three of them": (
        "x: f32[2, 8], w: f32[8, 8], b: f32[8]",
        "y = linear(x, w, b)\nz = linear(y, w, b)\nu = linear(z, w, b)\nu",
    ),
}


@needs_compiler
@pytest.mark.parametrize("name", PROGRAMS)
def test_float32(name: str) -> None:
    chain = program(*PROGRAMS[name])
    check(chain, [tensor(*t.shape, seed=i) for i, (_, t) in enumerate(chain.inputs)], rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_16_bits(name: str, dtype: torch.dtype) -> None:
    """Sums of float32, rounded once for each operator."""
    inputs, lines = PROGRAMS[name]
    chain = program(inputs.replace("f32", {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]), lines)
    given = [tensor(*t.shape, seed=i).to(dtype) / 4 for i, (_, t) in enumerate(chain.inputs)]
    for got, exact in zip(run(chain, given), program(inputs, lines).run([t.float() for t in given]), strict=True):
        assert got.dtype is dtype
        assert (got.float() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


@needs_compiler
def test_inputs_as_they_lie() -> None:
    chain = program(*PROGRAMS["one"])
    x, w, b = tensor(5, 3).t(), tensor(14, 10)[::2, ::2], tensor(1).expand(7)
    check(chain, [x, w, b], rtol=1e-5)


@needs_compiler
def test_not_finite() -> None:
    chain = program(*PROGRAMS["squeeze and excitation"])
    x, w, b, v = (tensor(*t.shape, seed=i) for i, (_, t) in enumerate(chain.inputs))
    x[0, 3], x[1, 2], w[1, 5] = torch.inf, torch.nan, 0.0
    check(chain, [x, w, b, v], rtol=1e-5)


def deep(features: int, hidden: int) -> Program:
    return program(
        f"x: f32[2, {features}], w: f32[{hidden}, {features}], v: f32[{features}, {hidden}]",
        "y = linear(x, w, None)\nz = linear(y, v, None)\nz",
    )


def test_so_many_products() -> None:
    """Each element of the second product is made of all products of the first one."""
    emitted(deep(64, MOST_PRODUCTS // 64))
    with pytest.raises(NotEmittable, match=f"more than {MOST_PRODUCTS} products in an element"):
        emitted(deep(64, MOST_PRODUCTS // 64 + 1))


def test_so_many_products_of_all_elements() -> None:
    """A classifier's head is torch's affair, whose products share what they read."""
    for rows, small in ((MOST_PRODUCTS_OF_ALL // (64 * 128), True), (MOST_PRODUCTS_OF_ALL // (64 * 128) + 1, False)):
        head = program(f"x: f32[{rows}, 64], w: f32[128, 64]", "y = linear(x, w, None)\ny")
        if small:
            emitted(head)
            continue
        with pytest.raises(NotEmittable, match=f"more than {MOST_PRODUCTS_OF_ALL} products in all elements"):
            emitted(head)


def test_the_products_of_products_count() -> None:
    """Each of 2 * 64 elements makes all hidden features anew."""
    most = MOST_PRODUCTS_OF_ALL // (64 * 64 * 16)
    for samples, small in ((most, True), (most + 1, False)):
        text = deep(64, 16).text("chain").replace("f32[2, 64]", f"f32[{samples}, 64]")
        chain = Program.parse(text)[1]
        if small:
            emitted(chain)
            continue
        with pytest.raises(NotEmittable, match="products in all elements"):
            emitted(chain)


def test_a_head_behind_a_mean_is_left_to_torch() -> None:
    up = nn.ConvTranspose3d(16, 256, 3, 2, 1, 1)
    for classes, kernels in ((10, 1), (1000, 0)):
        model = nn.Sequential(up, nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(256, classes)).eval()
        plan = str(explained(model, (16, 16, 8, 8, 8), precision="tf32").regions[0].plan)
        assert plan.count("on small tensors: reshape > reshape > linear") == kernels, plan
        assert "linear" in plan and "conv_transpose > relu -> statistics" in plan


@pytest.mark.parametrize("kinds", [("f64", "f64"), ("f32", "f16"), ("i64", "i64")])
def test_other_dtypes(kinds: tuple[str, str]) -> None:
    chain = program("x: f32[2, 3], w: f32[4, 3]", "y = linear(x, w, None)\ny")
    types = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "i64": torch.int64}
    x, w = (tensor(*shape).to(types[k]) for shape, k in zip(((2, 3), (4, 3)), kinds, strict=True))
    with pytest.raises((NotEmittable, RuntimeError)):
        emitted(chain, [x, w])


def test_the_text_is_cuda() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs the extra fxfuse[cuda]")
    texts = [emitted(program(*given)).text for given in PROGRAMS.values()]
    inputs, lines = PROGRAMS["squeeze and excitation"]
    texts.append(emitted(program(inputs.replace("f32", "bf16"), lines)).text)
    for text in texts:
        cubin = jit.compile_cubin(text, "sm_90a")
        assert cubin.kernels["bundle"].spills == 0 and not cubin.warnings


def test_sizes_are_no_constants_of_the_text() -> None:
    assert emitted(deep(16, 4)).text == emitted(deep(32, 8)).text


# --- what a schedule makes of them ------------------------------------------------------------------
def plan_of(channels: int, hidden: int, *, behind: nn.Module | None = None, batch: int = 8) -> str:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose3d(32, channels, 3, stride=2, padding=1, output_padding=1)
            self.down, self.again = nn.Conv3d(channels, hidden, 1), nn.Conv3d(hidden, channels, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            means = y.mean((2, 3, 4), keepdim=True)
            return y * torch.sigmoid(self.again(torch.relu(self.down(means))))

    model = Block() if behind is None else nn.Sequential(Block().up, behind)
    return str(explained(model.eval(), (batch, 32, 16, 48, 48)).regions[0].plan)


def test_the_convolution_runs_twice_and_its_value_is_never_stored() -> None:
    small = "then one kernel on small tensors: reshape > linear > relu > linear > sigmoid;"
    for plan in (plan_of(48, 12), plan_of(48, 0, behind=Excite(48))):
        assert plan.startswith("one kernel: conv_transpose -> statistics; ")
        assert small in plan and "then the convolution again: conv_transpose > mul -> f32[8, 48" in plan, plan


def test_more_products_are_a_kernel_each() -> None:
    """And the sigmoid is not computed for every element, nor by a kernel of its own."""
    plan = plan_of(256, 32, batch=2)
    first = "then one kernel on small tensors: reshape > linear > relu; "
    assert first + "then one kernel on small tensors: linear > sigmoid; then " in plan, plan


def test_products_that_are_too_many_are_torchs() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.ConvTranspose3d(32, 8, 2, stride=2), nn.Linear(8 * 64**3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.up(x).relu().flatten(1)).sigmoid()

    plan = str(explained(Head().eval(), (16, 32, 32, 32, 32)).regions[0].plan)
    assert "then reshape > linear > sigmoid" in plan, plan
