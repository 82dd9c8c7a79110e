// Reductions over the last dims of a contiguous value, bound by memory: a warp or a block per row, which goes through the
// row once, and once more where every element has a result.
#pragma once
#include "fold.cuh"
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

// `Row`: how to reduce. `lanes` threads per row, 32 or kMapThreads; each reads `count` neighbours at once, of which the
// length is a multiple.
template <class Row, int lanes, int count, class In, class Out, class Before, class After>
FXFUSE_INLINE void map_rows(const ReductionArguments<In, Out, Before, After>& a) {
  constexpr int warps = kMapThreads / 32;
  __shared__ float shared[2][warps];
  const unsigned plane = (unsigned)a.size.d * a.size.h * a.size.w, rows = plane * a.size.c * a.size.n / a.length;
  const unsigned found = block_from_end() * (kMapThreads / lanes) + threadIdx.x / lanes;
  const unsigned row = found < rows ? found : rows - 1;  // all take part in shuffles
  const int lane = threadIdx.x % lanes;
  const unsigned begin = row * a.length;
  Row mine;
#pragma unroll 4
  for (int i = lane * count; i < a.length; i += lanes * count) {
    const Vector<In, count> v = *(const Vector<In, count>*)(a.in + begin + i);
#pragma unroll
    for (int k = 0; k < count; ++k) mine.add(at_element(a.before, a.size, to_float(v.v[k]), begin + i + k));
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) mine.merge(other_row(mine, o));
  // one thread's, since others may have rounded differently
  mine.x = __shfl_sync(~0u, mine.x, 0), mine.y = __shfl_sync(~0u, mine.y, 0);
  if (lanes > 32) {
    if ((threadIdx.x & 31) == 0) shared[0][threadIdx.x / 32] = mine.x, shared[1][threadIdx.x / 32] = mine.y;
    __syncthreads();
    mine.x = shared[0][0], mine.y = shared[1][0];
    for (int k = 1; k < warps; ++k) {
      Row other;
      other.x = shared[0][k], other.y = shared[1][k];
      mine.merge(other);
    }
  }
  if (found >= rows) return;
  const float r = mine.of(a.length);
  if constexpr (Row::keeps) {
#pragma unroll 4
    for (int i = lane * count; i < a.length; i += lanes * count) {
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
    if (lane == 0) a.out[row] = from_float<Out>(at_element(a.after, a.size, r, begin));
  }
}

}  // namespace fxfuse
