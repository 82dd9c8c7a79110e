"""Norms and means taken apart: the same values as torch's operators, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from harness import program

from fxfuse import vocabulary
from fxfuse.instr import Ref, TensorType
from fxfuse.kernels.codegen.chains import needed_by
from fxfuse.kernels.stages.norms import split_norms
from fxfuse.program import Program

INPUTS = "x: {0}[3, 6, 4, 5, 2], w: {1}[6], b: {1}[6], m: {1}[6], v: {1}[6], lw: {1}[6, 4, 5, 2]"
INPUTS += ", sw: {1}[4, 5, 2], rw: {1}[2], rb: {1}[2], hw: {1}[5, 2]"
LAST, FIRST = "t = permute(x, dims=(0, 2, 3, 4, 1))", "y = permute(u, dims=(0, 4, 1, 2, 3))"
FLAT, BACK = "t = reshape(x, shape=(3, 6, 40))", "y = reshape(u, shape=(3, 6, 4, 5, 2))"
SPLIT = {
    "group_norm": "y = group_norm(x, w, b, groups=3, eps=1e-3)\ny",
    "group_norm_plain": "y = group_norm(x, None, None, groups=2, eps=1e-3)\ny",
    "instance_norm": "y = instance_norm(x, w, b, eps=1e-3)\ny",
    "layer_norm": "y = layer_norm(x, lw, None, shape=(6, 4, 5, 2), eps=1e-3)\ny",
    "layer_norm_over_space": "y = layer_norm(x, sw, sw, shape=(4, 5, 2), eps=1e-3)\ny",
    "layer_norm_over_rows": "y = layer_norm(x, rw, rb, shape=(2,), eps=1e-3)\ny",
    "plain_layer_norm_over_rows": "y = layer_norm(x, None, None, shape=(2,), eps=1e-3)\ny",
    "layer_norm_over_two_dims": "y = layer_norm(x, None, hw, shape=(5, 2), eps=1e-3)\ny",
    "rms_norm": "y = rms_norm(x, lw, shape=(6, 4, 5, 2), eps=1e-3)\ny",
    "rms_norm_over_space": "y = rms_norm(x, None, shape=(4, 5, 2), eps=1e-3)\ny",
    "rms_norm_over_rows": "y = rms_norm(x, rw, shape=(2,), eps=1e-3)\ny",
    "layer_norm_over_channels": f"{LAST}\nu = layer_norm(t, w, b, shape=(6,), eps=1e-3)\n{FIRST}\ny",
    "plain_layer_norm_over_channels": f"{LAST}\nu = layer_norm(t, None, None, shape=(6,), eps=1e-3)\n{FIRST}\ny",
    "rms_norm_over_channels": f"{LAST}\nu = rms_norm(t, w, shape=(6,), eps=1e-3)\n{FIRST}\ny",
    "softmax_over_space": f"{FLAT}\nu = softmax(t, dim=2)\n{BACK}\ny",
    "log_softmax_over_space": f"{FLAT}\nu = log_softmax(t, dim=2)\n{BACK}\ny",
    "batch_norm": "y = batch_norm(x, m, v, w, b, eps=1e-3)\ny",
    "batch_norm_plain": "y = batch_norm(x, m, v, None, None, eps=1e-3)\ny",
    "batch_norm_batch": "y = batch_norm_batch(x, w, None, eps=1e-3)\ny",
    "batch_norm_train": "y, a, c = batch_norm_train(x, w, b, eps=1e-3)\ny, a, c",
    "mean": "y = mean(x, dims=(2, 3, 4), keepdim=False)\ny",
    "mean_of_all_samples": "y = mean(x, dims=(0, 2, 3, 4), keepdim=True)\ny",
    "sum": "y = sum(x, dims=(2, 3, 4), keepdim=True)\ny",
    "mean_over_channels_too": "y = mean(x, dims=(1, 2, 3, 4), keepdim=False)\ny",
    "mean_of_everything": "y = mean(x, dims=(0, 1, 2, 3, 4), keepdim=False)\ny",
    "sum_of_everything": "y = sum(x, dims=(0, 1, 2, 3, 4), keepdim=True)\ny",
    "var": "y = var(x, dims=(2, 3, 4), correction=1, keepdim=True)\ny",
    "var_of_all_samples": "y = var(x, dims=(0, 2, 3, 4), correction=0, keepdim=False)\ny",
    "std": "y = std(x, dims=(2, 3, 4), correction=2.5, keepdim=False)\ny",
    "std_over_channels_too": "y = std(x, dims=(1, 2, 3, 4), correction=1, keepdim=True)\ny",
    "length": "y = vector_norm(x, ord=2.0, dims=(2, 3, 4), keepdim=False)\ny",
    "length_of_everything": "y = vector_norm(x, ord=2, dims=(0, 1, 2, 3, 4), keepdim=False)\ny",
    "adaptive_max_pool": "y = adaptive_max_pool(x, size=(1, 1, 1))\ny",
    "adaptive_avg_pool": "y = adaptive_avg_pool(x, size=(1, 1, 1))\ny",
}
LEFT = {
    "a_layer_norm_of_everything": "y = layer_norm(x, None, None, shape=(3, 6, 4, 5, 2), eps=1e-3)\ny",
    "a_layer_norm_of_other_dims": f"{LAST}\nu = layer_norm(t, None, None, shape=(2, 6), eps=1e-3)\n{FIRST}\ny",
    "a_layer_norm_that_stays_turned": f"{LAST}\nu = layer_norm(t, w, None, shape=(6,), eps=1e-3)\nu",
    "a_layer_norm_that_is_turned_on": (
        f"{LAST}\nu = layer_norm(t, w, None, shape=(6,), eps=1e-3)\ny = permute(u, dims=(0, 4, 3, 2, 1))\ny"
    ),
    "a_layer_norm_that_is_read_turned": f"{LAST}\nu = layer_norm(t, w, None, shape=(6,), eps=1e-3)\n{FIRST}\ny, u",
    "a_layer_norm_whose_value_is_read_turned": (
        f"{LAST}\nu = layer_norm(t, w, None, shape=(6,), eps=1e-3)\n{FIRST}\nz = neg(t)\ny, z"
    ),
    "a_layer_norm_of_another_dim": (
        "t = permute(x, dims=(0, 1, 2, 4, 3))\nu = layer_norm(t, None, None, shape=(5,), eps=1e-3)\n"
        "y = permute(u, dims=(0, 1, 2, 4, 3))\ny"
    ),
    "a_softmax_of_other_dims": f"{FLAT}\nu = softmax(t, dim=1)\n{BACK}\ny",
    "a_softmax_over_mixed_dims": (f"t = reshape(x, shape=(3, 3, 80))\nu = softmax(t, dim=2)\n{BACK}\ny"),
    "a_softmax_that_stays_flat": f"{FLAT}\nu = softmax(t, dim=2)\nu",
    "a_relu_between_reshapes": f"{FLAT}\nu = relu(t)\n{BACK}\ny",
    "a_partial_mean": "y = mean(x, dims=(2, 3), keepdim=False)\ny",
    "a_length_of_what_others_read": "y = vector_norm(x, ord=2.0, dims=(2, 3, 4), keepdim=True)\nz = mul(x, y)\nz",
    "an_epsilon_beyond_float32": "y = layer_norm(x, None, None, shape=(2,), eps=1e39)\ny",
    "a_variance_of_rows": "y = var(x, dims=(3, 4), correction=1, keepdim=True)\ny",
    "a_variance_without_freedom": "y = var(x, dims=(2, 3, 4), correction=40, keepdim=True)\ny",
    "a_sum_of_magnitudes": "y = vector_norm(x, ord=1.0, dims=(2, 3, 4), keepdim=False)\ny",
    "a_maximum_of_windows": "y = adaptive_max_pool(x, size=(1, 2, 1))\ny",
    "a_pool": "y = adaptive_avg_pool(x, size=(1, 1, 2))\ny",
    "softmax": "y = softmax(x, dim=1)\ny",
}


#: of values that are gathered on the way; what is left of x's readers
GATHERED = {
    "softmax": (f"{FLAT}\nu = softmax(t, dim=2)\n{BACK}\ny", ["exponentials", "exp_below"]),
    "log_softmax": (f"{FLAT}\nu = log_softmax(t, dim=2)\n{BACK}\ny", ["exponentials", "sub"]),
    "logsumexp": ("y = logsumexp(x, dims=(2, 3, 4), keepdim=False)\ny", ["exponentials"]),
    "amax": ("y = amax(x, dims=(2, 3, 4), keepdim=True)\ny", ["extremes"]),
    "amin": ("y = amin(x, dims=(2, 3, 4), keepdim=False)\ny", ["extremes"]),
    "adaptive_max_pool": ("y = adaptive_max_pool(x, size=(1, 1, 1))\ny", ["extremes"]),
    "three_of_them": (
        "y = amax(x, dims=(2, 3, 4), keepdim=True)\nz = amin(x, dims=(2, 3, 4), keepdim=True)\n"
        "q = logsumexp(x, dims=(2, 3, 4), keepdim=True)\ny, z, q",
        ["extremes", "exponentials"],
    ),
}
#: what is none of all of space
NOT_GATHERED = {
    "a_maximum_over_rows": "y = amax(x, dims=(4,), keepdim=True)\ny",
    "a_maximum_over_channels_too": "y = amax(x, dims=(1, 2, 3, 4), keepdim=True)\ny",
    "a_maximum_over_samples_too": "y = amax(x, dims=(0, 2, 3, 4), keepdim=True)\ny",
    "a_maximum_over_one_dim": "y = max(x, dim=2, keepdim=True)\ny",
    "a_logsumexp_over_planes": "y = logsumexp(x, dims=(3, 4), keepdim=False)\ny",
    "a_softmax_over_rows": "y = softmax(x, dim=4)\ny",
    "a_window_per_plane": "y = adaptive_max_pool(x, size=(None, 1, 1))\ny",
}


def made(body: str, dtype: str = "f32", parameters: str | None = None) -> Program:
    return program(INPUTS.format(dtype, parameters or dtype), body)


def types_of(original: Program) -> dict[str, TensorType]:
    tensors = [torch.empty([s or 0 for s in k.shape], dtype=k.dtype) for _, k in original.inputs]
    values = dict(zip((n for n, _ in original.inputs), tensors, strict=True))
    for instr in original.body:
        results = vocabulary.lookup(instr.op)(
            *(values[o.name] if isinstance(o, Ref) else o for o in instr.operands), **dict(instr.attributes)
        )
        results = results if isinstance(results, tuple) else (results,)
        values.update(zip(instr.outs, results, strict=True))
    return {n: TensorType(t.dtype, tuple(t.shape)) for n, t in values.items()}


def split(original: Program) -> Program:
    found = split_norms(original, types_of(original), lambda name: name == "x")
    found.verify()
    return found


def inputs(original: Program, offset: float = 0.0) -> list[torch.Tensor]:
    torch.manual_seed(0)
    tensors = [torch.rand([s or 0 for s in k.shape]) + 0.5 for _, k in original.inputs]
    tensors[0] = torch.randn(tensors[0].shape) + offset
    return [t.to(k.dtype) for t, (_, k) in zip(tensors, original.inputs, strict=True)]


@pytest.mark.parametrize(("dtype", "parameters"), [("f32", "f32"), ("f16", "f16"), ("bf16", "bf16"), ("f16", "f32")])
@pytest.mark.parametrize("name", SPLIT)
def test_values_are_torchs(name: str, dtype: str, parameters: str) -> None:
    original = made(SPLIT[name], dtype, parameters)
    tensors = inputs(original)
    try:
        expected = original.run(tensors)
    except RuntimeError:
        pytest.skip("torch has no such kernel on a CPU")
    after = split(original)
    taken = {"group_norm", "instance_norm", "layer_norm", "rms_norm", "softmax", "log_softmax", "mean", "sum"}
    taken |= {"var", "std", "vector_norm", "adaptive_max_pool", "adaptive_avg_pool"}
    assert not taken & {i.op for i in after.body}
    found = after.run(tensors)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype is b.dtype and a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=tolerance[a.dtype], atol=tolerance[a.dtype])


def split_gathered(original: Program) -> Program:
    found = split_norms(original, types_of(original), lambda name: name == "x", lambda name: name == "x")
    found.verify()
    return found


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", GATHERED)
def test_what_is_gathered_of_all_of_space(name: str, dtype: str) -> None:
    text, readers = GATHERED[name]
    original = made(text, dtype)
    after = split_gathered(original)
    assert [i.op for i in after.body if "x" in i.reads()] == readers
    for odd in (None, torch.inf, -torch.inf, torch.nan):
        tensors = inputs(original)
        if odd is not None:
            tensors[0][1, 2, 0, 0, 0], tensors[0][0, 1] = odd, -torch.inf
        for a, b in zip(after.run(tensors), original.run(tensors), strict=True):
            tolerance = {"f32": 1e-5, "f16": 2e-3, "bf16": 2e-2}[dtype]
            assert a.shape == b.shape and a.dtype is b.dtype and a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", NOT_GATHERED)
def test_what_is_not_of_all_of_space_is_left_alone(name: str) -> None:
    original = made(NOT_GATHERED[name])
    assert split_gathered(original) == original


def test_a_softmax_over_the_only_dim_of_space_is_gathered() -> None:
    original = program("x: f32[3, 6, 40]", "y = softmax(x, dim=2)\nz = max(x, dim=2, keepdim=False)\ny, z")
    after, tensors = split_gathered(original), inputs(original)
    assert [i.op for i in after.body if "x" in i.reads()] == ["exponentials", "exp_below", "extremes"]
    for a, b in zip(after.run(tensors), original.run(tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LEFT)
def test_what_has_another_form_is_left_alone(name: str) -> None:
    original = made(LEFT[name])
    assert split(original) == original


def test_only_wanted_values() -> None:
    original = made(SPLIT["group_norm"])
    assert split_norms(original, types_of(original), lambda name: name == "z") == original


def test_the_mean_of_what_is_centred_needs_no_centred_values() -> None:
    original = made("c, a, s, u = centre(x)\ny = mean(c, dims=(2, 3, 4), keepdim=True)\ny, a, s, u")
    after = split(original)
    tensors = inputs(original, offset=3.0)
    for a, b in zip(after.run(tensors), original.run(tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    readers = [i.op for i in after.body if "x" in i.reads()]
    assert readers == ["statistics", "statistics"]  # nobody reads what is centred


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize(
    "norm",
    [
        "batch_norm_batch(x, w, b, eps=1e-3)", "group_norm(x, w, None, groups=2, eps=1e-3)",
        "instance_norm(x, None, b, eps=1e-3)", "batch_norm(x, m, v, w, b, eps=1e-3)",
    ],
)  # fmt: skip
def test_the_mean_of_what_is_normalised_is_made_of_statistics(norm: str, dtype: str) -> None:
    original = made(f"y = {norm}\nu = mul(y, 0.5)\nz = sub(u, 3)\nq = mean(z, dims=(2, 3, 4), keepdim=True)\nq", dtype)
    tensors = inputs(original, offset=2.0)
    truth = [t.double() for t in tensors]
    wide = made(str(original).split("\n", 1)[1].replace("    ", "").replace("return ", "").strip(), "f64")
    after = split(original)
    (found,), (expected,) = after.run(tensors), wide.run(truth)
    tolerance = {"f32": 1e-5, "f16": 2e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert {i.op for i in needed_by(after.body, after.outputs) if "x" in i.reads()} == {"statistics"}


def test_steps_that_vary_in_space_are_none() -> None:
    lines = [
        "y = layer_norm(x, lw, None, shape=(6, 4, 5, 2), eps=1e-3)",
        "q = mean(y, dims=(2, 3, 4), keepdim=True)",
        "q",
    ]
    original = made("\n".join(lines))
    after, tensors = split(original), inputs(original)
    torch.testing.assert_close(after.run(tensors)[0], original.run(tensors)[0], rtol=1e-5, atol=1e-5)


def test_an_infinite_length_stays_infinite() -> None:
    """Of Inf and -Inf, too, whose mean is NaN."""
    original = made(SPLIT["length"])
    tensors = inputs(original)
    tensors[0][1, 2, 0, 0, 0], tensors[0][1, 2, 1, 0, 0], tensors[0][0, 1, 0, 0, 0] = torch.inf, -torch.inf, torch.nan
    (found,), (expected,) = split(original).run(tensors), original.run(tensors)
    assert found[1, 2] == torch.inf and found[0, 1].isnan()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("line", ["vector_norm(x, ord=2.0, dims=(2,), keepdim=True)", "softmax(x, dim=2)"])
def test_one_number_has_no_length_but_its_magnitude(line: str) -> None:
    original = program("x: f32[2, 3, 1]", f"y = {line}\ny")
    types = {"x": TensorType(torch.float32, (2, 3, 1)), "y": TensorType(torch.float32, (2, 3, 1))}
    assert split_norms(original, types, lambda _: True) == original


@pytest.mark.parametrize(
    ("shape", "dtype", "kernel"),
    [((2, 3, 4, 128, 128), "f32", False), ((8, 4, 4, 128, 128), "f32", True), ((1, 2, 2, 50, 50), "f16", False),
     ((8, 4, 4, 129, 128), "f32", False), ((1, 2, 2, 30, 30), "f16", True)],
)  # fmt: skip
def test_rows_that_no_kernel_takes_are_torchs(shape: tuple[int, ...], dtype: str, kernel: bool) -> None:
    """Of more elements than threads hold, or too few of them for a GPU: torch has one kernel for all of a norm."""
    sizes = ", ".join(map(str, shape))
    original = program(f"x: {dtype}[{sizes}]", f"y = layer_norm(x, None, None, shape={shape[3:]}, eps=1e-3)\ny")
    types = {n: TensorType(original.inputs[0][1].dtype, shape) for n in "xy"}
    found = split_norms(original, types, lambda _: True)
    assert any(i.op == "normalise" for i in found.body) == kernel
    assert kernel or found == original


def test_an_rms_norm_whose_epsilon_is_torchs_own() -> None:
    """float32's, of float32; of narrow numbers it depends on the version of torch, and torch is asked."""
    body = "y = rms_norm(x, rw, shape=(2,), eps=None)\ny"
    original = made(body)
    tensors = [t * 1e-4 for t in inputs(original)]
    torch.testing.assert_close(split(original).run(tensors)[0], original.run(tensors)[0], rtol=1e-5, atol=0)
    assert [i.op for i in split(original).body] == ["normalise", "mul"]
    assert split(made(body, "f16")) == made(body, "f16")


@pytest.mark.parametrize("rank", [1, 2])
def test_weights_of_fewer_dims_than_three_vary_in_space_too(rank: int) -> None:
    """The mean of (x - m) * s * w, with a w for each place, is not (mean of x - m) * s * w."""
    sizes = (4, 5)[:rank]
    shape, dims = str((6, *sizes)), str(tuple(range(2, 2 + rank)))
    original = program(
        f"x: f32[{', '.join(map(str, (3, 6, *sizes)))}], w: f32[{shape[1:-1]}]",
        f"y = layer_norm(x, w, None, shape={shape}, eps=1e-3)\nq = mean(y, dims={dims}, keepdim=True)\nq",
    )
    tensors = inputs(original)
    torch.testing.assert_close(split(original).run(tensors)[0], original.run(tensors)[0], rtol=1e-5, atol=1e-5)


def test_statistics_of_one_value_are_made_once() -> None:
    original = made("y = instance_norm(x, w, b, eps=1e-3)\nz = instance_norm(x, None, None, eps=1e-3)\ny, z")
    assert [i.op for i in split(original).body].count("statistics") == 1


def test_an_infinite_mean_stays_infinite() -> None:
    original = made(SPLIT["mean"])
    tensors = inputs(original)
    tensors[0][1, 2, 0, 0, 0] = torch.inf
    (found,) = split(original).run(tensors)
    assert found[1, 2] == torch.inf and found.isinf().sum() == 1


def test_one_value_per_channel_is_left_to_torch() -> None:
    original = program(
        "x: f32[1, 6, 1, 1, 1], w: f32[6], b: f32[6]", "y, m, v = batch_norm_train(x, w, b, eps=1e-3)\ny"
    )
    types = {n: TensorType(torch.float32, (1, 6, 1, 1, 1)) for n in "xy"}
    assert split_norms(original, types, lambda _: True) == original


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((4, 6), "f32"), ((2, 6, 3, 2, 2, 2), "f32"), ((2, 6, 0, 3), "f32"), ((2, 6, 4, 5), "f64")],
    ids=str,
)
def test_tensors_that_kernels_do_not_measure_are_left_alone(shape: tuple[int, ...], dtype: str) -> None:
    """Those of other ranks, without elements, of other dtypes; the same norm of others is taken apart."""
    line = "y = group_norm(x, None, None, groups=2, eps=1e-3)\ny"
    for sizes, kind, left in ((shape, dtype, True), ((2, 6, 4, 5), "f32", False)):
        original = program(f"x: {kind}[{', '.join(map(str, sizes))}]", line)
        types = {n: TensorType(original.inputs[0][1].dtype, sizes) for n in "xy"}
        assert (split_norms(original, types, lambda _: True) == original) == left


@pytest.mark.parametrize(
    "other",
    [
        "group_norm(x, None, None, groups=3, eps=0.5)", "group_norm(x, None, None, groups=2, eps=1e-3)",
        "batch_norm_batch(x, None, None, eps=1e-3)",
    ],
)  # fmt: skip
def test_statistics_of_other_groups_or_with_another_eps_are_others(other: str) -> None:
    original = made(f"y = group_norm(x, None, None, groups=3, eps=1e-3)\nz = {other}\ny, z")
    after, tensors = split(original), inputs(original)
    assert [i.op for i in after.body].count("statistics") == 2
    for a, b in zip(after.run(tensors), original.run(tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", ["pow(y, 2)", "maximum(y, w2)", "mul(y, y)", "sub(1.5, y)", "clamp(y, 0.0, None)"])
def test_steps_that_a_mean_does_not_pass_are_none(step: str) -> None:
    """(mean of squares) is not (square of mean)."""
    lines = ["w2 = reshape(w, shape=(-1, 1, 1, 1))", "y = instance_norm(x, w, b, eps=1e-3)", f"z = {step}"]
    original = made("\n".join([*lines, "q = mean(z, dims=(2, 3, 4), keepdim=True)", "q"]))
    after, tensors = split(original), inputs(original, offset=1.0)
    torch.testing.assert_close(after.run(tensors)[0], original.run(tensors)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims", [(1, 2, 3, 4), (0, 1, 2, 3, 4)], ids=str)
def test_a_mean_over_channels_of_what_differs_by_channel(dims: tuple[int, ...]) -> None:
    original = made(f"y = batch_norm(x, m, v, w, b, eps=1e-3)\nq = mean(y, dims={dims}, keepdim=True)\nq")
    after, tensors = split(original), inputs(original)
    torch.testing.assert_close(after.run(tensors)[0], original.run(tensors)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["instance_norm(x, w, b, eps=1e-3)", "group_norm(x, w, b, groups=2, eps=1e-3)"])
def test_a_mean_over_samples_of_what_differs_by_sample(norm: str) -> None:
    original = made(f"y = {norm}\nq = mean(y, dims=(0, 2, 3, 4), keepdim=True)\nq")
    after, tensors = split(original), inputs(original)
    tensors[0] *= torch.tensor([1.0, 5.0, 25.0]).view(3, 1, 1, 1, 1)
    tensors[0] += torch.tensor([1.0, 5.0, 25.0]).view(3, 1, 1, 1, 1)
    torch.testing.assert_close(after.run(tensors)[0], original.run(tensors)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "size"), [("f16", (3, 6, 4, 5, 2)), ("f32", (1, 6, 1, 1, 1))])
def test_centring_that_is_left_alone(dtype: str, size: tuple[int, ...]) -> None:
    """Half precision, whose statistics would be rounded; one value per channel, which has no variance."""
    original = program(f"x: {dtype}[{', '.join(map(str, size))}]", "c, a, s, u = centre(x)\nc, a, s, u")
    types = types_of(original) if size[0] > 1 else {n: TensorType(torch.float32, size) for n in "xcasu"}
    assert split_norms(original, types, lambda _: True) == original


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("batch", [False, True])
def test_statistics_lie_as_kernels_make_them(groups: int, batch: bool) -> None:
    """A kernel that reads them relies on it."""
    made = vocabulary.lookup("statistics")(torch.randn(3, 6, 4, 5), batch=batch, groups=groups, eps=0.0)
    for value in made:
        assert value.shape == (1 if batch else 3, 6, 1, 1) and value.stride() == (6, 1, 1, 1)
