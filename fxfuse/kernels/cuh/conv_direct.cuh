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

template <class Problem, class T>
FXFUSE_INLINE float direct_value(const T* x, const T* w, const DirectGeometry& s, const Geometry& g, int n, int group,
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
        const T* from = x + n * s.stride.n + (int64_t)group * Problem::in_channels * s.stride.c +
                        ud / Problem::stride_d * s.stride.d + uh / Problem::stride_h * s.stride.h +
                        uw / Problem::stride_w * s.stride.w;
        constexpr int volume = Problem::kernel_d * Problem::kernel_h * Problem::kernel_w;
        const T* weight = w + ((int64_t)group * Problem::in_channels * g.out_channels + column) * volume +
                          (kd * Problem::kernel_h + kh) * Problem::kernel_w + kw;
        for (int c = 0; c < Problem::in_channels; ++c)
          sum = fmaf(to_float(from[c * s.stride.c]), to_float(weight[(int64_t)c * g.out_channels * volume]), sum);
      }
    }
  }
  return sum;
}

// Calls f(n, group, column, d, h, w) for the positions of marked samples, w varying fastest.
template <class F>
FXFUSE_INLINE void direct_positions(const DirectGeometry& s, const Geometry& g, int depth, int height, int width, F f) {
  const int64_t positions = (int64_t)depth * height * width * g.out_channels * g.groups;
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  bool wrong = false;
  for (int c = threadIdx.x; c < s.channels; c += blockDim.x) wrong |= s.wrong[c] != 0;
  wrong = __syncthreads_or(wrong);
  for (int n = 0; n < s.samples; ++n) {
    if (!wrong && s.marks[n] <= kFewTiny) continue;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < positions; i += step) {
      int64_t rest = i / width;
      const int w = (int)(i - rest * width);
      const int h = (int)(rest % height);
      rest /= height;
      const int d = (int)(rest % depth);
      const int c = (int)(rest / depth);
      f(n, c / g.out_channels, c % g.out_channels, d, h, w);
    }
  }
}

template <class Problem, class T, class Arguments>
FXFUSE_INLINE void direct_store(const T* x, const T* w, const DirectGeometry& s, const Geometry& g, const Arguments& a) {
  direct_positions(s, g, g.out_d, g.out_h, g.out_w, [&](int n, int group, int column, int od, int oh, int ow) {
    const int c = group * g.out_channels + column;
    const float y = direct_value<Problem>(x, w, s, g, n, group, column, od, oh, ow) + (a.to.bias ? a.to.bias[c] : 0.f);
    auto* out = a.to.out + n * a.to.stride.n + c * a.to.stride.c + od * a.to.stride.d + oh * a.to.stride.h + ow * a.to.stride.w;
    *out = from_float<typename RemovePointer<decltype(out)>::type>(a.expression(y, n, c, od, oh, ow));
  });
}

template <class Problem, class T, class Combine, class Arguments>
FXFUSE_INLINE void direct_pool(const T* x, const T* w, const DirectGeometry& s, const Geometry& g, const Arguments& a) {
  direct_positions(s, g, a.pooled_d, a.pooled_h, a.pooled_w, [&](int n, int group, int column, int d, int h, int w_) {
    const int c = group * g.out_channels + column;
    const float bias = a.to.bias ? a.to.bias[c] : 0.f;
    float best = Combine::zero();
    for (int rd = 0; rd < Problem::stride_d; ++rd)
      for (int rh = 0; rh < Problem::stride_h; ++rh)
        for (int rw = 0; rw < Problem::stride_w; ++rw) {
          const int od = d * Problem::stride_d + rd, oh = h * Problem::stride_h + rh, ow = w_ * Problem::stride_w + rw;
          if (od >= g.out_d || oh >= g.out_h || ow >= g.out_w) continue;
          const float y = direct_value<Problem>(x, w, s, g, n, group, column, od, oh, ow) + bias;
          best = Combine::combine(best, a.before(y, n, c, od, oh, ow));
        }
    auto* out = a.to.out + n * a.to.stride.n + c * a.to.stride.c + d * a.to.stride.d + h * a.to.stride.h + w_ * a.to.stride.w;
    *out = from_float<typename RemovePointer<decltype(out)>::type>(a.after(best * a.factor, n, c, d, h, w_));
  });
}

}  // namespace fxfuse
