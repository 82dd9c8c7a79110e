"""CUDA C++ of the kernels behind a convolution: entries around the algorithms of ``map*.cuh``. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fxfuse.kernels.codegen.expression import Expression
from fxfuse.kernels.codegen.reductions import Fold, Rows, Window
from fxfuse.kernels.codegen.statistics import struct_of
from fxfuse.kernels.convolution.entries import TYPES

#: bytes that a thread reads at once
VECTOR_BYTES = 16
#: blocks that a multiprocessor shall hold of a pool's kernel at least. Without a word ptxas saves registers for as
#: many as there may be, and has few loads on their way
POOL_BLOCKS = 2


def vector(dtype: str) -> int:
    """Elements that a thread reads at once."""
    return VECTOR_BYTES // (4 if dtype == "f32" else 2)


def emit_map(dtype: str, output: str, layout: str, before: Expression | None) -> str:
    """Entries ``whole``, ``any``: for a multiple of the vector in a channel's plane (or among channels), or not."""
    given, out, count = TYPES[dtype], TYPES[output], vector(dtype)
    if layout == "contiguous":
        bodies = {"whole": f"map_contiguous<{count}, true>(a)", "any": f"map_contiguous<{count}, false>(a)"}
    else:
        bodies = {"whole": f"map_channels<{count}>(a)", "any": "map_channels<1>(a)"}
    name = "fxfuse::Identity" if before is None else before.name
    arguments = f"fxfuse::MapArguments<{given}, {out}, {name}>"
    return "\n".join([*_head(before), *(_entry(entry, arguments, f"fxfuse::{body}") for entry, body in bodies.items())])


def emit_pool(
    dtype: str,
    output: str,
    layouts: tuple[str, str],
    before: Expression | None,
    window: Window,
    after: Expression | None,
) -> str:
    """The entry ``pool``. ``layouts``: of the value, of the result."""
    last = ", ".join(str(layout != "contiguous").lower() for layout in layouts)
    arguments = f"fxfuse::PoolArguments<{TYPES[dtype]}, {TYPES[output]}, {_names(before, after)}>"
    return "\n".join([
        '#include "map_pool.cuh"',
        *_head(before, after),
        _pool(window, layouts),
        _entry("pool", arguments, f"fxfuse::map_pool<Pool, {last}>(a)", POOL_BLOCKS),
    ])  # fmt: skip


def emit_pool_fold(
    dtype: str,
    output: str,
    before: Expression | None,
    window: Window,
    after: Expression | None,
    fold: Fold,
    behind: Expression | None,
) -> str:
    """The entry ``pool``, with a reduction over channels behind the pool and the expression ``after`` it."""
    both, slices = ("contiguous", "contiguous"), fold.slices(window)
    arguments = f"fxfuse::PoolFoldArguments<{TYPES[dtype]}, {TYPES[output]}, {_names(before, after, behind)}>"
    return "\n".join([
        '#include "pool_fold.cuh"',
        *_head(before, after, behind),
        *_body(fold),
        _pool(window, both),
        _entry("pool", arguments, f"fxfuse::pool_fold<Pool, {fold.op}, {slices}>(a)", POOL_BLOCKS),
    ])  # fmt: skip


def _pool(window: Window, layouts: tuple[str, str]) -> str:
    constants = {
        f"{name}_{dim}": value
        for name in ("kernel", "stride", "padding", "dilation")
        for dim, value in zip("dhw", getattr(window, name), strict=True)
    }
    constants |= {"divisor": window.divisor, "planes": window.planes(layouts)}
    sums, adaptive, whole = (str(v).lower() for v in (window.combine == "Sum", window.adaptive, window.whole))
    return "\n".join([
        "struct Pool {",
        f"  using Combine = fxfuse::{window.combine};",
        f"  static constexpr bool sums = {sums}, adaptive = {adaptive}, whole = {whole};",
        *(f"  static constexpr int {k} = {v};" for k, v in constants.items()),
        "};",
    ])  # fmt: skip


def emit_fold(
    dtype: str,
    output: str,
    layouts: tuple[str, str],
    before: Expression | None,
    fold: Fold,
    after: Expression | None,
) -> str:
    """The entry ``fold``. ``layouts``: of the value, of the result."""
    arguments = f"fxfuse::ReductionArguments<{TYPES[dtype]}, {TYPES[output]}, {_names(before, after)}>"
    last, last_made = (layout != "contiguous" for layout in layouts)
    return "\n".join([
        '#include "map_fold.cuh"',
        *_head(before, after),
        *_body(fold),
        "struct Fold {",
        f"  using Op = {fold.op};",
        f"  static constexpr int channels = {fold.channels}, lanes = {fold.lanes(last, last_made)};",
        f"  static constexpr bool last = {str(last).lower()}, last_made = {str(last_made).lower()};",
        "};",
        _entry("fold", arguments, "fxfuse::fold_channels<Fold>(a)"),
    ])  # fmt: skip


def emit_rows(dtype: str, output: str, before: Expression | None, rows: Rows, after: Expression | None) -> str:
    """The entry ``rows``."""
    arguments = f"fxfuse::ReductionArguments<{TYPES[dtype]}, {TYPES[output]}, {_names(before, after)}>"
    count = rows_at_once(dtype, rows)
    held = f"{rows.lanes(count)}, {count}, {rows.each(count)}, {str(rows.line).lower()}"
    call = f"held_rows<{rows.op}, {held}>" if rows.held else f"map_rows<{rows.op}, {rows.threads}, {count}>"
    return "\n".join([
        '#include "map_rows.cuh"',
        *_head(before, after),
        *_body(rows),
        _entry("rows", arguments, f"fxfuse::{call}(a)", threads=str(rows.threads)),
    ])  # fmt: skip


def emit_rows_pool(
    dtype: str,
    output: str,
    before: Expression | None,
    rows: Rows,
    after: Expression | None,
    window: Window,
    behind: Expression | None,
) -> str:
    """The entry ``pool``, of what a reduction leaves of rows."""
    arguments = f"fxfuse::PoolFoldArguments<{TYPES[dtype]}, {TYPES[output]}, {_names(before, after, behind)}>"
    count = rows_at_once(dtype, rows)
    held = f"{rows.lanes(count)}, {count}, {rows.each(count)}"
    return "\n".join([
        '#include "rows_pool.cuh"',
        *_head(before, after, behind),
        *_body(rows),
        _pool(window, ("contiguous", "contiguous")),
        _entry("pool", arguments, f"fxfuse::rows_pool<{rows.op}, Pool, {held}>(a)"),
    ])  # fmt: skip


def rows_at_once(dtype: str, rows: Rows) -> int:
    """Elements that a thread reads at once of rows: a part of all of them."""
    return math.gcd(vector(dtype), rows.length)


def emit_statistics(dtype: str, layout: str, kinds: Sequence[str] = ("statistics",)) -> str:
    """Entries ``measure`` and ``merge``, of moments, and a ``finish_<kind>`` each: the stages of statistics.

    ``layout``: "" where the kernel that makes the value gathers on its way, and merges.
    """
    stages = [_measure(dtype, layout)] if layout else []
    return "\n".join(['#include "map.cuh"', *stages, *map(_finish, kinds)])


def _measure(dtype: str, layout: str) -> str:
    given = TYPES[dtype]
    measure = "measure_contiguous" if layout == "contiguous" else "measure_channels"
    return f"""extern "C" __global__ void __launch_bounds__(fxfuse::kMapThreads)
measure(const {given}* x, const __grid_constant__ fxfuse::Partials p, int positions) {{
  fxfuse::begin_dependent();
  fxfuse::{measure}(x, p, positions);
}}
extern "C" __global__ void __launch_bounds__(fxfuse::kMergeThreads, 2)
merge(const __grid_constant__ fxfuse::Partials p, int pieces, fxfuse::Moments* out) {{
  fxfuse::begin_dependent();
  fxfuse::merge_partials<fxfuse::Statistics>(p, 1, 0, pieces, out, fxfuse::NoElements<fxfuse::Statistics>());
}}"""


def _finish(kind: str) -> str:
    return f"""extern "C" __global__ void __launch_bounds__(fxfuse::kFinishThreads)
finish_{kind}(const {struct_of(kind)}::Merged* merged, float* results, int samples, int channels, int members,
       int batch, int pieces, double eps) {{
  fxfuse::begin_dependent();
  fxfuse::finish_statistics<{struct_of(kind)}>(merged, results, samples, channels, members, batch, pieces, eps);
}}"""


def _names(*expressions: Expression | None) -> str:
    return ", ".join("fxfuse::Identity" if e is None else e.name for e in expressions)


def _head(*expressions: Expression | None) -> list[str]:
    return ['#include "map.cuh"', *(e.code for e in expressions if e is not None)]


def _body(of: Fold | Rows) -> list[str]:
    return [] if of.body is None else [of.body.code]


def _entry(
    name: str, arguments: str, body: str, blocks: int | None = None, threads: str = "fxfuse::kMapThreads"
) -> str:
    least = "" if blocks is None else f", {blocks}"
    return (
        f'extern "C" __global__ void __launch_bounds__({threads}{least})\n'
        f"{name}(const __grid_constant__ {arguments} a) {{\n  fxfuse::begin_dependent();\n  {body};\n}}"
    )
