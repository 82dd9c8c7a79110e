"""Where a chain is cut: what the kernel takes, what is left to torch, and the sentences of a refusal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from unittest import mock

import many_chains
import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.kernels import execute
from fxfuse.kernels.codegen.expression import Expression
from fxfuse.kernels.codegen.reductions import Fold
from fxfuse.kernels.planning import cutter
from fxfuse.kernels.planning.observe import Unscheduled, examples
from fxfuse.kernels.planning.schedule import schedule
from fxfuse.kernels.stages.steps import Gather, Map, Schedule, Torch
from fxfuse.program import Program
from fxfuse.region import Region

CONVOLVE = (
    "conv_transpose({x}, {w}, {b}, stride={s}, padding=(0, 0, 0), output_padding=(0, 0, 0), dilation=(1, 1, 1),"
    " groups=1)"
)
MAX = "max_pool({x}, kernel={k}, stride={t}, padding={p}, dilation=(1, 1, 1), ceil_mode={c})"
AVG = (
    "avg_pool({x}, kernel={k}, stride={t}, padding=(0, 0, 0), ceil_mode=False, count_include_pad=True,"
    " divisor_override={d})"
)
INPUTS = "x: f32[2, 8, 4, 5, 6], w: f32[8, 16, 3, 3, 3], b: f32[16]"


def conv(x: str = "x", w: str = "w", b: str = "b", s: str = "(2, 2, 2)") -> str:
    return "y = " + CONVOLVE.format(x=x, w=w, b=b, s=s)


def max_pool(x: str, k: int = 2, t: int | None = None, p: int = 0, c: bool = False) -> str:
    return MAX.format(x=x, k=(k,) * 3, t=(t or k,) * 3, p=(p,) * 3, c=c)


def avg_pool(x: str, k: int = 2, d: int | None = None) -> str:
    return AVG.format(x=x, k=(k,) * 3, t=(k,) * 3, d=d)


def program(*lines: str, inputs: str = INPUTS, returns: str | None = None) -> Program:
    """The lines; the last value is returned, unless ``returns`` names others."""
    last = lines[-1].split(" = ")[0] if returns is None else returns
    body = "".join(f"    {line}\n" for line in (*lines, f"return {last}"))
    return Program.parse(f"def chain({inputs}):\n{body}")[1]


def cut(*lines: str, inputs: str = INPUTS, returns: str | None = None) -> Schedule:
    made = program(*lines, inputs=inputs, returns=returns)
    found = schedule(made, examples(made))
    for part in (found.first, found.rest):
        part.verify()
    return found


def stages(made: Schedule) -> tuple[list[str], list[str], list[str]]:
    return [i.op for i in made.first.body], list(made.kernel.stages), [i.op for i in made.rest.body]


def fields(expression: Expression | None) -> list[str]:
    return [] if expression is None else [f.value for f in expression.fields if f.kind == "pointer"]


# --- the chain ------------------------------------------------------------------------------------
def test_a_convolution_alone() -> None:
    made = cut(conv())
    assert stages(made) == ([], ["conv_transpose"], [])
    assert made.kernel.before is None and made.kernel.after is None and made.kernel.combine == ""
    assert made.kernel.extents == (9, 11, 13)
    assert made.kernel.strides == (16 * 9 * 11 * 13, 9 * 11 * 13, 11 * 13, 13, 1)
    assert made.rest.outputs == ("y",)


def test_the_activation_goes_into_the_kernel() -> None:
    made = cut(conv(), "z = relu(y)")
    assert stages(made) == ([], ["conv_transpose", "relu"], [])
    assert made.kernel.stored == "z"
    assert str(made) == "one kernel: conv_transpose > relu -> f32[2, 16, 9, 11, 13]"


def test_clamp_and_div() -> None:
    made = cut(conv(), "z = clamp(y, -1.0, None)", "u = div(z, 2)")
    assert stages(made) == ([], ["conv_transpose", "clamp", "div"], [])


SCALED = "f = scale_weight(w, {}, groups=1)"


@pytest.mark.parametrize(
    ("lines", "scales", "first"),
    [
        ((SCALED.format(0.5), "c = mul(b, 0.5)", conv(w="f", b="c")), (0.5, 0.5), []),
        ((SCALED.format(-3), "c = mul(-3, b)", conv(w="f", b="c")), (-3.0, -3.0), []),
        ((SCALED.format(0.5), conv(w="f")), (0.5, 1.0), []),
        ((SCALED.format(0.5), conv(w="f", b="None")), (0.5, 1.0), []),
        ((SCALED.format(0.5), "c = add(b, 0.5)", conv(w="f", b="c")), (0.5, 1.0), ["add"]),
        ((SCALED.format(0.5), "c = mul(b, b)", conv(w="f", b="c")), (0.5, 1.0), ["mul"]),
        ((SCALED.format("b"), conv(w="f")), (1.0, 1.0), ["scale_weight"]),
        ((SCALED.format(1e-39), conv(w="f")), (1.0, 1.0), ["scale_weight"]),
        ((SCALED.format("inf"), conv(w="f")), (1.0, 1.0), ["scale_weight"]),
        (("c = mul(b, 0.5)", conv(b="c")), (1.0, 1.0), ["mul"]),
    ],
)
def test_numbers_that_the_kernel_multiplies_by(
    lines: Sequence[str], scales: tuple[float, float], first: list[str]
) -> None:
    made = cut(*lines, "z = clamp(y, -0.5, None)")
    assert made.kernel is not None and made.kernel.scales == scales
    assert stages(made) == (first, ["conv_transpose", "clamp"], [])
    if not first:
        assert made.kernel.weight == "w" and made.kernel.bias in ("b", None)


def test_a_number_before_a_pool_stays_in_the_weights() -> None:
    made = cut(SCALED.format(-0.5), conv(w="f"), f"m = {max_pool('y')}")
    assert made.kernel is not None and made.kernel.scales == (1.0, 1.0) and made.kernel.weight == "f"
    assert stages(made)[0] == ["scale_weight"]


def test_scaled_weights_that_others_read_are_made_for_them() -> None:
    made = cut(SCALED.format(0.5), conv(w="f"), "z = relu(y)", "u = relu(f)", returns="z, u")
    assert made.kernel is not None and made.kernel.scales == (0.5, 1.0) and made.kernel.weight == "w"


def test_a_norm_ends_the_chain() -> None:
    made = cut(conv(), "z = relu(y)", "u = instance_norm(z, None, None, eps=1e-05)", "v = relu(u)")
    assert stages(made) == ([], ["conv_transpose", "relu"], ["statistics", "sub", "mul", "relu"])


def test_a_scale_per_channel_is_read_by_the_kernel() -> None:
    made = cut(conv(), "z = mul(y, g)", inputs=f"{INPUTS}, g: f32[16, 1, 1, 1]")
    assert stages(made) == ([], ["conv_transpose", "mul"], [])
    assert fields(made.kernel.before) == ["g"]
    assert made.kernel.reads == ("x", "w", "b", "g")


def test_a_residual_is_read_by_the_kernel() -> None:
    made = cut(conv(), "z = add(y, r)", "u = relu(z)", inputs=f"{INPUTS}, r: f32[2, 16, 9, 11, 13]")
    assert stages(made) == ([], ["conv_transpose", "add", "relu"], [])
    assert fields(made.kernel.before) == ["r"]


def test_what_the_kernel_reads_is_made_first() -> None:
    made = cut(
        "f = scale_weight(w, g, groups=1)",
        conv(w="f"),
        "t = add(h, 1.0)",
        "z = mul(y, t)",
        "o = exp(h)",
        inputs=f"{INPUTS}, g: f32[16], h: f32[16, 1, 1, 1]",
        returns="z, o",
    )
    assert stages(made) == (["scale_weight"], ["conv_transpose", "add", "mul"], ["exp"])
    assert made.first.outputs == ("f",)
    assert fields(made.kernel.before) == ["h"]  # t is small, and computed again for every element


def test_a_value_used_twice_inside_stays_inside() -> None:
    made = cut(conv(), "s = sigmoid(y)", "z = mul(y, s)")
    assert stages(made) == ([], ["conv_transpose", "sigmoid", "mul"], [])


def test_a_value_used_elsewhere_is_stored() -> None:
    made = cut(conv(), "z = relu(y)", "u = exp(z)", "v = sum(z, dims=(1,), keepdim=True)", returns="u, v")
    assert stages(made) == ([], ["conv_transpose", "relu"], ["exp", "sum"])
    assert made.kernel.stored == "z"


def test_an_output_is_stored() -> None:
    made = cut(conv(), "z = relu(y)", "u = exp(z)", returns="z, u")
    assert stages(made) == ([], ["conv_transpose", "relu"], ["exp"])


def test_a_larger_operand_ends_the_chain() -> None:
    made = cut(
        conv(), "z = relu(y)", "u = add(z, r)", inputs=f"{INPUTS.replace('2, 8', '1, 8')}, r: f32[3, 1, 1, 1, 1]"
    )
    assert stages(made) == ([], ["conv_transpose", "relu"], ["add"])


def test_a_comparison_is_not_stored() -> None:
    made = cut(conv(), "z = relu(y)", "u = gt(z, 0.5)")
    assert stages(made) == ([], ["conv_transpose", "relu"], ["gt"])


def test_what_a_kernel_cannot_read_ends_the_chain() -> None:
    made = cut(conv(), "z = relu(y)", "u = mul(z, d)", inputs=f"{INPUTS}, d: f64[16, 1, 1, 1]")
    assert stages(made) == ([], ["conv_transpose", "relu"], ["mul"])


def test_a_cast_in_front_of_rows_is_their_kernels() -> None:
    """Half the bytes to write and to read; not in front of what no kernel reduces."""
    inputs = "x: f16[2, 8, 4, 4, 4], w: f16[8, 16, 3, 3, 3]"
    lines = ["z = relu(y)", "c = cast(z, dtype=f32)"]
    made = cut(
        conv(b="None"), *lines, "r = normalise(c, dims=(3, 4), eps=1e-5, centred=True, last=False)", inputs=inputs
    )
    assert stages(made) == ([], ["conv_transpose", "relu"], ["cast", "normalise"])
    assert made.kernel.kind.dtype is torch.float16
    made = cut(conv(b="None"), *lines, "r = vector_norm(c, ord=1.0, dims=(4,), keepdim=True)", inputs=inputs)
    assert stages(made) == ([], ["conv_transpose", "relu", "cast"], ["vector_norm"])


def test_the_stored_dtype_is_that_of_the_value() -> None:
    made = cut(conv(b="None"), "z = cast(y, dtype=f32)", inputs="x: f16[2, 8, 4, 4, 4], w: f16[8, 16, 3, 3, 3]")
    assert made.kernel.kind.dtype is torch.float32 and made.kernel.dtype is torch.float16


# --- reductions along w ---------------------------------------------------------------------------
NORM = "r = normalise({x}, dims=(4,), eps=1e-5, centred=True, last=False)"


def test_a_norm_along_w_is_the_kernels() -> None:
    """With what is in front of it and behind it, and a pool of residue classes."""
    made = cut(conv(), "z = tanh(y)", NORM.format(x="z"), "u = mul(r, 0.5)")
    assert stages(made) == ([], ["conv_transpose", "tanh", "normalise", "mul"], [])
    assert made.kernel.along.length == 13 and not made.kernel.combine and made.kernel.behind is not None
    inputs = "x: f32[2, 8, 4, 5, 6], w: f32[8, 16, 2, 2, 2], b: f32[16]"
    made = cut(conv(), NORM.format(x="y"), "u = mul(r, 0.5)", "m = " + avg_pool("u"), "v = relu(m)", inputs=inputs)
    assert stages(made) == ([], ["conv_transpose", "normalise", "mul", "avg_pool 2x2x2", "relu"], [])
    assert made.kernel.combine == "Sum" and made.kernel.factor == 1 / 8 and made.kernel.kind.shape == (2, 16, 4, 5, 6)


def test_a_pool_that_is_not_of_whole_positions_stays_behind_rows() -> None:
    """Of rows of 13 elements the last is no window's, which the norm needs all the same."""
    made = cut(conv(), NORM.format(x="y"), "m = " + avg_pool("r"))
    assert stages(made) == ([], ["conv_transpose", "normalise"], ["avg_pool"])
    made = cut(conv(), NORM.format(x="y"), "m = " + max_pool("r", 3, 2))
    assert stages(made) == ([], ["conv_transpose", "normalise"], ["max_pool"])


def test_rows_that_have_a_kernel_of_their_own() -> None:
    """Behind a pool; of a value that others read; what leaves one value; rows of h and w."""
    for lines in (
        ("z = " + max_pool("y"), NORM.format(x="z")),
        (NORM.format(x="y"), "u = amin(y, dims=(1,), keepdim=True)", "t = mul(r, u)"),
        ("r = amax(y, dims=(4,), keepdim=True)",),
        ("r = normalise(y, dims=(3, 4), eps=1e-5, centred=True, last=False)",),
    ):
        made = cut(conv(), *lines)
        assert made.kernel.along is None and made.kernel.apart is None and made.steps


def test_the_reason_why_rows_stay_apart() -> None:
    made = cut(conv(), NORM.format(x="y"), inputs="x: f32[2, 8, 4, 5, 300], w: f32[8, 16, 3, 3, 3], b: f32[16]")
    assert stages(made) == ([], ["conv_transpose"], ["normalise"])
    assert made.kernel.apart is None  # too long for any epilogue
    with mock.patch.object(cutter, "LAUNCH", -1.0):
        made = cut(conv(), NORM.format(x="y"))
    assert stages(made) == ([], ["conv_transpose"], ["normalise"])
    assert re.fullmatch(r"-?\d+ us with a kernel of its own, \d+ us without, by estimate", made.kernel.apart)


def test_rows_are_no_value_that_statistics_are_gathered_of() -> None:
    """What reduces in its epilogue gathers nothing: the statistics are a kernel's that reads what was stored."""
    norm = "n = instance_norm(r, None, None, eps=1e-5)"
    with many_chains.kernels_always():
        made = cut(conv(), NORM.format(x="y"), norm)
    assert made.kernel.along is not None and not made.kernel.gathers
    (gather,) = (s for s in made.steps if isinstance(s, Gather))
    assert gather.layout == "contiguous"


# --- pools ----------------------------------------------------------------------------------------
def test_a_pool_of_the_convolutions_stride_is_the_kernels() -> None:
    made = cut(conv(), "z = relu(y)", "m = " + max_pool("z"), "u = mul(m, 0.5)", "v = " + max_pool("u", 2))
    assert stages(made) == ([], ["conv_transpose", "relu", "max_pool 2x2x2", "mul"], ["max_pool"])
    assert (made.kernel.combine, made.kernel.factor, made.kernel.stored) == ("Maximum", 1.0, "u")
    assert made.kernel.kind.shape == (2, 16, 4, 5, 6) and made.kernel.extents == (9, 11, 13)
    assert made.kernel.before is not None and made.kernel.after is not None


def test_the_first_model() -> None:
    made = cut(conv(), "m = " + max_pool("y", 6), "s = sum(m, dims=(1,), keepdim=True)")
    assert stages(made) == ([], ["conv_transpose", "max_pool 2x2x2"], ["max_pool", "sum"])
    assert made.kernel.stored == "m_combined" and made.kernel.kind.shape == (2, 16, 3, 3, 6)
    assert dict(made.rest.body[0].attributes)["kernel"] == (3, 3, 3)
    assert str(made) == (
        "one kernel: conv_transpose > max_pool 2x2x2 -> f32[2, 16, 3, 3, 6]; "
        "then one kernel: max_pool 3x3x3 -> f32[2, 16, 1, 1, 2]; then one kernel: sum -> f32[2, 1, 1, 1, 2]"
    )


def test_what_is_pooled_in_part_is_laid_out_as_the_value() -> None:
    made = program(conv(), "m = " + max_pool("y", 6))
    x, *others = examples(made)
    found = schedule(made, [x.to(memory_format=torch.channels_last_3d), *others])
    assert found.kernel is not None and found.kernel.stored == "m_combined" and found.kernel.layout == "channels_last"


def test_a_pool_after_the_first_one_is_torchs() -> None:
    made = cut(conv(), "m = " + max_pool("y"), "n = " + max_pool("m", 3), "s = sum(n, dims=(1,), keepdim=True)")
    assert stages(made) == ([], ["conv_transpose", "max_pool 2x2x2"], ["max_pool", "sum"])
    assert made.kernel.stored == "m"


def test_means() -> None:
    made = cut(conv(), "m = " + avg_pool("y"), "z = relu(m)")
    assert stages(made) == ([], ["conv_transpose", "avg_pool 2x2x2", "relu"], [])
    assert (made.kernel.combine, made.kernel.factor) == ("Sum", 1 / 8)
    made = cut(conv(), "m = " + avg_pool("y", 4))
    assert stages(made) == ([], ["conv_transpose", "avg_pool 2x2x2"], ["avg_pool"])
    assert made.kernel.kind.shape == (2, 16, 4, 4, 6)


@pytest.mark.parametrize(
    ("pool", "sizes"),
    [(max_pool("y", 4, 4, 2), (5, 5, 7)), (max_pool("y", 2, c=True), (5, 6, 7)), (max_pool("y", 4, 2), (4, 5, 6))],
    ids=["padding", "ceil", "overlap"],
)
def test_maxima_of_more_kinds(pool: str, sizes: tuple[int, ...]) -> None:
    made = cut(conv(), f"m = {pool}")
    assert made.kernel.combine == "Maximum"
    assert made.kernel.kind.shape == (2, 16, *sizes)


@pytest.mark.parametrize(
    "pool",
    [
        max_pool("y", 3),
        max_pool("y", 4, 3),
        max_pool("y", 4, 2, 1),
        max_pool("y", 2).replace("dilation=(1, 1, 1)", "dilation=(2, 2, 2)"),
        avg_pool("y", 2, d=3),
        avg_pool("y").replace("padding=(0, 0, 0)", "padding=(1, 1, 1)"),
        avg_pool("y").replace("ceil_mode=False", "ceil_mode=True"),
        "adaptive_avg_pool(y, size=(2, 2, 2))",
    ],
)  # fmt: skip
def test_other_pools_are_torchs(pool: str) -> None:
    made = cut(conv(), f"m = {pool}", "z = relu(m)")
    assert stages(made) == ([], ["conv_transpose"], [pool.split("(")[0], "relu"])


def test_a_convolution_of_stride_one_has_nothing_to_combine() -> None:
    assert stages(cut(conv(s="(1, 1, 1)"), "m = " + max_pool("y")))[1] == ["conv_transpose"]


def test_dims_of_stride_one() -> None:
    made = cut(conv(s="(1, 2, 2)"), "m = " + max_pool("y"))
    assert stages(made) == ([], ["conv_transpose", "max_pool 1x2x2"], ["max_pool"])
    assert dict(made.rest.body[0].attributes)["kernel"] == (2, 1, 1)


def test_an_adaptive_pool_of_equal_windows() -> None:
    line = conv().replace("output_padding=(0, 0, 0)", "output_padding=(1, 1, 1)")  # 10, 12, 14
    assert stages(cut(line, "m = adaptive_avg_pool(y, size=(5, 6, 7))")) == (
        [], ["conv_transpose", "adaptive_avg_pool 2x2x2"], [],
    )  # fmt: skip
    made = cut(line, "m = adaptive_max_pool(y, size=(1, 1, 1))")
    assert stages(made) == ([], ["conv_transpose", "max_pool 2x2x2"], ["amax"])


@pytest.mark.parametrize(
    "line",
    ["amax(z, dims=(2, 3, 4), keepdim=True)", "amax(z, dims=(0, 2, 3, 4), keepdim=False)",
     "amax(z, dims=(1, 2, 3, 4), keepdim=False)", "adaptive_max_pool(z, size=(1, 1, 1))"],
)  # fmt: skip
def test_a_maximum_over_all_of_space_is_one_of_positions_first(line: str) -> None:
    """9, 11 and 13 outputs: the last windows have one."""
    made = cut(conv(), "z = exp(y)", f"m = {line}")
    assert stages(made) == ([], ["conv_transpose", "exp", "max_pool 2x2x2"], ["amax"])
    assert made.kernel.combine == "Maximum" and made.kernel.kind.shape == (2, 16, 5, 6, 7)


@pytest.mark.parametrize(
    "line",
    ["amax(y, dims=(2, 3), keepdim=True)", "amin(y, dims=(2, 3, 4), keepdim=True)",
     "adaptive_max_pool(y, size=(1, 1, 2))", "max(y, dim=2, keepdim=True)"],
)  # fmt: skip
def test_other_maxima_are_not(line: str) -> None:
    assert stages(cut(conv(), f"m = {line}")) == ([], ["conv_transpose"], [line.split("(")[0]])


def test_a_pool_that_others_share_is_torchs() -> None:
    made = cut(conv(), "m = " + max_pool("y"), "n = " + max_pool("y", 4), returns="m, n")
    assert stages(made) == ([], ["conv_transpose"], ["max_pool", "max_pool"])


# --- reductions over channels ---------------------------------------------------------------------
def test_a_softmax_and_the_chain_behind_it() -> None:
    made = cut(conv(), "z = relu(y)", "u = softmax(z, dim=1)", "v = sigmoid(u)", "t = mul(v, g)",
               inputs=f"{INPUTS}, g: f32[16, 1, 1, 1]")  # fmt: skip
    assert stages(made) == ([], ["conv_transpose", "relu", "softmax", "sigmoid", "mul"], [])
    assert made.kernel.fold == Fold("Softmax", 16) and not made.kernel.squeezed and made.kernel.apart is None
    assert fields(made.kernel.behind) == ["g"] and fields(made.kernel.before) == []
    assert made.kernel.reads == ("x", "w", "b", "g") and made.kernel.kind.shape == (2, 16, 9, 11, 13)
    assert str(made) == "one kernel: conv_transpose > relu > softmax > sigmoid > mul -> f32[2, 16, 9, 11, 13]"


@pytest.mark.parametrize("op", ["sum", "mean", "amax", "amin", "logsumexp"])
def test_one_value_of_all_channels(op: str) -> None:
    made = cut(conv(), f"u = {op}(y, dims=(1,), keepdim=True)", "v = relu(u)")
    assert stages(made) == ([], ["conv_transpose", op, "relu"], [])
    assert made.kernel.kind.shape == (2, 1, 9, 11, 13) and made.kernel.sizes == made.kernel.extents == (9, 11, 13)
    made = cut(conv(), f"u = {op}(y, dims=(1,), keepdim=False)", "v = mul(u, r)", inputs=f"{INPUTS}, r: f32[9, 1, 13]")
    assert stages(made) == ([], ["conv_transpose", op, "mul"], [])
    assert made.kernel.squeezed and made.kernel.layout == "contiguous"
    assert made.kernel.kind.shape == (2, 9, 11, 13) and made.kernel.sizes == (9, 11, 13)


def test_maxima_with_indices_nobody_wants() -> None:
    for op, combine in (("max", "Maximum"), ("min", "Minimum")):
        assert cut(conv(), f"u = {op}(y, dim=1, keepdim=True)").kernel.fold == Fold(combine, 16)


def test_a_reduction_behind_a_pool() -> None:
    made = cut(conv(), "m = " + max_pool("y"), "z = relu(m)", "s = sum(z, dims=(1,), keepdim=False)", "v = exp(s)")
    assert stages(made) == ([], ["conv_transpose", "max_pool 2x2x2", "relu", "sum", "exp"], [])
    assert made.kernel.kind.shape == (2, 4, 5, 6) == (2, *made.kernel.sizes)
    # of half a pool there is nothing to reduce yet
    made = cut(conv(), "m = " + max_pool("y", 4), "s = sum(m, dims=(1,), keepdim=True)")
    assert made.kernel.fold is None and stages(made)[2] == ["max_pool", "sum"]


def test_a_reduction_of_what_others_need() -> None:
    made = cut(conv(), "z = relu(y)", "u = softmax(z, dim=1)", "v = mul(z, g)", "t = mul(u, v)",
               inputs=f"{INPUTS}, g: f32[16, 1, 1, 1]")  # fmt: skip
    assert stages(made) == ([], ["conv_transpose", "relu"], ["softmax", "mul", "mul"])
    assert made.kernel.stored == "z" and made.kernel.apart is None
    made = cut(conv(), "u = softmax(y, dim=1)", "v = exp(u)", returns="u, v")
    assert stages(made) == ([], ["conv_transpose", "softmax"], ["exp"])


def test_what_is_laid_out_without_channels_stays_so() -> None:
    """In a tensor of (N, D, H, W), D is no dim of channels that could be the fastest."""
    made = cut(conv(), "s = sum(y, dims=(1,), keepdim=False)", "u = amax(s, dims=(1,), keepdim=True)")
    assert made.kernel.strides == (9 * 11 * 13, 11 * 13, 13, 1)


def test_a_row_of_values_without_channels() -> None:
    """A (N, W) tensor has no expression of its own."""
    line = conv().replace("(2, 2, 2)", "(2,)").replace("(0, 0, 0)", "(0,)").replace("(1, 1, 1)", "(1,)")
    made = cut(line, "s = sum(y, dims=(1,), keepdim=False)", "u = relu(s)",
               inputs="x: f32[2, 8, 6], w: f32[8, 16, 3], b: f32[16]")  # fmt: skip
    assert stages(made) == ([], ["conv_transpose", "sum"], ["relu"])
    assert made.kernel.sizes == (1, 1, 13)


@pytest.mark.parametrize(
    ("text", "exact", "reason"),
    [
        ("x: f32[2, 8, 4, 5, 6], w: f32[8, 8, 3, 3, 3], b: f32[16]", False,
         "2 groups of channels lie in as many tiles"),
        ("x: f32[2, 8, 4, 5, 6], w: f32[8, 300, 3, 3, 3], b: f32[300]", False,
         "300 channels have more accumulators than a tile holds (256 channels)"),
        ("x: f32[2, 8, 4, 5, 6], w: f32[8, 200, 3, 3, 3], b: f32[200]", True,
         "200 channels of two neighbours have more accumulators than a tile holds"),
        ("x: f32[2, 8, 4, 5, 6], w: f32[8, 300, 3, 3, 3], b: f32[300]", True,
         "300 channels have more accumulators than a tile holds (256 channels)"),
        ("x: f32[2, 8, 4, 5, 6], w: f32[8, 200, 3, 3, 3], b: f32[200]", False,
         "200 channels of two neighbours have more accumulators than a tile holds"),
        ("x: f16[2, 8, 4, 5, 6], w: f16[8, 200, 3, 3, 3], b: f16[200]", True,
         "200 channels of two neighbours have more accumulators than a tile holds"),
    ],
    ids=["groups", "300", "exact", "300 exact", "neighbours", "f16"],
)  # fmt: skip
def test_channels_that_no_tile_holds(text: str, exact: bool, reason: str) -> None:
    line = conv().replace("groups=1", "groups=2") if "groups of" in reason else conv()
    made = program(line, "u = softmax(y, dim=1)", "v = relu(u)", inputs=text)
    found = schedule(made, examples(made), exact=exact)
    assert stages(found) == ([], ["conv_transpose"], ["softmax", "relu"])
    assert found.kernel is not None and found.kernel.fold is None and found.kernel.apart == reason


def test_one_value_of_two_neighbours_is_held() -> None:
    """What is stored in one place per position asks for no pairs."""
    made = cut(conv(), "u = logsumexp(y, dims=(1,), keepdim=True)",
               inputs="x: f32[2, 8, 4, 5, 6], w: f32[8, 200, 3, 3, 3], b: f32[200]")  # fmt: skip
    assert made.kernel.fold == Fold("LogSumExp", 200)


def test_statistics_of_a_softmax_are_read_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("stages.tail", "planning.schedule"):
        monkeypatch.setattr(f"fxfuse.kernels.{module}.LEAST_ELEMENTS", 1)
    made = cut(conv(), "u = softmax(y, dim=1)", "v = instance_norm(u, None, None, eps=1e-05)")
    assert made.kernel.fold is not None and made.kernel.keeps and not made.kernel.gathers
    assert "statistics of u, one pass over u" in str(made)


# --- fewer dims, layouts --------------------------------------------------------------------------
def test_two_dims() -> None:
    made = cut(
        "y = conv_transpose(x, w, None, stride=(2, 2), padding=(1, 1), output_padding=(0, 0), dilation=(1, 1),"
        " groups=2)",
        "m = max_pool(y, kernel=(2, 4), stride=(2, 4), padding=(0, 0), dilation=(1, 1), ceil_mode=False)",
        inputs="x: f32[2, 8, 5, 9], w: f32[8, 3, 4, 4]",
    )
    layer = made.kernel.layer
    assert (layer.in_channels, layer.out_channels, layer.groups) == (4, 3, 2)
    assert (layer.kernel, layer.stride, layer.padding) == ((1, 4, 4), (1, 2, 2), (0, 1, 1))
    assert made.kernel.extents == (1, 10, 18) and made.kernel.kind.shape == (2, 6, 5, 8)
    assert stages(made)[2] == ["max_pool"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layouts_are_as_torch_has_them(layout: str) -> None:
    made = program(conv(), "z = relu(y)", "m = " + max_pool("z", 6))
    inputs = examples(made)
    memory = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}[layout]
    inputs[0] = torch.empty(2, 8, 4, 5, 6, device="meta").to(memory_format=memory)
    found = schedule(made, [torch.empty_strided(t.shape, t.stride()) for t in inputs])
    assert found.kernel.layout == layout
    assert sorted(found.kernel.strides)[0] == 1 and found.kernel.strides.index(1) == (
        4 if layout == "contiguous" else 1
    )


def test_strides_of_one_sample_are_no_reason_for_torch() -> None:
    """Torch gives channels_last_3d any strides along dims of one element; a norm's are others than a map's."""
    norm = "z = group_norm(y, b, b, groups=4, eps=1e-5)"
    made = program(conv(), norm, "r = relu(z)", inputs=INPUTS.replace("x: f32[2,", "x: f32[1,"))
    inputs = examples(made)
    inputs[0] = torch.empty(1, 8, 4, 5, 6, device="meta").to(memory_format=torch.channels_last_3d)
    with mock.patch.object(torch._C, "_conv_determine_backend_memory_format", many_chains._as_cudnn):
        found = schedule(made, [torch.empty_strided(t.shape, t.stride()) for t in inputs])
    assert found.kernel.layout == "channels_last" and not any(isinstance(s, Torch) for s in found.steps)
    assert "then one kernel: sub > mul > mul > add > relu -> f32[1, 16, 9, 11, 13]" in str(found)


def test_a_norm_of_what_a_pool_leaves_is_a_kernel() -> None:
    """What is small among the values behind the convolution is: not what is small beside its input."""
    norm = "z = group_norm(m, b, b, groups=4, eps=1e-5)"
    inputs = "x: f32[2, 256, 12, 12, 12], w: f32[256, 16, 3, 3, 3], b: f32[16]"
    made = cut(conv(s="(1, 1, 1)"), "u = silu(y)", "m = " + avg_pool("u", 3), norm, inputs=inputs)
    assert 256 * 12**3 > 64 * 16 * 4**3  # the input is that much larger than what is normalised
    assert [type(s) for s in made.steps] == [Map, Gather, Map]


# --- the three parts together ---------------------------------------------------------------------
def test_the_parts_are_complete() -> None:
    """Every name that a part reads is there when it runs."""
    made = cut(
        "f = scale_weight(w, g, groups=1)", conv(w="f"), "z = mul(y, r)", "m = " + max_pool("z", 4), "u = add(m, e)",
        "e2 = exp(e)", inputs=f"{INPUTS}, g: f32[16], r: f32[16, 1, 1, 1], e: f32[1]", returns="u, e2, f",
    )  # fmt: skip
    known = {"x", "w", "b", "g", "r", "e"}
    assert {n for n, _ in made.first.inputs} <= known
    known |= set(made.first.outputs)
    assert set(made.kernel.reads) <= known
    assert {n for n, _ in made.rest.inputs} <= known | {made.kernel.stored}
    assert made.rest.outputs == ("u", "e2", "f")


# --- refusals -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lines", "inputs", "reason"),
    [
        ((conv(),), INPUTS.replace("2, 8, 4, 5, 6", "8, 4, 5, 6"), "the convolution's input has no batch dim"),
        ((conv(),), INPUTS.replace("f32", "f64"), "no kernel convolves f64[2, 8, 4, 5, 6] with f64[8, 16, 3, 3, 3]"),
        ((conv(),), INPUTS.replace("2, 8, 4", "0, 8, 4"), "there is nothing to compute"),
        ((conv(),), INPUTS.replace("2, 8, 4", "2, 8, _"), "sizes are not known before the call"),
        (("z = relu(x)",), INPUTS, "nothing of the convolution is left"),
        ((conv(), "z = " + conv()[4:], "u = add(y, z)"), INPUTS, "2 convolutions in one chain"),
        ((conv(),), INPUTS.replace("2, 8, 4", "70000, 8, 4"), "is too large for 32-bit positions"),
        ((conv(),), INPUTS.replace("2, 8, 4, 5, 6", "1, 8, 1000, 1000, 1000"), "is too large for 32-bit positions"),
        ((conv(),), INPUTS.replace("2, 8, 4, 5, 6", "1, 8, 300, 300, 300"), "is too large for 32-bit positions"),
        ((conv(),), INPUTS.replace("b: f32", "b: f64"), "no kernel adds a bias of torch.float64"),
    ],
)  # fmt: skip
def test_refusals(lines: tuple[str, ...], inputs: str, reason: str) -> None:
    with pytest.raises(Unscheduled) as refusal:
        cut(*lines, inputs=inputs)
    assert reason in str(refusal.value)


# --- with the rest of the compiler ----------------------------------------------------------------
def test_a_model_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "slower", lambda *_: None)
    model = nn.Sequential(nn.ConvTranspose3d(4, 8, 3, stride=2), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2)).eval()
    region = fxfuse.explain(model, torch.randn(1, 4, 5, 5, 5)).regions[0].region
    line = execute.describe(region)
    assert "one kernel: conv_transpose > max_pool 2x2x2 > relu -> f32[1, 8, 5, 5, 5]" in line
    mean = nn.Sequential(nn.ConvTranspose3d(4, 8, 3), nn.AdaptiveAvgPool3d(1)).eval()
    region = fxfuse.explain(mean, torch.randn(1, 4, 5, 5, 5)).regions[0].region
    line = execute.describe(region)
    assert line.startswith("then one kernel: tap_sums of x0") and line.endswith("(nothing of the convolution is left)")


def test_a_cpu_call_takes_no_kernel() -> None:
    made = program(conv(), "z = relu(y)")
    assert execute.run(Region(made, made), [torch.zeros(t.shape) for t in examples(made)]) is None
