// The same convolution without matrix instructions, in float32: for samples that 16-bit numbers cannot carry. It
// returns at once where a sample is not marked.
#pragma once
#include "conv_epilogue.cuh"
#include "prepare.cuh"

namespace fxfuse {

struct DirectGeometry {
  Strides stride;          // of x
  int depth, height, width;
  int samples;
  const uint32_t* marks;   // per sample
  const uint32_t* wrong;   // per output channel
  int64_t channels;        // in all groups
};

// Output channels of one of the model's groups; `group` and `column` are of those here.
template <class Problem>
FXFUSE_INLINE int channels_of(const Geometry& g) {
  return g.out_channels / Problem::joined;
}

template <class Problem, class X, class T>
FXFUSE_INLINE float direct_value(const X& x, const T* w, const DirectGeometry& s, const Geometry& g, int n, int group,
                                 int column, int d, int h, int w_) {
  float sum = 0.f;
  for (int kd = 0; kd < Problem::kernel_d; ++kd) {
    const int ud = d + Problem::padding_d - kd * Problem::dilation_d;
    if (ud < 0 || ud % Problem::stride_d || ud / Problem::stride_d >= s.depth) continue;
    for (int kh = 0; kh < Problem::kernel_h; ++kh) {
      const int uh = h + Problem::padding_h - kh * Problem::dilation_h;
      if (uh < 0 || uh % Problem::stride_h || uh / Problem::stride_h >= s.height) continue;
      for (int kw = 0; kw < Problem::kernel_w; ++kw) {
        const int uw = w_ + Problem::padding_w - kw * Problem::dilation_w;
        if (uw < 0 || uw % Problem::stride_w || uw / Problem::stride_w >= s.width) continue;
        const int at_d = ud / Problem::stride_d, at_h = uh / Problem::stride_h, at_w = uw / Problem::stride_w;
        const int first = group * Problem::in_channels;
        const auto* from = x.at + n * s.stride.n + (int64_t)first * s.stride.c + at_d * s.stride.d + at_h * s.stride.h +
                           at_w * s.stride.w;
        constexpr int volume = Problem::kernel_d * Problem::kernel_h * Problem::kernel_w;
        const int outs = channels_of<Problem>(g);
        const T* weight = w + ((int64_t)group * Problem::in_channels * outs + column) * volume +
                          (kd * Problem::kernel_h + kh) * Problem::kernel_w + kw;
        for (int c = 0; c < Problem::in_channels; ++c) {
          const float v = x(to_float(from[c * s.stride.c]), n, first + c, at_d, at_h, at_w);
          sum = fmaf(v, to_float(weight[(int64_t)c * outs * volume]), sum);
        }
      }
    }
  }
  return sum;
}

// Which samples the direct kernel makes. To be made by all threads of a block at once, and once in a kernel.
template <class Problem>
struct Marked {
  static constexpr bool scaled = Problem::scaled, some = scaled || Problem::watched;  // may be marked
  bool all;           // some weight is not finite, or an operand of a maximum's chain makes NaN of some number
  float most, least;  // of the channels' scales

  template <class Arguments>
  FXFUSE_INLINE Marked(const DirectGeometry& s, const Arguments& a) : all(false), most(1.f), least(1.f) {
    if constexpr (Problem::steady)
      for (int i = threadIdx.x; i < s.samples * s.channels; i += blockDim.x) {
        const int n = i / (int)s.channels;
        all |= !a.before.steady(a.before.channel(n, i - n * (int)s.channels));
      }
    if (!scaled) {
      if (Problem::steady) all = __syncthreads_or(all);
      return;
    }
    __shared__ float2 found[32];  // of a warp: the largest scale, and the largest reciprocal of one
    float2 mine = {0.f, 0.f};
    for (int c = threadIdx.x; c < s.channels; c += blockDim.x) {
      const float scale = a.to.channel_scale[c];
      all |= s.wrong[c] != 0, mine = larger(mine, {scale, reciprocal_of_power(scale)});
    }
    mine = warp_largest(mine);
    if ((threadIdx.x & 31) == 0) found[threadIdx.x >> 5] = mine;
    all = __syncthreads_or(all);
    mine = warp_largest((threadIdx.x & 31) < blockDim.x / 32 ? found[threadIdx.x & 31] : float2{0.f, 0.f});
    most = mine.x, least = reciprocal_of_power(mine.y);
  }
  static FXFUSE_INLINE float2 larger(const float2& a, const float2& b) { return {fmaxf(a.x, b.x), fmaxf(a.y, b.y)}; }
  static FXFUSE_INLINE float2 warp_largest(float2 v) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v = larger(v, {__shfl_xor_sync(~0u, v.x, o), __shfl_xor_sync(~0u, v.y, o)});
    return v;
  }
  // The epilogue multiplies by the product of a sample's and a channel's scale, then of a number: a float has to hold it.
  template <class Arguments>
  FXFUSE_INLINE bool operator()(const DirectGeometry& s, const Arguments& a, int n) const {
    return some && is(s.marks[n], scaled ? a.to.sample_scale[n] : 1.f);
  }
  FXFUSE_INLINE bool is(uint32_t mark, float scale) const {
    if (all || mark > kFewTiny || (scaled && (!finite(scale * most) || scale * least == 0.f))) return true;
    constexpr float by = Problem::weight_scale < 0.f ? -Problem::weight_scale : Problem::weight_scale;
    return scaled && by != 1.f && (!finite(scale * most * by) || scale * least * by < 1.17549435e-38f);  // a normal one
  }
};

struct Size {
  int d, h, w;
};

// One element of what `Store` and `Pool` (conv_epilogue.cuh) store or reduce over channels, before it is rounded.
template <class Problem, class T>
struct DirectStore {
  template <class Arguments>
  static FXFUSE_INLINE Size size(const Geometry& g, const Arguments&) { return {g.out_d, g.out_h, g.out_w}; }
  template <class X, class Arguments>
  static FXFUSE_INLINE float element(const X& x, const T* w, const DirectGeometry& s, const Geometry& g,
                                     const Arguments& a, int n, int c, int d, int h, int w_) {
    const int group = c / channels_of<Problem>(g), column = c - group * channels_of<Problem>(g);
    const float bias = a.to.bias ? a.to.bias[c] * Problem::bias_scale : 0.f;
    const float y = direct_value<Problem>(x, w, s, g, n, group, column, d, h, w_) * Problem::weight_scale + bias;
    return a.expression(y, n, c, d, h, w_);
  }
};

template <class Problem, class T, class Combine>
struct DirectPool {
  static constexpr int window_d = Problem::stride_d * Problem::step_d, window_h = Problem::stride_h * Problem::step_h,
                       window_w = Problem::stride_w * Problem::step_w;
  template <class Arguments>
  static FXFUSE_INLINE Size size(const Geometry&, const Arguments& a) { return {a.pooled_d, a.pooled_h, a.pooled_w}; }
  template <class X, class Arguments>
  static FXFUSE_INLINE float element(const X& x, const T* w, const DirectGeometry& s, const Geometry& g,
                                     const Arguments& a, int n, int c, int d, int h, int w_) {
    const int group = c / channels_of<Problem>(g), column = c - group * channels_of<Problem>(g);
    const float bias = a.to.bias ? a.to.bias[c] : 0.f;
    float best = Combine::zero();
    for (int rd = 0; rd < window_d; ++rd)
      for (int rh = 0; rh < window_h; ++rh)
        for (int rw = 0; rw < window_w; ++rw) {
          const int od = d * window_d + rd, oh = h * window_h + rh, ow = w_ * window_w + rw;
          if (od >= g.out_d || oh >= g.out_h || ow >= g.out_w) continue;
          const float y = direct_value<Problem>(x, w, s, g, n, group, column, od, oh, ow) + bias;
          best = Combine::combine(best, a.before(y, n, c, od, oh, ow));
        }
    return a.after(Combine::scaled(best, a.factor), n, c, d, h, w_);
  }
};

// The channels of a position or the elements of a row, for the reductions of fold.cuh: value(i) is computed again whenever it
// is asked for.
template <class Value>
struct DirectValues {
  Value value;
  int count;
  Left left;
  FXFUSE_INLINE float at(int i) const { return left(value(i)); }
  template <class Combine, class Of>
  FXFUSE_INLINE float all(float zero, Combine combine, Of of) const {
    float r = zero;
    for (int i = 0; i < count; ++i) r = combine(r, of(at(i)));
    return r;
  }
  FXFUSE_INLINE void subtract(float shift) { left.subtract(shift); }
  FXFUSE_INLINE void raise(const Powers& powers) { left.raise(powers); }
};

// The reduction over channels at a position of `out`.
template <class Problem, class Direct, class X, class T, class Arguments, class Out>
FXFUSE_INLINE void direct_fold(const X& x, const T* w, const DirectGeometry& s, const Geometry& g, const Arguments& a, int n,
                               int at_d, int at_h, int at_w, Out* out) {
  using Fold = typename Problem::Fold;
  auto value = [&](int c) { return Direct::element(x, w, s, g, a, n, c, at_d, at_h, at_w); };
  DirectValues<decltype(value)> channels{value, Fold::channels, {}};
  const auto made = Fold::fold(channels, Fold::channels);
  if constexpr (Fold::keeps) {
    for (int c = 0; c < Fold::channels; ++c)
      out[c * a.to.stride.c] = from_float<Out>(a.behind(Fold::result(channels.at(c), made), n, c, at_d, at_h, at_w));
  } else {
    *out = from_float<Out>(a.behind(made, n, 0, at_d, at_h, at_w));
  }
}

// The reduction of a row of `out`, or of those that a pool makes it of.
template <class Problem, class Direct, class X, class T, class Arguments, class Out>
FXFUSE_INLINE void direct_row(const X& x, const T* w, const DirectGeometry& s, const Geometry& g, const Arguments& a, int n, int c,
                              int at_d, int at_h, Out* out) {
  using Along = typename Problem::Along;
  constexpr bool pools = Arguments::pools;
  constexpr int window_d = pools ? Problem::stride_d : 1, window_h = pools ? Problem::stride_h : 1, window_w = pools ? Problem::stride_w : 1;
  auto row = [&](int r, const Left& left) {
    const int d = at_d * window_d + r / window_h, h = at_h * window_h + r % window_h;
    auto value = [&x, &w, &s, &g, &a, n, c, d, h](int i) { return Direct::element(x, w, s, g, a, n, c, d, h, i); };
    return DirectValues<decltype(value)>{value, g.out_w, left};
  };
  Left left[window_d * window_h];
  auto reduced = [&](int r) {
    auto all = row(r, {});
    const auto made = Along::fold(all, g.out_w);
    left[r] = all.left;
    return made;
  };
  decltype(reduced(0)) made[window_d * window_h];
  for (int r = 0; r < window_d * window_h; ++r) made[r] = reduced(r);
  auto result = [&](int r, int i) { return Along::result(row(r, left[r]).at(i), made[r]); };
  for (int i = 0; i < g.out_w / window_w; ++i) {
    float y;
    if constexpr (pools) {
      y = Arguments::Combine::zero();
      for (int k = 0; k < window_d * window_h * window_w; ++k) {
        const int r = k / window_w, d = at_d * window_d + r / window_h, h = at_h * window_h + r % window_h, j = i * window_w + k % window_w;
        y = Arguments::Combine::combine(y, a.after(result(r, j), n, c, d, h, j));
      }
      y = Arguments::Combine::scaled(y, a.factor);
    } else {
      y = result(0, i);
    }
    out[i] = from_float<Out>(a.behind(y, n, c, at_d, at_h, i));
  }
}

// All elements of marked samples, w varying fastest; of a reduction over channels all channels of a position by one thread,
// of one over w all of a row.
template <class Problem, class Direct, class X, class T, class Arguments>
FXFUSE_INLINE void direct_elements(const X& x, const T* w, const DirectGeometry& s, const Geometry& g, const Arguments& a) {
  Size size = Direct::size(g, a);
  if constexpr (Problem::along) {
    size.w = 1;
    if constexpr (Arguments::pools) size.d = a.pooled_d, size.h = a.pooled_h;
  }
  const int64_t elements = (int64_t)size.d * size.h * size.w * (Problem::folds ? 1 : g.out_channels * g.groups);
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  using Mark = Marked<Problem>;
  const bool there = Mark::some && threadIdx.x < s.samples;  // of its first sample it reads what it needs, at once
  const uint32_t mark = there ? s.marks[threadIdx.x] : 0;
  const float scale = there && Mark::scaled ? a.to.sample_scale[threadIdx.x] : 1.f;
  const Mark marked(s, a);
  bool some = there && marked.is(mark, scale);
  for (int n = threadIdx.x + blockDim.x; n < s.samples; n += blockDim.x) some |= marked(s, a, n);
  if (!__syncthreads_or(some)) return;
  for (int n = 0; n < s.samples; ++n) {
    if (!marked(s, a, n)) continue;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < elements; i += step) {
      int64_t rest = i / size.w;
      const int at_w = (int)(i - rest * size.w), at_h = (int)(rest % size.h);
      rest /= size.h;
      const int at_d = (int)(rest % size.d), c = (int)(rest / size.d);
      auto* out = a.to.out + n * a.to.stride.n + c * a.to.stride.c + at_d * a.to.stride.d + at_h * a.to.stride.h +
                  at_w * a.to.stride.w;
      if constexpr (Problem::folds)
        direct_fold<Problem, Direct>(x, w, s, g, a, n, at_d, at_h, at_w, out);
      else if constexpr (Problem::along)
        direct_row<Problem, Direct>(x, w, s, g, a, n, c, at_d, at_h, out);
      else
        *out = from_float<typename RemovePointer<decltype(out)>::type>(
            Direct::element(x, w, s, g, a, n, c, at_d, at_h, at_w));
    }
  }
}

// The elements of marked samples, for their statistics of a kind.
template <class Kind, class Problem, class Direct, class Out, class X, class T, class Arguments>
struct DirectElements {
  const X& x;
  const T* w;
  const DirectGeometry& s;
  const Geometry& g;
  const Arguments& a;
  FXFUSE_INLINE bool wanted(int n) const { return Marked<Problem>(s, a)(s, a, n); }
  FXFUSE_INLINE typename Kind::Running of(int n, int c, int thread, int threads) const {
    const Size size = Direct::size(g, a);
    typename Kind::Running mine;
    for (int64_t i = thread; i < (int64_t)size.d * size.h * size.w; i += threads) {
      const int64_t rest = i / size.w;
      const int at_w = (int)(i - rest * size.w), at_h = (int)(rest % size.h), at_d = (int)(rest / size.h);
      mine.add(to_float(from_float<Out>(Direct::element(x, w, s, g, a, n, c, at_d, at_h, at_w))));
    }
    return mine;
  }
};

// Merges the parts, those of marked samples from their elements: of this kind, and behind it of those that follow.
template <class Problem, class Direct, class Out, int number = 0, class X, class T, class Arguments>
FXFUSE_INLINE void direct_statistics(const X& x, const T* w, const DirectGeometry& s, const Geometry& g,
                                     const Arguments& a, int pieces, double* merged) {
  using Kind = KindOf<Problem, number>;
  typename Kind::Merged* const out = (typename Kind::Merged*)merged;
  const DirectElements<Kind, Problem, Direct, Out, X, T, Arguments> elements{x, w, s, g, a};
  merge_partials<Kind>(a.to.partials, Problem::Kinds::count, number, pieces, out, elements);
  if constexpr (number + 1 < Problem::Kinds::count) {
    double* const behind = (double*)(out + (int64_t)s.samples * pieces * a.to.partials.channels);
    direct_statistics<Problem, Direct, Out, number + 1>(x, w, s, g, a, pieces, behind);
  }
}

}  // namespace fxfuse
