"""What runs behind a convolution: steps that together mean the chain, and what kernels take of it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from emulator.device import emulated, needs_compiler
from harness import program
from hypothesis import HealthCheck, given, settings
from strategies import Chain, chains
from torch import Tensor

import fxfuse
from fxfuse import vocabulary
from fxfuse.instr import Instr, Ref
from fxfuse.kernels.codegen.chains import dense
from fxfuse.kernels.codegen.reductions import Fold, Rows, Window
from fxfuse.kernels.compilation.jit import compile_cubin
from fxfuse.kernels.compilation.sass import sass
from fxfuse.kernels.planning.observe import Unscheduled, examples, observe
from fxfuse.kernels.planning.schedule import schedule
from fxfuse.kernels.runtime.tail_engine import prepare
from fxfuse.kernels.stages.emit_tail import emit_fold, emit_map, emit_pool, emit_pool_fold, emit_rows, emit_statistics
from fxfuse.kernels.stages.steps import Gather, Map, Schedule, Torch
from fxfuse.kernels.stages.tail import plan
from fxfuse.program import Program

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(autouse=True)
def small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take tensors of any size."""
    for module in ("stages.tail", "planning.schedule"):
        monkeypatch.setattr(f"fxfuse.kernels.{module}.LEAST_ELEMENTS", 1)


# --- the steps mean the chain ---------------------------------------------------------------------
def perform(instr: Instr, values: dict[str, Tensor]) -> None:
    operands = [values[o.name] if isinstance(o, Ref) else o for o in instr.operands]
    result = vocabulary.lookup(instr.op)(*operands, **dict(instr.attributes))
    values.update(zip(instr.outs, result if isinstance(result, tuple) else (result,), strict=True))


def perform_steps(made: Schedule, values: dict[str, Tensor]) -> None:
    """Every step by torch, from no more than it says that it reads, to no more than it says that it makes."""
    for step in made.steps:
        body = step.program.body if isinstance(step, Torch) else step.instrs if isinstance(step, Gather) else step.body
        inside = {name: values[name] for name in step.reads}
        for instr in body:
            perform(instr, inside)
        for name in step.makes:
            values[name] = inside[name]


def check(chain: Program, inputs: list[Tensor]) -> None:
    expected = chain.run(inputs)
    for anchored in (True, False):
        try:
            made = schedule(chain, inputs, anchored=anchored)
        except Unscheduled:
            continue
        values = dict(zip((n for n, _ in chain.inputs), inputs, strict=True))
        if made.kernel is not None:
            for instr in made.first.body:
                perform(instr, values)
            # what the kernel stores, and what its statistics are of
            whole = made.kernel
            assert set(whole.reads) <= values.keys()
            replay(chain, made, values)
        perform_steps(made, values)
        strides = {s.stored: s.strides for s in made.steps if isinstance(s, Map)}
        if made.kernel is not None:
            strides[made.kernel.stored] = made.kernel.strides
        for name, value in zip(chain.outputs, expected, strict=True):
            planned = zip(value.shape, strides.get(name, value.stride()), value.stride(), strict=True)
            assert all(size == 1 or stride == wanted for size, stride, wanted in planned)
            torch.testing.assert_close(values[name], value, rtol=1e-4, atol=1e-4, equal_nan=True)
            if made.kernel is not None or len(chain.outputs) == 1:
                assert values[name].dtype is value.dtype


def replay(chain: Program, made: Schedule, values: dict[str, Tensor]) -> None:
    """The kernel's stored value, from the chain's own instructions; of a pool that is cut in two, its first half."""
    assert made.kernel is not None
    everything = dict(zip((n for n, _ in chain.inputs), (values[n] for n, _ in chain.inputs), strict=True))
    for instr in chain.body:
        perform(instr, everything)
    name = made.kernel.stored
    if name in everything:
        values[name] = everything[name]
        return
    raise Unscheduled("a pool is cut in two, or a norm is taken apart in front of it")


BATCHES = settings(max_examples=60, deadline=None, database=None, derandomize=True,
                   suppress_health_check=list(HealthCheck))  # fmt: skip


@BATCHES
@given(chains())
def test_random_chains(chain: Chain) -> None:
    model, x = chain.make(torch.float32)
    try:
        optimized = fxfuse.optimize(model, (x,))
    except RuntimeError:  # a cast to float64 meets a layer of float32
        return
    for region in optimized.fxfuse_report.regions:
        found = region.region.rewritten
        try:
            inputs = [torch.rand(t.shape).add(0.5).to(t.dtype) for t in examples(found)]
            found.run(inputs)
        except (Unscheduled, RuntimeError, ValueError):
            continue
        last = [t.contiguous(memory_format=LAST.get(t.dim(), torch.contiguous_format)) for t in inputs]
        for each in (inputs, last):
            with contextlib.suppress(Unscheduled):
                check(found, each)


# --- what kernels take ----------------------------------------------------------------------------
CONV = (
    "y = conv_transpose(x, w, b, stride=(1, 1, 1), padding=(0, 0, 0), output_padding=(0, 0, 0), dilation=(1, 1, 1),"
    " groups=1)"
)
INPUTS = "x: f32[2, 8, 4, 5, 6], w: f32[8, 16, 3, 3, 3], b: f32[16], g: f32[16], s: f32[16, 1, 1, 1]"


def steps(*lines: str, anchored: bool = True) -> list[str]:
    made = program(INPUTS, "\n".join([CONV, *lines]))
    return [str(s) for s in schedule(made, examples(made), anchored=anchored).steps]


def test_a_norm_is_statistics_and_a_map() -> None:
    found = steps("z = relu(y)", "u = group_norm(z, g, None, groups=4, eps=1e-5)", "v = relu(u)", "v")
    assert found == [
        "statistics of z, gathered on the way",
        "one kernel: sub > mul > mul > relu -> f32[2, 16, 6, 7, 8]",
    ]


def test_behind_torchs_convolution_statistics_are_a_pass() -> None:
    found = steps("u = instance_norm(y, None, None, eps=1e-5)", "u", anchored=False)
    assert found == [
        "conv_transpose",
        "statistics of y, one pass over y",
        "one kernel: sub > mul -> f32[2, 16, 6, 7, 8]",
    ]


def test_values_that_only_statistics_read_are_not_kept() -> None:
    made = program(INPUTS, "\n".join([CONV, "z = relu(y)", "m = mean(z, dims=(2, 3, 4), keepdim=True)", "m"]))
    kernel = schedule(made, examples(made)).kernel
    assert kernel is not None and kernel.gathers and not kernel.keeps


def test_a_pool_joins_the_chain_in_front_of_it() -> None:
    pool = (
        "m = avg_pool(z, kernel=(3, 3, 3), stride=(3, 3, 3), padding=(0, 0, 0), ceil_mode=False,"
        " count_include_pad=True, divisor_override=None)"
    )
    found = steps("z = relu(y)", pool, "v = tanh(m)", "v", anchored=False)
    assert found == ["conv_transpose", "one kernel: relu > avg_pool 3x3x3 > tanh -> f32[2, 16, 2, 2, 2]"]


def test_overlapping_windows_do_not_compute_twice() -> None:
    pool = "m = max_pool(z, kernel=(3, 3, 3), stride=(1, 1, 1), padding=(1, 1, 1), dilation=(1, 1, 1), ceil_mode=False)"
    found = steps("z = gelu(y, approximate='none')", pool, "m", anchored=False)
    assert found[1:] == [
        "one kernel: gelu -> f32[2, 16, 6, 7, 8]",
        "one kernel: max_pool 3x3x3 -> f32[2, 16, 6, 7, 8]",
    ]


@pytest.mark.parametrize(("least", "kernels"), [(128, 1), (129, 2)])
def test_a_reduction_joins_the_pool_where_threads_are_enough(
    least: int, kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16 positions with eight threads each."""
    monkeypatch.setattr("fxfuse.kernels.stages.tail.ENOUGH_THREADS", least)
    pool = "m = max_pool(y, kernel=(3, 3, 3), stride=(3, 3, 3), padding=(0, 0, 0), dilation=(1, 1, 1), ceil_mode=False)"
    lines = [pool, "z = relu(m)", "v = sum(z, dims=(1,), keepdim=True)", "u = exp(v)", "u"]
    found = steps(*lines, anchored=False)[1:]
    if kernels == 1:
        assert found == ["one kernel: max_pool 3x3x3 > relu > sum > exp -> f32[2, 1, 2, 2, 2]"]
    else:
        assert found[0] == "one kernel: max_pool 3x3x3 > relu -> f32[2, 16, 2, 2, 2]" and len(found) == 2


def test_a_reduction_over_channels_joins() -> None:
    found = steps("z = relu(y)", "v = softmax(z, dim=1)", "t = mul(v, 2.0)", "t", anchored=False)
    assert found[1:] == ["one kernel: relu > softmax > mul -> f32[2, 16, 6, 7, 8]"]
    found = steps("v = sum(y, dims=(1,), keepdim=False)", "v", anchored=False)
    assert found[1:] == ["one kernel: sum -> f32[2, 6, 7, 8]"]


def test_other_reductions_are_torchs() -> None:
    assert steps("v = vector_norm(y, ord=1.0, dims=(1,), keepdim=True)", "v") == ["vector_norm"]
    assert steps("v = sum(y, dims=(2, 4), keepdim=True)", "v") == ["sum"]


def test_reductions_over_dims_inside_are_kernels() -> None:
    """With the chains around them, as long as these do not ask for a place."""
    assert steps("v = softmax(y, dim=2)", "v") == ["one kernel: softmax -> f32[2, 16, 6, 7, 8]"]
    assert steps("v = sum(y, dims=(1, 2), keepdim=True)", "v") == ["one kernel: sum -> f32[2, 1, 1, 7, 8]"]
    found = steps("z = exp(y)", "v = softmax(z, dim=3)", "t = relu(v)", "t", anchored=False)
    assert found[1:] == ["one kernel: exp > softmax > relu -> f32[2, 16, 6, 7, 8]"]
    found = steps("z = mul(y, s)", "v = softmax(z, dim=3)", "t = mul(v, s)", "t", anchored=False)
    assert [f.split(" -> ")[0] for f in found[1:]] == ["one kernel: mul", "one kernel: softmax", "one kernel: mul"]


@pytest.mark.parametrize(("channels", "joins"), [(200, True), (256, True), (257, False)])
def test_so_many_channels_as_threads_hold_are_reduced(channels: int, joins: bool) -> None:
    more = f"x: f32[2, 8, 4, 5, 6], w: f32[8, {channels}, 3, 3, 3], b: f32[{channels}]"
    made = program(more, "\n".join([CONV, "v = softmax(y, dim=1)", "v"]))
    found = [str(s) for s in schedule(made, examples(made), anchored=False).steps]
    assert ("one kernel: softmax" in found[-1]) == joins


def test_reductions_of_one_spatial_dim_keep_it() -> None:
    line = CONV.replace("(1, 1, 1)", "(1,)").replace("(0, 0, 0)", "(0,)")
    for keep, expected in ((True, "one kernel: sum -> f32[2, 1, 6]"), (False, "conv_transpose > sum")):
        made = program(
            "x: f32[2, 8, 4], w: f32[8, 16, 3], b: f32[16]", f"{line}\nv = sum(y, dims=(1,), keepdim={keep})\nv"
        )
        assert [str(s) for s in schedule(made, examples(made), anchored=False).steps][-1] == expected


@pytest.mark.parametrize(
    "lines",
    [
        ("c = reshape(y, shape=(2, 16, 6, 7, 4, 2))", "v = relu(c)"),
        ("c = reshape(y, shape=(2, 5376))", "v = relu(c)"),
        ("c = permute(y, dims=(0, 1, 4, 3, 2))", "v = relu(c)"),
        ("c = cast(y, dtype=f64)", "v = softmax(c, dim=1)"),
    ],
    ids=["six dims", "two dims", "other strides", "float64"],
)
def test_values_that_kernels_do_not_read_are_torchs(lines: tuple[str, ...]) -> None:
    made = program(INPUTS, "\n".join([CONV, *lines, "v"]))
    assert all(isinstance(s, Torch) for s in schedule(made, examples(made), anchored=False).steps)


def test_an_overlap_that_is_computed_twice_at_most() -> None:
    """Windows of 3 with a step of 2 look at an element 3.4 times, those of 3 with a step of 3 once."""
    pool = "m = max_pool(z, kernel=(3, 3, 3), stride={0}, padding=(1, 1, 1), dilation=(1, 1, 1), ceil_mode=False)"
    for stride, count in (((2, 2, 2), 2), ((3, 3, 3), 1)):
        found = steps("z = gelu(y, approximate='none')", pool.format(stride), "m", anchored=False)
        assert len(found[1:]) == count, found


def test_tensors_that_kernels_cannot_count_are_torchs() -> None:
    for line in ("z = relu(y)", "z = sum(y, dims=(1,), keepdim=True)", "z = adaptive_avg_pool(y, size=(1, 2, 2))"):
        found = steps_of_samples(400_000, torch.contiguous_format, line, "z")
        assert len(found) == 1 and found[0].startswith("conv_transpose > "), found


def test_norms_that_torch_runs_are_not_taken_apart() -> None:
    """Where no kernel takes the values, one operator of torch's is better than three."""
    inputs = "x: f16[5, 8, 96, 96, 96], w: f16[8, 64, 3, 3, 3], b: f16[64]"
    conv = CONV.replace("stride=(1, 1, 1)", "stride=(2, 2, 2)")
    made = program(inputs, "\n".join([conv, "z = instance_norm(y, None, None, eps=1e-5)", "v = relu(z)", "v"]))
    found = schedule(made, examples(made))
    assert found.kernel is not None and not found.kernel.gathers
    assert [str(s) for s in found.steps] == ["instance_norm > relu"]


def test_scales_leave_the_weights_where_a_chain_follows_and_no_pool() -> None:
    pool = "m = max_pool(y, kernel=(2, 2, 2), stride=(2, 2, 2), padding=(0, 0, 0), dilation=(1, 1, 1), ceil_mode=False)"
    conv = CONV.replace("x, w, b", "x, v, b").replace("stride=(1, 1, 1)", "stride=(2, 2, 2)")
    lines = ["v = scale_weight(w, g, groups=1)", conv]
    for behind, first, stages in (
        (["z = relu(y)", "z"], [], ("conv_transpose", "mul", "add", "relu")),
        ([pool, "m"], ["scale_weight"], ("conv_transpose", "max_pool 2x2x2")),
    ):
        made = program(INPUTS, "\n".join([*lines, *behind]))
        found = schedule(made, examples(made))
        assert found.kernel is not None and found.kernel.stages == stages
        assert [i.op for i in found.first.body] == first


def test_small_operands_are_computed_in_the_chain() -> None:
    found = steps("t = add(s, 1.0)", "r = rsqrt(t)", "z = mul(y, r)", "z", anchored=False)
    assert found == ["conv_transpose", "one kernel: add > rsqrt > mul -> f32[2, 16, 6, 7, 8]"]


def test_small_operands_that_are_outputs_are_made_as_well() -> None:
    found = steps("t = add(s, 1.0)", "z = mul(y, t)", "z, t", anchored=False)
    assert found == [
        "conv_transpose",
        "one kernel: add > mul -> f32[2, 16, 6, 7, 8]",
        "one kernel: add -> f32[16, 1, 1, 1]",
    ]


def test_a_value_that_others_read_is_stored() -> None:
    found = steps(
        "z = relu(y)",
        "v = vector_norm(z, ord=1.0, dims=(1,), keepdim=True)",
        "u = exp(z)",
        "t = mul(u, v)",
        "t",
        anchored=False,
    )
    assert found == [
        "conv_transpose",
        "one kernel: relu -> f32[2, 16, 6, 7, 8]",
        "vector_norm",
        "one kernel: exp > mul -> f32[2, 16, 6, 7, 8]",
    ]


def test_what_torch_has_made_is_not_computed_again() -> None:
    """Its own operands may be gone."""
    small = ["t = add(s, 1.0)", "q = mul(t, 2.0)", "p = prod(q, dim=0, keepdim=True)"]
    found = program(INPUTS, "\n".join([CONV, *small, "z = mul(y, q)", "u = add(z, p)", "u"]))
    made = schedule(found, examples(found), anchored=False)
    torch.manual_seed(0)
    inputs = [torch.randn(t.shape) for t in examples(found)]
    values = dict(zip((n for n, _ in found.inputs), inputs, strict=True))
    perform_steps(made, values)
    torch.testing.assert_close(values["u"], found.run(inputs)[0], rtol=1e-5, atol=1e-5)


def test_what_torch_has_made_before_is_not_computed_again_later() -> None:
    """After a step its operands are gone, as far as nothing else reads them."""
    small = ["t = add(s, 1.0)", "q = mul(t, 2.0)", "p = prod(q, dim=0, keepdim=True)"]
    body = [CONV, *small, "z = relu(y)", "r = softmax(z, dim=2)", "u = mul(r, q)", "v = add(u, p)", "v"]
    found = program(INPUTS, "\n".join(body))
    made = schedule(found, examples(found), anchored=False)
    torch.manual_seed(0)
    inputs = [torch.randn(t.shape) for t in examples(found)]
    values = dict(zip((n for n, _ in found.inputs), inputs, strict=True))
    perform_steps(made, values)
    torch.testing.assert_close(values["v"], found.run(inputs)[0], rtol=1e-5, atol=1e-5)
    assert [str(s).split(" -> ")[0] for s in made.steps][-1] == "one kernel: mul > add"


def test_a_chain_ends_where_an_operand_is_not_there_yet() -> None:
    found = program(INPUTS, "\n".join([CONV, "z = relu(y)", "q = softmax(y, dim=2)", "u = add(z, q)", "u"]))
    torch.manual_seed(0)
    check(found, [torch.randn(t.shape) for t in examples(found)])


def test_operands_that_are_not_small_are_made_once() -> None:
    more = INPUTS + ", h: f32[16, 6, 7, 8]"
    made = program(more, "\n".join([CONV, "t = add(h, 1.0)", "z = mul(y, t)", "z"]))
    found = [str(s) for s in schedule(made, examples(made), anchored=False).steps]
    assert found[-1] == "one kernel: mul -> f32[2, 16, 6, 7, 8]" and any("add" in s for s in found[:-1])
    assert [i.op for i in schedule(made, examples(made)).first.body] == ["add"]


@pytest.mark.parametrize("anchored", [True, False])
def test_a_pooled_value_that_is_an_output_is_stored(anchored: bool) -> None:
    pool = "m = max_pool(z, kernel=(2, 2, 2), stride=(2, 2, 2), padding=(0, 0, 0), dilation=(1, 1, 1), ceil_mode=False)"
    conv = CONV.replace("stride=(1, 1, 1)", "stride=(2, 2, 2)")
    found = program(INPUTS, "\n".join([conv, "z = relu(y)", pool, "z, m"]))
    made = schedule(found, examples(found), anchored=anchored)
    assert {"z", "m"} <= {n for s in made.steps for n in s.makes} | ({made.kernel.stored} if made.kernel else set())
    assert made.kernel is None or made.kernel.stored == "z"


def test_statistics_of_a_value_are_one_step() -> None:
    found = steps("u = group_norm(y, None, None, groups=4, eps=1e-5)", "v = instance_norm(y, None, None, eps=1e-5)",
                  "t = add(u, v)", "t", anchored=False)  # fmt: skip
    assert [s for s in found if "statistics" in s] == ["statistics of y, one pass over y"]


@pytest.mark.parametrize(
    "norm", ["instance_norm(y, None, None, eps=1e-5)", "layer_norm(y, None, None, shape=(16, 6, 7, 8), eps=1e-5)"]
)
def test_results_are_laid_out_as_torch_has_them(norm: str) -> None:
    """Of channels that are neighbours torch's own norm makes planes, which a map of them would not."""
    made = program(INPUTS, "\n".join([CONV, f"z = {norm}", "z"]))
    x, *others = examples(made)
    inputs = [x.to(memory_format=torch.channels_last_3d), *others]
    found = schedule(made, inputs, anchored=False)
    assert [str(s) for s in found.steps] == ["conv_transpose > " + norm.split("(")[0]]
    found = schedule(made, inputs)
    assert found.kernel is not None and found.kernel.layout == "contiguous"
    (stored,) = (s for s in found.steps if isinstance(s, Map))
    assert stored.strides == dense(stored.kind.shape, "contiguous")


def test_a_map_keeps_the_memory_format() -> None:
    """The mask decides how the result is laid out; a map reads and writes in the same order."""
    made = program(INPUTS + ", m: b1[2, 16, 6, 7, 8]", "\n".join([CONV, "z = where(m, y, 0.5)", "z"]))
    *others, mask = examples(made)
    found = schedule(made, [*others, mask.to(memory_format=torch.channels_last_3d)], anchored=False)
    assert [str(s) for s in found.steps] == ["conv_transpose > where"]
    assert "one kernel: where" in str(schedule(made, [*others, mask], anchored=False))


@pytest.mark.parametrize(
    "lines",
    [
        ("t = add(s, 1.0)", CONV, "z = mul(y, t)", "z, t"),
        ("h = exp(g)", "f = scale_weight(w, h, groups=1)", CONV.replace("x, w", "x, f"), "z = relu(y)", "z, h"),
        (
            "h = exp(g)", "f = scale_weight(w, h, groups=1)", CONV.replace("x, w", "x, f"), "z = softmax(y, dim=2)",
            "r = reshape(h, shape=(-1, 1, 1, 1))", "v = mul(z, r)", "v",
        ),
    ],
    ids=["a small operand", "what is made first is an output", "what is made first is read behind"],
)  # fmt: skip
def test_values_of_one_part_are_there_in_the_others(lines: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.kernels.planning.schedule.LEAST_ELEMENTS", 2**40)  # scales stay where they are
    found = program(INPUTS, "\n".join(lines))
    made = schedule(found, examples(found))
    assert made.kernel is not None
    inputs = [torch.rand(t.shape) for t in examples(found)]
    values = dict(zip((n for n, _ in found.inputs), inputs, strict=True))
    values.update(zip(made.first.outputs, made.first.run([values[n] for n, _ in made.first.inputs]), strict=True))
    assert set(made.kernel.reads) <= values.keys()
    replay(found, made, values)
    values = {n: t for n, t in values.items() if n in {*dict(found.inputs), *made.first.outputs, made.kernel.stored}}
    perform_steps(made, values)
    for name, expected in zip(found.outputs, found.run(inputs), strict=True):
        torch.testing.assert_close(values[name], expected, rtol=1e-5, atol=1e-5)


def test_tensors_that_are_small_are_torchs_behind_its_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind one of ours, kernels of ours alone are a graph."""
    for module in ("stages.tail", "planning.schedule"):
        monkeypatch.setattr(f"fxfuse.kernels.{module}.LEAST_ELEMENTS", 2**20)
    lines = "z = relu(y)", "v = exp(z)", "u = vector_norm(v, ord=1.0, dims=(2,), keepdim=True)", "t = sub(v, u)", "t"
    made = program(INPUTS, "\n".join([CONV, *lines]))
    assert steps(*lines) == ["vector_norm", "one kernel: sub -> f32[2, 16, 6, 7, 8]"]
    (step,) = schedule(made, examples(made), anchored=False).steps
    assert isinstance(step, Torch) and str(step) == "conv_transpose > relu > exp > vector_norm > sub"


def steps_of_samples(samples: int, layout: torch.memory_format, *lines: str) -> list[str]:
    """Behind torch's convolution of so many samples."""
    made = program(INPUTS.replace("2, 8, 4", f"{samples}, 8, 4"), "\n".join([CONV, *lines]))
    x, *others = examples(made)
    return [str(s) for s in schedule(made, [x.to(memory_format=layout), *others], anchored=False).steps]


def test_samples_are_a_dim_of_the_grid_where_channels_are_neighbours() -> None:
    last, most = torch.channels_last_3d, 65535
    assert steps_of_samples(most, last, "z = relu(y)", "z") == [
        "conv_transpose",
        "one kernel: relu -> f32[65535, 16, 6, 7, 8]",
    ]
    assert steps_of_samples(most + 1, last, "z = relu(y)", "z") == ["conv_transpose > relu"]
    assert "one kernel: relu" in steps_of_samples(most + 1, torch.contiguous_format, "z = relu(y)", "z")[1]
    assert "one kernel: sum" in steps_of_samples(most + 1, last, "z = sum(y, dims=(1,), keepdim=True)", "z")[1]
    found = steps_of_samples(most + 1, last, "z = relu(y)", "u = adaptive_avg_pool(z, size=(2, 2, 2))", "u")
    assert found[1:] == ["one kernel: relu > adaptive_avg_pool -> f32[65536, 16, 2, 2, 2]"]


def test_results_have_no_more_elements_than_a_kernel_counts() -> None:
    made = steps_of_samples(2, torch.contiguous_format, "z = adaptive_avg_pool(y, size=(400, 400, 419))", "z")
    assert "one kernel: adaptive_avg_pool" in made[1]
    assert steps_of_samples(2, torch.contiguous_format, "z = adaptive_avg_pool(y, size=(400, 400, 420))", "z") == [
        "conv_transpose > adaptive_avg_pool"
    ]


# --- every kernel compiles ------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_kernels_compile_without_spills(dtype: str, layout: str, arch: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    window = Window("Sum", (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), -1)
    sources = [
        emit_map(dtype, dtype, layout, None),
        emit_pool(dtype, dtype, (layout, "contiguous"), None, window, None),
        emit_pool_fold(dtype, dtype, None, window, None, Fold("Mean", 64), None),
        emit_fold(dtype, dtype, (layout, layout), None, Fold("Softmax", 64), None),
        emit_fold(dtype, dtype, (layout, "contiguous"), None, Fold("LogSumExp", 3), None),
        emit_rows(dtype, dtype, None, Rows("LogSoftmax", 64), None),
        emit_rows(dtype, dtype, None, Rows("Minimum", 5000), None),
        emit_statistics(dtype, layout),
    ]
    for source in sources:
        cubin = compile_cubin(source, arch)
        assert not {name: used.spills for name, used in cubin.kernels.items() if used.spills}


BOTH, ONES = ("contiguous", "contiguous"), (1, 1, 1)
WHOLE = Window("Maximum", (3, 3, 3), (3, 3, 3), (0, 0, 0), ONES, whole=True)
PADDED = Window("Maximum", (3, 3, 3), (2, 2, 2), ONES, ONES)
HALVED = Window("Sum", (2, 2, 2), (2, 2, 2), (0, 0, 0), ONES, 8, whole=True)


@pytest.mark.parametrize(
    ("source", "combines", "loads"),
    [
        (emit_pool("f32", "f32", BOTH, None, WHOLE, None), "FMNMX", 27),
        (emit_pool("f16", "f16", BOTH, None, PADDED, None), "FMNMX", 27),
        (emit_pool("f32", "f32", ("channels_last", "contiguous"), None, WHOLE, None), "FMNMX", 27),
        (emit_pool("f32", "f32", BOTH, None, HALVED, None), "FADD", 32),
        (emit_pool_fold("f32", "f32", None, WHOLE, None, Fold("Sum", 64), None), "FMNMX", 27),
    ],
    ids=["whole", "padded", "last", "four planes", "folded"],
)
def test_windows_are_read_before_they_are_combined(source: str, combines: str, loads: int) -> None:
    """What memory-bound kernels wait for is on its way at once."""
    pytest.importorskip("cuda.bindings.nvrtc")
    before = sass(compile_cubin(source), "pool").split(combines, maxsplit=1)[0]
    assert before.count("LDG.E") == loads


@needs_compiler
@pytest.mark.parametrize("line", ["mul(x, v)", "statistics(x, batch=False, groups=4, eps=0.1)"])
def test_what_torch_laid_out_in_another_way_than_it_said(line: str) -> None:
    """The step was planned for a contiguous x."""
    names = "y, m, s" if line.startswith("statistics") else "y"
    found = program("x: f32[2, 4, 3, 5, 7], v: f32[4, 1, 1, 1]", f"{names} = {line}\n{names}")
    x, v = torch.randn(2, 4, 3, 5, 7), torch.randn(4, 1, 1, 1)
    values = {"x": x.contiguous(memory_format=torch.channels_last_3d), "v": v}
    with emulated():
        (step,) = plan(found, observe(found, [x, v]), least=1)
        assert not isinstance(step, Torch)
        prepare(step, torch.device("cpu"), {}, set(found.outputs))(values)
    for name, expected in zip(found.outputs, found.run([x, v][: len(found.inputs)]), strict=True):
        torch.testing.assert_close(values[name], expected, rtol=1e-5, atol=1e-6)
