// Sums of a tensor over boxes, bound by memory: each element is read once, into the sum of the cell between the borders
// of boxes that it lies in; a box is the sum of its cells. Every sum in a fixed order, in float32.
#pragma once
#include "divisor.cuh"
#include "map.cuh"

namespace fxfuse {

constexpr int kSumThreads = 256, kSumWarps = kSumThreads / 32;
constexpr int kSumLoads = 8;  // that a thread has on their way at a time
constexpr int kMostSegments = 24, kMostBoxes = 16, kMostSlots = 64;

// Boxes along one dim, in elements of the result; box i is of segments first[i] to last[i] - 1.
struct Boxes {
  int64_t stride;
  int count;
  unsigned char first[kMostBoxes], last[kMostBoxes];
};

// A dim that is summed. Segment i goes from bounds[i] to bounds[i + 1] - 1.
struct Summed {
  int64_t stride;
  int segments;
  int bounds[kMostSegments + 1];
  Divisor sizes[kMostSegments];
  Boxes boxes;
};

// Rows have two dims, which are kept. Of the dims that are summed, a block takes a slot of `outer`, and all of `b`, `c`
// and the inner one, whose elements are neighbours; the inner one may be kept instead. A team of 2^team warps takes a
// row, 2^across threads of a warp neighbours of a line; where the inner dim is not cut, `units` of those are a line.
template <class In>
struct SumsArguments {
  const In* in;
  float* out;
  int64_t strides[2], out_strides[2];  // of rows
  int64_t outer, slot_stride, inner_out;
  int rows, inner_rows, slots, tiles, size, team, across, units;
  Divisor by_rows, by_units;
  int begins[kMostSlots + 1];
  Summed b, c, inner;
};

// Neighbours as they are read: words, which take fewer registers than the elements until those are summed.
template <int bytes>
struct alignas(bytes) Words {
  unsigned word[bytes / 4];
};
template <>
struct alignas(2) Words<2> {
  unsigned short word[1];
};
template <class In, int count>
union Neighbours {
  Words<sizeof(In) * count> words;
  Vector<In, count> v;
};

// What a warp sums of each cell of one round: of neighbours from `low` on, of which this thread has `count` from `w0`.
template <int count, bool keeps, class In>
FXFUSE_INLINE void sum_cells(const SumsArguments<In>& a, const In* from, int deep, int low, int units, int member, float* cells) {
  const int lane = threadIdx.x & 31, at = lane & ((1 << a.across) - 1), sub = lane >> a.across, together = 32 >> a.across;
  const int columns = count << a.across, w0 = low + at * count, numbers = keeps ? columns : a.inner.segments;
  const int outer = (int)a.outer, stride_b = (int)a.b.stride, stride_c = (int)a.c.stride;  // offsets have 31 bits
  const bool cut = !keeps && units == 0;
  if (units == 0) units = 1;
  for (int b = 0, cell = 0; b < a.b.segments; ++b)
    for (int c = 0; c < a.c.segments; ++c, ++cell) {
      const int size_b = a.b.bounds[b + 1] - a.b.bounds[b], size_c = a.c.bounds[c + 1] - a.c.bounds[c];
      const Divisor by_b = a.b.sizes[b], by_c = a.c.sizes[c];
      const int lines = deep * size_b * size_c, total = (lines + together - 1) / together * units;
      const int first = ((member - cell) & ((1 << a.team) - 1)) * kSumLoads;  // small cells are for different warps
      if (first >= total) continue;
      const In* start = from + (a.b.bounds[b] * stride_b + a.c.bounds[c] * stride_c);
      float sums[count];
#pragma unroll
      for (int k = 0; k < count; ++k) sums[k] = 0.f;
      for (int turn = first; turn < total; turn += kSumLoads << a.team) {
        Neighbours<In, count> read[kSumLoads];
#pragma unroll
        for (int i = 0; i < kSumLoads; ++i) {
          const int t = turn + i, group = a.by_units.of(t), line = group * together + sub;
          const int w = w0 + (t - group * units) * columns, slab = by_c.of(line), deeper = by_b.of(slab);
          if (line < lines && w < a.size) {
            const int place = deeper * outer + (slab - deeper * size_b) * stride_b + (line - slab * size_c) * stride_c + w;
            read[i].words = *(const Words<sizeof(In) * count>*)(start + place);
          } else {
            read[i].words = {};
          }
        }
#pragma unroll
        for (int i = 0; i < kSumLoads; ++i)
#pragma unroll
          for (int k = 0; k < count; ++k) sums[k] += to_float(read[i].v.v[k]);
      }
      if (keeps) {
#pragma unroll
        for (int k = 0; k < count; ++k) {
          for (int o = 16; o >> a.across; o >>= 1) sums[k] += __shfl_xor_sync(~0u, sums[k], o);
          if (sub == 0) cells[cell * numbers + at * count + k] = sums[k];
        }
      } else {
        for (int s = 0; s < a.inner.segments; ++s) {
          const int begin = a.inner.bounds[s], end = a.inner.bounds[s + 1];
          if (cut && (end <= low || begin >= low + columns)) continue;
          float sum = 0.f;
#pragma unroll
          for (int k = 0; k < count; ++k)
            if (!cut || (w0 + k >= begin && w0 + k < end)) sum += sums[k];
          sum = warp_sum(sum);
          if (lane == 0) cells[cell * numbers + s] += sum;
        }
      }
    }
}

template <int count, bool keeps, class In>
FXFUSE_INLINE void tap_sums(const SumsArguments<In>& a) {
  extern __shared__ uint8_t raw[];
  float* const room = (float*)raw;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int warps = 1 << a.team, member = warp & (warps - 1), columns = count << a.across;
  const int numbers = a.b.segments * a.c.segments * (keeps ? columns : a.inner.segments);
  const int tiled = blockIdx.x / a.tiles, tile = blockIdx.x - tiled * a.tiles, group = tiled / a.slots;
  const int slot = tiled - group * a.slots, row = group * (kSumWarps >> a.team) + (warp >> a.team);
  const bool there = row < a.rows;
  const int row0 = a.by_rows.of(there ? row : 0), row1 = (there ? row : 0) - row0 * a.inner_rows;
  float* const mine = room + warp * numbers;
  float* const team = room + (warp - member) * numbers;
  for (int i = lane; i < numbers; i += 32) mine[i] = 0.f;
  __syncwarp();
  if (there) {
    const In* from = a.in + row0 * a.strides[0] + row1 * a.strides[1] + a.begins[slot] * a.outer;
    const int deep = a.begins[slot + 1] - a.begins[slot];
    if (keeps) {
      sum_cells<count, true>(a, from, deep, tile * columns, 1, member, mine);
    } else if (a.units) {
      sum_cells<count, false>(a, from, deep, a.inner.bounds[0], a.units, member, mine);
    } else {
      for (int low = a.inner.bounds[0] / count * count; low < a.inner.bounds[a.inner.segments]; low += columns)
        sum_cells<count, false>(a, from, deep, low, 0, member, mine);
    }
  }
  __syncthreads();
  for (int i = member * 32 + lane; i < numbers; i += warps * 32) {
    float sum = team[i];
    for (int k = 1; k < warps; ++k) sum += team[k * numbers + i];
    team[i] = sum;
  }
  __syncthreads();
  if (!there) return;
  float* const out = a.out + row0 * a.out_strides[0] + row1 * a.out_strides[1] + slot * a.slot_stride;
  const int wide = keeps ? columns : a.inner.boxes.count, all = a.b.boxes.count * a.c.boxes.count * wide;
  for (int i = member * 32 + lane; i < all; i += warps * 32) {
    const int pair = i / wide, x = i - pair * wide, b = pair / a.c.boxes.count, c = pair - b * a.c.boxes.count;
    if (keeps && tile * columns + x >= a.size) continue;
    const int first = keeps ? x : a.inner.boxes.first[x], last = keeps ? x + 1 : a.inner.boxes.last[x];
    float sum = 0.f;
    for (int sb = a.b.boxes.first[b]; sb < a.b.boxes.last[b]; ++sb)
      for (int sc = a.c.boxes.first[c]; sc < a.c.boxes.last[c]; ++sc)
        for (int s = first; s < last; ++s) sum += team[(sb * a.c.segments + sc) * (keeps ? columns : a.inner.segments) + s];
    out[b * a.b.boxes.stride + c * a.c.boxes.stride + (keeps ? ((int64_t)tile * columns + x) * a.inner_out : x * a.inner.boxes.stride)] = sum;
  }
}

// Sums of boxes of the outer dim from those of its slots: `numbers` of each, `behind` of them between two boxes.
struct SlotsArguments {
  const float* slots;
  float* out;
  int numbers, behind, elements;
  Boxes boxes;
};

FXFUSE_INLINE void add_slots(const SlotsArguments& a) {
  const int i = blockIdx.x * kSumThreads + threadIdx.x;
  if (i >= a.elements) return;
  const int rest = i / a.behind, box = rest % a.boxes.count, from = rest / a.boxes.count * a.behind + i - rest * a.behind;
  float sum = 0.f;
  for (int s = a.boxes.first[box]; s < a.boxes.last[box]; ++s) sum += a.slots[(int64_t)s * a.numbers + from];
  a.out[i] = sum;
}

}  // namespace fxfuse
