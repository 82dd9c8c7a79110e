"""Run a convolution with its epilogue on a Hopper GPU: workspaces, arguments and launches of one call."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxfuse.instr import DTYPE_NAMES
from fxfuse.kernels.convolution import SHARED_BYTES, STAGE_BYTES, Layer, Specialisation, specialise, tile
from fxfuse.kernels.emit import Epilogue, emit
from fxfuse.kernels.geometry import reach
from fxfuse.kernels.jit import compile_cubin
from fxfuse.kernels.launch import Module, rows_map

KERNELS = ("convolution", "scale_weights", "find_maximum", "to_rows", "pack_weights", "direct")
_I, _L = ctypes.c_int, ctypes.c_int64


class _Strides(ctypes.Structure):
    _fields_ = [(name, _L) for name in "ncdhw"]


class _Geometry(ctypes.Structure):
    _fields_ = [
        *((n, _I) for n in ("samples", "groups", "column_tiles", "tiles_d", "tiles_h", "tiles_w", "tiles")),
        *((n, _I) for n in ("tile_d", "tile_h", "tile_w", "region_h", "region_w", "region_bytes", "region_stride")),
        *((n, _I) for n in ("low_d", "low_h", "low_w", "row_group")),
        ("row_base", _I * 8),
        *((n, _I) for n in ("chunks", "out_d", "out_h", "out_w", "out_channels", "weight_bytes")),
    ]


class _Samples(ctypes.Structure):
    _fields_ = [(n, _L) for n in ("largest", "marks", "scale")]


class _Channels(ctypes.Structure):
    _fields_ = [(n, _L) for n in ("scale", "reciprocal", "bias", "mark")]


class _Direct(ctypes.Structure):
    _fields_ = [
        ("stride", _Strides),
        *((n, _I) for n in ("depth", "height", "width", "samples")),
        ("marks", _L),
        ("mark", _L),
    ]


class _Store(ctypes.Structure):
    _fields_ = [("out", _L), ("stride", _Strides), ("bias", _L), ("sample_scale", _L), ("channel_scale", _L)]


class _Pooled(ctypes.Structure):
    _fields_ = [(n, _I) for n in ("pooled_d", "pooled_h", "pooled_w")]


class _Factor(ctypes.Structure):
    _fields_ = [("factor", ctypes.c_float)]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A compiled layer with its epilogue: call :meth:`run`."""

    made: Specialisation
    dtype: torch.dtype
    output: torch.dtype
    bias: torch.dtype
    epilogue: Epilogue
    source: str = dataclasses.field(compare=False)

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(
        layer: Layer, dtype: torch.dtype, output: torch.dtype, bias: torch.dtype, epilogue: Epilogue
    ) -> Convolution:
        """The kernel for a layer; Unsupported where there is none."""
        made = specialise(layer, pooled=bool(epilogue.combine))
        names = [DTYPE_NAMES[d] for d in (dtype, output, bias)]
        return Convolution(made, dtype, output, bias, epilogue, emit(made, *names, epilogue))

    def module(self, device: int) -> Module:
        return _module(self.source, device)

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        extents: tuple[int, int, int],
        out: Tensor,
        *,
        before: bytes = b"",
        after: bytes = b"",
        factor: float = 1.0,
    ) -> None:
        """Fill ``out`` (N, Cout, ...) from ``x`` (N, Cin, D, H, W) and ``weight`` (Cin, Cout/groups, kd, kh, kw).

        ``extents``: sizes of the convolution's output that are wanted. ``before``, ``after``: the operands
        of the epilogue's expressions, packed. Everything is queued on the current stream.
        """
        made, layer = self.made, self.made.layer
        device = x.device.index
        kernels = self.module(device).kernels
        stream = torch.cuda.current_stream(device).cuda_stream
        n, _, *sizes = x.shape
        if out.numel() == 0:
            return
        low, high = reach(layer.residues)
        extent_q = out.shape[2:] if self.epilogue.combine else [-(-o // s) for o, s in zip(extents, layer.stride)]
        tiling = tile(made, tuple(extent_q))
        scaled = self.dtype is torch.float32
        half = torch.bfloat16 if self.dtype is torch.bfloat16 else torch.float16
        couts = layer.out_channels * layer.groups
        weight = weight.contiguous()

        state = torch.empty(3 * n + 3 * couts + 1, dtype=torch.float32, device=x.device)
        at = [state.data_ptr() + 4 * i for i in (0, n, 2 * n, 3 * n, 3 * n + couts, 3 * n + 2 * couts, 3 * n + 3 * couts)]
        samples, channels = _Samples(*at[:3]), _Channels(*at[3:])
        state[-1:].zero_()
        block = 256
        bias_pointer = _L(0 if bias is None else bias.data_ptr())
        in_c, out_c, volume = _I(layer.in_channels), _I(layer.out_channels), _I(layer.volume)
        kernels["scale_weights"].launch(
            (couts, 1, 1), block,
            [_L(weight.data_ptr()), bias_pointer, channels, samples, _I(n), in_c, out_c, volume], stream,
        )  # fmt: skip
        if scaled:
            if not _dense(x):
                x = x.contiguous()
            size = x[0].numel()
            kernels["find_maximum"].launch(
                (max(1, min(size // (4 * block * 4), 2048 // n + 1)), n, 1), block, [_L(x.data_ptr()), samples, _L(size)], stream
            )
        width = made.padded_channels * layer.groups
        direct_rows = not scaled and _rows_in_place(x, made)
        if direct_rows:
            rows = x.permute(0, 2, 3, 4, 1)
        else:
            rows = torch.empty((n, *sizes, width), dtype=half, device=x.device)
            positions = math.prod(sizes)
            kernels["to_rows"].launch(
                (-(-positions // 64), -(-width // 64), n), block,
                [_L(x.data_ptr()), _L(rows.data_ptr()), samples, _Strides(*x.stride()), *map(_I, sizes),
                 in_c, _I(made.padded_channels), _I(layer.groups)], stream,
            )  # fmt: skip
        tiles = layer.groups * made.column_tiles
        packed = torch.empty(max(tiles * made.weight_bytes, 16), dtype=torch.uint8, device=x.device)
        steps = [s for p in made.passes for s in p.steps]
        if steps:
            units = max(s.count for s in steps) * made.columns * made.chunk // 8
            kernels["pack_weights"].launch(
                (-(-units // block), len(steps), tiles * made.chunks), block,
                [_L(weight.data_ptr()), _L(packed.data_ptr()), _L(channels.scale), _I(made.chunks),
                 _I(made.column_tiles), in_c, out_c, volume, _I(made.weight_bytes)], stream,
            )  # fmt: skip
        total = n * layer.groups * made.column_tiles * math.prod(tiling.counts)
        region = math.prod(tiling.region) * made.chunk * 2
        geometry = _Geometry(
            n, layer.groups, made.column_tiles, *tiling.counts, total, *tiling.tile, *tiling.region[1:],
            region, made.region_bytes, *low, tiling.row_group, (_I * 8)(*tiling.row_base), made.chunks, *extents,
            layer.out_channels, made.weight_bytes,
        )  # fmt: skip
        arguments = bytes(
            _Store(
                out.data_ptr(), _Strides(*out.stride()), channels.bias if bias is not None else 0,
                samples.scale if scaled else 0, channels.reciprocal if scaled else 0,
            )
        )  # fmt: skip
        arguments += before or bytes(8)
        if self.epilogue.combine:
            arguments += (after or bytes(8)) + bytes(_Pooled(*out.shape[2:])) + bytes(_Factor(factor))
        packed_arguments = ctypes.create_string_buffer(arguments, len(arguments))
        shared = SHARED_BYTES + 1024
        kernels["convolution"].launch(
            (min(total, _processors(device)), 1, 1), 384,
            [rows_map(rows, tiling.region, made.chunk), _L(packed.data_ptr()), geometry, packed_arguments], stream, shared,
        )  # fmt: skip
        if scaled:
            direct = _Direct(_Strides(*x.stride()), *sizes, n, samples.marks, channels.mark)
            kernels["direct"].launch(
                (_processors(device) * 8, 1, 1), block,
                [_L(x.data_ptr()), _L(weight.data_ptr()), direct, geometry, packed_arguments], stream,
            )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _module(source: str, device: int) -> Module:
    with torch.cuda.device(device):
        return Module(compile_cubin(source).code, KERNELS)


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _dense(x: Tensor) -> bool:
    """Whether every sample is a block of memory without holes, one behind the other."""
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last_3d)


def _rows_in_place(x: Tensor, made: Specialisation) -> bool:
    """Whether TMA can read x as rows of channels as it lies."""
    strides: Sequence[int] = x.stride()
    return (
        strides[1] == 1
        and made.padded_channels == made.layer.in_channels
        and all(s % 8 == 0 for i, s in enumerate(strides) if i != 1)
        and x.data_ptr() % 16 == 0
        and all(s > 0 for s in strides)
    )
