"""Which layers the engine leaves to cuDNN, and the reasons it gives."""

from __future__ import annotations

import re

import pytest

from fxfuse.kernels.choice import slower
from fxfuse.kernels.schedule import examples, schedule
from fxfuse.kernels.specialise import specialise
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
) -> str | None:
    weight = ", ".join(map(str, (channels[0], channels[1] // groups, *kernel)))
    lines = [CONV.format(s=stride, g=groups), *([POOL.format(s=stride)] if pool else [])]
    body = "".join(f"    {line}\n" for line in (*lines, f"return {'m' if pool else 'y'}"))
    inputs = f"x: {dtype}[{batch}, {channels[0]}, {size}, {size}, {size}], w: {dtype}[{weight}]"
    program = Program.parse(f"def chain({inputs}):\n{body}")[1]
    made = schedule(program, examples(program))
    layer = specialise(made.kernel.layer, pooled=pool)
    return slower(made.kernel, layer, batch, (size, size, size))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_layers_that_win(dtype: str) -> None:
    two = (2, 2, 2)
    assert reason((32, 64), (5, 5, 5), two, dtype=dtype) is None
    assert reason((32, 64), (5, 5, 5), two, dtype=dtype, pool=True) is None
    assert reason((32, 64), (3, 5, 5), dtype=dtype) is None
    assert reason((64, 128), (3, 3, 3)) is None
    assert reason((64, 64), (3, 3, 3), (1, 1, 3), dtype=dtype, groups=4) is None


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"size": 6, "batch": 1}, "the layer is small"),
        ({"kernel": (2, 2, 2), "stride": (3, 3, 3)}, "leave outputs that no tap reaches"),
        ({"kernel": (4, 4, 4), "stride": (1, 1, 4)}, "a stride of 4 along w scatters"),
        ({"channels": (64, 3)}, "3 output channels leave the matrix units idle"),
        ({"kernel": (1, 2, 2)}, "bound by memory"),
        ({"dtype": "f16"}, "cuDNN convolves f16 with stride 1 as fast"),
    ],
)
def test_layers_that_do_not(more: dict[str, object], why: str) -> None:
    found = reason(**more)  # type: ignore[arg-type]
    assert found is not None and re.search(why, found)
