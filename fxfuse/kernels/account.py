"""What a region costs on an H100, step by step: launches, bytes, multiply-adds, seconds by estimate. Pure.

The chain as the model wrote it is counted operator by operator; the plan as :mod:`~fxfuse.kernels.execute` decides
it for contiguous inputs. Seconds are those of :mod:`~fxfuse.kernels.planning.estimate`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import torch

from fxfuse.kernels import execute
from fxfuse.kernels.convolution.correlation import Correlation
from fxfuse.kernels.convolution.instructions import PRODUCTS
from fxfuse.kernels.convolution.kernels import THREADS, Convolution
from fxfuse.kernels.convolution.specialisation import CONSUMERS, Shared, Specialisation
from fxfuse.kernels.cost import operators
from fxfuse.kernels.execute import Strides
from fxfuse.kernels.planning.candidate import Candidate
from fxfuse.kernels.planning.estimate import BANDWIDTH, HALF_RATE, Work, by_torch, bytes_of, run_by, types_of, works
from fxfuse.kernels.stages.collapsed import Sums
from fxfuse.kernels.stages.contraction import Contraction
from fxfuse.kernels.stages.sources import source_of
from fxfuse.kernels.stages.steps import Bundle, Gather, Launch, Step, Torch
from fxfuse.program import Program
from fxfuse.region import Region


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part(Work):
    """One step of a plan.

    ``what``: its stages. ``by``: "kernel" for a kernel of ours that stands for operators of the chain, "helper" for
    small ones of ours, "torch" for torch's operators. ``facts``: names and values, for a person to read. ``source``:
    CUDA C++, "" for torch's.
    """

    what: str
    by: str
    facts: tuple[tuple[str, str], ...] = ()
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Account:
    """What a region costs before and after.

    ``before``: the model's chain, operator by operator, as torch runs it; ``parts``: the plan. ``refusal``: why
    torch's operators run all of it, or its convolution; None where a kernel of ours makes that. ``given``,
    ``made``: bytes of the region's inputs and outputs. ``floor``: seconds that any implementation of the rewritten
    chain takes: its inputs read once and its outputs written once, or its products (the plan's, where these are
    fewer), whichever takes longer.
    """

    before: Part
    parts: tuple[Part, ...]
    refusal: str | None
    given: int
    made: int
    floor: float

    @property
    def kernels(self) -> int:
        """Kernels of ours that stand for operators of the chain."""
        return sum(p.by == "kernel" for p in self.parts)

    @property
    def launches(self) -> int:
        return sum(p.launches for p in self.parts)

    @property
    def bytes(self) -> int:
        """Read and written by the plan."""
        return sum(p.bytes for p in self.parts)

    @property
    def macs(self) -> int:
        return sum(p.macs for p in self.parts)

    @property
    def seconds(self) -> float:
        return sum(p.seconds for p in self.parts)

    @property
    def saved(self) -> int:
        """Bytes read and written by torch, operator by operator, and not by the plan; negative where it moves more."""
        return self.before.bytes - self.bytes

    @property
    def unwritten(self) -> int:
        """Bytes of intermediates that the plan never writes; 0 where it writes as much."""
        return max(0, self.before.written - sum(p.written for p in self.parts))


@functools.lru_cache(maxsize=256)
def account(region: Region, strides: Strides = None, device: torch.device | None = None) -> Account | None:
    """The account of ``region``, for the sizes that it names; None where one is not known.

    ``strides``, ``device``: of its inputs, as for :func:`fxfuse.kernels.execute.describe`.
    """
    if operators(region.rewritten) is None:
        return None
    return account_of(region, execute.planned(region, strides, device))


def account_of(region: Region, plan: Candidate) -> Account:
    """The account of a region, whose sizes are known, by a plan."""
    program, exact = region.rewritten, region.precision == "ieee"
    before, after = _torch(region.original, exact), _torch(program, exact)
    parts = (after,) if plan.schedule is None else tuple(_parts(program, plan, exact))
    types = types_of(program)
    given, made = (bytes_of(types, dict.fromkeys(names)) for names in (dict(program.inputs), program.outputs))
    rate = HALF_RATE / PRODUCTS if exact else HALF_RATE
    floor = max((given + made) / BANDWIDTH, min(after.macs, sum(p.macs for p in parts)) / rate)
    refusal = plan.refusal if any(p.by == "torch" for p in parts) else None
    return Account(before, tuple(p for p in parts if p.launches), refusal, given, made, floor)


def _parts(program: Program, plan: Candidate, exact: bool) -> Iterator[Part]:
    made = plan.schedule
    assert made is not None
    for part, work in works(dict(program.inputs), made, plan.convolution, plan.measuring, exact=exact):
        if isinstance(part, Launch):
            engine = plan.measuring if part is made.measuring else plan.convolution
            assert engine is not None
            if isinstance(engine, Correlation):
                yield _correlation(part, engine, work)
            else:
                yield _convolution(part, engine, work)
        else:
            yield _step(part, work, exact)


def _torch(program: Program, exact: bool) -> Part:
    what = " > ".join(o.instr.op for o in run_by(program))
    return Part(**vars(by_torch(program, exact)), what=what, by="torch")


# --- the convolution ------------------------------------------------------------------------------
def _convolution(kernel: Launch, engine: Convolution, work: Work) -> Part:
    made, batch = engine.made, kernel.kind.shape[0] or 0
    return Part(
        **vars(work),
        what=" > ".join(kernel.stages),
        by="kernel",
        facts=(*_tiles(kernel, engine, batch), ("arithmetic", _arithmetic(kernel, made)), *_results(kernel)),
        source=engine.source(engine.tiling(kernel.sizes)[1]),
    )


def _correlation(kernel: Launch, engine: Correlation, work: Work) -> Part:
    channels, lags = engine.layer.in_channels, len(engine.lags)
    products = f"{channels} x {engine.columns} per position: of {channels} channels with themselves at {lags} distances"
    facts = ("products", products), ("arithmetic", "float64"), ("results", "statistics")
    what = f"statistics of {' > '.join(kernel.stages)}"
    return Part(**vars(work), what=what, by="kernel", facts=facts, source=engine.source())


def _tiles(kernel: Launch, engine: Convolution, batch: int) -> Iterator[tuple[str, str]]:
    made, (tiling, store) = engine.made, engine.tiling(kernel.sizes)
    step = (1, 1, 1) if made.pooled else made.layer.stride
    d, h, w = (-(-e // s) for e, s in zip(kernel.sizes, step, strict=True))
    sets, parts = -(-batch // made.samples), len(made.passes) if made.by_pass else 1
    count = sets * made.layer.groups * made.column_tiles * math.prod(tiling.counts) * parts
    if tiling.linear:
        shape = f"{tiling.tile[1]} consecutive positions of {tiling.tile[0]} planes and their border"
    else:
        size, box = (" x ".join(map(str, s)) for s in (tiling.tile, tiling.box))
        where = "shared by both warpgroups" if tiling.joint else f"a warpgroup's {box}"
        where = "each warpgroup has its own" if made.pingpong else where
        many = f" of {made.samples} samples side by side" if made.samples > 1 else ""
        shape = f"{size} positions{many}, {where}"
    yield "tile", f"{shape}; {100 * tiling.fit((d, h, w)):.0f} % of the rows are used"
    yield "tiles", f"{count}"
    yield "stores", store.value
    where = "rows" if made.by_channel else "columns"
    yield "output channels", f"{made.columns} per tile, {where} of instructions; {made.column_tiles} tiles per group"
    if made.planar:
        yield "input channels", f"{made.chunk} planes in shared memory, as x has them"
    else:
        yield "input channels", f"{made.chunk_channels} per row of shared memory, {made.padded_channels} with padding"
    if made.layer.beside:
        dims = " and ".join(("d", "h", "w")[dim] for dim in made.layer.beside)
        count, each = len(made.layer.offsets), made.layer.channels
        yield "positions in a row", f"{count} along {dims}, {each} channels of each: one product for their taps"
    yield "residue classes", _classes(made)
    yield "threads", f"{THREADS} per block: {CONSUMERS} warpgroups that multiply, one that copies"
    weights, both = ("all weights", " for each warpgroup") if made.pingpong else (f"{made.stages} stages", "")
    yield "shared memory", f"{made.dynamic_bytes / 1024:.0f} KiB per block: {weights}, {made.x_buffers} of x{both}"


def _classes(made: Specialisation) -> str:
    if made.merged:
        weights = f", weights as well: {made.products} of {made.layer.volume}" if made.headroom else ""
        return f"{len(made.layer.residues)}, added up by the matrix units{weights}"
    passes = len(made.passes)
    each = ", each a tile of its own" if made.by_pass else ""
    return f"{made.residues} at the same time, {passes} {'pass' if passes == 1 else 'passes'}{each}"


def _arithmetic(kernel: Launch, made: Specialisation) -> str:
    if made.planar:
        return "TF32 products, float32 sums; samples with Inf, NaN or denormal numbers by the kernel `direct`"
    if kernel.dtype is not torch.float32:
        watched = "; samples with Inf or NaN by the kernel `direct`" if made.watched else ""
        return f"{str(kernel.dtype).removeprefix('torch.')} products, float32 sums{watched}"
    return "float32 of two 16-bit parts: three products" if made.exact else "TF32's accuracy of 16-bit products"


def _results(kernel: Launch) -> Iterator[tuple[str, str]]:
    made = [*([f"{kernel.kind}, {kernel.layout}"] if kernel.keeps else []), *kernel.gathers]
    yield "results", " and ".join(made)
    if kernel.shares is not Shared.NOTHING:
        yield "made before", f"{kernel.shares.value}, by the first run"
    if kernel.apart is not None:
        yield "reduced by a kernel of its own", kernel.apart


# --- the steps around it --------------------------------------------------------------------------
def _step(step: Step, work: Work, exact: bool) -> Part:
    if isinstance(step, Torch):
        return _torch(step.program, exact)
    source = source_of(step)
    if isinstance(step, Bundle):
        return Part(**vars(work), what=" > ".join(i.op for i in step.body), by="helper", source=source)
    if isinstance(step, Gather):
        kinds = " and ".join(step.gathers)
        what, by = (kinds, "kernel") if step.layout else (f"{kinds}, added up", "helper")
        return Part(**vars(work), what=what, by=by, source=source)
    if isinstance(step, Sums):
        facts = ("blocks", f"{step.blocks}"), ("slots", f"{step.slots}"), ("cells of a block", f"{step.cells}")
        return Part(**vars(work), what="tap_sums", by="kernel", facts=facts, source=source)
    if isinstance(step, Contraction):
        blocks = f"{step.blocks}, each of {step.rows} samples and {step.across} output channels"
        what = " > ".join(i.op for i in step.chain)
        return Part(**vars(work), what=what, by="kernel", facts=(("blocks", blocks),), source=source)
    stores = ("stores", f"{step.kind}, {step.layouts[1]}")
    return Part(**vars(work), what=" > ".join(step.stages), by="kernel", facts=(stores,), source=source)
