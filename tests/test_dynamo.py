"""The backend of torch.compile. Most tests leave the remainder eager: Inductor is slow to compile."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import logging
import os
import pathlib
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode

import fxfuse
from fxfuse import dynamo
from fxfuse.dynamo import backend, reports
from fxfuse.kernels.plan import Path
from fxfuse.models import CASES
from fxfuse.ops import Run, watch

ROOT = pathlib.Path(__file__).parent.parent
EAGER = {"remainder": "eager"}
CHANNELS_LAST = torch.channels_last_3d


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    dynamo._reports.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def cold() -> Iterator[None]:
    """Inductor compiles anew."""
    with fresh_cache():
        yield


def f64(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape or (2, 2, 3, 4, 5), dtype=torch.float64).requires_grad_(grad)


class Up(nn.Module):
    """A transposed convolution, a BatchNorm (if asked for), and what the test wants of them."""

    def __init__(self, body: Callable[..., Any], *, norm: bool = False, **norm_options: Any) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(2, 3, 3, dtype=torch.float64)
        self.norm = nn.BatchNorm3d(3, dtype=torch.float64, **norm_options) if norm else None
        self.body = body

    def forward(self, *inputs: Any) -> Any:
        return self.body(self, *inputs)


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.requires_grad == wanted.requires_grad
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, check_stride=False)


def compare(
    model: nn.Module,
    *calls: Sequence[Tensor],
    options: dict[str, Any] | None = None,
    tolerance: float = 1e-10,
    **how: Any,
) -> list[Run]:
    """Call ``model`` and a compiled copy alike: results, gradients, inputs and buffers agree; what ran in the last."""
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=backend, options=EAGER if options is None else options, **how)
    for inputs in calls:
        for tensor in (*inputs, *model.parameters(), *twin.parameters()):
            tensor.grad = None
        copies = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        expected = model(*inputs)
        with watch() as runs:
            got = compiled(*copies)
        expected, got = ([r] if isinstance(r, Tensor) else list(r) for r in (expected, got))
        assert len(got) == len(expected)
        for a, b in zip([*got, *copies], [*expected, *inputs], strict=True):
            close(a, b, tolerance)
        for results in (expected, got):
            losses = [(r.double() * torch.linspace(-1, 2, r.numel()).view_as(r)).sum() for r in results if r.grad_fn]
            if losses:
                sum(losses).backward()  # type: ignore[union-attr]
        for a, b in zip([*twin.parameters(), *copies], [*model.parameters(), *inputs], strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None and b.grad is not None:
                close(a.grad, b.grad, tolerance)
        for a, b in zip(twin.buffers(), model.buffers(), strict=True):
            close(a, b, min(tolerance, 1e-6))
    return list(runs)


def operators(number: int = -1) -> list[tuple[str, ...]]:
    """The vocabulary's operators of each region of the graph that was compiled ``number``-th."""
    return [tuple(i.op for i in r.region.original.body) for r in reports()[number].regions]


def ends(number: int = -1) -> str:
    return "; ".join(f"{node}: {reason}" for r in reports()[number].regions for node, reason in r.ended)


# --- finding it ---------------------------------------------------------------------------------------
SCRIPT = """
import sys, torch
from torch import nn

assert {early} or "fxfuse" not in sys.modules
assert "fxfuse" in torch.compiler.list_backends()
model, x = nn.Sequential(nn.ConvTranspose3d(2, 3, 3), nn.ReLU()), torch.randn(1, 2, 3, 3, 3)
compiled = torch.compile(model, backend="fxfuse", options={{"remainder": "eager"}})
torch.testing.assert_close(compiled(x), model(x))
dynamo = sys.modules["fxfuse.dynamo"]
print("operators:", *dynamo.reports()[-1].regions[0].operators)
"""


def run_installed(tmp_path: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run SCRIPT where the distribution's entry points are visible: installed, or written as they would be."""
    paths = [str(ROOT)]
    try:
        importlib.metadata.distribution("fxfuse")
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        info = tmp_path / f"fxfuse-{fxfuse.__version__}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fxfuse\nVersion: {fxfuse.__version__}\n")
        groups = project["entry-points"]
        lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in groups[group].items()) for group in groups]
        (info / "entry_points.txt").write_text("\n".join(lines))
        paths.append(str(tmp_path))
    path = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    script = SCRIPT.format(early="TORCH_LOGS" in environment)
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


def test_torch_compile_finds_the_backend_by_name(tmp_path: pathlib.Path) -> None:
    done = run_installed(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "operators: input_1 input_2\n"
    assert "region" not in done.stderr


def test_torch_logs_prints_the_report(tmp_path: pathlib.Path) -> None:
    done = run_installed(tmp_path, TORCH_LOGS="fxfuse")
    assert done.returncode == 0, done.stderr
    assert "graph 0/0: 1 region of 2 operators" in done.stderr
    assert "conv_transpose > relu" in done.stderr


# --- mode and options ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fastest"}, "'reduce-overhead', .*'max-autotune'"),
        (
            {"options": {"reminder": "eager"}},
            "'reminder'.*'remainder', 'precision', 'allow', 'rules', 'kernels', 'tune'",
        ),
        ({"options": {"remainder": "nvfuser"}}, "'nvfuser'.*'inductor', 'eager'"),
        ({"options": {"precision": "fp8"}}, "'fp8'.*'tf32', 'ieee'"),
        ({"options": {"kernels": 0}}, "kernels=0 is not True or False"),
        ({"options": {"kernels": False, "tune": True}}, "tune=True measures kernels against torch"),
        ({"options": {"allow": ["sloppy"]}}, "'sloppy'.*bitwise, finite-only, reassociating"),
    ],
)
def test_unknown_choices_are_named_beside_the_known_ones(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backend(fx.symbolic_trace(nn.ReLU()), [f64()], **arguments)
    with pytest.raises(BackendCompilerFailed, match=message) as raised:
        torch.compile(nn.ReLU(), backend=backend, **arguments)(f64())
    assert isinstance(raised.value.inner_exception, ValueError)


def test_a_mode_of_inductor_is_refused_where_inductor_takes_no_part() -> None:
    gm = fx.symbolic_trace(nn.ReLU())
    with pytest.raises(ValueError, match="mode='max-autotune' is for Inductor"):
        backend(gm, [f64()], mode="max-autotune", options=EAGER)
    assert backend(gm, [f64()], mode="default", options=EAGER) is not None


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> list[tuple[fx.GraphModule, dict[str, Any]]]:
    """Stands in for Inductor, and keeps what it was given."""
    given: list[tuple[fx.GraphModule, dict[str, Any]]] = []

    def compile_fx(gm: fx.GraphModule, example_inputs: Any, *, config_patches: dict[str, Any]) -> Any:
        given.append((gm, config_patches))
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return given


def test_the_mode_configures_inductor(inductor: list[tuple[fx.GraphModule, dict[str, Any]]]) -> None:
    for mode in ("default", "reduce-overhead"):
        torch.compile(Up(lambda m, x: m.up(x)), backend=backend, mode=mode)(f64())
    (_, plain), (_, graphs) = inductor
    assert "triton.cudagraphs" not in plain
    assert graphs["triton.cudagraphs"] is True


def test_mode_and_options_together(inductor: list[tuple[fx.GraphModule, dict[str, Any]]]) -> None:
    both = functools.partial(backend, mode="max-autotune", options={"precision": "ieee", "allow": ["bitwise"]})
    torch.compile(Up(lambda m, x: F.max_pool3d(F.relu(m.up(x)), 2)), backend=both)(f64())
    assert inductor[0][1]["max_autotune"] is True
    (found,) = reports()[-1].regions
    assert found.region.precision == "ieee"
    assert [r.rule for r in found.rules] == ["MoveMonotoneBehindMaxPool"]
    assert "DropDeadOutputs" in {r.rule for r in reports()[-1].rejected}


def test_what_is_not_fused_goes_on_to_inductor(inductor: list[tuple[fx.GraphModule, dict[str, Any]]]) -> None:
    torch.compile(Up(lambda m, x: torch.fft.fft(m.up(x).relu())), backend=backend)(f64())
    (gm, _) = inductor[0]
    called = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert called[0] is dynamo.traced_region
    assert torch.fft.fft in called and torch.conv_transpose3d not in called


# --- the five models ----------------------------------------------------------------------------------
SHAPE = {"max_max_sum": (2, 32, 4, 4, 5)}


def five(training: bool) -> tuple[nn.Module, list[Tensor]]:
    """The five models side by side, and their inputs, in float64."""

    class Five(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(case.make() for case in CASES)

        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(part(x) for part, x in zip(self.parts, inputs, strict=True))

    inputs = [f64(*SHAPE.get(case.name, (2, case.shape[1], 2, 3, 2))) for case in CASES]
    return Five().double().train(training), inputs


@pytest.mark.parametrize("training", [True, False])
def test_the_five_models_agree_with_eager_mode(training: bool) -> None:
    model, inputs = five(training)
    runs = compare(model, inputs, inputs)  # twice: running statistics move once per call
    assert len(runs) == 5
    assert [len(o) for o in operators()] == [4, 1, 3, 4, 3]
    with torch.no_grad():
        assert {r.path for r in compare(model, inputs)} == {Path.REWRITTEN}


def test_the_five_models_under_inductor(cold: None) -> None:
    model, inputs = five(training=False)
    with torch.no_grad():
        assert [r.path for r in compare(model, inputs, inputs, options={})] == [Path.REWRITTEN] * 5


def test_gradients_of_the_five_models_under_inductor(cold: None) -> None:
    """A precision keeps the regions' operators in the graph, also where a backward follows."""
    model, inputs = five(training=True)
    runs = compare(model, inputs, inputs, options={"precision": "ieee"})
    assert [r.path for r in runs] == [Path.REWRITTEN] * 5


def test_the_plan_leaves_original_operators_to_inductor_where_a_backward_follows(cold: None) -> None:
    assert compare(Up(lambda m, x: F.relu(m.norm(m.up(x))), norm=True), [f64()], [f64()], options={}) == []
    assert operators() == [("conv_transpose", "batch_norm_train", "relu")]


def test_training_follows_eager_mode() -> None:
    model = Up(lambda m, x: F.relu(m.norm(m.up(x) * 2.0)), norm=True)
    twin, x = copy.deepcopy(model), f64()
    losses = []
    for trained in (model, torch.compile(twin, backend=backend, options=EAGER)):
        optimizer = torch.optim.Adam(trained.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            losses.append(loss := trained(x).square().mean())
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(losses[4:], losses[:4], rtol=1e-9, atol=1e-9)
    assert len(reports()) == 1
    for a, b in zip(twin.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# --- sizes that are not known -------------------------------------------------------------------------
def spying(seen: list[Any]) -> Callable[..., Any]:
    """The backend, and what it leaves in Dynamo's ShapeEnv: guards added, symbols left pending."""

    def compiler(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        env = TracingContext.get().fake_mode.shape_env
        before = len(env.guards)
        compiled = backend(gm, example_inputs, options=EAGER)
        seen.append(([str(g.expr) for g in env.guards[before:]], list(env.pending_fresh_unbacked_symbols)))
        return compiled

    return compiler


DYNAMIC = {
    "pointwise": lambda m, x: F.leaky_relu(m.up(x), 0.2) + 1,
    "group_norm": lambda m, x: F.group_norm(F.relu(m.up(x)), 3),
    "batch_norm": lambda m, x: m.norm(m.up(x) * 2.0),
    "mean": lambda m, x: m.norm(m.up(x)).mean((2, 3, 4), keepdim=True),
    "max_pools": lambda m, x: F.max_pool3d(F.max_pool3d(F.relu(m.up(x)), 2), 2),
    "avg_pools": lambda m, x: F.avg_pool3d(F.avg_pool3d(m.up(x), 2), 2),
    "softmax": lambda m, x: m.up(x).softmax(1).sum(1),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", DYNAMIC)
def test_sizes_that_vary_stay_unknown(name: str, training: bool) -> None:
    if torch.__version__ < "2.13" and "pools" in name:
        pytest.skip("before 2.13 torch's own fake pools put guards on sizes")
    model = Up(DYNAMIC[name], norm=True).train(training)
    twin, seen = copy.deepcopy(model), []  # type: ignore[var-annotated]
    compiled = torch.compile(twin, backend=spying(seen))
    for shape in ((2, 2, 5, 6, 7), (3, 2, 6, 5, 8), (4, 2, 9, 6, 10)):
        x = f64(*shape)
        for dim in (0, 2, 3, 4):
            torch._dynamo.mark_dynamic(x, dim)  # raises if anything fixes the size
        with watch() as runs:
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-10)
        assert len(runs) == 1
    assert seen == [([], [])]  # one graph, no guard of ours
    assert runs[0].region.original.inputs[0][1].shape == (None, 2, None, None, None)
    assert len(operators()[0]) >= 2


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        (lambda m, x: F.max_pool3d(m.up(x), 2), "DropDeadOutputs"),
        (lambda m, x: m.up(x).mean((2, 3, 4), keepdim=True), "CollapseMeanOfConvTranspose"),
    ],
)
def test_rules_that_need_sizes_say_so(body: Callable[..., Any], rule: str) -> None:
    compare(Up(body), [f64(2, 2, 3, 3, 3)], [f64(2, 2, 5, 5, 5)], dynamic=True)
    assert len(reports()) == 1 and reports()[0].rules == []
    (reason,) = [r.reason for r in reports()[0].rejected if r.rule == rule]
    assert "sizes that are" in reason and "known" in reason
    dynamo._reports.clear()
    compare(Up(body), [f64(2, 2, 3, 3, 3)], dynamic=False)
    assert rule in {r.rule for r in reports()[0].rules}  # a near miss for its sizes alone


def test_rules_that_need_no_sizes_fire_without_them() -> None:
    compare(Up(DYNAMIC["mean"], norm=True), [f64(2, 2, 5, 6, 7)], [f64(2, 2, 6, 8, 9)], dynamic=True)
    assert len(reports()) == 1
    assert {"CancelBiasBeforeStatistics", "SplitBatchNormBeforeMean"} <= {r.rule for r in reports()[0].rules}


def test_dynamic_shapes_under_inductor(cold: None) -> None:
    calls = [[f64(2, 2, n, n + 1, n + 3)] for n in (4, 5, 7)]
    runs = compare(Up(lambda m, x: F.group_norm(F.relu(m.up(x)), 3).sin()), *calls, options={}, dynamic=True)
    assert len(runs) == 1 and len(reports()) == 1


def test_batch_norm_whose_eps_became_a_symbol() -> None:
    """dynamic=True turns eps and momentum into 0-dim tensors and ``.item()``."""
    model = Up(lambda m, x: F.relu(m.norm(m.up(x))), norm=True, eps=0.25, momentum=0.3)
    runs = compare(model, [f64()], [f64(2, 2, 6, 7, 8)], dynamic=True)
    assert operators() == [("conv_transpose", "batch_norm_train", "relu")]
    assert dict(runs[0].region.original.body[1].attributes)["eps"] == 0.25
    assert any(n.target == "item" for n in reports()[-1].graph_before.nodes)  # type: ignore[union-attr]
    compare(model.eval(), [f64()], dynamic=True)
    assert operators() == [("conv_transpose", "batch_norm", "relu")]


def test_a_number_that_varies_is_not_fixed() -> None:
    def scaled(m: Up, x: Tensor, factor: float) -> Tensor:
        return F.relu(m.up(x)) * factor

    model, x = Up(scaled), f64()
    compiled = torch.compile(model, backend=backend, options=EAGER)
    for factor in (2.0, 3.0, 5.0, 7.0):
        torch.testing.assert_close(compiled(x, factor), model(x, factor))
    assert len(reports()) == 2  # one that knows the factor, one for all others
    assert operators(0) == [("conv_transpose", "relu", "mul")] and operators(1) == [("conv_transpose", "relu")]
    assert "is not known before the call" in ends(1)


def test_sizes_that_depend_on_data() -> None:
    seen: list[Any] = []
    model = Up(lambda m, x: F.relu(m.up(x[(x.sum((1, 2, 3, 4)) > 0).nonzero().squeeze(1)])))
    compiled = torch.compile(model, backend=spying(seen))
    x = f64(6, 2, 3, 3, 3)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), watch() as runs:
        torch.testing.assert_close(compiled(x), model(x))
    assert len(runs) == 1
    assert seen == [([], [])]  # nothing is left for AOTAutograd to trip over


# --- training mode ------------------------------------------------------------------------------------
def test_momentum_none_averages() -> None:
    model = Up(lambda m, x: F.relu(m.norm(m.up(x))), norm=True, momentum=None)
    runs = compare(model, [f64()], [f64()], [f64()])
    assert len(runs) == 1  # torch breaks the graph before the norm, to read the count of batches
    assert int(model.norm.num_batches_tracked) == 3  # type: ignore[union-attr,arg-type]


def test_graph_breaks() -> None:
    def body(m: Up, x: Tensor) -> Tensor:
        y = F.relu(m.up(x))
        torch._dynamo.graph_break()
        return F.relu(m.up(y[:, :2]))

    assert len(compare(Up(body), [f64()])) == 2
    assert [operators(i) for i in range(len(reports()))] == [[("conv_transpose", "relu")]] * 2


# --- switches inside the graph ------------------------------------------------------------------------
BF16 = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)


def autocast_inside(m: Up, x: Tensor) -> Tensor:
    with BF16():
        y = F.relu(m.up(x))
    return y * 2


def autocast_switched_off_inside(m: Up, x: Tensor) -> Tensor:
    with BF16():
        y = m.up(x)
        with torch.autocast("cpu", enabled=False):
            y = F.relu(m.up(x)).bfloat16() + y
        return m.up(y[:, :2])


def autocast_beside_the_region(m: Up, x: Tensor, other: Tensor) -> Tensor:
    y = m.up(x)
    with BF16():
        product = other @ other  # must not move in front of the switch, where the region begins
    return F.relu(y + product)


@pytest.mark.parametrize(
    ("body", "shapes", "tolerance"),
    [
        (autocast_inside, [(2, 2, 3, 4, 5)], 1e-6),
        # eager mode sums the gradients of a weight that it cast once in bfloat16
        (autocast_switched_off_inside, [(2, 2, 3, 4, 5)], 2e-2),
        (autocast_beside_the_region, [(2, 2, 3, 3, 3), (5, 5)], 1e-6),
    ],
)
def test_autocast_inside(body: Callable[..., Any], shapes: list[tuple[int, ...]], tolerance: float) -> None:
    if torch.__version__ < "2.13" and body is autocast_switched_off_inside:
        pytest.skip("before 2.13 eager mode itself mixes dtypes here on some CPUs")
    inputs = [torch.randn(s, requires_grad=True) for s in shapes]
    assert compare(Up(body).float(), inputs, tolerance=tolerance)
    assert "is switched between it and the region" in ends()


def test_autocast_around() -> None:
    model = Up(lambda m, x: F.relu(m.up(x)) * 2).float()
    for context in (BF16, contextlib.nullcontext):
        with context():
            (run,) = compare(model, [torch.randn(2, 2, 3, 4, 5)], tolerance=1e-6)
        assert ("cast" in {i.op for i in run.region.original.body}) == (context is BF16)


@pytest.mark.parametrize("switch", [BF16, torch.no_grad])
def test_a_switch_in_front_of_the_anchor(switch: Callable[..., Any]) -> None:
    """What the switch does not reach stays outside, and what it reaches is taken."""

    def body(m: Up, x: Tensor) -> Tensor:
        y = F.relu(x)
        with switch():
            return m.up(F.relu(y) * 2)

    (run,) = compare(Up(body).float(), [torch.randn(2, 2, 3, 4, 5, requires_grad=True)], tolerance=1e-6)
    assert [i.op for i in run.region.original.body if i.op != "cast"] == ["relu", "mul", "conv_transpose"]


def part_without_gradient(m: Up, x: Tensor) -> Tensor:
    y = m.up(x)
    with torch.no_grad():
        z = F.relu(y) * 2
    return y + z


def region_without_gradient(m: Up, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = F.relu(m.up(x))
    return y * x.sum()


def gradient_inside_no_gradient(m: Up, x: Tensor) -> Tensor:
    with torch.no_grad():
        with torch.enable_grad():
            y = F.relu(m.up(x))
        z = F.relu(m.up(x))
    return y * z


def no_gradient_beside_the_region(m: Up, x: Tensor, other: Tensor) -> Tensor:
    y = m.up(x)
    with torch.no_grad():
        constant = other.exp()
    return F.relu(y + constant)


@pytest.mark.parametrize(
    ("body", "regions"),
    [
        (part_without_gradient, 1),
        (region_without_gradient, 1),
        (gradient_inside_no_gradient, 2),
        (no_gradient_beside_the_region, 1),
    ],
)
def test_no_grad_inside(body: Callable[..., Any], regions: int) -> None:
    inputs = [f64(2, 2, 3, 3, 3), f64(5, 5)]
    runs = compare(Up(body), inputs[: body.__code__.co_argcount - 1])
    assert len(runs) == regions
    assert "is switched between it and the region" in ends()


def test_a_check_inside_is_no_switch() -> None:
    def body(m: Up, x: Tensor) -> Tensor:
        y = m.up(x)
        torch._check(y.shape[2] > 1)
        torch._assert_async(x.isfinite().all())
        return F.relu(y)

    compare(Up(body), [f64()])
    assert operators() == [("conv_transpose", "relu")]
    assert reports()[-1].graph_after is not None
    assert any("assert" in str(n.target) for n in reports()[-1].graph_after.nodes)  # it is still there


# --- memory -------------------------------------------------------------------------------------------
def chained_in_place(m: Up, x: Tensor) -> Tensor:
    y = m.up(x)
    y.mul_(3)  # the result is read through y
    y += 1
    y.abs_()
    return y


def input_written_before(m: Up, x: Tensor) -> Tensor:
    x.add_(1)
    return F.relu(m.up(x).mul_(2), inplace=True)


def input_written_between(m: Up, x: Tensor) -> Tensor:
    y = F.relu(m.up(x.clone()))
    x.mul_(2)
    return y + m.up(x)


def input_reshaped(m: Up, x: Tensor) -> Tensor:
    x.unsqueeze_(0)
    return F.relu(m.up(x))


def view_written(m: Up, x: Tensor) -> Tensor:
    y = F.relu(m.up(x)) + 1
    y[:, 0].zero_()
    return y


def view_read_after_write(m: Up, x: Tensor) -> Tensor:
    y = m.up(x)
    part = y[:, 0]
    y.mul_(2)
    return y.sum(1) + part


@pytest.mark.parametrize(
    ("body", "shape", "longest"),
    [
        (chained_in_place, (2, 2, 3, 4, 5), 4),
        (input_written_before, (2, 2, 3, 4, 5), 3),
        (input_written_between, (2, 2, 3, 4, 5), 3),
        (input_reshaped, (2, 3, 4, 5), 2),
        (view_written, (2, 2, 3, 4, 5), 3),
        (view_read_after_write, (2, 2, 3, 4, 5), 1),
    ],
)
def test_writing_in_place(body: Callable[..., Any], shape: tuple[int, ...], longest: int) -> None:
    runs = compare(Up(body), [f64(*shape, grad=False)])
    assert max(len(r.region.original.body) for r in runs) == longest


def test_channels_last() -> None:
    model = Up(lambda m, x: F.max_pool3d(F.relu(m.norm(m.up(x))), 2), norm=True).to(memory_format=CHANNELS_LAST)
    x = f64(grad=False).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    assert len(compare(model, [x], [x.detach()])) == 1
    compiled = torch.compile(model, backend=backend, options=EAGER)
    assert compiled(x).stride() == model(x).stride()


def test_gradients_have_the_layout_that_the_fake_operator_promises() -> None:
    model = Up(lambda m, x: F.relu(m.up(x))).to(memory_format=CHANNELS_LAST)
    x = f64(grad=False).contiguous(memory_format=CHANNELS_LAST)
    (run,) = compare(model, [x])
    tensors = [x, *(p.detach() for p in model.parameters())]
    (y,) = torch.ops.fxfuse.region(tensors, run.region.text)
    arguments = [torch.randn_like(y)], tensors
    real = torch.ops.fxfuse.region_backward(*arguments, run.region.text, [True] * 3)
    with FakeTensorMode() as mode:
        grads, inputs = ([mode.from_tensor(t) for t in ts] for ts in arguments)
        fake = torch.ops.fxfuse.region_backward(grads, inputs, run.region.text, [True] * 3)
    assert [t.stride() for t in real] == [t.stride() for t in fake]
    assert real[0].is_contiguous(memory_format=CHANNELS_LAST)


# --- never break a model ------------------------------------------------------------------------------
@pytest.mark.defective
def test_a_defect_of_the_compiler_leaves_the_model_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fuse(graph: fx.Graph, *_: Any) -> None:
        for node in reversed(graph.nodes):
            graph.erase_node(node)  # half done
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(dynamo, "fuse", fuse)
    with caplog.at_level(logging.WARNING, "fxfuse.dynamo"):
        assert compare(Up(lambda m, x: F.relu(m.up(x))), [f64()]) == []
    assert "compiling a graph failed" in caplog.text and "on purpose" in caplog.text
    assert reports()[-1].notes == ["left alone: the compiler failed with ZeroDivisionError: on purpose"]


def test_a_graph_with_nothing_to_fuse_is_not_touched() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Flatten()))
    graph, x = gm.graph, f64()
    assert torch.equal(backend(gm, [x], options=EAGER)(x), x.relu().flatten(1))
    assert gm.graph is graph
    assert reports()[-1].headline == "graph: nothing to fuse"


def test_what_dynamo_noted_stays(inductor: list[tuple[fx.GraphModule, Any]]) -> None:
    torch.compile(Up(lambda m, x: F.relu(m.up(x))), backend=backend)(f64())
    graph = inductor[0][0].graph
    placeholders = graph.find_nodes(op="placeholder")
    assert len(placeholders) == 3 and all(hasattr(n, "_dynamo_source") for n in placeholders)
    (result,) = graph.output_node().args[0]
    assert result.meta["example_value"].shape == (2, 3, 5, 6, 7)  # Inductor's passes and caches look for it
    assert not [k for n in graph.nodes for k in n.meta if k in ("fxfuse", "fxfuse_val")]


class Tagged(Tensor):
    """A subclass without anything of its own."""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: F.relu(m.up(x)), "class Tagged, a subclass of Tensor"),
        (lambda m, x: torch.func.grad(lambda v: F.relu(m.up(v)).sum())(x), "torch.func transform"),
    ],
)
def test_what_is_not_understood_is_left_alone(body: Callable[..., Any], reason: str) -> None:
    model, x = Up(body), f64(grad=False)
    if "Tagged" in reason:
        x = x.as_subclass(Tagged)
    compiled = torch.compile(model, backend=backend, options=EAGER)
    with watch() as runs:
        torch.testing.assert_close(compiled(x), model(x))
    assert runs == []
    assert any(reason in note for r in reports() for note in r.notes)


def test_a_graph_that_did_not_come_from_dynamo() -> None:
    weight = f64(2, 3, 3, 3, 3)
    gm = fx.symbolic_trace(lambda x, w: F.relu(F.conv_transpose3d(x, w)))
    x = f64()
    with watch() as runs:
        torch.testing.assert_close(backend(gm, [x, weight], options=EAGER)(x, weight), gm(x, weight))
    assert len(runs) == 2  # gm itself is the compiled graph
    assert operators() == [("conv_transpose", "relu")]


def test_an_input_that_the_graph_reshapes_is_unknown() -> None:
    """Dynamo notes an input as the graph leaves it: here the noted shape is not the one that comes in."""
    gm, x, weight = fx.symbolic_trace(lambda x, w: F.relu(F.conv_transpose3d(x, w))), f64(), f64(2, 3, 3, 3, 3)
    with FakeTensorMode() as mode:
        gm.graph.find_nodes(op="placeholder")[0].meta["example_value"] = mode.from_tensor(f64(2, 2, 3, 4, 6))
    assert backend(gm, [x, weight], options=EAGER)(x, weight).shape == (2, 3, 5, 6, 7)
    assert reports()[-1].regions == []


@pytest.mark.parametrize("compiler", ["eager", backend])
def test_an_optimised_module_under_torch_compile(compiler: Any) -> None:
    model = Up(lambda m, x: F.relu(m.norm(m.up(x))), norm=True)
    twin, x = copy.deepcopy(model), f64(grad=False)
    optimised = torch.compile(fxfuse.optimize(twin, x), backend=compiler)
    for _ in range(2):
        with watch() as runs:
            got = optimised(x)
        close(got, model(x), 1e-10)
        assert len(runs) == 1  # once, and not once more inside
        got.sum().backward()
    for a, b in zip(twin.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# --- caches and reports -------------------------------------------------------------------------------
def test_inductors_caches_tell_regions_apart(cold: None) -> None:
    """The region's text is part of the keys: another slope is another graph, the same one is found again."""
    found = []
    for slope in (0.1, 0.3, 0.1):
        torch._dynamo.reset()
        counters.clear()
        model = Up(lambda m, x, slope=slope: F.leaky_relu(m.norm(m.up(x)), slope), norm=True)
        with torch.no_grad():
            assert len(compare(model, [f64(grad=False)], options={})) == 1
        found.append((counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"]))
    assert found == [(0, 0), (0, 0), (1, 1)]


def test_reports_are_kept_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fxfuse.dynamo"):
        compare(Up(lambda m, x: F.relu(m.up(x))), [f64()])
    compare(Up(lambda m, x: F.max_pool3d(m.up(x), 2)), [f64()])
    first, last = reports()
    assert str(first) in caplog.text and "conv_transpose > relu" in caplog.text
    assert last.headline.startswith("graph 1/0: 1 region of 2 operators") or last.headline.startswith("graph 0/")
    for graph in (first.graph_before, first.graph_after):
        assert graph is not None and all(n.meta.keys() <= {"fxfuse_region"} for n in graph.nodes)
    assert first.graph_after is not None
    assert any("fxfuse_region" in n.meta for n in first.graph_after.nodes)


def test_only_the_most_recent_reports_are_kept() -> None:
    gm = fx.symbolic_trace(nn.ReLU())
    for _ in range(dynamo.KEPT + 1):
        backend(gm, [f64()], options=EAGER)
    assert len(reports()) == dynamo.KEPT
