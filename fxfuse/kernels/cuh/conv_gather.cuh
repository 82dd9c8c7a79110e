// Partial statistics of what a convolution stores, from its accumulators.
#pragma once
#include "conv_store.cuh"

namespace fxfuse {

// What is stored of `y`, in float32; zero where nothing is.
template <class Out>
FXFUSE_INLINE float as_stored(float y, bool inside) {
  return inside ? to_float(from_float<Out>(y)) : 0.f;
}

constexpr int kGathered = 4 + 2 * 128 * 2;  // floats of shared memory of a warpgroup

// A slot of statistics per warpgroup and pass: of up to m_tiles * 64 * classes elements of a channel. Of eight columns
// at a time: each thread's own elements; then each of eight threads with the same columns takes one of them, over three
// exchanges with half as many columns each; then one thread takes the four warps' parts, from shared memory.
// `ready`: what `replace` has made. `number`: of the kind, behind which others follow.
template <class Problem, class Out, bool ready, int number = 0, int classes, class Value, class Expression>
FXFUSE_INLINE void gather(const Destination<Out>& to, const Geometry& g, const Place<Problem>& place, const Extent& o,
                          const Residue (&residue)[classes], float* memory, int group, int pass, int passes,
                          const Value& value, const Expression& expression) {
  using Kind = KindOf<Problem, number>;
  constexpr int rows = Problem::m_tiles * 2 * classes, blocks = Problem::columns / 8;
  const Tile& t = place.box;
  const int lane = place.lane, warp = (threadIdx.x >> 5) & 3;
  const uint32_t inside = inside_mask(g, place, o, residue);
  int count = __popc(inside);
  const float reciprocal = 1.f / (float)(count > 0 ? count : 1);
  auto next = [&](int distance) {
    const int other = __shfl_xor_sync(~0u, count, distance);
    const Weights w(count, other);
    count += other;
    return w;
  };
  const Weights w16 = next(16), w8 = next(8), w4 = next(4);
  // shared memory of this warpgroup: the warps' counts, then their parts of 32 columns, twice
  float* const buffer = memory + group * kGathered;
  int* const counts = (int*)buffer;
  Part* const parts = (Part*)(buffer + 4);
  named_barrier(1 + group, 128);  // what was there has been read
  if (lane == 0) counts[warp] = count;
  const int64_t slot = (int64_t)t.n * to.partials.slots + slot_of<Problem>(t.number * passes + pass, group);
  const int first = t.column * Problem::columns, channel0 = t.group * g.out_channels + first;
  Part* const stored = (Part*)to.partials.parts + (slot * Problem::Kinds::count + number) * to.partials.channels + channel0;
#pragma unroll
  for (int j0 = 0; j0 < blocks; j0 += 4) {
    Part p[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      p[k] = {0.f, 0.f};
      const int j = j0 + k / 2, e = k & 1;
      if (j >= blocks) continue;
      const Results<Problem, Value, Expression> results(g, place, value, expression, j, e);
      uint32_t here = inside;
      settle(here);  // or a register per row keeps its bit
      float v[rows];
#pragma unroll
      for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int q = 0; q < classes; ++q) {
            const int at = (i * 2 + r) * classes + q;
            const float y = results(place, o, residue[q], inside >> at & 1, i, r, q);
            if (!ready)
              v[at] = as_stored<Out>(y, here >> at & 1);
            else  // zero outside the tensor; what the next box counts is not
              v[at] = !Problem::joint || here >> at & 1 ? y : 0.f;
          }
      auto value = [&](int at) { return v[at]; };
      p[k] = Kind::template of<rows>(value, value, [&](int at) { return here >> at & 1; }, reciprocal);
      schedule_barrier();
    }
    auto exchange = [&](int half, int distance, const Weights& w) {
      const bool upper = lane & distance;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (k >= half) break;
        const Part sent = upper ? p[k] : p[k + half], kept = upper ? p[k + half] : p[k];
        const Part got = {__shfl_xor_sync(~0u, sent.x, distance), __shfl_xor_sync(~0u, sent.y, distance)};
        p[k] = Kind::merged(kept, got, w);
      }
    };
    exchange(4, 16, w16), exchange(2, 8, w8), exchange(1, 4, w4);
    Part* const mine = parts + (j0 / 4 & 1) * 128;
    mine[warp * 32 + Columns<Problem>::channel(j0 + (lane >> 3), lane & 3, lane >> 2 & 1) - j0 * 8] = p[0];
    named_barrier(1 + group, 128);
    if (warp == (j0 / 4 & 3) && j0 * 8 + lane < Problem::columns && first + j0 * 8 + lane < g.out_channels) {
      Part all = mine[lane];
      int before = counts[0];
#pragma unroll
      for (int other = 1; other < 4; ++other) {
        all = Kind::merged(all, mine[other * 32 + lane], Weights(before, counts[other]));
        before += counts[other];
      }
      stored[j0 * 8 + lane] = all;
      if (j0 == 0 && lane == 0) to.partials.counts[slot] = before;
    }
  }
  named_barrier(1 + group, 128);
  if constexpr (number + 1 < Problem::Kinds::count)
    gather<Problem, Out, ready, number + 1>(to, g, place, o, residue, memory, group, pass, passes, value, expression);
}

}  // namespace fxfuse
