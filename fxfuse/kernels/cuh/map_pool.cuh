// Pools, bound by memory: a thread reads all of a window, or many of its elements, before it combines the first of them.
#pragma once
#include "map.cuh"

namespace fxfuse {

// Loads that a thread has on their way at a time; where channels are neighbours each has an address of its own.
constexpr int kPoolLoads = 32, kPoolLoadsLast = 16;

template <class In, class Out, class Before, class After>
struct PoolArguments {
  const In* in;
  Out* out;
  Sizes size, made;  // of the input, of the result
  alignas(8) Before before;
  alignas(8) After after;
};

// Inputs of a window along one dim, those from first on below end; `padded` of them with padding.
struct Range {
  int first, end, padded;
};

// `Pool` has constants per dim: kernel, stride, padding, dilation; adaptive; whole: no window reaches beyond the input;
// divisor: 0 counts what is there, -1 with padding; planes: how many a thread takes.
template <class Pool>
FXFUSE_INLINE Range range_of(int o, int size, int made, int kernel, int stride, int padding) {
  if (Pool::adaptive) {
    const int first = (int)((int64_t)o * size / made), end = (int)(((int64_t)(o + 1) * size + made - 1) / made);
    return {first, end, end - first};
  }
  const int first = o * stride - padding, end = first + kernel;
  const int padded = (end < size + padding ? end : size + padding) - first;
  return {first < 0 ? 0 : first, end < size ? end : size, padded};
}

// A window of a plane, whose first input is at (d, h, w); sd, sh, sw are strides. Its elements count from 0, along w first.
template <class Pool>
struct Window {
  static constexpr int length = Pool::kernel_d * Pool::kernel_h * Pool::kernel_w;
  Sizes size;
  int sd, sh, sw, d, h, w;

  FXFUSE_INLINE int at_d(int t) const { return d + t / (Pool::kernel_h * Pool::kernel_w) * Pool::dilation_d; }
  FXFUSE_INLINE int at_h(int t) const { return h + t / Pool::kernel_w % Pool::kernel_h * Pool::dilation_h; }
  FXFUSE_INLINE int at_w(int t) const { return w + t % Pool::kernel_w * Pool::dilation_w; }
  FXFUSE_INLINE bool there(int t) const {
    if (t >= length) return false;
    return Pool::whole || ((unsigned)at_d(t) < (unsigned)size.d && (unsigned)at_h(t) < (unsigned)size.h && (unsigned)at_w(t) < (unsigned)size.w);
  }
  // Where its first input lies; of a window that may begin in front of the plane, the plane.
  template <class In>
  FXFUSE_INLINE const In* begin(const In* plane) const {
    return Pool::whole ? plane + ((int64_t)d * sd + (int64_t)h * sh + (int64_t)w * sw) : plane;
  }
  static FXFUSE_INLINE unsigned inside(int i, int size) { return i < 0 ? 0 : i < size ? i : size - 1; }
  // An element, from where the window begins; any of the plane for one that is not there.
  template <class In>
  FXFUSE_INLINE In read(const In* begin, int t) const {
    if (!Pool::whole) return begin[inside(at_d(t), size.d) * sd + inside(at_h(t), size.h) * sh + inside(at_w(t), size.w) * sw];
    const unsigned slab = t / (Pool::kernel_h * Pool::kernel_w) * Pool::dilation_d, line = t / Pool::kernel_w % Pool::kernel_h * Pool::dilation_h;
    return (begin + (slab * sd + line * sh))[t % Pool::kernel_w * Pool::dilation_w * sw];
  }
};

// Of a sample's channel: its inputs, the first of them.
template <class In>
struct Plane {
  const In* from;
  int n, c;
};

// Whether an expression computes anything.
template <class Expression>
struct Changes {
  static constexpr bool value = true;
};
template <>
struct Changes<Identity> {
  static constexpr bool value = false;
};

// The windows at the same place of several planes. Small ones are in line: their elements' places are constants.
template <class Pool, int most, int planes, class In, class Before>
FXFUSE_INLINE void pool_windows(float (&y)[planes], const Plane<In> (&of)[planes], const Window<Pool>& at, const Before& before) {
  constexpr int length = Window<Pool>::length, loads = length * planes <= most ? length : most / planes;
  constexpr bool changes = Changes<Before>::value, in_line = length <= (changes ? 64 : 512);
#pragma unroll
  for (int r = 0; r < planes; ++r) y[r] = Pool::Combine::zero();
#pragma unroll(in_line ? length : 1)
  for (int first = 0; first < length; first += loads) {
    In v[planes][loads];
#pragma unroll
    for (int r = 0; r < planes; ++r)
#pragma unroll
      for (int k = 0; k < loads; ++k) v[r][k] = first + k < length ? at.read(at.begin(of[r].from), first + k) : In{};
#pragma unroll
    for (int r = 0; r < planes; ++r)
#pragma unroll
      for (int k = 0; k < loads; ++k) {
        const int t = first + k;
        if (at.there(t))
          y[r] = Pool::Combine::combine(y[r], before(to_float(v[r][k]), of[r].n, of[r].c, at.at_d(t), at.at_h(t), at.at_w(t)));
      }
  }
}

// A window whose size depends on its place.
template <class Pool, class In, class Before>
FXFUSE_INLINE float pool_ranges(const Plane<In>& of, const Window<Pool>& at, Range ds, Range hs, Range ws, const Before& before) {
  float y = Pool::Combine::zero();
  for (int d = ds.first; d < ds.end; ++d)
    for (int h = hs.first; h < hs.end; ++h) {
      const In* line = of.from + ((int64_t)d * at.sd + h * at.sh);
#pragma unroll 4
      for (int w = ws.first; w < ws.end; ++w) y = Pool::Combine::combine(y, before(to_float(line[w * at.sw]), of.n, of.c, d, h, w));
    }
  return y;
}

// What the pool makes of several planes at (d, h, w) of its result. `last`: channels are neighbours in the input.
template <class Pool, bool last, int planes, class In, class Before>
FXFUSE_INLINE void pool_at(float (&y)[planes], const Plane<In> (&of)[planes], const Sizes& size, const Sizes& made, int d, int h, int w, const Before& before) {
  const int sw = last ? size.c : 1, sh = sw * size.w, sd = sh * size.h;
  const Window<Pool> at = {size, sd, sh, sw, d * Pool::stride_d - Pool::padding_d, h * Pool::stride_h - Pool::padding_h,
                           w * Pool::stride_w - Pool::padding_w};
  int divisor = Pool::divisor;
  if constexpr (Pool::adaptive || (Pool::sums && Pool::divisor <= 0)) {
    const Range ds = range_of<Pool>(d, size.d, made.d, Pool::kernel_d, Pool::stride_d, Pool::padding_d);
    const Range hs = range_of<Pool>(h, size.h, made.h, Pool::kernel_h, Pool::stride_h, Pool::padding_h);
    const Range ws = range_of<Pool>(w, size.w, made.w, Pool::kernel_w, Pool::stride_w, Pool::padding_w);
    if (Pool::divisor == 0) divisor = (ds.end - ds.first) * (hs.end - hs.first) * (ws.end - ws.first);
    if (Pool::divisor < 0) divisor = ds.padded * hs.padded * ws.padded;
    if constexpr (Pool::adaptive) y[0] = pool_ranges(of[0], at, ds, hs, ws, before);
  }
  if constexpr (!Pool::adaptive) pool_windows<Pool, last ? kPoolLoadsLast : kPoolLoads>(y, of, at, before);
#pragma unroll
  for (int r = 0; r < planes; ++r)
    if (Pool::sums) y[r] /= (float)divisor;
}

// `last`, `last_made`: channels are neighbours in the input, in the result. Neighbouring threads read neighbours; where
// they store is further apart if it must, which most often is less.
template <class Pool, bool last, bool last_made, class In, class Out, class Before, class After>
FXFUSE_INLINE void map_pool(const PoolArguments<In, Out, Before, After>& a) {
  constexpr int planes = Pool::planes;
  const unsigned positions = (unsigned)a.made.d * a.made.h * a.made.w, all = (unsigned)a.made.n * a.made.c;
  const unsigned i = block_from_end() * (unsigned)kMapThreads + threadIdx.x;
  unsigned p = 0, plane = 0;
  if (last) {
    const unsigned place = i / a.made.c, n = place / positions;
    p = place - n * positions, plane = n * a.made.c + (i - place * a.made.c);
  } else {
    const unsigned group = i / positions;
    p = i - group * positions, plane = group * planes;
  }
  if (plane >= all) return;
  const unsigned row = p / a.made.w;
  const int w = p - row * a.made.w, d = row / a.made.h, h = row - d * a.made.h;
  const int64_t inputs = (int64_t)a.size.d * a.size.h * a.size.w;
  Plane<In> of[planes];
#pragma unroll
  for (int r = 0; r < planes; ++r) {
    const int one = plane + r < all ? plane + r : plane, n = one / a.size.c, c = one - n * a.size.c;
    of[r] = {a.in + (last ? n * inputs * a.size.c + c : one * inputs), n, c};
  }
  float y[planes];
  pool_at<Pool, last>(y, of, a.size, a.made, d, h, w, a.before);
#pragma unroll
  for (int r = 0; r < planes; ++r) {
    const unsigned at = last_made ? (of[r].n * positions + p) * a.made.c + of[r].c : (plane + r) * positions + p;
    if (plane + r < all) a.out[at] = from_float<Out>(a.after(y[r], of[r].n, of[r].c, d, h, w));
  }
}

}  // namespace fxfuse
