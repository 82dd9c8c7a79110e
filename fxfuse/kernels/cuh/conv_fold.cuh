// Reductions over channels in a convolution's epilogue: one tile of columns holds all channels, so that a position's lie
// in the accumulators of four neighbouring threads.
//
// A loop takes a few rows of a thread's accumulators at a time. Registers have no index: a turn copies those of its rows
// to where the short code behind finds them. The same code for all rows at once, in line, does not fit into the
// instruction caches, and an epilogue waits for it longer than it computes.
//
// `Problem::Fold` is a reduction of fold.cuh with a constant `channels`, or NoFold.
#pragma once
#include "conv_outbox.cuh"
#include "fold.cuh"

namespace fxfuse {

struct NoFold {};

// Some of a thread's positions: rows (i * 2 + r) of its accumulators and classes, (row * classes + class) in order, a
// multiple of `width` at a time.
template <class Problem, int classes, int width>
struct FoldRows {
  static constexpr int all = 2 * Problem::m_tiles * classes, values = Problem::columns / 4, channels = Problem::Fold::channels;
  // as many as make 32 values, so that there is something to do while results are on their way
  static __device__ constexpr int at_once() {
    for (int n = all; n > width; --n)
      if (all % n == 0 && n % width == 0 && n * values <= 32) return n;
    return width;
  }
  static constexpr int count = at_once(), turns = all / count;
  // Two turns of so many values that there are no registers for copies: each finds its accumulators where the first does.
  static constexpr bool exchanged = turns == 2 && count * values > 32;

  float v[count][values];            // at [j * 2 + e] those of accumulator j * 4 + e
  int d[count], h[count], w[count];  // places in the output
  uint32_t inside;                   // a bit for each: it is an element of the output

  static __device__ constexpr int row_of(int turn, int k) { return (turn * count + k) / classes; }
  static __device__ constexpr int class_of(int turn, int k) { return (turn * count + k) % classes; }
  FXFUSE_INLINE bool is_inside(int k) const { return inside >> k & 1; }

  FXFUSE_INLINE void locate(const Place<Problem>& place, const Extent& o, const Residue (&residue)[classes], int turn) {
    const Tile& t = place.box;
    inside = 0;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      int packed = place.packed[row_of(0, k) / 2][row_of(0, k) % 2];
      Residue one = residue[class_of(0, k)];
#pragma unroll
      for (int other = 1; other < turns; ++other) {
        const int there = place.packed[row_of(other, k) / 2][row_of(other, k) % 2];
        const Residue its = residue[class_of(other, k)];
        packed = other == turn ? there : packed;
        one = other == turn ? its : one;
      }
      d[k] = (t.d + (packed >> 20)) * o.step_d + one.d, h[k] = (t.h + (packed >> 10 & 1023)) * o.step_h + one.h;
      w[k] = (t.w + (packed & 1023)) * o.step_w + one.w;
      if (packed >= 0 && one.valid && d[k] < o.size_d && h[k] < o.size_h && w[k] < o.size_w) inside |= 1u << k;
    }
  }

  template <class F>
  static FXFUSE_INLINE void each(F f) {
#pragma unroll
    for (int k = 0; k < count; ++k)
#pragma unroll
      for (int c = 0; c < values; ++c) f(k, c);
  }

  // Every value through an expression: what is not inside as if it were at the first position, and unused columns as if
  // they were the last channel, so that operands are read where there are some and nothing branches.
  template <class Expression>
  FXFUSE_INLINE void through(const Expression& expression, int n, int lane) {
    each([&](int k, int c) {
      const int column = Columns<Problem>::channel(c / 2, lane & 3, c % 2);
      const bool there = is_inside(k);
      v[k][c] = expression(v[k][c], n, column < channels ? column : channels - 1, there ? d[k] : 0, there ? h[k] : 0,
                           there ? w[k] : 0);
    });
  }
};

// The channels of one position: a thread's of them, and of the three beside it.
template <class Problem>
struct QuadChannels {
  static constexpr int values = Problem::columns / 4, channels = Problem::Fold::channels;
  float (&v)[values];
  int lane;

  FXFUSE_INLINE bool there(int c) const {
    const auto with = Columns<Problem>::together(c / 2);
    return (with.first + with.count) * 8 <= channels || Columns<Problem>::channel(c / 2, lane & 3, c % 2) < channels;
  }
  template <class Combine, class Of>
  FXFUSE_INLINE float all(float zero, Combine combine, Of of) const {
    float r[2];  // two at a time: none waits for the one before
#pragma unroll
    for (int c = 0; c < values; ++c) {
      if (c < 2)
        r[c] = there(c) ? of(v[c]) : zero;
      else if (there(c))
        r[c % 2] = combine(r[c % 2], of(v[c]));
    }
    float one = combine(r[0], r[1]);
    one = combine(one, __shfl_xor_sync(~0u, one, 1));
    return combine(one, __shfl_xor_sync(~0u, one, 2));
  }
  template <class Made>
  FXFUSE_INLINE void each(Made made) {
#pragma unroll
    for (int c = 0; c < values; ++c) v[c] = made(v[c]);
  }
  FXFUSE_INLINE void subtract(float shift) {
    each([&](float v) { return v - shift; });
  }
  FXFUSE_INLINE void raise(const Powers& powers) { each(powers); }
};

// Stores all channels, w varying fastest: eight neighbouring threads have neighbouring positions. `width`, `reversed`:
// see store_direct.
template <class Problem, class Out, bool reversed, int classes, int width>
FXFUSE_INLINE void store_folded_direct(const FoldRows<Problem, classes, width>& rows, const Destination<Out>& to,
                                       const Place<Problem>& place) {
  using Rows = FoldRows<Problem, classes, width>;
  const int64_t stride = to.stride.c;
  const int first = (place.lane & 3) * 2, stride_d = (int)to.stride.d, stride_h = (int)to.stride.h;
  Out* const sample = to.out + place.box.n * to.stride.n + first * stride;
  auto there = [&](int c) { return c / 2 * 8 + 8 <= Rows::channels || c / 2 * 8 + first + c % 2 < Rows::channels; };
  auto at = [&](int k) { return sample + (rows.d[k] * stride_d + rows.h[k] * stride_h + rows.w[k]); };
#pragma unroll
  for (int k = 0; k < Rows::count; k += width) {
    if constexpr (width == 2) {
      constexpr int left = reversed ? 1 : 0;
      Out* const pair = at(k + left);
      if (rows.is_inside(k) && rows.is_inside(k + 1) && (((uint64_t)pair | stride * sizeof(Out)) & (2 * sizeof(Out) - 1)) == 0) {
#pragma unroll
        for (int c = 0; c < Rows::values; ++c)
          if (there(c)) store_two(pair + (c / 2 * 8 + c % 2) * stride, rows.v[k + left][c], rows.v[k + 1 - left][c]);
        continue;
      }
    }
#pragma unroll
    for (int one = k; one < k + width; ++one) {
      if (!rows.is_inside(one)) continue;
      Out* out = at(one);
#pragma unroll
      for (int c = 0; c < Rows::values; ++c) {
        if (there(c)) *out = from_float<Out>(rows.v[one][c]);
        out += c % 2 ? 7 * stride : stride;
      }
    }
  }
}

// The same where channels are neighbours.
template <class Problem, class Out, int classes, int width>
FXFUSE_INLINE void store_folded_channels(const FoldRows<Problem, classes, width>& rows, const Destination<Out>& to,
                                         const Place<Problem>& place) {
  using Rows = FoldRows<Problem, classes, width>;
  Out* const sample = to.out + place.box.n * to.stride.n;
#pragma unroll
  for (int k = 0; k < Rows::count; ++k) {
    if (!rows.is_inside(k)) continue;
    Out* const out = sample + rows.d[k] * to.stride.d + rows.h[k] * to.stride.h + rows.w[k] * to.stride.w;
    store_position<Problem>(out, place.lane, Rows::channels, [&](int j, int e) { return rows.v[k][j * 2 + e]; });
  }
}

// Stores one value per position, through `behind`: of four threads, which all have them, each every fourth.
template <class Problem, class Out, int classes, int width, class Behind>
FXFUSE_INLINE void store_folded_one(const FoldRows<Problem, classes, width>& rows, const Destination<Out>& to,
                                    const Place<Problem>& place, const Behind& behind) {
  constexpr int count = FoldRows<Problem, classes, width>::count;
  Out* const sample = to.out + place.box.n * to.stride.n;
#pragma unroll
  for (int first = 0; first < count; first += 4) {
    float y = rows.v[first][0];
    int d = rows.d[first], h = rows.h[first], w = rows.w[first];
    bool mine = (place.lane & 3) == 0 && rows.is_inside(first);
#pragma unroll
    for (int k = first + 1; k < first + 4 && k < count; ++k) {
      // all are read, and one is chosen: to choose what is read would put them into local memory
      const float v = rows.v[k][0];
      const int its_d = rows.d[k], its_h = rows.h[k], its_w = rows.w[k];
      const bool inside = rows.is_inside(k), here = (place.lane & 3) == k - first;
      y = here ? v : y, d = here ? its_d : d, h = here ? its_h : h, w = here ? its_w : w, mine = here ? inside : mine;
    }
    if (mine)
      sample[d * to.stride.d + h * to.stride.h + w * to.stride.w] = from_float<Out>(behind(y, place.box.n, 0, d, h, w));
  }
}

// Reduces expression(value(i, r, j, e, q)) over channels, and stores what is left through `behind`. `kept(i, r, j, e, q)`
// are the accumulators, in whose place results wait that go through shared memory.
template <class Problem, class Runs, class Out, int width, bool reversed, int classes, class Kept, class Value, class Expression, class Behind>
FXFUSE_INLINE void fold(const Destination<Out>& to, const Geometry& g, const Place<Problem>& place, const Extent& o,
                        const Residue (&residue)[classes], Outbox<Problem>& outbox, int group, Kept kept, Value value,
                        const Expression& expression, const Behind& behind) {
  using Fold = typename Problem::Fold;
  static_assert(Fold::channels <= Problem::columns, "one tile of columns holds all channels");
  constexpr bool waits = Fold::keeps && Problem::outbox, direct = Fold::keeps && !Problem::outbox && !Problem::channels_last;
  using Rows = FoldRows<Problem, classes, direct ? width : 1>;
#pragma unroll 1
  for (int turn = 0; turn < Rows::turns; ++turn) {
    Rows rows;
    rows.locate(place, o, residue, turn);
#pragma unroll
    for (int from = 0; from < Rows::turns; ++from) {
      if (Rows::exchanged ? from > 0 : from != turn) continue;
      Rows::each([&](int k, int c) {
        const int row = Rows::row_of(from, k);
        if (c > 0 && c % 16 == 0) __syncwarp();  // or scales of all columns are loaded at once, and something is spilt
        rows.v[k][c] = value(row / 2, row % 2, c / 2, c % 2, Rows::class_of(from, k));
      });
    }
    rows.through(expression, place.box.n, place.lane);
#pragma unroll
    for (int k = 0; k < Rows::count; ++k) {
      QuadChannels<Problem> channels{rows.v[k], place.lane};
      const auto made = Fold::fold(channels, Fold::channels);
      if constexpr (Fold::keeps)
        channels.each([&](float v) { return Fold::result(v, made); });
      else
        rows.v[k][0] = made;
    }
    if constexpr (Fold::keeps) rows.through(behind, place.box.n, place.lane);
    if constexpr (!Fold::keeps)
      store_folded_one(rows, to, place, behind);
    else if constexpr (Problem::channels_last)
      store_folded_channels(rows, to, place);
    else if constexpr (direct)
      store_folded_direct<Problem, Out, reversed>(rows, to, place);
#pragma unroll
    for (int into = 0; into < Rows::turns; ++into) {
      if (Rows::exchanged ? into > 0 : !waits || into != turn) continue;
      Rows::each([&](int k, int c) {
        const int row = Rows::row_of(into, k), other = Rows::row_of(into + 1, k);
        float& here = kept(row / 2, row % 2, c / 2, c % 2, Rows::class_of(into, k));
        if constexpr (Rows::exchanged) {
          float& there = kept(other / 2, other % 2, c / 2, c % 2, Rows::class_of(into + 1, k));
          here = there;
          if (waits) there = rows.v[k][c];
        } else {
          here = rows.v[k][c];
        }
      });
    }
  }
  if constexpr (waits) stage_runs<Problem, Runs, Out>(outbox, to, g, place, o, residue, group, made(kept), Identity());
}

}  // namespace fxfuse
