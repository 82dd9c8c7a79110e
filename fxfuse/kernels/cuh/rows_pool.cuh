// Pools of what a reduction leaves of rows, bound by memory: what is pooled is never written. Both tensors are contiguous,
// and no window reaches beyond its input.
#pragma once
#include "map_rows.cuh"
#include "pool_fold.cuh"

namespace fxfuse {

// A row of results, which `lanes` threads of a warp make: of the rows of the windows, one after the other, what `Op` and
// `After` make of them is combined element by element; along w it is combined last, through shared memory.
template <class Op, class Pool, int lanes, int count, int each, class In, class Out, class Before, class After, class Behind>
FXFUSE_INLINE void rows_pool(const PoolFoldArguments<In, Out, Before, After, Behind>& a) {
  using Combine = typename Pool::Combine;
  constexpr int together = kMapThreads / lanes, longest = lanes * count * each, rows = Pool::kernel_d * Pool::kernel_h;
  __shared__ float shared[together][longest];
  const Sizes &size = a.size, &made = a.made;
  const unsigned units = (unsigned)made.d * made.h * size.c * size.n, group = threadIdx.x / lanes;
  const unsigned found = block_from_end() * together + group, unit = found < units ? found : units - 1;
  const unsigned slab = unit / made.h, plane = slab / made.d;
  const int n = plane / size.c, c = plane - n * size.c, at_d = slab - plane * made.d, at_h = unit - slab * made.h;
  HeldRow<lanes, count, each> held;
  held.lane = threadIdx.x % lanes, held.length = size.w, held.shared = nullptr;
  float combined[each * count];
#pragma unroll
  for (int k = 0; k < each * count; ++k) combined[k] = Combine::zero();
#pragma unroll(rows <= 4 ? rows : 1)
  for (int r = 0; r < rows; ++r) {
    const int d = at_d * Pool::stride_d + r / Pool::kernel_h * Pool::dilation_d;
    const int h = at_h * Pool::stride_h + r % Pool::kernel_h * Pool::dilation_h;
    const In* const from = a.in + (((int64_t)plane * size.d + d) * size.h + h) * size.w;
#pragma unroll
    for (int k = 0; k < each; ++k) {
      const int i = held.at(k);
      Vector<In, count> v = {};
      if (i < size.w) v = *(const Vector<In, count>*)(from + i);
#pragma unroll
      for (int e = 0; e < count; ++e) held.v[k * count + e] = i < size.w ? a.before(to_float(v.v[e]), n, c, d, h, i + e) : 0.f;
    }
    const auto made_of = Op::fold(held, size.w);
#pragma unroll
    for (int k = 0; k < each; ++k)
#pragma unroll
      for (int e = 0; e < count; ++e)
        if (held.at(k) < size.w) {
          float& y = combined[k * count + e];
          y = Combine::combine(y, a.after(Op::result(held.v[k * count + e], made_of), n, c, d, h, held.at(k) + e));
        }
  }
#pragma unroll
  for (int k = 0; k < each; ++k)
#pragma unroll
    for (int e = 0; e < count; ++e) shared[group][held.at(k) + e] = combined[k * count + e];
  __syncwarp();
  if (found >= units) return;
  for (int w = held.lane; w < made.w; w += lanes) {
    float y = Combine::zero();
#pragma unroll
    for (int k = 0; k < Pool::kernel_w; ++k) y = Combine::combine(y, shared[group][w * Pool::stride_w + k * Pool::dilation_w]);
    if (Pool::sums) y = y / (float)Pool::divisor;
    a.out[(int64_t)unit * made.w + w] = from_float<Out>(a.behind(y, n, c, at_d, at_h, w));
  }
}

}  // namespace fxfuse
