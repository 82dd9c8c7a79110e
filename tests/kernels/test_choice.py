"""Which layers the engine leaves to cuDNN, and the reasons it gives."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fxfuse.kernels.codegen.chains import dense
from fxfuse.kernels.convolution.specialise import specialise
from fxfuse.kernels.convolution.tiling import seconds
from fxfuse.kernels.planning import choice
from fxfuse.kernels.planning.choice import slower
from fxfuse.kernels.planning.observe import examples
from fxfuse.kernels.planning.schedule import schedule
from fxfuse.program import Program

CONV = (
    "y = conv_transpose(x, w, None, stride={s}, padding=(0, 0, 0), output_padding=(0, 0, 0), "
    "dilation=(1, 1, 1), groups={g})"
)
POOL = "m = max_pool(y, kernel={s}, stride={s}, padding=(0, 0, 0), dilation=(1, 1, 1), ceil_mode=False)"


def reason(
    channels: tuple[int, int] = (32, 64),
    kernel: tuple[int, int, int] = (3, 3, 3),
    stride: tuple[int, int, int] = (1, 1, 1),
    *,
    size: int = 32,
    batch: int = 16,
    dtype: str = "f32",
    pool: bool = False,
    groups: int = 1,
    behind: tuple[str, ...] = (),
    last: bool = False,
    exact: bool = False,
    finite: bool = False,
) -> str | None:
    weight = ", ".join(map(str, (channels[0], channels[1] // groups, *kernel)))
    lines = [CONV.format(s=stride, g=groups), *([POOL.format(s=stride)] if pool else []), *behind]
    body = "".join(f"    {line}\n" for line in (*lines, f"return {lines[-1].split(' = ')[0]}"))
    inputs = f"x: {dtype}[{batch}, {channels[0]}, {size}, {size}, {size}], w: {dtype}[{weight}]"
    program = Program.parse(f"def chain({inputs}):\n{body}")[1]
    made = schedule(program, examples(program))
    launch = made.kernel
    if last:
        launch = dataclasses.replace(
            launch, strides=dense(launch.kind.shape, "channels_last"), x_layout="channels_last"
        )
    folded, one = launch.fold is not None, launch.fold is not None and not launch.fold.keeps
    one_layer = launch.layer.join() if finite else launch.layer
    layer = specialise(one_layer, pooled=pool, exact=exact, folded=folded, one=one, finite=finite)
    return slower(launch, layer, batch, (size, size, size))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_layers_that_win(dtype: str) -> None:
    assert reason((32, 64), (5, 5, 5), TWO, dtype=dtype) is None
    assert reason((32, 64), (5, 5, 5), TWO, dtype=dtype, pool=True) is None
    assert reason((32, 64), (3, 5, 5), dtype=dtype) is None
    assert reason((64, 128), (3, 3, 3)) is None
    assert reason((64, 64), (3, 3, 3), (1, 1, 3), dtype=dtype, groups=4) is None
    assert reason((64, 32), TWO, TWO, dtype=dtype) is None
    assert reason((64, 3), (4, 4, 4), TWO, dtype=dtype) is None
    assert reason((32, 32), (4, 4, 4), (4, 4, 4), dtype=dtype) is None
    assert reason((8, 12), (5, 5, 5), (3, 3, 3), dtype=dtype, size=7) is None  # few rows of its tiles are positions
    assert reason((128, 32), TWO, (3, 3, 3), dtype=dtype) is None
    assert reason((64, 64), (1, 1, 1), size=64, batch=4, dtype=dtype, last=True) is None
    assert reason((8, 96), dtype=dtype) is None  # of few input channels cuDNN multiplies more
    assert reason((4, 320), TWO, dtype=dtype, size=12, batch=2) is None  # cuDNN's shortest call is longer
    assert reason(kernel=TWO, stride=(3, 3, 3), dtype=dtype, last=True) is None  # no tap reaches some outputs
    assert reason((96, 128), (2, 2, 1), groups=4, dtype=dtype, last=True) is None


TWO, ONES = (2, 2, 2), (1, 1, 1)
MEAN = "u = mean(y, dims=(2, 3, 4), keepdim=True)"
SOFTMAX, LOGSUMEXP = "u = softmax(y, dim=1)", "u = logsumexp(y, dims=(1,), keepdim=False)"
POINTS: dict[str, Any] = {"kernel": ONES, "channels": (128, 32)}
UP: dict[str, Any] = {
    "channels": (64, 32), "kernel": TWO, "stride": TWO, "dtype": "f16", "batch": 1, "size": 24, "last": True,
}  # fmt: skip
HALF: dict[str, Any] = {"dtype": "f16", "channels": (256, 256), "batch": 2, "size": 16}
IDLE, READS, CUDNN = "output channels leave the matrix units idle", "its input", "with stride 1 as fast"


@pytest.mark.parametrize(
    ("more", "other", "why"),
    [
        ({"channels": (128, 1), "kernel": (5, 5, 5)}, {"channels": (64, 1)}, "1 " + IDLE),
        ({"channels": (128, 1), "kernel": (5, 5, 5)}, {"channels": (128, 5)}, "1 " + IDLE),
        ({"channels": (128, 1), "kernel": (5, 5, 5)}, {"dtype": "f16"}, "1 " + IDLE),
        ({"channels": (320, 3), "kernel": (6, 7, 6), "stride": (2, 2, 1)}, {"stride": (2, 2, 3)}, "3 " + IDLE),
        ({"channels": (64, 3), "exact": True}, {"stride": TWO}, "3 " + IDLE),
        ({"channels": (64, 3), "exact": True}, {"exact": False}, "3 " + IDLE),
        ({"channels": (64, 1), "exact": True, "kernel": TWO, "stride": TWO}, {"channels": (64, 2)}, "1 " + IDLE),
        (POINTS, {"channels": (128, 65)}, READS),
        (POINTS, {"behind": (MEAN,)}, READS),
        (POINTS, {"behind": (SOFTMAX,)}, READS),
        (POINTS, {"kernel": (1, 2, 2)}, READS),
        (POINTS, {"stride": (1, 1, 2)}, READS),
        (POINTS | {"dtype": "f16"}, {"last": True}, READS),
        (UP, {"last": False}, "the layer is small"),
        (UP, {"dtype": "f32"}, "the layer is small"),
        (UP, {"kernel": (3, 3, 3)}, "the layer is small"),
        (HALF, {"behind": (MEAN,)}, "cuDNN convolves f16 " + CUDNN),
        (HALF, {"behind": (SOFTMAX,)}, "cuDNN convolves f16 " + CUDNN),
        (HALF, {"stride": TWO}, "cuDNN convolves f16 " + CUDNN),
        (HALF, {"dtype": "f32"}, "cuDNN convolves f16 " + CUDNN),
        (HALF, {"channels": (96, 96), "batch": 8, "size": 32}, "cuDNN convolves f16 " + CUDNN),
        (HALF | {"last": True}, {"channels": (128, 128), "batch": 8, "size": 32}, CUDNN),  # nothing is made of x
        (HALF | {"last": True, "kernel": TWO}, {"groups": 4}, CUDNN),
        ({"size": 3, "batch": 2048}, {"exact": True}, "cuDNN convolves f32 " + CUDNN),
        ({"size": 3, "batch": 2048}, {"size": 32, "batch": 4}, "cuDNN convolves f32 " + CUDNN),
    ],
)  # fmt: skip
def test_what_is_refused_and_what_else_lets_it_win(more: dict[str, Any], other: dict[str, Any], why: str) -> None:
    """Each rule has its exceptions: one difference, and the layer is taken."""
    found = reason(**more)
    assert found is not None and why in found
    assert reason(**{**more, **other}) is None


def test_an_empty_batch_is_nothing_to_compute() -> None:
    text = f"def chain(x: f32[2, 8, 9, 9, 9], w: f32[8, 8, 3, 3, 3]):\n    {CONV.format(s=TWO, g=1)}\n    return y\n"
    program = Program.parse(text)[1]
    kernel = schedule(program, examples(program)).kernel
    assert slower(kernel, specialise(kernel.layer, pooled=False), 0, (9, 9, 9)) == "there is nothing to compute"


@pytest.mark.parametrize(
    ("more", "taken"),
    [
        ({}, False), ({"behind": ("z = relu(y)",)}, False), ({"behind": ("z = relu(y)", "v = exp(z)")}, True),
        ({"pool": True}, True), ({"behind": (MEAN,)}, True), ({"behind": (SOFTMAX,)}, True), ({"groups": 4}, True),
        ({"groups": 4, "kernel": TWO, "stride": TWO}, False), ({"groups": 4, "kernel": (1, 2, 2)}, False),
    ],
)  # fmt: skip
def test_what_is_small_depends_on_what_else_there_is(
    more: dict[str, Any], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same time, by estimate: more than a chain needs and a group, less than a convolution alone does."""
    time = (max(choice.LEAST_SECONDS_CHAIN, choice.LEAST_SECONDS_GROUPED) + choice.LEAST_SECONDS) / 2
    monkeypatch.setattr(choice, "seconds", lambda *_, **more: time)
    found = reason(**{"stride": TWO, **more})
    assert (found is None) == taken
    assert taken or "the layer is small: " in str(found)


def test_a_layer_whose_classes_are_merged_is_not_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer products make it faster, which is no reason to leave it to cuDNN."""
    pool = "m = adaptive_avg_pool(y, size=(14, 14, 14))"
    inputs = "x: f32[16, 32, 14, 14, 14], w: f32[32, 64, 2, 2, 2]"
    program = Program.parse(f"def chain({inputs}):\n    {CONV.format(s=TWO, g=1)}\n    {pool}\n    return m\n")[1]
    kernel, sizes = schedule(program, examples(program)).kernel, (14, 14, 14)
    made, apart = (
        specialise(kernel.layer, pooled=True, summed=s, contiguous=True, finite=True, stored=sizes)
        for s in (True, False)
    )
    one, other = (seconds(m, 16, sizes, sizes, 14, 4) for m in (made, apart))
    assert made.merged and one < other
    monkeypatch.setattr(choice, "LEAST_SECONDS_CHAIN", (one + other) / 2)
    assert slower(kernel, made, 16, sizes) is None
