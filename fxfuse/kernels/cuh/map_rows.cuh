// Reductions over the last dims of a contiguous value, bound by memory: some threads of a warp or a block per row, which hold
// it; or a block goes through a long one once, and once more where every element has a result.
#pragma once
#include "fold.cuh"
#include "held_row.cuh"
#include "map.cuh"

namespace fxfuse {

// What is known of a part of a row: add() takes one more element, merge() another part's. of(length) is the result, or
// what result(value, of(length)) needs for each element. `x` and `y` go from thread to thread.
struct RowSum {
  static constexpr bool keeps = false;
  float x = 0.f, y = 0.f;
  FXFUSE_INLINE void add(float v) { x += v; }
  FXFUSE_INLINE void merge(const RowSum& o) { x += o.x; }
  FXFUSE_INLINE float of(int) const { return x; }
};
struct RowMean : RowSum {
  FXFUSE_INLINE float of(int length) const { return x / (float)length; }
};
struct RowMaximum {
  static constexpr bool keeps = false;
  float x = __uint_as_float(0xff800000u), y = 0.f;
  FXFUSE_INLINE void add(float v) { x = max_or_nan(x, v); }
  FXFUSE_INLINE void merge(const RowMaximum& o) { add(o.x); }
  FXFUSE_INLINE float of(int) const { return x; }
};
struct RowMinimum : RowMaximum {
  FXFUSE_INLINE void add(float v) { RowMaximum::add(-v); }
  FXFUSE_INLINE void merge(const RowMinimum& o) { RowMaximum::add(o.x); }
  FXFUSE_INLINE float of(int) const { return -x; }
};
// The maximum, and the sum of exp(value - maximum); as many elements as are +Inf where that is the maximum.
struct RowExponentials {
  float x = __uint_as_float(0xff800000u), y = 0.f;
  static FXFUSE_INLINE float above(float v, float m) { return v == m ? 1.f : exponential(v - m); }
  FXFUSE_INLINE void add(float v) {
    if (v == __uint_as_float(0xff800000u)) return;  // -Inf less -Inf would be NaN
    if (v <= x) {
      y += above(v, x);
    } else {
      y = y * above(x, v) + 1.f, x = v;
    }
  }
  FXFUSE_INLINE void merge(const RowExponentials& o) {
    if (o.x == __uint_as_float(0xff800000u)) return;
    const float m = max_or_nan(x, o.x);
    y = y * above(x, m) + o.y * above(o.x, m), x = m;
  }
  // torch's softmax takes Inf from Inf
  FXFUSE_INLINE float sum() const { return x == __uint_as_float(0x7f800000u) ? x - x : y; }
};
struct RowLogSumExp : RowExponentials {
  static constexpr bool keeps = false;
  FXFUSE_INLINE float of(int) const { return logf(y) + x; }
};
struct RowSoftmax : RowExponentials {
  static constexpr bool keeps = true;
  FXFUSE_INLINE float of(int) const { return 1.f / sum(); }
  FXFUSE_INLINE float result(float v, float r) const { return exponential(v - x) * r; }
};
struct RowLogSoftmax : RowExponentials {
  static constexpr bool keeps = true;
  FXFUSE_INLINE float of(int) const { return logf(sum()); }
  FXFUSE_INLINE float result(float v, float r) const { return v - x - r; }
};

// The expression for element `i` of a contiguous tensor.
template <class Expression>
FXFUSE_INLINE float at_element(const Expression& expression, const Sizes& size, float v, unsigned i) {
  const unsigned line = i / size.w, slab = line / size.h, channel = slab / size.d, n = channel / size.c;
  return expression(v, n, channel - n * size.c, slab - channel * size.d, line - slab * size.h, i - line * size.w);
}

template <class Row>
FXFUSE_INLINE Row other_row(const Row& mine, int distance) {
  Row other;
  other.x = __shfl_xor_sync(~0u, mine.x, distance), other.y = __shfl_xor_sync(~0u, mine.y, distance);
  return other;
}

// A long row, which a block of `threads` goes through, and back where every element has a result: what was read last may
// lie in the L2 cache. `Row`: how to reduce; a thread reads `count` neighbours at once, of which the length is a multiple.
template <class Row, int threads, int count, class In, class Out, class Before, class After>
FXFUSE_INLINE void map_rows(const ReductionArguments<In, Out, Before, After>& a) {
  constexpr int warps = threads / 32, at_once = threads > kMapThreads ? 8 : 4;
  __shared__ float shared[2][warps];
  const unsigned row = block_from_end(), begin = row * a.length;
  const int first = threadIdx.x * count, step = threads * count;
  Row mine;
#pragma unroll(at_once)
  for (int i = first; i < a.length; i += step) {
    const Vector<In, count> v = *(const Vector<In, count>*)(a.in + begin + i);
#pragma unroll
    for (int k = 0; k < count; ++k) mine.add(at_element(a.before, a.size, to_float(v.v[k]), begin + i + k));
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) mine.merge(other_row(mine, o));
  if ((threadIdx.x & 31) == 0) shared[0][threadIdx.x / 32] = mine.x, shared[1][threadIdx.x / 32] = mine.y;
  __syncthreads();
  mine.x = shared[0][0], mine.y = shared[1][0];
  for (int k = 1; k < warps; ++k) {
    Row other;
    other.x = shared[0][k], other.y = shared[1][k];
    mine.merge(other);
  }
  const float r = mine.of(a.length);
  if constexpr (Row::keeps) {
#pragma unroll(at_once)
    for (int i = (a.length - 1) / step * step + first; i >= 0; i -= step) {
      if (i >= a.length) continue;
      const Vector<In, count> v = *(const Vector<In, count>*)(a.in + begin + i);
      Vector<Out, count> made;
#pragma unroll
      for (int k = 0; k < count; ++k) {
        const unsigned here = begin + i + k;
        const float again = at_element(a.before, a.size, to_float(v.v[k]), here);
        made.v[k] = from_float<Out>(at_element(a.after, a.size, mine.result(again, r), here));
      }
      *(Vector<Out, count>*)(a.out + begin + i) = made;
    }
  } else {
    if (threadIdx.x == 0) a.out[row] = from_float<Out>(at_element(a.after, a.size, r, begin));
  }
}

// The expression for `count` neighbours of a row, from element `i` of the row on, which begins at `begin`. `line`: a row is
// one of w.
template <int count, bool line, class Expression>
FXFUSE_INLINE void along_row(const Expression& expression, const Sizes& size, float* v, unsigned begin, int i) {
  const unsigned here = begin + (line ? 0 : i), before = here / size.w, slab = before / size.h, channel = slab / size.d;
  int n = channel / size.c, c = channel - n * size.c, d = slab - channel * size.d, h = before - slab * size.h;
  int w = line ? i : here - before * size.w;
#pragma unroll
  for (int k = 0; k < count; ++k) {
    v[k] = expression(v[k], n, c, d, h, w);
    if (++w == size.w && !line) {
      w = 0;
      if (++h == size.h) {
        h = 0;
        if (++d == size.d) {
          d = 0;
          if (++c == size.c) c = 0, ++n;  // behind the last sample only behind the last of the neighbours
        }
      }
    }
  }
}

// A row that its threads hold. `Op`: a reduction of fold.cuh.
template <class Op, int lanes, int count, int each, bool line, class In, class Out, class Before, class After>
FXFUSE_INLINE void held_rows(const ReductionArguments<In, Out, Before, After>& a) {
  __shared__ float shared[kMapThreads / 32];
  const unsigned plane = (unsigned)a.size.d * a.size.h * a.size.w, rows = plane * a.size.c * a.size.n / a.length;
  const unsigned found = block_from_end() * (kMapThreads / lanes) + threadIdx.x / lanes;
  const unsigned row = found < rows ? found : rows - 1, begin = row * a.length;  // all take part in shuffles
  HeldRow<lanes, count, each> held;
  held.lane = threadIdx.x % lanes, held.length = a.length, held.shared = shared;
#pragma unroll
  for (int k = 0; k < each; ++k) {
    const int i = held.at(k);
    Vector<In, count> v = {};
    if (i < a.length) v = *(const Vector<In, count>*)(a.in + begin + i);
#pragma unroll
    for (int e = 0; e < count; ++e) held.v[k * count + e] = to_float(v.v[e]);
  }
#pragma unroll
  for (int k = 0; k < each; ++k)
    if (held.at(k) < a.length) along_row<count, line>(a.before, a.size, held.v + k * count, begin, held.at(k));
  const auto r = Op::fold(held, a.length);
  if (found >= rows) return;
  if constexpr (Op::keeps) {
#pragma unroll
    for (int k = 0; k < each; ++k) {
      const int i = held.at(k);
      if (i >= a.length) continue;
      float v[count];
#pragma unroll
      for (int e = 0; e < count; ++e) v[e] = Op::result(held.v[k * count + e], r);
      along_row<count, line>(a.after, a.size, v, begin, i);
      Vector<Out, count> made;
#pragma unroll
      for (int e = 0; e < count; ++e) made.v[e] = from_float<Out>(v[e]);
      *(Vector<Out, count>*)(a.out + begin + i) = made;
    }
  } else {
    if (held.lane == 0) a.out[row] = from_float<Out>(at_element(a.after, a.size, r, begin));
  }
}

}  // namespace fxfuse
