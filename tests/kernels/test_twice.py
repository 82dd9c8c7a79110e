"""The convolution run twice or once: what is cut, what is chosen for which chain, and what is launched."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import pytest
import torch
from harness import program
from reports import explained
from test_launch import Driver, driver, memory, small  # noqa: F401 - fixtures
from torch import Tensor, nn

from fxfuse.bench import chains
from fxfuse.kernels import execute
from fxfuse.kernels.account import account_of
from fxfuse.kernels.convolution import planar
from fxfuse.kernels.convolution.specialisation import Shared
from fxfuse.kernels.execute import candidates
from fxfuse.kernels.planning.candidate import Candidate
from fxfuse.kernels.planning.observe import examples
from fxfuse.kernels.planning.schedule import schedule
from fxfuse.kernels.planning.twice import _later, twice
from fxfuse.kernels.runtime.prepared import Prepared
from fxfuse.kernels.stages.steps import Schedule
from fxfuse.models import CASES
from fxfuse.program import Program
from fxfuse.region import Region

INPUTS = "x: f32[2, 8, 4, 5, 6], w: f32[8, 16, 3, 3, 3], b: f32[16], g: f32[16], r: f32[2, 16, 9, 11, 13]"
CONV = (
    "y = conv_transpose(x, w, b, stride=(2, 2, 2), padding=(0, 0, 0), output_padding=(0, 0, 0), dilation=(1, 1, 1),"
    " groups=1)"
)
POOL = "avg_pool({}, kernel=(2, 2, 2), stride=(2, 2, 2), padding=(0, 0, 0), ceil_mode=False, count_include_pad=True, "
POOL += "divisor_override=None)"
NORM = "z = instance_norm(y, g, None, eps=1e-5)"
PATHS = "fxfuse.kernels.stages.tail", "fxfuse.kernels.planning.schedule"


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of any size are worth a kernel."""
    for name in PATHS:
        monkeypatch.setattr(f"{name}.LEAST_ELEMENTS", 1)


def chain(*lines: str, returns: str | None = None) -> Program:
    last = lines[-1].split(" = ")[0].split(", ")[0]
    return program(INPUTS, "\n".join([*lines, returns or last]))


def cut(made: Program, inputs: Sequence[Tensor] | None = None) -> Schedule | None:
    given = inputs or examples(made)
    found = twice(made, given, schedule(made, given))
    if found is not None:
        for part in (found.first, found.rest):
            part.verify()
        complete(made, found)
    return found


def complete(made: Program, found: Schedule) -> None:
    """Every name that a part reads is there when it runs, and every output in the end."""
    assert found.measuring is not None and found.kernel is not None
    known = {n for n, _ in made.inputs}
    assert {n for n, _ in found.first.inputs} <= known
    known |= {*found.first.outputs}
    assert {*found.measuring.reads} <= known
    for step in found.between:
        assert {*step.reads} <= known | {found.measuring.stored}
        known |= {*step.makes}
    assert {*found.kernel.reads} <= known
    known |= {found.kernel.stored}
    for step in found.steps:
        assert {*step.reads} <= known
        known |= {*step.makes}
    assert {*made.outputs} <= known


# --- where it is cut ------------------------------------------------------------------------------
@pytest.mark.usefixtures("any_size")
def test_a_normalisation_joins_the_second_run() -> None:
    found = cut(chain(CONV, "a = relu(y)", NORM.replace("(y", "(a"), "u = relu(z)"))
    assert str(found) == (
        "one kernel: conv_transpose > relu -> statistics; then statistics of a, gathered on the way; "
        "then the convolution again: conv_transpose > relu > sub > mul > mul > relu -> f32[2, 16, 9, 11, 13]"
    )
    assert found is not None and found.measuring is not None and found.kernel is not None
    assert (found.measuring.gathers, found.measuring.keeps) == (("statistics",), False)
    assert (found.kernel.gathers, found.kernel.keeps) == ((), True)


@pytest.mark.usefixtures("any_size")
def test_a_pool_of_maxima_joins_it_as_well() -> None:
    pool = "m = max_pool(z, kernel=(2, 2, 2), stride=(2, 2, 2), padding=(0, 0, 0), dilation=(1, 1, 1), ceil_mode=False)"
    found = cut(chain(CONV, NORM, pool, "v = exp(m)"))
    assert str(found).endswith(
        "the convolution again: conv_transpose > sub > mul > mul > max_pool 2x2x2 > exp -> f32[2, 16, 4, 5, 6]"
    )


@pytest.mark.usefixtures("any_size")
def test_a_pool_of_means_goes_in_front_of_the_arithmetic() -> None:
    found = cut(chain(CONV, NORM, "m = " + POOL.format("z"), "v = exp(m)"))
    assert str(found).endswith(
        "the convolution again: conv_transpose > avg_pool 2x2x2 > sub > mul > mul > exp -> f32[2, 16, 4, 5, 6]"
    )


@pytest.mark.usefixtures("any_size")
def test_running_statistics_are_made_of_the_first_run() -> None:
    line = "z, m, v = batch_norm_train(y, g, None, eps=1e-5)"
    found = cut(chain(CONV, line, "u = relu(z)", returns="u, m, v"))
    assert str(found) == (
        "one kernel: conv_transpose -> statistics; then statistics of y, gathered on the way; "
        "then the convolution again: conv_transpose > sub > mul > mul > relu -> f32[2, 16, 9, 11, 13]; "
        "then one kernel on small tensors: reshape > mul > reshape"
    )


@pytest.mark.usefixtures("any_size")
def test_operands_made_of_statistics_are_made_between_the_runs() -> None:
    """A softmax of the means, of which the second run needs every channel's."""
    lines = [CONV, "q = mean(y, dims=(2, 3, 4), keepdim=True)", "e = softmax(q, dim=1)"]
    found = cut(chain(*lines, "z = sub(y, e)", "u = relu(z)"))
    assert found is not None and [str(s) for s in found.between] == [
        "statistics of y, gathered on the way",
        "one kernel on small tensors: reshape",
        "one kernel: softmax -> f32[2, 16, 1, 1, 1]",
    ]


@pytest.mark.usefixtures("any_size")
def test_the_second_run_gathers_for_the_next_norm() -> None:
    found = cut(chain(CONV, NORM, "a = relu(z)", "c = group_norm(a, None, None, groups=4, eps=1e-5)"))
    assert found is not None and found.kernel is not None and found.measuring is not None
    assert (found.measuring.stored, found.kernel.stored) == ("y", "a")
    assert found.kernel.gathers and found.kernel.keeps
    assert [str(s) for s in found.steps] == [
        "statistics of a, gathered on the way",
        "one kernel: sub > mul -> f32[2, 16, 9, 11, 13]",
    ]


@pytest.mark.usefixtures("any_size")
def test_an_output_is_laid_out_as_torch_has_it() -> None:
    """torch's instance norm gives contiguous values, whatever it is given."""
    made = chain(CONV, NORM)
    x, *others = examples(made)
    found = cut(made, [x.to(memory_format=torch.channels_last_3d), *others])
    assert found is not None and found.kernel is not None and found.kernel.layout == "contiguous"


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize(
    ("lines", "returns"),
    [
        ([CONV, "z = relu(y)"], None),
        ([CONV, "m = mean(y, dims=(2, 3, 4), keepdim=True)"], None),  # nothing is written as it is
        ([CONV, NORM], "z, y"),
        ([CONV, NORM, "q = max_pool(y, kernel=(3, 3, 3), stride=(3, 3, 3), padding=(0, 0, 0), dilation=(1, 1, 1), "
          "ceil_mode=False)"], "z, q"),
        ([CONV, NORM, "q = softmax(y, dim=1)", "u = add(z, q)"], None),
        ([CONV, "a = softmax(y, dim=1)", NORM.replace("(y", "(a")], None),  # another value's statistics
    ],
    ids=["no_norm", "a_mean_alone", "an_output", "pooled_elsewhere", "reduced_elsewhere", "not_the_kernels"],
)  # fmt: skip
def test_there_is_no_use_for_two_runs(lines: list[str], returns: str | None) -> None:
    assert cut(chain(*lines, returns=returns)) is None


@pytest.mark.usefixtures("any_size")
def test_a_value_that_meets_itself_stays_inside() -> None:
    """A residual connection around the normalisation."""
    found = cut(chain(CONV, NORM, "u = add(z, y)"))
    assert str(found).endswith("again: conv_transpose > sub > mul > mul > add -> f32[2, 16, 9, 11, 13]")


def test_the_program_of_the_second_run_means_the_same() -> None:
    """Given the statistics as inputs."""
    made = chain(CONV, "a = relu(y)", "s0, s1, s2 = statistics(a, batch=False, groups=4, eps=1e-5)",
                 "c = sub(a, s0)", "d = mul(c, s2)", "p = " + POOL.format("d"))  # fmt: skip
    tensors = [torch.randn([s or 0 for s in k.shape]) for _, k in made.inputs]
    values = dict(zip((n for n, _ in made.inputs), tensors, strict=True))
    whole = Program(made.inputs, made.body, ("s0", "s1", "s2", "p", "a"))
    values.update(zip(whole.outputs, whole.run(tensors), strict=True))
    given = {**values, "y": values["a"], "c": values["a"], "d": values["a"]}
    later, _ = _later(made, given, [made.body[2]])
    assert [i.op for i in later.body] == ["conv_transpose", "relu", "avg_pool", "sub", "mul"]
    (found,) = later.run([values[n] for n, _ in later.inputs])
    torch.testing.assert_close(found, values["p"], rtol=1e-5, atol=1e-5)


# --- what is chosen -------------------------------------------------------------------------------
@functools.cache
def region(name: str, dtype: torch.dtype, precision: str | None = None) -> Region:
    case = next(c for c in (*chains.CHAINS, *CASES) if c.name == name)
    report = explained(case.make().train(name in chains.TRAINED), case.shape, dtype=dtype, precision=precision)
    return report.regions[0].region


@pytest.fixture
def of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel reads x as it lies."""
    monkeypatch.setattr(planar, "MOST_CHANNELS", 0)


def ways(name: str, dtype: torch.dtype, precision: str | None = None) -> list[Candidate]:
    made = region(name, dtype, precision).rewritten
    return list(candidates(made, examples(made), exact=precision == "ieee", hopper=True))


#: what runs, by estimate
CHOSEN = {
    ("batch_norm_pools", "tf32"): "products",  # three input channels; and the run that is left stores 1/8 of the values
    ("batch_norm_pools", "ieee"): "products",
    ("batch_norm_pools", "float16"): "products",
    ("instance_norm", "tf32"): "twice",
    ("instance_norm", "ieee"): "twice",
    ("instance_norm", "float16"): "twice",
    ("swish_group_norm_hardswish", "tf32"): "twice",
    ("swish_group_norm_hardswish", "float16"): "engine",  # its kernel is bound by what it does per element
    ("relu_group_norm", "tf32"): "engine",  # products are most of the time
    ("relu_group_norm", "float16"): "engine",
}


@pytest.mark.parametrize(("name", "numerics"), CHOSEN)
def test_the_choice_for_chains_of_the_benchmark(name: str, numerics: str) -> None:
    dtype = torch.float16 if numerics == "float16" else torch.float32
    found = ways(name, dtype, "ieee" if numerics == "ieee" else None)
    assert found[0].name == CHOSEN[name, numerics]
    assert ("products" in [c.name for c in found]) == (name == "batch_norm_pools")
    assert {"engine", "twice"} <= {c.name for c in found}  # the other way is there to be measured
    told = re.search(
        r"by estimate (\d+\.\d+) ms with one run of the convolution, (\d+\.\d+) ms with two"
        r"(?:, (\d+\.\d+) ms with statistics from products of its input and one run)?",
        str(found[0]),
    )
    assert told is not None
    once, again, products = (math.inf if seconds is None else float(seconds) for seconds in told.groups())
    assert (min(again, products) < once) == (found[0].name != "engine")
    assert (products < again) == (found[0].name == "products")


def test_a_way_that_takes_far_longer_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are most of the time: two runs take a third longer."""
    assert [c.name for c in ways("relu_group_norm", torch.float16)][:2] == ["engine", "twice"]
    monkeypatch.setattr(execute, "HOPELESS", 1.3)
    found = ways("relu_group_norm", torch.float16)
    assert "twice" not in [c.name for c in found] and found[0].estimate is None


def test_a_convolution_that_only_measures_has_no_other_way() -> None:
    """The fourth model in training: nothing is written between its convolution and its mean."""
    model = nn.Sequential(nn.ConvTranspose3d(64, 128, 5), nn.BatchNorm3d(128), nn.AdaptiveAvgPool3d(1)).train()
    made = explained(model, (16, 64, 16, 32, 32)).regions[0].region.rewritten
    assert "twice" not in [c.name for c in candidates(made, examples(made), exact=False, hopper=True)]


def test_an_estimate_needs_no_sizes_of_the_program() -> None:
    """A region of a dynamic size is planned for the sizes that it is called with."""
    text = str(region("batch_norm_pools", torch.float32).rewritten)
    made = Program.parse(text.replace("f32[64, 3, 32, 32, 32]", "f32[_, 3, 32, 32, 32]"))[1]
    inputs = [torch.empty([s or 64 for s in k.shape], device="meta") for _, k in made.inputs]
    found = next(candidates(made, inputs, exact=False, hopper=True))
    assert found.name == "products" and found.estimate == ways("batch_norm_pools", torch.float32)[0].estimate


def test_the_account_counts_both_runs(of_rows: None) -> None:
    twice = next(c for c in ways("batch_norm_pools", torch.float32) if c.name == "twice")
    plan = account_of(region("batch_norm_pools", torch.float32), twice)
    first, second = (p for p in plan.parts if p.what.startswith("conv_transpose"))
    assert [p.by for p in plan.parts].count("kernel") == 3
    assert dict(first.facts)["results"] == "statistics"
    assert dict(second.facts)["results"] == "f32[64, 16, 30, 30, 30], contiguous"
    value = 4 * 64 * 16 * 63**3
    assert first.written + second.written < value / 4 and plan.saved > 3 * value
    assert first.macs == 64 * 63**3 // 8 * 3 * 16 * 27
    assert second.macs == 64 * 63**3 // 8 * 3 * 16 * 8  # weights of a pool's classes are added
    assert dict(second.facts)["residue classes"] == "8, added up by the matrix units, weights as well: 8 of 27"
    assert first.source != second.source and "fxfuse::Kinds<fxfuse::Statistics>" in first.source


# --- what is launched -----------------------------------------------------------------------------
RUN = """
def chain(x: {t}[2, 8, 6, 6, 6], w: {t}[8, 16, 3, 3, 3], b: {t}[16], g: {t}[16]):
    y = conv_transpose(x, w, b, stride={two}, padding={no}, output_padding={no}, dilation={one}, groups=1)
    z, m, v = batch_norm_train(y, g, None, eps=1e-5)
    u = relu(z)
    return u, m, v
"""


@pytest.mark.parametrize("shares", Shared)
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_launches_in_order(
    driver: Driver,  # noqa: F811
    memory: list[Tensor],  # noqa: F811
    small: None,  # noqa: F811
    dtype: str,
    shares: Shared,
) -> None:
    made = Program.parse(RUN.format(t=dtype, no=(0,) * 3, one=(1,) * 3, two=(2,) * 3))[1]
    inputs = [torch.randn([s or 0 for s in kind.shape]).to(kind.dtype) for _, kind in made.inputs]
    plan = cut(made)
    assert plan is not None and plan.kernel is not None and plan.measuring is not None
    plan = dataclasses.replace(plan, kernel=dataclasses.replace(plan.kernel, shares=shares))
    assert plan.kernel is not None and plan.measuring is not None
    first, second = (execute.convolution_of(k) for k in (plan.measuring, plan.kernel))
    ready = Prepared.of(made, plan, second, torch.device("cpu"), first)
    assert not ready.asks_torch
    prepare = ["measure", "prepare"] if dtype == "f32" else ["prepare"]
    mend = ["direct"] if dtype == "f32" else []
    later = [] if shares is Shared.ALL else prepare
    spaces = [torch.empty(1 << 21, dtype=torch.uint8) for _ in range(3)]
    for _ in range(2):
        driver.calls.clear()
        memory[:] = spaces
        results = ready.run(inputs)
        names = [c[0] for c in driver.calls]
        assert names == [*prepare, "convolution", "merge", "finish_statistics", *later, "convolution", *mend, "bundle"]
        maps, packed = ([c[2][i] for c in driver.calls if c[0] == "convolution"] for i in range(2))
        rows = [told.split(b",")[0] for told in maps]  # where they lie
        assert (rows[0] == rows[1]) == (shares is not Shared.NOTHING)
        assert (packed[0] == packed[1]) == (shares is Shared.ALL)
        grids = [c[1][0] for c in driver.calls if c[0] == "measure"]
        samples = 2 * 32 if dtype == "f32" else 0  # blocks that look for the largest value
        assert grids == [16 + (samples if i == 0 or shares is Shared.NOTHING else 0) for i in range(len(grids))]
        assert [t.shape for t in results] == [(2, 16, 13, 13, 13), (16,), (16,)]


def test_sources_are_in_the_order_in_which_they_run(of_rows: None) -> None:
    found = next(c for c in ways("batch_norm_pools", torch.float32) if c.name == "twice")
    assert [name for name, _ in found.sources()][:3] == ["measuring", "statistics", "convolution"]
    first, _, second, *_ = (text for _, text in found.sources())
    assert "gathers = true, keeps = false" in first and "gathers = false, keeps = true" in second
