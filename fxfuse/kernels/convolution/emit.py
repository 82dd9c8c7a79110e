"""CUDA C++ of a convolution kernel: constants, tables and one entry per launch, around the algorithms of ``cuh/``."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterator, Mapping, Sequence

from fxfuse.kernels.codegen.reductions import Fold, Rows
from fxfuse.kernels.codegen.statistics import struct_of
from fxfuse.kernels.convolution import emit_planar
from fxfuse.kernels.convolution.entries import ITEMSIZES, OPERANDS, TYPES, Prologue, entries
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.specialisation import ROWS, Along, Specialisation
from fxfuse.kernels.convolution.tiling import RUNS, Store, positions_at_once


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What follows the accumulators.

    ``scales``: numbers that these are multiplied by, and the bias; other ones than 1 where outputs are not combined.
    ``combine``: "" stores every output; "Maximum" and "Sum" make one value of all residue classes. ``fold``: a
    reduction over channels of that. ``before``, ``after`` (the combination) and ``behind`` (the reduction): names
    of expression structs in ``code`` ("fxfuse::Identity" for none). ``gathers``: the kinds of statistics of the
    stored values, of which it makes parts; ``keeps``: the values. ``step``: positions per dim, of whose sum one value
    is made. ``monotone``: ``before`` is, and only the largest and the smallest value of a maximum go through it;
    ``steady``: of operands that allow it, and the kernel `direct` makes the rest.
    """

    scales: tuple[float, float] = (1.0, 1.0)
    combine: str = ""
    step: tuple[int, int, int] = (1, 1, 1)
    fold: Fold | None = None
    along: Rows | None = None
    before: str = "fxfuse::Identity"
    after: str = "fxfuse::Identity"
    behind: str = "fxfuse::Identity"
    code: str = ""
    gathers: tuple[str, ...] = ()
    keeps: bool = True
    monotone: bool = False
    steady: bool = False


def emit(
    made: Specialisation,
    dtype: str,
    output: str,
    bias: str,
    epilogue: Epilogue,
    store: Store,
    prologue: Prologue | None = None,
) -> str:
    """The source of all kernels of a layer: deterministic, a function of what is compiled in alone."""
    operand = OPERANDS[dtype]
    return "\n".join([
        '#include "conv_wgmma.cuh"',
        '#include "conv_epilogue.cuh"',
        '#include "conv_sectors.cuh"',
        '#include "conv_planar.cuh"',
        '#include "conv_direct.cuh"',
        '#include "pointwise.cuh"',
        '#include "pack_weights.cuh"',
        '#include "prepare.cuh"',
        '#include "rows_beside.cuh"',
        epilogue.code,
        *(() if prologue is None else (prologue.code,)),
        *(() if made.planar else _wgmma_functions(made, operand)),
        _residues(made),
        *(emit_planar.tables(made) if made.planar else _tables(made)),
        _problem(made, dtype, output, epilogue, store),
        *entries(made, dtype, output, bias, prologue, gathers=bool(epilogue.gathers)),
    ])  # fmt: skip


def _instructions(made: Specialisation) -> list[int]:
    """Columns of the matrix instructions."""
    if made.exact:
        return sorted({made.window(count) for _, count in made.runs})
    return [made.m_tiles * ROWS] if made.by_channel else sorted({count * made.columns for _, count in made.runs})


def _wgmma(columns: int, operand: str, adds: int = 1, name: str = "wgmma") -> str:
    """The instruction m64nNk16: accumulators ``a[offset ...]``, descriptors of both operands, its rows' first.

    ``adds``: 1 where it adds to what accumulators hold, 0 where it begins anew.
    """
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(a[o + {i}])' for i in range(count))
    return (
        f"template <int o, int size> "
        f"FXFUSE_INLINE void {name}_n{columns}(float (&a)[size], uint64_t x, uint64_t y) {{\n"
        f'  asm volatile("wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{operand}.{operand} {{{registers}}}, '
        f'%{count}, %{count + 1}, {adds}, 1, 1, 0, 0;" : {outputs} : "l"(x), "l"(y));\n}}'
    )


def _wgmma_functions(made: Specialisation, operand: str) -> Iterator[str]:
    for columns in _instructions(made):
        if made.exact:
            yield _wgmma(columns, operand, 0, "wgmma_new")
            yield _wgmma(columns, operand, 1, "wgmma_more")
        else:
            yield _wgmma(columns, operand)


def _residues(made: Specialisation) -> str:
    """The classes of every pass."""
    passes = []
    for one in made.passes:
        filled = [f"{{{r.at[0]}, {r.at[1]}, {r.at[2]}, 1}}" for r in one.residues]
        passes.append(_list([*filled, *["{0, 0, 0, 0}"] * (made.residues - len(filled))]))
    return f"__constant__ fxfuse::Residue kResidues[][{made.residues}] = {_list(passes)};"


def _tables(made: Specialisation) -> list[str]:
    runs = {run: i for i, run in enumerate(made.runs)}
    begins, steps = list[str](), list[str]()
    kept = 0  # weights in front of the pass, of those that stay
    for one, low in zip(made.passes, made.lows, strict=True):
        order = [(runs[s.first, s.count], s.delta[0] - low[0]) for s in one.steps]
        slabs = (*range(made.slabs), math.inf)
        begins.append(
            _list([_list([len(steps) + sum(o < (r, d) for o in order) for d in slabs]) for r in range(len(runs))])
        )
        ends = {run: i for i, run in enumerate((s.first, s.count) for s in one.steps)}  # the last step of each
        number = 0
        for batch in made.batches(one.steps):
            size, inside = sum(map(made.step_bytes, batch)), kept
            for i, step in enumerate(batch):
                d, h, w = (a - b for a, b in zip(step.delta, low, strict=True))
                last = int(i == len(batch) - 1) + 2 * (number == ends[step.first, step.count])
                last += 4 * (made.together == 4 and i % 4 == 0 and i + 4 <= len(batch))
                steps.append(f"{{{d}, {h}, {w}, {last}, {inside // 16}, {size // 16 if i == 0 else 0}}}")
                number += 1
                inside += made.step_bytes(step)
            kept = inside if made.pingpong else 0
    begins.append(_list([_list([len(steps)] * (made.slabs + 1))] * len(runs)))
    return [
        f"__constant__ unsigned short kRunBegin[][{len(runs)}][{made.slabs + 1}] = {_list(begins)};",
        f"__constant__ fxfuse::Step kSteps[] = {_list(steps or ['{}'])};",
        *([f"__constant__ fxfuse::Low kLow[] = {_list([_list(low) for low in made.lows])};"] if made.by_pass else []),
        *_packed_tables(made),
    ]


def _packed_tables(made: Specialisation) -> list[str]:
    """Where weights go, and the taps that each of them is the sum of, for every position of a row."""
    offset_of, offsets = made.layer.offset_of, range(len(made.layer.offsets))
    places, ranges, listed = [], [], list[int]()
    for *place, taps in packed_taps(made):
        places.append(_list(place))
        for offset in offsets:
            added = [t for t in taps if offset_of[t] == offset]
            ranges.append(_list([*(added[:1] or [-1]), len(listed), len(added[1:])]))
            listed += added[1:]
    return [
        f"__device__ const fxfuse::Packed kPacked[] = {_list(places or ['{}'])};",
        f"__device__ const fxfuse::Taps kTaps[] = {_list(ranges or ['{}'])};",
        f"__device__ const int kTap[] = {_list(listed or [0])};",
    ]


def packed_taps(made: Specialisation) -> list[tuple[int, int, int, tuple[int, ...]]]:
    """Places of ``Packed`` (``pack_weights.cuh``) and their taps, in the order in which these lie in memory; behind
    them the places of classes that have none.
    """
    found = []
    pass_offset = 0
    for one in made.passes:
        pass_bytes, offset = sum(map(made.step_bytes, one.steps)), 0
        for step in one.steps:
            for taps in step.taps:
                found.append((pass_offset, pass_bytes, offset, taps))
                offset += made.columns * made.chunk * 2
        pass_offset += pass_bytes
    return sorted(found, key=lambda p: (not p[3], p[3]))


def _list(values: Sequence[object]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"


def _problem(
    made: Specialisation,
    dtype: str,
    output: str,
    epilogue: Epilogue,
    store: Store,
) -> str:
    layer = made.layer
    out = TYPES[output]
    if epilogue.along is not None:
        arguments = f"RowArguments<{out}, {epilogue.before}, {epilogue.behind}>"
        if epilogue.combine:
            expressions = f"{epilogue.before}, {epilogue.after}, {epilogue.behind}"
            arguments = f"RowPoolArguments<{out}, fxfuse::{epilogue.combine}, {expressions}>"
        bare, kind = "false", f"fxfuse::ReduceRows<Problem, {out}, fxfuse::{arguments}>"
        direct = f"fxfuse::DirectStore<Problem, {TYPES[dtype]}>"
    elif epilogue.combine:
        bare = str(epilogue.before == "fxfuse::Identity").lower()
        expressions = f"{epilogue.before}, {epilogue.after}, {epilogue.behind}"
        kind = f"fxfuse::Pool<Problem, {out}, fxfuse::{epilogue.combine}, {expressions}>"
        direct = f"fxfuse::DirectPool<Problem, {TYPES[dtype]}, fxfuse::{epilogue.combine}>"
    else:
        stores = "StoreSectors" if made.by_channel else "Store"
        bare, kind = "false", f"fxfuse::{stores}<Problem, {out}, {epilogue.before}, {epilogue.behind}>"
        direct = f"fxfuse::DirectStore<Problem, {TYPES[dtype]}>"
    types = ("SectorPlace", "SectorTable", "Lines") if made.by_channel else ("Place", "ChannelTable", "Outbox")
    constants = {
        "columns": made.columns,
        "residues": made.residues,
        "m_tiles": made.m_tiles,
        "stages": made.stages,
        "stage_bytes": made.stage_bytes,
        "passes": len(made.passes),
        "x_buffers": made.x_buffers,
        "samples": made.samples,
        "inner": made.inner,
        **{
            f"{name}_{dim}": value
            for name in ("stride", "kernel", "padding", "dilation")
            for dim, value in zip("dhw", getattr(layer, name), strict=True)
        },
        **{f"step_{dim}": value for dim, value in zip("dhw", made.step, strict=True)},
        "in_channels": layer.channels,
        "joined": layer.joined,
        "neighbours": made.neighbours,
        "pair": made.pair,
        "lines": made.lines,
        "itemsize": made.waiting_itemsize(ITEMSIZES[output]),
        "pitch": made.joint_pitch if store is Store.JOINT else made.pitch,
        "accumulator_tiles": made.accumulators[0],
        "accumulators": made.accumulators[1],
        "at_once": positions_at_once(made, streams=store is Store.STREAM) if made.by_channel else 0,
        "places": made.places if made.by_channel else 0,
    }
    values = "\n".join(f"  static constexpr int {k} = {v};" for k, v in constants.items())
    # without torch's operators: this may be emitted in a call that is looked at to be replayed as a graph
    weight_scale, bias_scale = (f"{struct.unpack('f', struct.pack('f', s))[0]!r}f" for s in epilogue.scales)
    return f"""struct Problem {{
{values}
  static constexpr float weight_scale = {weight_scale}, bias_scale = {bias_scale};
  static constexpr bool bare = {bare};
  static constexpr bool scaled = {str(dtype == "f32" and not made.planar).lower()};
  static constexpr bool watched = {str(made.watched or made.planar).lower()};
  static constexpr bool channels_last = {str(store is Store.CHANNELS).lower()};
  static constexpr bool wide = {str(store is Store.WIDE).lower()};
  static constexpr bool outbox = {str(store in RUNS).lower()}, joint = {str(store is Store.JOINT).lower()};
  static constexpr bool pingpong = {str(made.pingpong).lower()};
  static constexpr bool exact = {str(made.exact).lower()}, merged = {str(made.merged).lower()};
  static constexpr bool even = {str(len({len(p.residues) for p in made.passes}) == 1).lower()};
  static constexpr bool filled = {str(layer.out_channels % made.columns == 0).lower()};
  using Kinds = fxfuse::Kinds<{", ".join(map(struct_of, epilogue.gathers))}>;
  static constexpr bool gathers = {str(bool(epilogue.gathers)).lower()}, keeps = {str(epilogue.keeps).lower()};
  static constexpr bool folds = {str(epilogue.fold is not None).lower()}, along = {str(made.along is not None).lower()};
  static constexpr bool monotone = {str(epilogue.monotone).lower()}, steady = {str(epilogue.steady).lower()};
  static constexpr bool by_channel = {str(made.by_channel).lower()}, by_pass = {str(made.by_pass).lower()};
  static constexpr bool in_turn = {str(made.in_turn and not made.planar).lower()};
  static constexpr bool streams = {str(store is Store.STREAM).lower()};
  using Place = fxfuse::{types[0]}<Problem>;
  using Table = fxfuse::{types[1]}<Problem>;
  using Outbox = fxfuse::{types[2]}<Problem>;
{_fold_type(epilogue)}
{_along_type(made, epilogue)}
{_run_type(made, store)}
  using Epilogue = {kind};
  static FXFUSE_INLINE fxfuse::Residue residue(int pass, int i) {{ return kResidues[pass][i]; }}
{emit_planar.members(made) if made.planar else _members(made)}
}};
using Direct = {direct};"""


def _members(made: Specialisation) -> str:
    """Of ``Problem``, what warpgroup instructions multiply: see ``conv_wgmma.cuh`` and ``pack_weights.cuh``."""
    constants = {
        "chunk": made.chunk,
        "chunk_channels": made.chunk_channels,
        "offsets": len(made.layer.offsets),
        "runs": len(made.runs),
        "chunk_weights": made.weight_bytes // made.chunks // 16 if made.pingpong else 0,
        "slabs": made.slabs,
        "steps": sum(len(p.steps) for p in made.passes),
        "packed": len(packed_taps(made)) or 1,
        "headroom": made.headroom,
    }
    values = "\n".join(f"  static constexpr int {k} = {v};" for k, v in constants.items())
    return f"""{values}
  static constexpr bool idle = {str(not all(p.steps for p in made.passes)).lower()};
  static constexpr bool resident = {str(made.resident).lower()}, by_slab = {str(made.by_slab).lower()};
  static constexpr bool turns = {str(made.turns).lower()};
{_rows_type(made.layer)}{_LOW if made.by_pass else ""}
  static FXFUSE_INLINE int pass_begin(int i) {{ return kRunBegin[i][0][0]; }}
  static FXFUSE_INLINE int run_begin(int pass, int r, int slab) {{ return kRunBegin[pass][r][slab]; }}
  static FXFUSE_INLINE fxfuse::Step step(int i) {{ return kSteps[i]; }}
  static FXFUSE_INLINE fxfuse::Packed place(int i) {{ return kPacked[i]; }}
  static FXFUSE_INLINE fxfuse::Taps taps(int place, int offset) {{ return kTaps[place * offsets + offset]; }}
  static FXFUSE_INLINE int tap(int i) {{ return kTap[i]; }}
{_windows(made) if made.exact else _wgmmas(made)}
  static __device__ constexpr int run_first(int r) {{
    constexpr int values[] = {_list([f for f, _ in made.runs])};
    return values[r];
  }}
  static __device__ constexpr int run_count(int r) {{
    constexpr int values[] = {_list([c for _, c in made.runs])};
    return values[r];
  }}"""


def _wgmmas(made: Specialisation) -> str:
    """The instruction for a run of classes: see ``conv_wgmma.cuh``."""
    if made.by_channel:
        instructions = f"wgmma_n{made.m_tiles * ROWS}<0>(acc, x, y);"
    else:
        ways = [
            f"if constexpr (count == {c}) wgmma_n{c * made.columns}<first * {made.columns // 2}>(acc, x, y);"
            for c in sorted({c for _, c in made.runs})
        ]
        instructions = "\n    else ".join(ways)
    return f"""  template <int first, int count, int size>
  static FXFUSE_INLINE void wgmma(float (&acc)[size], uint64_t x, uint64_t y) {{
    {instructions}
  }}"""


def _windows(made: Specialisation) -> str:
    """The instructions for a window, and how wide those of a run are: see ``conv_windows.cuh``."""
    ways = "\n    else ".join(
        f"if constexpr (width == {n} && {'!' if name == 'more' else ''}anew) wgmma_{name}_n{n}<0>(acc, x, y);"
        for n in _instructions(made)
        for name in ("new", "more")
    )
    return f"""  static constexpr int together = {made.together}, windows = {made.windows};
  template <int width, bool anew, int size>
  static FXFUSE_INLINE void wgmma(float (&acc)[size], uint64_t x, uint64_t y) {{
    {ways}
  }}
  static __device__ constexpr int window(int r) {{
    constexpr int values[] = {_list([made.window(count) for _, count in made.runs])};
    return values[r];
  }}"""


#: where x of a pass begins: see ``conv_wgmma.cuh``
_LOW = """
  static FXFUSE_INLINE fxfuse::Low low(int pass) { return kLow[pass]; }"""


def _run_type(made: Specialisation, store: Store) -> str:
    """What of a pass's classes follows each other in memory: see ``conv_outbox.cuh``."""
    if store not in (*RUNS, Store.ALONG):
        return "  using Runs = fxfuse::OneRun;"
    merged = store not in (Store.ROWS, Store.ALONG)
    at = [r.at for r in made.passes[0].residues]  # w, and h where rows are merged, are the same in every pass
    keys = [a[:1] if merged else a[:2] for a in at]
    runs = sorted(set(keys))
    tables = {
        "of": [runs.index(k) for k in keys],
        "first": [keys.index(r) for r in runs],
        "h": [a[1] if merged else 0 for a in at],
        "w": [a[2] for a in at],
    }
    return (
        f"  struct Runs {{\n    static constexpr int count = {len(runs)};\n"
        f"    static constexpr bool merged = {str(merged).lower()};\n{_functions(tables)}\n  }};"
    )


def _functions(tables: Mapping[str, Sequence[object]]) -> str:
    """Members of a struct that are known when it is compiled, by number."""
    return "\n".join(
        f"    static __device__ constexpr int {name}(int i) {{\n"
        f"      constexpr int values[] = {_list(values)};\n      return values[i];\n    }}"
        for name, values in tables.items()
    )


def _rows_type(layer: Layer) -> str:
    """How rows of x are made, and which positions each holds where these are several: see ``rows_beside.cuh``."""
    if not layer.beside:
        return "  using Rows = fxfuse::RowsApart;"
    along = {dim: sorted({o[i] for o in layer.offsets}) for i, dim in enumerate("dhw")}
    counts = ", ".join(f"count_{dim} = {len(values)}" for dim, values in along.items())
    return (
        f"  struct Offsets {{\n    static constexpr int channels = {layer.channels}, {counts};\n"
        f"{_functions(along)}\n  }};\n  using Rows = fxfuse::RowsBeside<Offsets>;"
    )


def _fold_type(epilogue: Epilogue) -> str:
    fold = epilogue.fold
    if fold is None:
        return "  using Fold = fxfuse::NoFold;"
    return f"  struct Fold : {fold.op} {{\n    static constexpr int channels = {fold.channels};\n  }};"


def _along_type(made: Specialisation, epilogue: Epilogue) -> str:
    rows = epilogue.along
    if rows is None:
        return "  using Along = fxfuse::NoAlong;"
    assert rows.shares is not None
    lanes, count, each = rows.shares
    filled = lanes * count * each if made.along is Along.SHARED else made.m_tiles * 8 * made.layer.stride[2]
    whole = str(filled == rows.length).lower()
    constants = f"    static constexpr int lanes = {lanes}, count = {count}, each = {each};"
    return (
        f"  struct Along : {rows.op} {{\n{constants}\n    static constexpr bool whole = {whole};\n"
        f"    static constexpr bool held = {str(made.along is Along.HELD).lower()};\n  }};"
    )
