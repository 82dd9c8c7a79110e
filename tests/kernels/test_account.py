"""What regions cost: bytes, launches and products by hand arithmetic, estimates next to what was measured."""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Callable

import pytest
import torch
from reports import explained
from torch import Tensor, nn

from fxfuse.kernels.account import Account, account
from fxfuse.kernels.planning.estimate import BANDWIDTH, FLOAT_RATE, HALF_RATE, LAUNCH, TF32_RATE
from fxfuse.models import CASES
from fxfuse.region import Region

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"
#: x and the weights of the first model, and the results of its four operators
X, W, B = 16 * 32 * 32**3, 32 * 64 * 5**3, 64
UP, POOLED, TWICE, SUMMED = 16 * 64 * 63**3, 16 * 64 * 31**3, 16 * 64 * 10**3, 16 * 10**3


def first(dtype: torch.dtype = torch.float32, precision: str | None = None) -> Region:
    report = explained(CASES[0].make().eval(), CASES[0].shape, dtype=dtype, precision=precision)
    return report.regions[0].region


def known(region: Region) -> Account:
    found = account(region)
    assert found is not None
    return found


def test_before_is_every_operator_by_itself() -> None:
    before = known(first()).before
    assert before.what == "conv_transpose > max_pool > max_pool > sum" and before.by == "torch"
    assert before.launches == 4
    assert before.read == 4 * (X + W + B + UP + POOLED + TWICE)
    assert before.written == 4 * (UP + POOLED + TWICE + SUMMED)
    assert before.macs == 16 * (63**3 // 8) * W
    convolution = max(4 * (X + W + B + UP) / BANDWIDTH, before.macs / TF32_RATE)
    pools = 4 * (UP + POOLED + POOLED + TWICE + TWICE + SUMMED) / BANDWIDTH
    assert before.floor == pytest.approx(convolution + pools)
    assert before.seconds == pytest.approx(before.floor + 4 * LAUNCH)


def test_the_plan_of_the_first_model() -> None:
    """The convolution's kernel pools 2x2x2 of what the two pools look at, 60 of 63 positions per dim."""
    plan = known(first())
    assert plan.refusal is None
    assert [(p.by, p.what, p.launches) for p in plan.parts] == [
        ("kernel", "conv_transpose > max_pool 2x2x2", 5),
        ("kernel", "max_pool 3x3x3 > sum", 1),
    ]
    assert (plan.kernels, plan.launches) == (2, 6)
    convolution, pool = plan.parts
    half = 16 * 64 * 30**3
    rows = 2 * X  # of 16 bits; 32 channels need no padding
    assert convolution.macs == 16 * 60**3 // 8 * W
    packed = convolution.written - rows - 4 * half
    assert 2 * W <= packed < 3 * W
    # an eighth of x to measure it, all of it to make rows
    assert convolution.read == 4 * (X // 8 + X + W + B) + rows + packed
    assert (pool.read, pool.written, pool.macs) == (4 * half, 4 * SUMMED, 0)
    assert plan.given == 4 * (X + W + B) and plan.made == 4 * SUMMED
    assert plan.bytes == sum(p.read + p.written for p in plan.parts)
    assert plan.saved == plan.before.bytes - plan.bytes > 1.9e9
    assert plan.unwritten == plan.before.written - sum(p.written for p in plan.parts)
    assert plan.floor == pytest.approx(plan.macs / HALF_RATE)
    assert convolution.intensity == 2 * convolution.macs / convolution.bytes


def test_facts_of_the_convolution() -> None:
    facts = dict(known(first()).parts[0].facts)
    assert re.fullmatch(r"22\d KiB per block: 4 stages, [12] of x", facts["shared memory"])
    assert facts["arithmetic"] == "TF32's accuracy of 16-bit products"
    assert facts["results"] == "f32[16, 64, 30, 30, 30], contiguous"
    assert int(facts["tiles"]) > 132
    exact = dict(known(first(precision="ieee")).parts[0].facts)
    assert exact["input channels"] == "32 per row of shared memory, 32 with padding"  # two parts of each


@pytest.mark.parametrize("width", [31, 32])
def test_sources_are_those_that_run(width: int) -> None:
    """Rows that are no multiple of 32 bytes go out as runs, through shared memory."""
    model = nn.Sequential(nn.ConvTranspose3d(32, 64, 3, stride=2, output_padding=1), nn.ReLU())
    region = explained(model, (8, 32, 32, 32, width)).regions[0].region
    (kernel,) = known(region).parts
    row = 2 * (width - 1) + 3 + 1
    assert f"outbox = {'false' if row % 8 == 0 else 'true'}" in kernel.source


def test_half_precision_needs_no_scales() -> None:
    plan = known(first(torch.float16))
    assert plan.parts[0].launches == 2  # no value has to be mended
    rows = 2 * X
    assert plan.parts[0].read - plan.parts[0].written == 2 * (X + W + B) - 2 * 16 * 64 * 30**3
    assert plan.parts[0].written > rows


def test_accuracy_of_float32_takes_three_products() -> None:
    region = first(precision="ieee")
    plan = known(region)
    assert plan.floor == pytest.approx(3 * plan.macs / HALF_RATE)
    assert plan.before.floor > plan.before.macs / FLOAT_RATE
    assert dict(plan.parts[0].facts)["arithmetic"].startswith("float32 of two 16-bit parts")


def test_statistics_on_the_way_are_a_helper() -> None:
    model = nn.Sequential(nn.ConvTranspose3d(32, 64, 3, stride=2), nn.ReLU(), nn.InstanceNorm3d(64), nn.SiLU())
    plan = known(explained(model, (2, 32, 24, 24, 24)).regions[0].region)
    assert [p.by for p in plan.parts] == ["kernel", "helper", "kernel"]
    assert plan.kernels == 2
    stored = 4 * 2 * 64 * 49**3
    last = plan.parts[2]
    statistics = 2 * 4 * 2 * 64  # of mean, var and 1/std two are read
    assert (last.read, last.written) == (stored + statistics, stored)


class Reduced(nn.Module):
    """A reduction over the channels of a layer."""

    def __init__(self, layer: nn.Module, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.op = layer, op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.layer(x))


def test_a_reduction_on_the_way_stores_one_value() -> None:
    layer = nn.ConvTranspose3d(32, 64, 3, stride=2)
    regions = [
        explained(Reduced(layer, op).eval(), (16, 32, 32, 32, 32)).regions[0].region
        for op in (lambda y: y.relu(), lambda y: y.logsumexp(1))
    ]
    whole, (one, *others) = (known(r).parts for r in regions)
    assert not others and one.what == "conv_transpose > logsumexp" and one.launches == 5
    saved = whole[0].written - one.written  # but for zeros among the packed weights
    assert saved == pytest.approx(4 * 63 * 16 * 65**3, rel=1e-3)
    assert one.seconds < whole[0].seconds
    assert dict(one.facts)["stores"] == "one value of all channels: from registers"
    assert dict(one.facts)["results"] == "f32[16, 65, 65, 65], contiguous"


def test_a_reduction_that_no_tile_holds_says_why() -> None:
    layer = nn.ConvTranspose3d(32, 320, 3, stride=2)
    parts = known(
        explained(Reduced(layer, lambda y: y.softmax(1)).eval(), (16, 32, 32, 32, 32)).regions[0].region
    ).parts
    assert parts[0].what == "conv_transpose"
    why = dict(parts[0].facts)["reduced by a kernel of its own"]
    assert why == "320 channels have more accumulators than a tile holds (256 channels)"


def test_small_tensors_are_one_helper() -> None:
    model = nn.Sequential(nn.ConvTranspose3d(32, 64, 3, stride=2), nn.BatchNorm3d(64), nn.ReLU()).eval()
    plan = known(explained(model, (2, 32, 24, 24, 24)).regions[0].region)
    assert [p.by for p in plan.parts] == ["helper", "kernel"] and plan.kernels == 1
    small = plan.parts[0]
    assert small.what == "add > rsqrt > mul > sub > mul > add" and small.launches == 1
    assert (small.read, small.written) == (4 * 5 * 64, 4 * 2 * 64)  # of five vectors, a scale and a shift
    assert 'extern "C" __global__ void __launch_bounds__(fxfuse::kBundleThreads)' in small.source


def test_a_convolution_by_torch() -> None:
    """What is behind a convolution that torch runs is still a kernel of ours."""
    model = nn.Sequential(nn.ConvTranspose3d(64, 32, 1), nn.BatchNorm3d(32), nn.ReLU()).eval()
    plan = known(explained(model, (4, 64, 32, 64, 64)).regions[0].region)
    assert plan.refusal == "a kernel of (1, 1, 1) is bound by reading its input, in cuDNN as here"
    assert [p.by for p in plan.parts] == ["torch", "helper", "kernel"]
    assert "conv_transpose" in plan.parts[0].what and plan.parts[0].macs > 0


def test_all_by_torch() -> None:
    plan = known(explained(nn.ConvTranspose3d(2, 3, 2, stride=3), (1, 2, 4, 4, 4)).regions[0].region)
    assert plan.refusal is not None and plan.refusal.startswith("the layer is small")
    assert (plan.kernels, plan.launches) == (0, 1)
    assert plan.parts[0] == plan.before and plan.saved == plan.unwritten == 0


def test_algebra_that_leaves_no_convolution() -> None:
    report = explained(CASES[3].make().eval(), CASES[3].shape)
    plan = known(report.regions[0].region)
    assert plan.refusal is None and (plan.kernels, plan.launches) == (2, 2)
    assert [p.what.split(" > ")[0] for p in plan.parts] == ["tap_sums", "contract_taps"]
    assert plan.bytes < 1.1 * (plan.given + plan.made)
    assert plan.macs < plan.before.macs / 1000
    assert plan.unwritten > 6e8


def test_unknown_sizes_have_no_account() -> None:
    text = str(first()).replace("f32[16, 32, 32, 32, 32]", "f32[_, 32, 32, 32, 32]")
    assert account(Region.parse(text)) is None


@pytest.mark.parametrize("file", ["h100_float32", "h100_float16"])
def test_estimates_next_to_measurements(file: str) -> None:
    """Where kernels of ours run for more than a tenth of a millisecond, the estimate is within 40 % of the time."""
    rows = json.loads((RESULTS / f"{file}.json").read_text())["rows"]
    cases = {c.name: c for c in CASES}
    compared = 0
    for row in rows:
        case = cases[row["model"]]
        model = case.make().train(row["mode"] == "train")
        report = explained(model, case.shape, dtype=getattr(torch, row["dtype"]))
        plan, measured = known(report.regions[0].region), row["ms"]["fxfuse"] / 1e3
        assert plan.floor < measured, row["model"]
        assert plan.before.floor < row["ms"]["eager"] / 1e3
        if plan.refusal is None and plan.seconds > 1e-4:
            assert math.isclose(plan.seconds, measured, rel_tol=0.4), row["model"]
            compared += 1
    assert compared == 5
