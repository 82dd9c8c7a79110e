// Reductions by name, over the channels of a position or the elements of a row, whoever holds them: as torch computes them.
//
// A holder has all(zero, combine, of), which combines of(value) of all its channels; subtract(shift) and raise(powers),
// which make value - shift and powers(value) of every value.
#pragma once
#include "pointwise.cuh"
#include "ptx.cuh"

namespace fxfuse {

using pw::exponential;

// exp(v - m) for v <= m, but for a factor that all v have in common: one multiply-add and a power of two. The factor is what
// rounding m * log2(e) makes, 2^64 or its reciprocal at most. Of larger m, where that would be Inf or 0, two numbers differ
// by 128 at least, or not at all: the power is 0 or 1 of any base. Inf and NaN are those of exp(v - m).
struct Powers {
  float scale, shift;
  explicit FXFUSE_INLINE Powers(float m) : scale(fabsf(m) <= 1073741824.f ? 1.4426950408889634f : 1.f), shift(-(m * scale)) {}
  FXFUSE_INLINE float operator()(float v) const { return pw::power_of_two(fmaf(v, scale, shift)); }
};

template <class F, class Of>
FXFUSE_INLINE float sum_of(const F& f, Of of) {
  return f.all(0.f, [](float a, float b) { return a + b; }, of);
}
template <class F>
FXFUSE_INLINE float sum(const F& f) {
  return sum_of(f, [](float v) { return v; });
}
template <class F>
FXFUSE_INLINE float maximum(const F& f) {
  return f.all(__uint_as_float(0xff800000u), max_or_nan, [](float v) { return v; });
}

// One value of all channels.
struct FoldSum {
  static constexpr bool keeps = false;
  template <class F>
  static FXFUSE_INLINE float fold(F& f, int) { return sum(f); }
};
struct FoldMean {
  static constexpr bool keeps = false;
  template <class F>
  static FXFUSE_INLINE float fold(F& f, int channels) { return sum(f) / (float)channels; }
};
struct FoldMaximum {
  static constexpr bool keeps = false;
  template <class F>
  static FXFUSE_INLINE float fold(F& f, int) { return maximum(f); }
};
struct FoldMinimum {
  static constexpr bool keeps = false;
  template <class F>
  static FXFUSE_INLINE float fold(F& f, int) {
    return -f.all(__uint_as_float(0xff800000u), max_or_nan, [](float v) { return -v; });
  }
};
struct FoldLogSumExp {
  static constexpr bool keeps = false;
  template <class F>
  static FXFUSE_INLINE float fold(F& f, int) {
    float m = maximum(f);
    if (fabsf(m) == __uint_as_float(0x7f800000u)) m = 0.f;  // Inf less Inf would be NaN
    return logf(sum_of(f, [m](float v) { return exponential(v - m); })) + m;
  }
};
template <class F>
FXFUSE_INLINE float squares(const F& f) {
  return sum_of(f, [](float v) { return v * v; });
}
struct FoldProduct {
  static constexpr bool keeps = false;
  template <class F>
  static FXFUSE_INLINE float fold(F& f, int) {
    return f.all(1.f, [](float a, float b) { return a * b; }, [](float v) { return v; });
  }
};
struct FoldLength {
  static constexpr bool keeps = false;
  template <class F>
  static FXFUSE_INLINE float fold(F& f, int) { return sqrtf(squares(f)); }
};
// `correction`: the bits of a float, which is taken from the number of values. Two passes over what the holder holds are no
// less exact than torch's one, which merges moments.
template <uint32_t correction>
struct FoldVariance {
  static constexpr bool keeps = false;
  template <class F>
  static FXFUSE_INLINE float fold(F& f, int channels) {
    f.subtract(sum(f) / (float)channels);
    return squares(f) / fmaxf((float)channels - __uint_as_float(correction), 0.f);
  }
};
template <uint32_t correction>
struct FoldDeviation {
  static constexpr bool keeps = false;
  template <class F>
  static FXFUSE_INLINE float fold(F& f, int channels) { return sqrtf(FoldVariance<correction>::fold(f, channels)); }
};
// One value for every channel: result(value, r) of what `fold` leaves there and returns.
struct FoldSoftmax {
  static constexpr bool keeps = true;
  template <class F>
  static FXFUSE_INLINE float fold(F& f, int) {
    f.raise(Powers(maximum(f)));
    return pw::reciprocal_of_normal(sum(f));  // the largest of them is one, but for the factor
  }
  static FXFUSE_INLINE float result(float v, float r) { return v * r; }
};
struct FoldLogSoftmax {
  static constexpr bool keeps = true;
  template <class F>
  static FXFUSE_INLINE float fold(F& f, int) {
    f.subtract(maximum(f));  // by itself: beside a large maximum the logarithm would be lost
    return logf(sum_of(f, exponential));
  }
  static FXFUSE_INLINE float result(float v, float r) { return v - r; }
};

// `eps`: the bits of a float, which is added to the mean of squares.
template <uint32_t eps>
struct FoldRMSNorm {
  static constexpr bool keeps = true;
  template <class F>
  static FXFUSE_INLINE float fold(F& f, int channels) {
    return rsqrtf(fmaf(squares(f), 1.f / (float)channels, __uint_as_float(eps)));
  }
  static FXFUSE_INLINE float result(float v, float r) { return v * r; }
};
template <uint32_t eps>
struct FoldLayerNorm {
  static constexpr bool keeps = true;
  template <class F>
  static FXFUSE_INLINE float fold(F& f, int channels) {
    f.subtract(sum(f) * (1.f / (float)channels));
    return FoldRMSNorm<eps>::fold(f, channels);
  }
  static FXFUSE_INLINE float result(float v, float r) { return v * r; }
};

// `eps`: the bits of a float, which the length is at least.
template <uint32_t eps>
struct FoldUnitNorm {
  static constexpr bool keeps = true;
  template <class F>
  static FXFUSE_INLINE pw::Divisor fold(F& f, int) {
    return pw::Divisor(pw::at_least(sqrtf(squares(f)), __uint_as_float(eps)));
  }
  static FXFUSE_INLINE float result(float v, const pw::Divisor& r) { return r(v); }
};

// What a reduction leaves of a value, for a holder that does not keep it: left(value).
struct Left {
  float shift = 0.f;
  Powers powers = Powers(0.f);
  bool raised = false;
  FXFUSE_INLINE float operator()(float v) const { return raised ? powers(v) : v - shift; }
  FXFUSE_INLINE void subtract(float by) { shift = by; }
  FXFUSE_INLINE void raise(const Powers& by) { powers = by, raised = true; }
};

// A holder of of(value) of every value of another one, which keeps its own.
template <class F, class Of>
struct Through {
  const F& f;
  Of of;
  Left left = {};
  template <class Combine, class Next>
  FXFUSE_INLINE float all(float zero, Combine combine, Next next) const {
    return f.all(zero, combine, [&](float v) { return next(left(of(v))); });
  }
  FXFUSE_INLINE void subtract(float shift) { left.subtract(shift); }
  FXFUSE_INLINE void raise(const Powers& powers) { left.raise(powers); }
};
template <class F, class Of>
FXFUSE_INLINE Through<F, Of> through(const F& f, Of of) {
  return {f, of};
}

}  // namespace fxfuse
