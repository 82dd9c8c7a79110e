"""Run a convolution with its epilogue on a Hopper GPU: workspaces, arguments and launches of one call.

A call queues up to six kernels: `measure` (scales of weights and samples of float32) or `unmark` (where 16-bit
numbers of x are looked at), `prepare` (x as rows of channels, or a look at it; packed weights), `again` (rows of
large samples whose scale `measure` has guessed too low), `convolution`, `direct` for samples that `prepare` marked,
and `merge` where statistics of the output are wanted. Those that read x have the chain in front of the convolution, if
there is one. Of planar kernels, which read x as it lies and mark samples themselves, there are `unmark`,
`convolution`, `direct` and `merge`. A second run on the same x leaves out what the first one has made for it.
What depends on shapes alone is computed once, in a :class:`_Call`, which :class:`Calls` keep; a call fills in the
pointers.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fxfuse.kernels.codegen.chains import dense
from fxfuse.kernels.compilation.jit import compile_cubin
from fxfuse.kernels.convolution.arguments import (
    BIAS,
    I32,
    I64,
    MOMENTS,
    OUT,
    POOLED,
    WEIGHT,
    Arguments,
    Channels,
    Direct,
    Divisor,
    Geometry,
    Rows,
    Samples,
    Strides,
    X,
)
from fxfuse.kernels.convolution.kernels import BLOCK, KERNELS, THREADS, Convolution, sampled
from fxfuse.kernels.convolution.lies import (
    at_once_of,
    channels_by_position,
    lines_by_quads,
    planes_in_place,
    rows_in_place,
    samples_are_dense,
    three_dims,
)
from fxfuse.kernels.convolution.specialisation import MOST_TILES, Shared, Specialisation, Unsupported
from fxfuse.kernels.convolution.tiles import Extents, Tiling, copied, first_planes, outbox_blocks, region_stride
from fxfuse.kernels.convolution.tiling import Store
from fxfuse.kernels.convolution.workspace import Workspace
from fxfuse.kernels.runtime import memory
from fxfuse.kernels.runtime.launch import Chain, Launch, Module, planes_map, rows_map, stream_of
from fxfuse.kernels.stages.merge import MERGE_BLOCK, MERGED, pieces

#: sizes that a kernel counts in 32 bits
MOST = 2**31 - 1
#: operands of the expressions before a pool, behind it, behind a reduction, and in front of x, packed
PackedOperands = tuple[bytes, bytes, bytes, bytes]
NO_OPERANDS: PackedOperands = b"", b"", b"", b""
#: units of eight 16-bit numbers that a block of `prepare` looks at, where x is multiplied as it lies
LOOKED_AT = 8 * BLOCK
#: places of a workspace for which the arguments are kept
MOST_PLACES = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Calls:
    """Runs of a layer's kernels for one set of shapes, strides of ``out`` and lengths of operands: call :meth:`run`.

    ``extents``: sizes of the convolution's output that are wanted. ``factor``: of a pool that sums. ``squeezed``:
    where the epilogue makes one value of all channels, ``out`` has no dim for them. ``shares``: what of x and the
    weights another run, on the same tensors, uses as well; each of the two has Calls of its own. ``follows``: as of
    ``Chain``.
    """

    convolution: Convolution
    extents: Extents
    factor: float = 1.0
    squeezed: bool = False
    shares: Shared = Shared.NOTHING
    follows: bool = False
    #: those that no thread is filling in, by strides and alignment of x
    free: dict[object, list[_Call]] = dataclasses.field(default_factory=dict, repr=False)

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        operands: PackedOperands = NO_OPERANDS,
        moments: int = 0,
        prepared: Tensor | None = None,
    ) -> Tensor | None:
        """Fill ``out`` (N, Cout, ...) from ``x`` (N, Cin, D, H, W) and ``weight`` (Cin, Cout/groups, kd, kh, kw).

        All may have fewer of the spatial dims; the weights and the bias are contiguous. Where the epilogue makes one
        value of all channels, ``out`` has one of them, or, ``squeezed``, no dim for them. ``operands``: of the
        epilogue's expressions, packed. ``moments``: the address of (N, pieces, Cout, numbers) in float64 of every kind
        of statistics that the epilogue gathers; where it does not keep the values, ``out`` is a meta tensor.
        ``prepared``: what the first run returned, for the second one.
        Everything is queued on the current stream of the current device, x's. Raises Unsupported before anything is
        queued where sizes exceed what the kernels count.
        """
        at = x.data_ptr()
        form = x.stride(), at % 16 == 0
        free = self.free.get(form)
        if free is None:
            if out.numel() == 0:
                return None
            if prepared is None and not self._takes(three_dims(x)):
                x = x.clone(memory_format=torch.contiguous_format)
                at = x.data_ptr()
                form = x.stride(), at % 16 == 0
            free = self.free.setdefault(form, [])
        try:
            call = free.pop()  # no other thread has it now
        except IndexError:
            room = three_dims(out.unsqueeze(1) if self.squeezed else out)
            call = _Call(self, three_dims(x), room, bias is not None, [*map(len, operands)], prepared is not None)
        prepared = call.run(at, weight, bias, out, operands, moments, prepared)
        free.append(call)
        return prepared

    def _takes(self, x: Tensor) -> bool:
        """Whether the kernels read x where it is."""
        if self.convolution.made.planar:
            return planes_in_place(x)
        return self.convolution.dtype is not torch.float32 or samples_are_dense(x)


class _Call:
    """The launches of one layer for given shapes and strides, for one thread at a time.

    ``operands``: lengths of those of a call. ``given``: it is the second one on the same tensors.
    """

    def __init__(self, of: Calls, x: Tensor, out: Tensor, bias: bool, operands: Sequence[int], given: bool) -> None:
        layer = of.convolution
        made, shape, epilogue = layer.made, layer.made.layer, layer.epilogue
        n, _, *sizes = x.shape
        rows_sizes = shape.row_sizes((sizes[0], sizes[1], sizes[2]))
        positions, each = math.prod(rows_sizes), math.prod(x.shape[1:])
        if max(positions, math.prod(sizes), math.prod(of.extents), n * positions // 64 * shape.groups) > MOST:
            raise Unsupported(f"a tensor of {tuple(x.shape)} has more positions than a kernel counts ({MOST})")
        if made.samples > 1 and made.samples * out.stride(0) > MOST:
            raise Unsupported(
                f"{made.samples} samples of {tuple(out.shape)} are further apart than a kernel counts ({MOST})"
            )
        stored: Extents = tuple(out.shape[2:])  # type: ignore[assignment]
        tiling, store = layer.tiling(stored)
        self.device, self.bias, self.given = x.device.index, bias, given
        self.planar = made.planar > 0
        self.scaled = layer.dtype is torch.float32 and not self.planar
        self.looks = self.scaled or self.planar or made.watched  # at x, and marks samples
        changed = layer.prologue is not None or self.scaled
        self.in_place = self.planar or (not changed and rows_in_place(x, made))
        width = made.padded_channels * shape.groups * made.parts
        self.map = self._map_of(x, (n, *rows_sizes, width), layer, tiling)
        every = sampled(n, each) if self.scaled else 1
        parts = 32 * max(1, min(8, each // every // 2**16, -(-64 // n)))
        slots = layer.slots(stored) if epilogue.gathers else 0
        couts = shape.out_channels * shape.groups
        self.workspace = Workspace.of(
            [0 if self.in_place else n * positions * width * 2, n * parts * 4, n * 4, n * 4, n * 4],
            [shape.groups * made.column_tiles * made.weight_bytes, couts * 4, couts * 4, couts * 4, couts * 4],
            [n * slots * couts * 8 * len(epilogue.gathers), n * slots * 4],
            of.shares,
        )
        self.hands_on = self.workspace.handed > 0 and not given
        whole = self.workspace.own + (self.workspace.handed if self.hands_on else 0)
        self.room = (whole,) if whole else None
        self.bases, self.source = (-1, -1), -1
        self.placed = dict[tuple[int, int], bytes]()
        self.packed_operands = NO_OPERANDS
        end = self._lay_out(operands, pooled=bool(epilogue.combine))
        told = self.told
        told.samples.parts, told.samples.every, told.to.stride = parts, every, Strides(*out.stride())
        told.direct = Direct(Strides(*x.stride()), *sizes, n, channels=couts)
        if epilogue.gathers:
            told.to.slots, told.to.all_channels = slots, couts
        if epilogue.combine:
            POOLED.pack_into(self.arguments, end, *stored, of.factor)
        self.launch = Chain([*self._launches(of, x, tiling, store)], follows=of.follows)

    def _map_of(self, x: Tensor, rows: tuple[int, ...], layer: Convolution, tiling: Tiling) -> Callable[[int], bytes]:
        """What makes the map of x, or of its ``rows``, that begin at an address."""
        planes, *plane = tiling.region
        made, bfloat = layer.made, layer.dtype is torch.bfloat16
        if self.planar:
            planes_box = (x.shape[1], *copied(made, tiling))
            return functools.partial(
                planes_map, shape=tuple(x.shape), strides=x.stride(), box=planes_box, dtype=x.dtype
            )
        strides = tuple(x.stride(i) for i in (0, 2, 3, 4, 1)) if self.in_place else dense(rows, "contiguous")
        box = (1, planes if first_planes(made, tiling) == planes else 1, *plane)
        if made.samples > 1:  # the dims as rows of shared memory have them: d, outer, inner, sample
            order = 1, *((3, 2) if made.inner == 1 else (2, 3)), 0, 4
            rows, strides = (tuple(of[i] for i in order) for of in (rows, strides))
            box = (*box[1:], made.samples)
        return functools.partial(rows_map, shape=rows, strides=strides, bfloat=bfloat, box=box, channels=made.chunk)

    def _lay_out(self, lengths: Sequence[int], *, pooled: bool) -> int:
        """Make room for the arguments, with operands of these lengths behind them; where these end."""
        *lengths, front = lengths
        self.front = ctypes.create_string_buffer(max(front, 8))
        end, places = ctypes.sizeof(Arguments), []
        for number, length in enumerate(lengths):
            places.append(end)
            if pooled or number != 1:  # nothing is between a convolution that stores and a reduction
                end += max(length, 8)
        self.places = tuple(places)
        self.arguments = ctypes.create_string_buffer(end + POOLED.size)
        self.memory = memoryview(self.arguments).cast("B")
        self.words = self.memory.cast("q")
        self.told = Arguments.from_buffer(self.arguments)
        return end

    def _launches(self, of: Calls, x: Tensor, tiling: Tiling, store: Store) -> Iterator[Launch]:
        """The kernels of a call in the order in which they run."""
        layer, told, given = of.convolution, self.told, self.given
        made, shape, epilogue = layer.made, layer.made.layer, layer.epilogue
        n, each, couts = x.shape[0], math.prod(x.shape[1:]), told.direct.channels
        guesses = told.samples.every > 1
        more = {
            "prepare": not self.planar,
            "measure": self.scaled,
            "unmark": made.watched or self.planar,
            "again": guesses,
            "merge": bool(epilogue.gathers),
        }
        names = (*KERNELS, *(name for name, there in more.items() if there))
        kernels, processors = _module(layer.source(store), names, self.device).kernels, _processors(self.device)

        rows, packed, scale, x_at, w_at, b_at, moments_at = (
            I64.from_buffer(self.arguments, getattr(Arguments, name).offset)
            for name in ("rows", "packed", "scale", "x", "weight", "bias", "moments")
        )
        to = Arguments.to.offset  # with the operands behind it
        destination = (ctypes.c_char * (len(self.arguments) - to)).from_buffer(self.arguments, to)
        in_c, out_c, volume = map(I32, (shape.in_channels, shape.out_channels, shape.volume))
        geometry = _geometry(x, of.extents, made, tiling, made.waiting_itemsize(layer.output.itemsize))

        wide = I64.from_buffer(self.arguments, Arguments.channels.offset + Channels.bias.offset)
        if "unmark" in names and not given:
            biases = [b_at, wide, I32(couts)] if self.planar else []
            yield Launch(kernels["unmark"], -(-n // BLOCK), BLOCK, [told.samples, I32(n), *biases])
        front = [] if layer.prologue is None else [self.front]
        if not (self.planar or (given and of.shares is Shared.ALL)):
            rows_geometry = _rows_geometry(x, made, in_place=self.in_place)
            if given or (self.in_place and not made.watched):
                rows_geometry.blocks = 0  # `prepare` has weights alone
            if self.scaled:
                ins, outs = I32(shape.channels), I32(shape.out_channels // shape.joined)
                arguments = [w_at, b_at, told.channels, x_at, told.samples, I64(each), ins, outs, volume, I32(couts)]
                arguments += [rows_geometry, *front] if front else []
                blocks = couts + (0 if given else n * told.samples.parts)
                yield Launch(kernels["measure"], blocks, BLOCK, arguments)
            taps = sum(s.count for p in made.passes for s in p.steps)
            blocks_weights = -(-taps * made.columns * (made.chunk // 8) // BLOCK)
            blocks = rows_geometry.blocks + blocks_weights * shape.groups * made.column_tiles * made.chunks
            yield Launch(
                kernels["prepare"], max(blocks, 1), BLOCK,
                [x_at, rows, told.samples, rows_geometry, w_at, packed, scale, I32(made.chunks),
                 I32(made.column_tiles), in_c, out_c, volume, I32(made.weight_bytes), I32(blocks_weights),
                 *([] if self.scaled else [b_at, wide, I32(couts)]), *front],
            )  # fmt: skip
            if guesses and not given:
                yield Launch(kernels["again"], processors * 4, BLOCK, [x_at, rows, told.samples, rows_geometry, *front])
        marks = I64.from_buffer(self.arguments, Arguments.samples.offset + Samples.marks.offset)
        arguments = [w_at, geometry, marks] if self.planar else [packed, geometry]
        yield Launch(
            kernels["convolution"], made.blocks(geometry.tiles, processors), THREADS,
            [told.map, *arguments, destination], made.dynamic_bytes,
        )  # fmt: skip
        if self.looks and epilogue.keeps:
            arguments = [x_at, w_at, told.direct, geometry, destination, *front]
            yield Launch(kernels["direct"], processors * 4, BLOCK, arguments)
        if epilogue.gathers:
            count = pieces(n, couts, told.to.slots)
            arguments = [x_at, w_at, told.direct, geometry, destination, I32(count), moments_at, *front]
            yield Launch(kernels["merge"], n * count * -(-couts // MERGED), MERGE_BLOCK, arguments)

    def run(
        self,
        at: int,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        operands: PackedOperands,
        moments: int,
        prepared: Tensor | None,
    ) -> Tensor | None:
        """Queue everything; what of it a second run uses, or what this one was given. ``at``: the address of x."""
        room, own = self.room, None
        if room is not None:
            own = memory.empty(room, (1,), torch.uint8)
            begin = own.data_ptr()
            if self.hands_on:
                prepared = own
                bases = begin, begin + self.workspace.handed
            else:
                bases = 0 if prepared is None else prepared.data_ptr(), begin
        else:
            bases = 0 if prepared is None else prepared.data_ptr(), 0
        if bases != self.bases:
            self._place(bases)
        words = self.words
        words[X], words[WEIGHT], words[OUT] = at, weight.data_ptr(), out.data_ptr()
        words[BIAS], words[MOMENTS] = 0 if bias is None else bias.data_ptr(), moments
        if operands != self.packed_operands:
            *behind, front = operands
            for place, packed in zip(self.places, behind, strict=True):
                self.memory[place : place + len(packed)] = packed
            ctypes.memmove(self.front, front, len(front))
            self.packed_operands = operands
        if self.in_place and at != self.source:
            self._map(at)
        self.launch(stream_of(self.device))
        return prepared

    def _place(self, bases: tuple[int, int]) -> None:
        """Let the arguments point into a workspace whose blocks begin at ``bases``."""
        self.bases = bases
        kept = self.placed.get(bases)
        if kept is not None:
            self.memory[: len(kept)] = kept
            self.source = -1  # the map in it may be of another x
            return
        told = self.told
        samples, channels, to = told.samples, told.channels, told.to
        places = self.workspace.addresses(*bases)
        told.rows, samples.largest, samples.above, samples.marks, samples.scale = places[:5]
        if self.in_place:
            told.rows = 0  # `prepare` makes none
        told.packed, channels.scale, channels.reciprocal, channels.bias, channels.wrong = places[5:10]
        to.parts, to.counts = places[10:]
        told.scale = channels.scale
        to.bias = channels.bias if self.bias else 0
        told.direct.marks = samples.marks
        if self.scaled:
            to.sample_scale, to.channel_scale, told.direct.wrong = samples.scale, channels.reciprocal, channels.wrong
        if not self.in_place:
            self._map(told.rows)
        if len(self.placed) == MOST_PLACES:
            self.placed.clear()
        self.placed[bases] = bytes(told)

    def _map(self, source: int) -> None:
        """Let the convolution read x, or its rows, from ``source`` on."""
        ctypes.memmove(self.told.map, self.map(source), 128)
        self.source = source


def _rows_geometry(x: Tensor, made: Specialisation, *, in_place: bool) -> Rows:
    """What `prepare` and `again` are told of the rows of x; ``in_place``: of what `prepare` looks at."""
    n, _, *sizes = x.shape
    layer, groups, width = made.layer, made.layer.groups, made.padded_channels * made.layer.groups
    rows = d, h, w = layer.row_sizes((sizes[0], sizes[1], sizes[2]))
    channels = layer.channels * layer.joined, made.padded_channels, groups
    if in_place:
        blocks = -(-math.prod(sizes) * width // (8 * LOOKED_AT))
        return Rows(Strides(*x.stride()), *sizes, *channels, blocks * n, blocks, LOOKED_AT, 0, *rows)
    if layer.beside:  # four neighbours along w at once
        at_once, positions = 4 * lines_by_quads(x), d * h * -(-w // 4) * 4
    else:
        at_once, positions = at_once_of(x), math.prod(rows)
    each = 2048 * at_once or (8192 if layer.beside else 32768 if channels_by_position(x) else 4096)
    span = each // max(16, min(64, 1 << (width - 1).bit_length()))
    blocks_positions = -(-positions // span)
    blocks = blocks_positions * -(-width // 64) * n
    return Rows(Strides(*x.stride()), *sizes, *channels, blocks, blocks_positions, span, at_once, *rows)


def _geometry(x: Tensor, extents: Extents, made: Specialisation, tiling: Tiling, itemsize: int) -> Geometry:
    """What kernels behind `prepare` are told of sizes and tiles. ``itemsize``: of results."""
    layer, (samples, _, *sizes) = made.layer, x.shape
    sizes_copied = copied(made, tiling)
    depth, *_ = layer.row_sizes((sizes[0], sizes[1], sizes[2]))
    sets, parts = -(-samples // made.samples), len(made.passes) if made.by_pass else 1
    tiles = sets * layer.groups * made.column_tiles * math.prod(tiling.counts) * parts
    divided = made.column_tiles, *reversed(tiling.counts), layer.groups, *reversed(tiling.region[1:]), tiling.box[1]
    return Geometry(
        samples, layer.groups, made.column_tiles, *tiling.counts, tiles, *tiling.tile, *tiling.box, *tiling.half,
        tiling.linear, tiling.over, *tiling.region[1:], *sizes_copied[1:],
        math.prod(sizes_copied) * made.samples * made.row_bytes, region_stride(made, tiling), *layer.reach[0],
        tiling.row_group, (I32 * MOST_TILES)(*tiling.row_base * made.teams), tiling.part_rows, made.chunks, *extents,
        layer.out_channels, made.weight_bytes, outbox_blocks(made, tiling, itemsize), depth,
        first_planes(made, tiling), *map(Divisor.of, divided),
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _module(source: str, names: tuple[str, ...], device: int) -> Module:
    with torch.cuda.device(device):
        return Module(compile_cubin(source).code, names)


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
