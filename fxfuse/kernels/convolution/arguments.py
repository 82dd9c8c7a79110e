"""What the kernels around a convolution take: the structs of ``cuh/`` as ctypes lays them out.

The names of fields are those of the device code; addresses are 64-bit numbers.
"""

from __future__ import annotations

import ctypes
import struct

from fxfuse.kernels.convolution.specialisation import MOST_TILES

#: bytes of a launch's parameters
MOST_PARAMETERS = 4096
I32, I64 = ctypes.c_int, ctypes.c_int64
WORD = ctypes.sizeof(I64)


class Strides(ctypes.Structure):
    _fields_ = [(name, I64) for name in "ncdhw"]


class Divisor(ctypes.Structure):
    """n * multiplier >> shift is n // by for n below 2**31."""

    _fields_ = [("multiplier", ctypes.c_uint), ("shift", ctypes.c_uint)]

    @classmethod
    def of(cls, by: int) -> Divisor:
        shift = 31 + (max(by, 1) - 1).bit_length()
        return cls((1 << shift) // max(by, 1) + 1, shift)


class Geometry(ctypes.Structure):
    _fields_ = [
        *((n, I32) for n in ("samples", "groups", "column_tiles", "tiles_d", "tiles_h", "tiles_w", "tiles")),
        *((n, I32) for n in ("tile_d", "tile_h", "tile_w", "box_d", "box_h", "box_w")),
        *((n, I32) for n in ("half_d", "half_h", "half_w", "linear", "over")),
        *((n, I32) for n in ("region_h", "region_w", "copied_h", "copied_w", "region_bytes", "region_stride")),
        *((n, I32) for n in ("low_d", "low_h", "low_w", "row_group")),
        ("row_base", I32 * MOST_TILES),
        *((n, I32) for n in ("part_rows", "chunks", "out_d", "out_h", "out_w", "out_channels", "weight_bytes")),
        *((n, I32) for n in ("outbox_blocks", "in_d", "first_planes")),
        *((n, Divisor) for n in ("by_columns", "by_w", "by_h", "by_d", "by_groups")),
        *((n, Divisor) for n in ("by_region_w", "by_region_h", "by_box_h")),
    ]


class Samples(ctypes.Structure):
    _fields_ = [*((n, I64) for n in ("largest", "above", "marks", "scale")), ("parts", I32), ("every", I32)]


class Channels(ctypes.Structure):
    _fields_ = [(n, I64) for n in ("scale", "reciprocal", "bias", "wrong")]


class Rows(ctypes.Structure):
    _fields_ = [
        ("stride", Strides),
        *((n, I32) for n in ("depth", "height", "width", "channels", "padded", "groups")),
        *((n, I32) for n in ("blocks", "blocks_positions", "span", "at_once", "rows_d", "rows_h", "rows_w")),
    ]


class Direct(ctypes.Structure):
    _fields_ = [
        ("stride", Strides),
        *((n, I32) for n in ("depth", "height", "width", "samples")),
        *((n, I64) for n in ("marks", "wrong", "channels")),
    ]


class Destination(ctypes.Structure):
    _fields_ = [
        ("out", I64),
        ("stride", Strides),
        *((n, I64) for n in ("bias", "sample_scale", "channel_scale", "parts", "counts")),
        ("slots", I32),
        ("all_channels", I32),
    ]


class Arguments(ctypes.Structure):
    """What changes from call to call, and lies among it; operands of the epilogue follow."""

    _fields_ = [
        ("map", ctypes.c_ubyte * 128),
        *((n, I64) for n in ("rows", "packed", "scale")),
        ("samples", Samples),
        ("channels", Channels),
        ("direct", Direct),
        *((n, I64) for n in ("x", "weight", "bias", "moments")),
        ("to", Destination),
    ]


#: where in :class:`Arguments`, in words, the addresses of a call lie
X, WEIGHT, BIAS, MOMENTS, OUT = (
    getattr(Arguments, name).offset // WORD for name in ("x", "weight", "bias", "moments", "to")
)
#: the end of a pool's arguments: extents of the result, and the factor of a sum
POOLED = struct.Struct("<iiif")
