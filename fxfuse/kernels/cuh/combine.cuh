// How pools make one value of many, and the expression that changes nothing.
#pragma once
#include "ptx.cuh"

namespace fxfuse {

struct Maximum {
  static FXFUSE_INLINE float zero() { return __uint_as_float(0xff800000u); }
  static FXFUSE_INLINE float combine(float a, float b) { return max_or_nan(a, b); }
};
struct Sum {
  static FXFUSE_INLINE float zero() { return 0.f; }
  static FXFUSE_INLINE float combine(float a, float b) { return a + b; }
};

// y itself.
struct Identity {
  FXFUSE_INLINE float operator()(float y, int, int, int, int, int) const { return y; }
};

}  // namespace fxfuse
