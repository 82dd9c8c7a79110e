// Rows of several positions, for x of few channels: number `channel * count + i` of a row is the channel at the
// i-th offset from the row's own position, zero beyond a border of x (`Layer.beside` in convolution.py).
#pragma once
#include "prepare.cuh"

namespace fxfuse {

// `Offsets`: how many there are per dim, which, ascending, and channels of x per group.
template <class Offsets>
struct RowsBeside {
  static constexpr int along = Offsets::count_w, lines = Offsets::count_d * Offsets::count_h, count = lines * along;
  static constexpr int numbers = Offsets::channels * count, units = (numbers + 15) / 16 * 2;  // 8 numbers are a unit
  static constexpr int low = Offsets::w(0), window = Offsets::w(along - 1) - low + 4;

  // What neighbours along w have at `line` of x, from the first offset of the position w on; four at once, or one by one.
  template <bool quads, class T>
  static FXFUSE_INLINE void read_line(float (&to)[window], const T* line, const RowGeometry& g, bool inside, int w) {
    if constexpr (quads) {
      constexpr int begin = (low & ~3), skip = low - begin;
#pragma unroll
      for (int i = 0; i < skip + window; i += 4) {
        const int at = w + begin + i;
        const bool there = inside && (uint32_t)at < (uint32_t)g.width;
        if (i >= skip && i + 4 <= skip + window) {
          alignas(16) T read[4] = {};
          if (there) {
            if constexpr (sizeof(T) == 4) *(uint4*)read = *(const uint4*)(line + at);
            else *(uint2*)read = *(const uint2*)(line + at);
          }
#pragma unroll
          for (int k = 0; k < 4; ++k) to[i + k - skip] = to_float(read[k]);
          continue;
        }
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (i + k >= skip && i + k < skip + window) to[i + k - skip] = there ? to_float(line[at + k]) : 0.f;
      }
    } else {
#pragma unroll
      for (int i = 0; i < window; ++i) {
        const int at = w + low + i;
        to[i] = inside && (uint32_t)at < (uint32_t)g.width ? to_float(line[at * (int)g.stride_w]) : 0.f;
      }
    }
  }

  // The `wanted` unit of the rows of four neighbours along w, from (d, h, w) on, of a sample and group. No shared memory.
  template <bool quads, int unit = 0, class X>
  static FXFUSE_INLINE void read(float (&to)[4][8], int wanted, const X& x, const RowGeometry& g, int n, int group, int d,
                                 int h, int w) {
    if constexpr (unit + 1 < units)
      if (wanted != unit) return read<quads, unit + 1>(to, wanted, x, g, n, group, d, h, w);
    const int before = group * g.channels;  // channels
    const auto* const sample = x.at + n * g.stride_n + (int64_t)before * g.stride_c;
    constexpr int first = unit * 8, end = numbers < first + 8 ? numbers : first + 8;
#pragma unroll
    for (int k = 0; k < 8; ++k) to[0][k] = to[1][k] = to[2][k] = to[3][k] = 0.f;
#pragma unroll
    for (int from = first / along; from * along < end; ++from) {
      const int channel = from / lines, at = from % lines;
      const int z = d + Offsets::d(at / Offsets::count_h), y = h + Offsets::h(at % Offsets::count_h);
      const bool inside = (uint32_t)z < (uint32_t)g.depth && (uint32_t)y < (uint32_t)g.height;
      float values[window];
      // elements of a dense sample are counted in 32 bits
      const auto* const line = sample + (channel * (int)g.stride_c + z * (int)g.stride_d + y * (int)g.stride_h);
      read_line<quads>(values, line, g, inside, w);
      if constexpr (!X::plain)
        if (inside) {
          const auto known = x.channel(n, before + channel);
#pragma unroll
          for (int i = 0; i < window; ++i) {
            const int at = w + low + i;
            if ((uint32_t)at < (uint32_t)g.width) values[i] = x(known, values[i], n, before + channel, z, y, at);
          }
        }
#pragma unroll
      for (int i = 0; i < along; ++i) {
        const int k = from * along + i - first;
        if (k < 0 || k >= 8) continue;
#pragma unroll
        for (int q = 0; q < 4; ++q) to[q][k] = values[Offsets::w(i) - low + q];
      }
    }
  }

  // Look at what such a unit has of x, every value once: of all rows that have it one has it at the first offset, since there
  // is a row for each such position.
  template <int unit = 0, class Taking>
  static FXFUSE_INLINE void look(const float (&values)[4][8], int wanted, int end, Taking& take) {
    if constexpr (unit + 1 < units)
      if (wanted != unit) return look<unit + 1>(values, wanted, end, take);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if ((unit * 8 + k) % count != 0 || unit * 8 + k >= numbers) continue;
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (q < end) take.look(values[q][k]);
    }
  }

  // As `block_to_rows`; `span` is of four neighbours along w each, a unit of them for every thread.
  template <class X, class Half16, class Problem>
  static FXFUSE_INLINE void block(int block, const X& x, Half16* rows, const SampleState& state, const RowGeometry& g,
                                  const Scaling& by) {
    if (g.at_once) block_by<Half16, Problem, true>(block, x, rows, state, g, by);
    else block_by<Half16, Problem, false>(block, x, rows, state, g, by);
  }
  template <class Half16, class Problem, bool quads, class X>
  static FXFUSE_INLINE void block_by(int block, const X& x, Half16* rows, const SampleState& state,
                                     const RowGeometry& g, const Scaling& by) {
    const int row_length = g.padded * g.groups, blocks_y = (row_length + 63) / 64;
    const int block_x = block % g.blocks_positions, block_rest = block / g.blocks_positions;
    const int n = block_rest / blocks_y, row0 = (block_rest - n * blocks_y) * 64;
    const int wide = (row_length - row0 < 64 ? row_length - row0 : 64) / 8, each = g.span / 4;
    const int across = (g.rows_w + 3) / 4, all = g.rows_d * g.rows_h * across;
    const int i = threadIdx.x, quad = block_x * each + i / wide, place = row0 + i % wide * 8;
    if (i >= each * wide || quad >= all) return;
    const int group = place / g.padded, unit = (place - group * g.padded) / 8;
    const int line = quad / across, w = (quad - line * across) * 4, d = line / g.rows_h, h = line - d * g.rows_h;
    const int end = g.rows_w - w < 4 ? g.rows_w - w : 4;
    float values[4][8];
    read<quads>(values, unit, x, g, n, group, d, h, w);
    Taken<Problem::scaled, Problem::watched> take{by};
    look(values, unit, end, take);
    const int64_t row = ((int64_t)n * g.rows_d * g.rows_h + line) * g.rows_w + w;
    const int length = row_length + remainders<Problem>(row_length);
    Half16* const to = rows + row * length + place + remainders<Problem>(place);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (q >= end) break;
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (Problem::scaled) values[q][k] *= by.scale;
      store_eight<Half16, Problem>(to + q * length, values[q]);
    }
    take.tell(state, n);
  }
};

}  // namespace fxfuse
