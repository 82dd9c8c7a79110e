// Weights as tiles of 16-bit numbers, in the order in which a convolution on matrix instructions copies them.
#pragma once
#include "columns.cuh"
#include "ptx.cuh"

namespace fxfuse {

// The place of weights in a tile: of column 0 of the tile's, in chunk 0.
struct Packed {
  int pass_offset, pass_bytes;  // bytes from the tile's begin to the pass, and of the pass, with one chunk
  int offset;                   // bytes from there
};
// Those that are added there for one of the positions of a row; none for a residue class that has none at this step.
struct Taps {
  int tap;           // -1 for none
  int first, count;  // of more of them
};

// One 16-byte unit per thread: 8 input channels of one output channel at one place, or, of an exact problem, what the 16-bit
// numbers leave of them. Neighbouring threads read neighbouring taps, and output channels behind those. `blocks` of them for
// each group, column tile and chunk. Zeros between the channels of the model's groups that are `joined`. Where rows have a
// channel at several `offsets`, each has taps of its own.
template <class Problem, class T, class Half16, bool scaled>
FXFUSE_INLINE void pack_weights(int block, int blocks, const T* w, uint8_t* packed, const float* scale, int chunks,
                                int column_tiles, int in_channels, int out_channels, int volume, int weight_bytes) {
  constexpr int units = Problem::chunk / 8, each = Problem::columns * Problem::packed, offsets = Problem::offsets;
  const int block_rest = block / blocks, index = (block - block_rest * blocks) * blockDim.x + threadIdx.x;
  const int unit = index / each, rest = index - unit * each, row = rest / Problem::packed;
  if (unit >= units) return;
  const int at_step = rest - row * Problem::packed;
  const Packed place = Problem::place(at_step);
  const int tile = block_rest / chunks, chunk = block_rest - tile * chunks;
  const int group = tile / column_tiles, column = (tile - group * column_tiles) * Problem::columns +
                                                  Columns<Problem>::channel(row / 8, row / 2 % 4, row % 2);
  const bool there = column < out_channels;
  const int outs = out_channels / Problem::joined, one = column / outs;  // of the model's groups
  const float s = scaled && there ? scale[group * out_channels + column] : 1.f;
  const bool remainder = Problem::exact && unit * 8 >= Problem::chunk_channels;
  const int first = chunk * Problem::chunk_channels + unit * 8 - (remainder ? Problem::chunk_channels : 0);
  const int begin = first / offsets;
  const T* const from = w + ((int64_t)(group * (in_channels / offsets) + begin) * outs + column - one * outs) * volume;
  Taps taps = Problem::taps(at_step, 0);
  alignas(16) Half16 values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (Problem::headroom > 0) schedule_barrier();  // sums are made one by one: registers are scarce
    const int channel = (first + i) / offsets, offset = first + i - channel * offsets;
    const T* const at = from + (int64_t)(offsets == 1 ? i : channel - begin) * outs * volume;
    const bool own = Problem::joined == 1 || channel / Problem::in_channels == one;
    const bool inside = there && own && first + i < in_channels;
    if constexpr (offsets > 1) taps = Problem::taps(at_step, offset);
    float v = inside && taps.tap >= 0 ? to_float(at[taps.tap]) * s : 0.f;
    if (Problem::headroom > 0 && inside)
      for (int k = 0; k < taps.count; ++k) v = fmaf(to_float(at[Problem::tap(taps.first + k)]), s, v);
    values[i] = from_float<Half16>(v);
    if (remainder) values[i] = from_float<Half16>(v - to_float(values[i]));
  }
  const int swizzled = unit ^ (units == 8 ? row & 7 : units == 4 ? (row >> 1) & 3 : (row >> 2) & 1);
  uint8_t* const to = packed + (int64_t)tile * weight_bytes + place.pass_offset * chunks + chunk * place.pass_bytes +
                      place.offset + (row * units + swizzled) * 16;
  *(uint4*)to = *(const uint4*)values;
}

}  // namespace fxfuse
