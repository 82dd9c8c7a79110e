// How pools make one value of many, and the expression that changes nothing.
#pragma once
#include "ptx.cuh"

namespace fxfuse {

struct Maximum {
  static FXFUSE_INLINE float zero() { return __uint_as_float(0xff800000u); }
  static FXFUSE_INLINE float combine(float a, float b) { return max_or_nan(a, b); }
  static FXFUSE_INLINE float scaled(float v, float) { return v; }
};
struct Sum {
  static FXFUSE_INLINE float zero() { return 0.f; }
  static FXFUSE_INLINE float combine(float a, float b) { return a + b; }
  static FXFUSE_INLINE float scaled(float v, float factor) { return v * factor; }
};

// An expression as kernels/codegen/expression.py emits them: y itself.
struct Identity {
  static constexpr bool local = false;
  struct Channel {};
  FXFUSE_INLINE Channel channel(int, int) const { return {}; }
  FXFUSE_INLINE float operator()(const Channel&, float y, int, int, int, int, int) const { return y; }
  FXFUSE_INLINE float operator()(float y, int, int, int, int, int) const { return y; }
};

// `Expression` of a tensor (n, ...) without a dim of channels: to it, the first of `dims` spatial dims is one.
template <class Expression, int dims>
struct WithoutChannels {
  Expression expression;
  FXFUSE_INLINE float operator()(float y, int n, int, int d, int h, int w) const {
    return dims == 3 ? expression(y, n, d, 0, h, w) : expression(y, n, h, 0, 0, w);
  }
};

}  // namespace fxfuse
