"""Pools as windows, reductions as folds and rows: what a kernel makes of the numbers that it is given, step by step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from harness import program
from torch import Tensor

from fxfuse.instr import TensorType
from fxfuse.kernels.codegen.reductions import Fold, Rows, Window, fold_of, inner_of, rows_of, window_of
from fxfuse.program import Program

SIZES = {1: (11,), 2: (7, 8), 3: (5, 6, 7)}
NO, YES = False, True
#: attributes with {n} values per dim: k kernel, s stride, p padding, d dilation
POOLS = {
    "max": "max_pool(x, kernel={3}, stride={2}, padding={1}, dilation={1}, ceil_mode=False)",
    "max_dilated": "max_pool(x, kernel={2}, stride={1}, padding={0}, dilation={2}, ceil_mode=False)",
    "max_ceil": "max_pool(x, kernel={3}, stride={2}, padding={1}, dilation={1}, ceil_mode=True)",
    "avg": "avg_pool(x, kernel={2}, stride={2}, padding={0}, ceil_mode=False, count_include_pad=True,%s)",
    "avg_without": "avg_pool(x, kernel={2}, stride={2}, padding={0}, ceil_mode=False, count_include_pad=False,%s)",
    "avg_padded": "avg_pool(x, kernel={3}, stride={2}, padding={1}, ceil_mode=False, count_include_pad=True,%s)",
    "avg_there": "avg_pool(x, kernel={3}, stride={2}, padding={1}, ceil_mode=False, count_include_pad=False,%s)",
    "avg_ceil": "avg_pool(x, kernel={3}, stride={2}, padding={0}, ceil_mode=True, count_include_pad=True,%s)",
    "avg_ceil_padded": "avg_pool(x, kernel={3}, stride={2}, padding={1}, ceil_mode=True, count_include_pad=True,%s)",
    "avg_ceil_there": "avg_pool(x, kernel={3}, stride={2}, padding={1}, ceil_mode=True, count_include_pad=False,%s)",
    "adaptive_avg": "adaptive_avg_pool(x, size={3})",
    "adaptive_max": "adaptive_max_pool(x, size={4})",
}
DIVIDED = (
    "avg_pool(x, kernel={2}, stride={2}, padding={0}, ceil_mode=False, count_include_pad=True, divisor_override=3)"
)


def pool(text: str, dims: int) -> Program:
    """The operator over ``dims`` spatial dims of x: f64[2, 3, ...]."""
    for number in range(5):
        text = text.replace(f"{{{number}}}", str((number,) * dims))
    sizes = ", ".join(map(str, (2, 3, *SIZES[dims])))
    return program(f"x: f64[{sizes}]", f"y = {text.replace('%s', ' divisor_override=None')}\ny")


def made_by(window: Window, x: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """What ``map_pool`` of cuh/map_pool.cuh makes of (N, C, D, H, W)."""
    lengths, result = x.shape[2:], x.new_empty(*x.shape[:2], *sizes)
    for place in itertools.product(*map(range, sizes)):
        indices, padded = [], []
        for o, length, made, k, s, p, d in zip(
            place, lengths, sizes, window.kernel, window.stride, window.padding, window.dilation, strict=True
        ):
            if window.adaptive:
                inside = list(range(o * length // made, -(-(o + 1) * length // made)))
                padded.append(len(inside))
            else:
                first = o * s - p
                inside = [i for i in range(first, first + (k - 1) * d + 1, d) if 0 <= i < length]
                padded.append(min(first + (k - 1) * d + 1, length + p) - first)
            indices.append(inside)
        looked_at = x[:, :, indices[0]][:, :, :, indices[1]][..., indices[2]].flatten(2)
        if window.combine == "Maximum":
            result[:, :, *place] = looked_at.amax(2)
        else:
            divisor = {0: looked_at.shape[2], -1: math.prod(padded)}.get(window.divisor, window.divisor)
            result[:, :, *place] = looked_at.sum(2) / divisor
    return result


def three(x: Tensor) -> Tensor:
    while x.dim() < 5:
        x = x.unsqueeze(2)
    return x


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", [*POOLS, "avg_divided"])
def test_windows_are_torchs_pools(name: str, dims: int) -> None:
    made = pool(POOLS.get(name, DIVIDED), dims)
    (instr,) = made.body
    window = window_of(instr, dims)
    if name == "avg_divided" and dims == 1:
        assert window is None  # torch has none in one dim
        return
    assert window is not None
    x = torch.randn(2, 3, *SIZES[dims], dtype=torch.float64)
    (expected,) = made.run([x])
    found = made_by(window, three(x), tuple(three(expected).shape[2:]))  # type: ignore[arg-type]
    torch.testing.assert_close(found, three(expected), rtol=1e-12, atol=1e-12)


def test_whole_windows_have_one_divisor() -> None:
    """It is a constant of the kernel's; those at a border are counted for each."""
    divisors = {name: window_of(pool(text, 3).body[0], 3).divisor for name, text in POOLS.items() if "avg" in name}  # type: ignore[union-attr]
    assert divisors == {
        "avg": 8, "avg_without": 8, "avg_padded": -1, "avg_there": 0, "avg_ceil": -1, "avg_ceil_padded": -1,
        "avg_ceil_there": 0, "adaptive_avg": 0,
    }  # fmt: skip


@pytest.mark.parametrize("name", POOLS)
def test_pools_without_a_dim_of_samples_are_none(name: str) -> None:
    """Of (C, H, W) as torch reads it: its first dim is no sample's."""
    assert window_of(pool(POOLS[name], 2).body[0], 1) is None


# --- reductions -----------------------------------------------------------------------------------
FOLDS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "sum(x, dims=(1,), keepdim=True)": ("Sum", lambda x: x.sum(1, True)),
    "mean(x, dims=(1,), keepdim=True)": ("Mean", lambda x: x.mean(1, True)),
    "amax(x, dims=(1,), keepdim=True)": ("Maximum", lambda x: x.amax(1, True)),
    "amin(x, dims=(1,), keepdim=True)": ("Minimum", lambda x: x.amin(1, True)),
    "logsumexp(x, dims=(1,), keepdim=True)": ("LogSumExp", lambda x: x.logsumexp(1, True)),
    "softmax(x, dim=1)": ("Softmax", lambda x: x.softmax(1)),
    "log_softmax(x, dim=1)": ("LogSoftmax", lambda x: x.log_softmax(1)),
}


@pytest.mark.parametrize("text", FOLDS)
def test_folds_are_torchs_reductions(text: str) -> None:
    made = program("x: f64[2, 6, 3, 4]", f"y = {text}\ny")
    combine, meaning = FOLDS[text]
    fold = fold_of(made.body[0], made.inputs[0][1])
    assert fold == Fold(combine, 6)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(made.run([x])[0], meaning(x))
    assert fold.keeps == (made.run([x])[0].shape == x.shape)


@pytest.mark.parametrize("text", ["sum(x, dims=(1, 2), keepdim=True)", "mean(x, dims=(2,), keepdim=True)",
                                  "softmax(x, dim=3)", "vector_norm(x, ord=1.0, dims=(1,), keepdim=True)"])  # fmt: skip
def test_other_reductions_are_none(text: str) -> None:
    made = program("x: f64[2, 6, 3, 4]", f"y = {text}\ny")
    assert fold_of(made.body[0], made.inputs[0][1]) is None


@pytest.mark.parametrize(
    ("fold", "layouts", "lanes"),
    [
        (Fold("Sum", 3), (NO, NO), 1), (Fold("Sum", 64), (NO, NO), 1), (Fold("Sum", 65), (NO, NO), 2),
        (Fold("Sum", 1000), (NO, NO), 4), (Fold("Sum", 3), (YES, NO), 1), (Fold("Sum", 5), (YES, NO), 2),
        (Fold("Sum", 100), (YES, NO), 32), (Fold("Sum", 1000), (YES, YES), 32), (Fold("Softmax", 100), (YES, YES), 32),
        (Fold("Softmax", 100), (YES, NO), 2), (Fold("LogSoftmax", 100), (YES, NO), 2),
    ],
)  # fmt: skip
def test_threads_of_a_position(fold: Fold, layouts: tuple[bool, bool], lanes: int) -> None:
    """Neighbouring threads take neighbouring channels, where both tensors have those together or one value is made."""
    assert fold.lanes(*layouts) == lanes


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("softmax(x, dim=4)", Rows("Softmax", 16, line=True)),
        ("softmax_over(x, count=2, log=True)", Rows("LogSoftmax", 256)),
        ("softmax_over(x, count=3, log=False)", Rows("Softmax", 4096)),
        ("normalise(x, dims=(4,), eps=0.5, centred=True)", Rows("LayerNorm", 16, line=True, number=0.5)),
        ("normalise(x, dims=(3, 4), eps=0.5, centred=False)", Rows("RMSNorm", 256, number=0.5)),
        ("normalise(x, dims=(1,), eps=0.5, centred=False)", None),
        ("amax(x, dims=(3, 4), keepdim=False)", Rows("Maximum", 256)),
        ("logsumexp(x, dims=(2, 3, 4), keepdim=True)", Rows("LogSumExp", 4096)),
        ("mean(x, dims=(1, 2, 3, 4), keepdim=True)", None),  # two rows leave most of a GPU idle
        ("sum(x, dims=(2, 4), keepdim=True)", None),
        ("sum(x, dims=(2, 3), keepdim=True)", None),
        ("softmax(x, dim=1)", None),
        ("prod(x, dim=4, keepdim=True)", Rows("Product", 16, line=True)),
        ("var(x, dims=(4,), correction=1.0, keepdim=True)", Rows("Variance", 16, line=True, number=1.0)),
        ("vector_norm(x, ord=2.0, dims=(4,), keepdim=True)", Rows("Length", 16, line=True)),
        ("vector_norm(x, ord=1.0, dims=(4,), keepdim=True)", None),
        ("var(x, dims=(4,), correction=16, keepdim=True)", None),
        ("std(x, dims=(3, 4), correction=300, keepdim=True)", None),
        ("prod(x, dim=3, keepdim=True)", None),
    ],
)
def test_reductions_over_the_last_dims_are_rows(text: str, rows: Rows | None) -> None:
    made = program("x: f32[2, 64, 16, 16, 16]", f"y = {text}\ny")
    found = rows_of(made.body[0], made.inputs[0][1])
    assert found == rows
    keeps = text.startswith(("softmax", "normalise"))
    assert found is None or (found.keeps, found.long) == (keeps, found.length > 1000)


@pytest.mark.parametrize(
    ("text", "fold", "shape"),
    [
        ("softmax(x, dim=2)", Fold("Softmax", 16), (128, 16, 289)),
        ("amax(x, dims=(2, 3), keepdim=False)", Fold("Maximum", 272), (128, 272, 17)),
        ("max(x, dim=3, keepdim=True)", Fold("Maximum", 17), (2048, 17, 17)),
        ("var(x, dims=(1, 2), correction=2.0, keepdim=True)", Fold("Variance", 1024, 2.0), (2, 1024, 289)),
        ("sum(x, dims=(2, 4), keepdim=True)", None, ()),
        ("softmax(x, dim=4)", None, ()),
        ("mean(x, dims=(0,), keepdim=True)", None, ()),
        ("vector_norm(x, ord=1.0, dims=(2,), keepdim=True)", None, ()),
    ],
)
def test_reductions_over_dims_inside_are_of_channels(text: str, fold: Fold | None, shape: tuple[int, ...]) -> None:
    """Of the same elements in three dims."""
    made = program("x: f32[2, 64, 16, 17, 17]", f"y = {text}\ny")
    kind = made.inputs[0][1]
    assert inner_of(made.body[0], kind) == (None if fold is None else (fold, TensorType(kind.dtype, shape)))


@pytest.mark.parametrize(
    ("length", "count", "lanes", "each"),
    [
        (1, 1, 1, 1), (3, 1, 4, 1), (16, 4, 4, 1), (64, 4, 16, 1), (100, 4, 32, 1), (128, 8, 16, 1), (132, 4, 32, 2),
        (1020, 4, 32, 8), (1023, 1, 32, 32), (1024, 4, 256, 1), (9216, 4, 256, 16), (16384, 4, 256, 16),
        (16383, 1, 256, 64),
    ],
)  # fmt: skip
def test_threads_hold_a_row(length: int, count: int, lanes: int, each: int) -> None:
    """A power of two of them, which read so many times as many neighbours at once."""
    rows = Rows("Softmax", length)
    assert (rows.lanes(count), rows.each(count)) == (lanes, each)
    assert rows.held and lanes * count * each >= length and count * each <= 64


def test_longer_rows_are_not_held() -> None:
    """Kernels go through them twice; a norm's statistics would then be of sums of squares."""
    source = program("x: f32[2, 64, 16, 32, 33]", "y = softmax_over(x, count=3, log=False)\ny")
    kind = source.inputs[0][1]
    assert rows_of(source.body[0], kind) == Rows("Softmax", 16896)
    norm = program("x: f32[2, 64, 16, 32, 33]", "y = normalise(x, dims=(2, 3, 4), eps=0.5, centred=True)\ny")
    assert rows_of(norm.body[0], kind) is None
