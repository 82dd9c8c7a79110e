"""A convolution on Hopper's matrix instructions: what a kernel is compiled for.

Pure arithmetic, without a GPU. A :class:`Specialisation` holds what is compiled in: taps, channel tiles,
stages; ``specialise.py`` chooses it. What depends on sizes, which a compiled kernel takes as arguments, is in
``tiles.py`` and ``tiling.py``.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import math
from collections import Counter

from fxfuse.kernels.convolution.factors import factor_bytes, factor_cycles
from fxfuse.kernels.convolution.geometry import Pass, Step
from fxfuse.kernels.convolution.instructions import PARTS, PRODUCTS, ROWS, WINDOW, cycles, cycles_by_channel, window
from fxfuse.kernels.convolution.layer import Layer

#: shared memory of a thread block on sm_90
SHARED_BYTES = 232448
#: warpgroups that multiply, of 64 rows per m64 tile each
CONSUMERS = 2
#: of weights that share a stage, at most
STAGE_BYTES = 16384
#: shared memory that is kept for outputs of a multiplying warpgroup on their way, where two blocks fit; the most blocks
#: of them; and floats for statistics
OUTBOX_BYTES, MOST_BLOCKS, GATHERED = 19000, 8, 4 + 2 * 128 * 2
#: and bytes of them of a warpgroup, where they need not be more: with more on their way to memory, stores took longer
MOST_WAITING = 40960
#: runs of neighbours in memory that the part of a tile of one warpgroup may have
MOST_RUNS = 64
#: tiles of rows, as a matrix instruction has, of a thread block at most
MOST_TILES = 16
#: of results whose matrix rows are channels: elements of a channel that a warp has in shared memory at once, and floats
#: from one such line to the next, which leaves the banks apart
LINE, LINE_PITCH = 64, 156
#: sums of a thread beside which there is room for the accumulators of two windows
MOST_BESIDE_TWO = 96
#: bytes along w, of a multiple of which a copy of planes begins and ends
PLANE_UNIT = 16
#: slabs of x along d that may be told apart; planes of positions of which that should pay, and what part of the time of
#: a full batch of weights one batch more takes: a guess
MOST_SLABS, TYPICAL_PLANES, BATCH = 16, 32, 0.1

#: clock cycles of a multiprocessor until the products of a run are done and those of the next one begin: read off the
#: fifth model on an H100, whose products alone took 784 us for 589
RUN_CYCLES = 365
#: the same where a run begins, by rows, while the other rows' products of the one before end: about
TURN_CYCLES = 60


class Along(enum.Enum):
    """Where rows of the output that are reduced along w come together: those of a warpgroup's part of a tile."""

    SHARED = "through shared memory"
    HELD = "in registers of eight threads"


class Unsupported(Exception):  # noqa: N818 - a refusal, not an error
    """The engine has no kernel for this; the message is a sentence for the report."""


class Shared(enum.Enum):
    """What a run of a convolution makes of x and the weights, and a second run of it on the same tensors uses."""

    NOTHING = "nothing"
    ROWS = "rows"
    ALL = "rows and packed weights"


@dataclasses.dataclass(frozen=True)
class Specialisation:
    """What is compiled into a convolution kernel.

    ``chunk``: 16-bit numbers per row of shared memory, ``parts`` for each input channel; ``columns``: output channels
    per residue class and thread block; ``m_tiles``: 64-row tiles per multiplying warpgroup; ``stages``, ``x_buffers``:
    buffers in shared memory, of weights and of x. ``pooled``, ``exact``, ``one``: see :func:`specialise`. ``merged``:
    the only class is the sum of all residue classes of a position. ``by_channel``: rows of a matrix instruction are
    output channels and its columns are the positions of a warpgroup, ``m_tiles`` times 64 of them; else the other way
    round.
    ``watched``: 16-bit numbers of x are looked at as they are made rows, or where they lie, and samples with Inf or NaN
    left to the kernel `direct`, as those of float32 always are.
    ``planar``: where x, of few channels, is not made rows, the bytes of a number of it: shared memory has a plane
    of positions for every channel, as x itself, and each warp's own instructions, of TF32, read it there
    (``conv_planar.cuh``). The only stage holds all weights. ``step``: positions of x per dim from one position of
    the output to the next; of a planar kernel whose only class is the sum of all classes of so many.
    ``samples``: a set of so many samples lie side by side in rows of shared memory, so that outputs of few positions
    fill instructions (``sets.py``); positions along dim ``inner`` follow each other there. ``by_pass``: a tile has one
    of the passes, which are as many times the tiles.
    ``pingpong``: each multiplying warpgroup has tiles of its own, and buffers of x; all weights of a block's channels
    lie in shared memory, as the only stage. The matrix units have the products of one while the other works off its
    accumulators. Else both have parts of a tile, and do the same together.
    ``along``: rows of the output are reduced along w, and the part of a tile that a warpgroup has holds whole ones:
    boxes of any form, or eight rows of ``m_tiles`` times eight positions.
    ``neighbours``: how many output channels in a row a thread has, to be stored at once where they are neighbours in
    memory; one where their number is odd (``columns.cuh``).
    """

    layer: Layer
    chunk: int
    columns: int
    passes: tuple[Pass, ...]
    m_tiles: int
    stages: int
    x_buffers: int
    pooled: bool
    exact: bool
    one: bool = False
    merged: bool = False
    by_channel: bool = False
    watched: bool = False
    planar: int = 0
    step: tuple[int, int, int] = (1, 1, 1)
    samples: int = 1
    inner: int = 2
    by_pass: bool = False
    pingpong: bool = False
    along: Along | None = None
    neighbours: int = 2

    @property
    def sharing(self) -> int:
        """Warpgroups that share a tile, its stages and its buffers."""
        return 1 if self.pingpong else CONSUMERS

    @property
    def teams(self) -> int:
        """Tiles that a thread block has at a time."""
        return CONSUMERS // self.sharing

    def blocks(self, tiles: int, processors: int) -> int:
        """Thread blocks for so many tiles: where weights stay, as many of each tile of channels."""
        apart = self.layer.groups * self.column_tiles if self.pingpong else 1
        return max(min(tiles, processors) // apart, 1) * apart

    @property
    def parts(self) -> int:
        """16-bit numbers that make a float32: two for float32's own accuracy."""
        return PARTS if self.exact else 1

    @functools.cached_property
    def padded_channels(self) -> int:
        """Input channels per group in rows of shared memory."""
        return -(-self.layer.in_channels // self.chunk_channels) * self.chunk_channels

    @property
    def pads(self) -> bool:
        """Whether rows hold more than a position's channels of x, so that they are made of it however it lies."""
        return self.padded_channels != self.layer.channels * self.layer.joined

    @property
    def chunk_channels(self) -> int:
        """Input channels of a row of shared memory."""
        return self.chunk // self.parts

    @property
    def row_bytes(self) -> int:
        """Shared memory of a position of x."""
        return self.chunk * (self.planar or 2)

    @property
    def chunks(self) -> int:
        """Rows of shared memory that hold all input channels of a position."""
        return self.padded_channels // self.chunk_channels

    @property
    def products_of_parts(self) -> int:
        """Products of 16-bit numbers per multiply-add."""
        return PRODUCTS if self.exact else 1

    def window(self, count: int) -> int:
        """Columns of the instructions that multiply a run of ``count`` classes where float32's accuracy is wanted."""
        if self.by_channel:
            return min(self.m_tiles * ROWS, 2 * WINDOW)
        return window(count * self.columns)

    @property
    def resident(self) -> bool:
        return self.chunks == 1

    @functools.cached_property
    def residues(self) -> int:
        return max(len(p.residues) for p in self.passes)

    @property
    def column_tiles(self) -> int:
        return -(-self.layer.out_channels // self.columns)

    @property
    def rows(self) -> int:
        """Positions q per tile, the wasted ones among them."""
        return self.sharing * self.m_tiles * 64

    @functools.cached_property
    def region_bytes(self) -> int:
        """Shared memory for one buffer of x."""
        free = self.dynamic_bytes - 1024 - self.stages * self.stage_bytes - self.staging_bytes
        return free // (self.teams * self.x_buffers) // 1024 * 1024

    @functools.cached_property
    def dynamic_bytes(self) -> int:
        """Shared memory beside barriers and the tables of steps and channels."""
        steps = sum(len(p.steps) for p in self.passes)
        static = 704 + 128 * self.teams + CONSUMERS * (MOST_RUNS + self.columns) * 8 + (steps + 1) * 8
        if self.by_slab:  # barriers
            static += 16 * self.slabs * self.teams
        if self.by_channel:  # where positions lie
            static += CONSUMERS * (self.m_tiles * ROWS * 9 + (self.places + 96) * 4)
        return (SHARED_BYTES - static) // 1024 * 1024

    @functools.cached_property
    def stored_classes(self) -> int:
        """Elements of the output per row of a pass that an epilogue keeps: residue classes, or one where they are
        pooled before anything else.
        """
        return 1 if self.pooled and self.along is not Along.SHARED else self.residues

    @functools.cached_property
    def pair(self) -> int:
        """1 where classes 2i and 2i+1 of every pass are neighbours along w, -1 where 2i+1 and 2i are, 0 elsewhere."""
        found = set()
        for one in self.passes:
            at = [r.at for r in one.residues]
            for a, b in itertools.zip_longest(at[::2], at[1::2]):
                found.add(b[2] - a[2] if b is not None and a[:2] == b[:2] else 0)
        return found.pop() if found in ({1}, {-1}) else 0

    @property
    def stored_columns(self) -> int:
        """Channels that are stored of a tile."""
        return 1 if self.one else self.columns

    @functools.cached_property
    def lines(self) -> int:
        """Channels of a block that a warpgroup puts into shared memory at once, on its way to memory. Every block is
        waited for and handed over: the fewer, the better.
        """
        if self.by_channel:
            return 32  # 8 of each warp
        # twice the usual rows need the room for x
        return 8 if self.stored_classes * self.m_tiles <= 8 and self.m_tiles < MOST_TILES // CONSUMERS else 4

    @functools.cached_property
    def least_blocks(self) -> int:
        """Such blocks that a warpgroup has there; with small tiles there is room for more. Of one alone who sends by
        turns could not tell its next use from the last but one (``conv_outbox.cuh``).
        """
        if self.by_channel:
            return 1
        return 2 if self.pooled and not self.merged else max(2, min(3, OUTBOX_BYTES // (self.lines * self.pitch * 4)))

    @functools.cached_property
    def pitch(self) -> int:
        """Elements from one channel of such a block to the next: those of all rows, and room to align runs."""
        if self.by_channel:
            return LINE_PITCH
        return self.m_tiles * 64 * self.stored_classes + (72 if self.stored_classes == 1 else 80)

    def waiting_itemsize(self, itemsize: int) -> int:
        """Bytes of a number in such a block, where those of results are ``itemsize``: rows are reduced in float32."""
        return 4 if self.along is not None else itemsize

    @property
    def joint_pitch(self) -> int:
        """The same where both warpgroups fill a block; no more than both have, and the banks of its lines are apart."""
        return 2 * self.pitch - 16

    @property
    def places(self) -> int:
        """Of elements of a channel that a warpgroup stores, one behind the other, with room to align runs."""
        return self.m_tiles * ROWS * self.residues * 7 // 4 + 64

    @property
    def accumulators(self) -> tuple[int, int]:
        """Tiles of accumulators of a thread, one per matrix instruction of a step, and the numbers in each."""
        if self.by_channel:
            return -(-self.residues * self.columns // ROWS), self.m_tiles * ROWS // 2
        return self.m_tiles, self.columns * self.residues // 2

    @functools.cached_property
    def staging_bytes(self) -> int:
        """Shared memory for outputs on their way, of float32 or less, and for statistics of them."""
        if self.samples > 1:  # stored from registers, and not looked at
            return 0
        gathered = 0 if self.by_channel else GATHERED
        waiting = 0 if self.pingpong or self.along is Along.HELD else self.least_blocks * self.lines * self.pitch
        return CONSUMERS * (waiting + gathered) * 4

    @functools.cached_property
    def reach(self) -> tuple[int, int, int]:
        """Positions of x per dim that taps reach beyond those of the output; by pass those of one."""
        if self.by_pass:
            reached = ([s.delta for s in p.steps] or [(0, 0, 0)] for p in self.passes)
            each = [[max(of) - min(of) for of in zip(*deltas, strict=True)] for deltas in reached]
            d, h, w = map(max, zip(*each, strict=True))
            return d, h, w
        low, high = self.layer.reach
        d, h, w = (b - a + s - 1 for a, b, s in zip(low, high, self.step, strict=True))
        return d, h, w

    @functools.cached_property
    def lows(self) -> tuple[tuple[int, int, int], ...]:
        """Of every pass the least delta per dim: of the layer, or, by pass, its own."""
        if not self.by_pass:
            return (self.layer.reach[0],) * len(self.passes)
        deltas = ([s.delta for s in p.steps] or [(0, 0, 0)] for p in self.passes)
        return tuple((min(d), min(h), min(w)) for d, h, w in (zip(*some, strict=True) for some in deltas))

    @functools.cached_property
    def halo(self) -> tuple[int, int, int]:
        """The same where rows of x in shared memory follow each other as those of instructions do."""
        return (0, 0, 0) if self.planar else self.reach

    def copied(self, region: tuple[int, int, int], tile_w: int) -> tuple[int, int, int]:
        """Sizes of what is copied of x for a tile with this ``region``: of planes whole units of 16 bytes along w.

        ``tile_w``: from one tile to the next along w; zero where there is but one.
        """
        if not self.planar:
            return region
        d, h, w = ((n - 1) * s + 1 + r for n, s, r in zip(region, self.step, self.reach, strict=True))
        unit, (low, _) = PLANE_UNIT // self.planar, self.layer.reach
        ahead = low[2] % unit if tile_w * self.step[2] % unit == 0 else unit - 1  # where a copy begins
        return d, h, -(-(w + ahead) // unit) * unit

    @functools.cached_property
    def pass_cycles(self) -> float:
        """Clock cycles that the matrix units of a multiprocessor need for all taps of 64 rows."""
        if self.planar:
            return factor_cycles(self.passes, self.chunk, self.columns)
        return self._cycles(self.passes) * (self.padded_channels * self.products_of_parts // 16)

    def _cycles(self, passes: tuple[Pass, ...]) -> float:
        if self.by_channel:
            positions = self.window(1) if self.exact else self.m_tiles * ROWS
            return cycles_by_channel(passes, self.columns, positions, exact=self.exact)
        return cycles(passes, self.columns, exact=self.exact)

    @property
    def products(self) -> int:
        """Multiply-adds per position, input channel of the model and output channel."""
        offset = self.layer.offset_of
        return sum(len({offset[t] for t in taps}) for p in self.passes for s in p.steps for taps in s.taps)

    @property
    def headroom(self) -> int:
        """Bits by which a sum of weights may exceed the largest of them."""
        offset = self.layer.offset_of
        added = (Counter(offset[t] for t in taps) for p in self.passes for s in p.steps for taps in s.taps)
        most = max((max(each.values(), default=0) for each in added), default=0)
        return (max(most, 1) - 1).bit_length()

    @property
    def weight_bytes(self) -> int:
        """Packed weights of one group and one tile of output channels."""
        if self.planar:
            return 0
        return sum(self.step_bytes(s) for p in self.passes for s in p.steps) * self.chunks

    def step_bytes(self, step: Step) -> int:
        return step.count * self.columns * self.chunk * 2

    def shared(self, first: Specialisation) -> Shared:
        """What of a ``first`` kernel's rows and packed weights this one reads, too, where both are given the same."""
        how = ("layer", "exact", "padded_channels", "watched", "planar", *(("chunk",) if self.exact else ()))
        if self.planar or any(getattr(self, name) != getattr(first, name) for name in how):
            return Shared.NOTHING
        # what lies in shared memory, and in registers, leaves the packed weights as they are
        apart = ("m_tiles", "stages", "x_buffers", "pooled", "one", "samples", "inner", "by_pass", "pingpong", "along")
        same = dataclasses.replace(first, **{name: getattr(self, name) for name in apart}) == self
        return Shared.ALL if same else Shared.ROWS

    @functools.cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(first, count) of residue classes that steps multiply."""
        return tuple(sorted({(s.first, s.count) for p in self.passes for s in p.steps})) or ((0, 1),)

    @functools.cached_property
    def in_turn(self) -> bool:
        """Whether every pass of a tile multiplies every run, once and all of it."""
        return self.slabs == 1 and self._every_run

    @functools.cached_property
    def turns(self) -> bool:
        """Whether a run begins, by rows of a warpgroup, while the other rows' products of the one before end."""
        return self.in_turn and self._may_turn

    @property
    def _every_run(self) -> bool:
        return self.resident and all({(s.first, s.count) for s in p.steps} == {*self.runs} for p in self.passes)

    @property
    def _may_turn(self) -> bool:
        return self._every_run and len(self.runs) > 1 and self.m_tiles > 1 and not (self.by_channel or self.exact)

    @functools.cached_property
    def slabs(self) -> int:
        """Slabs of x along d that steps are told apart by, so that products with padding are left out: the planes that
        a tile's positions read, for each delta along d. One where that would make many small batches, and where runs
        that need not be waited for are worth more.
        """
        slabs = self.halo[0] + 1
        if not 1 < slabs <= MOST_SLABS:
            return 1
        apart, together = (sum(len(self._batches(p.steps, n)) for p in self.passes) for n in (slabs, 1))
        padding = 1 - self._multiplied(TYPICAL_PLANES, 1)
        waits = len(self.passes) * len(self.runs) * (RUN_CYCLES - TURN_CYCLES)
        if self._may_turn and padding * self.pass_cycles * self.rows / ROWS < waits:
            return 1
        return slabs if padding > 0 and (apart - together) * BATCH <= together * padding else 1

    @functools.cached_property
    def by_slab(self) -> bool:
        """Whether x is copied slab by slab: products with the others go on meanwhile, where there is one buffer for
        several chunks of channels.
        """
        runs = {(s.first, s.count) for p in self.passes for s in p.steps}
        one = len(runs) == 1 or self.samples > 1  # of sets x is large, and worth the steps of several runs
        return self.slabs > 1 and self.x_buffers == 1 and not (self.resident or self.pingpong) and one

    def multiplied(self, planes: int, each: int) -> float:
        """Part of the products that is not left out in tiles of ``each`` of an output's ``planes`` of positions."""
        return self._multiplied(planes, each) if self.slabs > 1 else 1.0

    def _multiplied(self, planes: int, each: int) -> float:
        read, passes = self.layer.planes_read(planes), self._slab_parts
        return sum(_not_padding(parts, low, read, planes, each) for low, parts in passes) / len(passes)

    @functools.cached_property
    def _slab_parts(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """Of the time of all products the part of each slab, and the least delta along d; by pass those of each."""
        found = []
        for passes in ((p,) for p in self.passes) if self.by_pass else (self.passes,):
            low = self.lows[self.passes.index(passes[0])][0]
            slabs = [0.0] * (self.halo[0] + 1)
            for step in (s for p in passes for s in p.steps):
                slabs[step.delta[0] - low] += self._cycles((Pass((), (step,)),))
            found.append((low, tuple(s / sum(slabs) for s in slabs)))
        return tuple(found)

    @functools.cached_property
    def stage_bytes(self) -> int:
        """Shared memory of a stage: of the largest batch of weights, in units to which rows are aligned."""
        batches = (batch for p in self.passes for batch in self.batches(p.steps))
        most = max((sum(map(self.step_bytes, batch)) for batch in batches), default=1)
        if self.pingpong:
            most = self.weight_bytes
        if self.planar:
            most = factor_bytes(self.passes, self.chunk, self.columns)
        return -(-most // 1024) * 1024

    @functools.cached_property
    def together(self) -> int:
        """Steps of a stage, one, two or four, whose products are made together where float32's accuracy is wanted, and
        then added to sums. One where each of several runs would have instructions for that, and too many registers.
        """
        if not self.exact or self.windows == 1 or len(self.runs) > 1:
            return 1
        steps = max((len(same) for p in self.passes for same in self._alike(p.steps, 1)), default=1)
        room = min(STAGE_BYTES // max((self.step_bytes(s) for p in self.passes for s in p.steps), default=1), steps)
        return 4 if room > 3 else 2 if room > 1 else 1

    @property
    def windows(self) -> int:
        """Instructions whose accumulators there is room for beside the sums."""
        return 2 if math.prod(self.accumulators) <= MOST_BESIDE_TWO else 1

    def batches(self, steps: tuple[Step, ...]) -> list[list[Step]]:
        """Steps that share a stage: neighbours of the same run and slab, about as many in each."""
        return self._batches(steps, self.slabs)

    def _batches(self, steps: tuple[Step, ...], slabs: int) -> list[list[Step]]:
        found: list[list[Step]] = []
        for same in self._alike(steps, slabs):
            room = len(same) if self.pingpong else STAGE_BYTES // self.step_bytes(same[0])
            each = self.together  # a stage but the last has a multiple of these
            units = -(-len(same) // each)
            count = -(-units // max(room // each, 1))
            cuts = [min(i * units // count * each, len(same)) for i in range(count + 1)]
            found += [same[a:b] for a, b in itertools.pairwise(cuts)]
        return found

    @staticmethod
    def _alike(steps: tuple[Step, ...], slabs: int) -> list[list[Step]]:
        """Steps of the same run and slab."""
        groups = itertools.groupby(steps, lambda s: (s.first, s.count, s.delta[0] if slabs > 1 else 0))
        return [[*group] for _, group in groups]


@functools.lru_cache(maxsize=4096)
def _not_padding(parts: tuple[float, ...], low: int, depth: int, planes: int, each: int) -> float:
    """Of products of which slabs have these ``parts``, the first one at ``low``, the part that reads planes of x."""
    tiles = range(low, low + planes, each)
    return sum(part for first in tiles for d, part in enumerate(parts) if -each < first + d < depth) / len(tiles)
