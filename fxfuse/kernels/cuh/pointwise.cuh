// What pointwise operators compute for one element, in float32, as torch's CUDA kernels do.
// The same text compiles for a GPU (nvcc, NVRTC) and, for tests, with a host compiler.
// Not for -use_fast_math: NaN, Inf and denormals are meant to survive.
#ifndef FXFUSE_POINTWISE_CUH
#define FXFUSE_POINTWISE_CUH

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#ifndef FXFUSE_DEVICE
#define FXFUSE_DEVICE __device__ __forceinline__
#endif
#else
#include <math.h>
#include <string.h>
#ifndef FXFUSE_DEVICE
#define FXFUSE_DEVICE inline
#endif
#endif

namespace fxfuse::pw {

typedef long long i64;

// --- bits ------------------------------------------------------------------------------------------
FXFUSE_DEVICE unsigned bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  unsigned bits = 0;
  memcpy(&bits, &x, 4);
  return bits;
#endif
}

FXFUSE_DEVICE float float_of(unsigned bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x = 0.0f;
  memcpy(&x, &bits, 4);
  return x;
#endif
}

FXFUSE_DEVICE float infinity() { return float_of(0x7f800000u); }
FXFUSE_DEVICE float not_a_number() { return float_of(0x7fc00000u); }

FXFUSE_DEVICE bool is_nan(float x) { return x != x; }
FXFUSE_DEVICE bool is_inf(float x) { return fabsf(x) == infinity(); }
FXFUSE_DEVICE bool is_finite(float x) { return fabsf(x) < infinity(); }

// --- loads -----------------------------------------------------------------------------------------
// Not through the read-only path (ld.global.nc): that is for memory which nothing writes while the kernel runs, and the
// kernel in front may still write an operand when this one begins (dependent.cuh).
template <class T>
FXFUSE_DEVICE T load(const T* p) {
  return *p;
}

FXFUSE_DEVICE float f16_of(unsigned short word) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(word));
  return x;
#else
  const unsigned sign = (unsigned)(word & 0x8000) << 16, rest = word & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  // the exponent field moves from a bias of 15 to one of 127; a multiplication normalises denormals
  return float_of(sign | bits_of(float_of(rest << 13) * float_of((254u - 15u) << 23)));
#endif
}

FXFUSE_DEVICE float load_f32(const float* p) { return load(p); }
FXFUSE_DEVICE double load_f64(const double* p) { return load(p); }
FXFUSE_DEVICE float load_f16(const unsigned short* p) { return f16_of(load(p)); }
FXFUSE_DEVICE float load_bf16(const unsigned short* p) { return float_of((unsigned)load(p) << 16); }
FXFUSE_DEVICE bool load_b1(const unsigned char* p) { return load(p) != 0; }
FXFUSE_DEVICE i64 load_i8(const signed char* p) { return load(p); }
FXFUSE_DEVICE i64 load_i16(const short* p) { return load(p); }
FXFUSE_DEVICE i64 load_i32(const int* p) { return load(p); }
FXFUSE_DEVICE i64 load_i64(const i64* p) { return load(p); }
FXFUSE_DEVICE i64 load_u8(const unsigned char* p) { return load(p); }
FXFUSE_DEVICE i64 load_u16(const unsigned short* p) { return load(p); }
FXFUSE_DEVICE i64 load_u32(const unsigned* p) { return load(p); }

// --- casts -----------------------------------------------------------------------------------------
// x rounded to the nearest float16, ties to even, as a float
FXFUSE_DEVICE float to_f16(float x) {
#ifdef __CUDA_ARCH__
  unsigned short word;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(word) : "f"(x));
  return f16_of(word);
#else
  const unsigned sign = bits_of(x) & 0x80000000u;
  const float size = fabsf(x);
  float rounded = size;  // NaN stays
  if (size >= 65520.0f) {
    rounded = infinity();
  } else if (size < 6.103515625e-05f) {
    rounded = (size + 0.5f) - 0.5f;  // floats in [0.5, 1) are 2^-24 apart, as float16 denormals are
  } else if (!is_nan(x)) {
    const unsigned bits = bits_of(size);
    rounded = float_of((bits + 0xfffu + (bits >> 13 & 1u)) & ~0x1fffu);
  }
  return is_nan(x) ? x : float_of(bits_of(rounded) | sign);
#endif
}

// x rounded to the nearest bfloat16, ties to even, as a float
FXFUSE_DEVICE float to_bf16(float x) {
  const unsigned bits = bits_of(x);
  return is_nan(x) ? x : float_of((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

// --- stores ----------------------------------------------------------------------------------------
FXFUSE_DEVICE unsigned short f16_word(float x) {
#ifdef __CUDA_ARCH__
  unsigned short word;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(word) : "f"(x));
  return word;
#else
  const unsigned bits = bits_of(to_f16(x)), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return (unsigned short)(sign | 0x7e00);
  if (size == 0x7f800000) return (unsigned short)(sign | 0x7c00);
  // as in f16_of, the other way round: exact, since the value is a float16
  return (unsigned short)(sign | bits_of(float_of(size) * float_of((127u - 112u) << 23)) >> 13);
#endif
}

FXFUSE_DEVICE void store_f32(float* p, float x) { *p = x; }
FXFUSE_DEVICE void store_f64(double* p, double x) { *p = x; }
FXFUSE_DEVICE void store_f16(unsigned short* p, float x) { *p = f16_word(x); }
FXFUSE_DEVICE void store_bf16(unsigned short* p, float x) {
  *p = is_nan(x) ? 0x7fff : (unsigned short)(bits_of(to_bf16(x)) >> 16);
}
FXFUSE_DEVICE void store_b1(unsigned char* p, bool x) { *p = x; }
FXFUSE_DEVICE void store_i8(signed char* p, i64 x) { *p = (signed char)x; }
FXFUSE_DEVICE void store_i16(short* p, i64 x) { *p = (short)x; }
FXFUSE_DEVICE void store_i32(int* p, i64 x) { *p = (int)x; }
FXFUSE_DEVICE void store_i64(i64* p, i64 x) { *p = x; }
FXFUSE_DEVICE void store_u8(unsigned char* p, i64 x) { *p = (unsigned char)x; }
FXFUSE_DEVICE void store_u16(unsigned short* p, i64 x) { *p = (unsigned short)x; }
FXFUSE_DEVICE void store_u32(unsigned* p, i64 x) { *p = (unsigned)x; }

// --- comparisons -----------------------------------------------------------------------------------
FXFUSE_DEVICE float maximum(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  return is_nan(a) ? a : is_nan(b) ? b : fmaxf(a, b);
#endif
}

FXFUSE_DEVICE float minimum(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  return is_nan(a) ? a : is_nan(b) ? b : fminf(a, b);
#endif
}

FXFUSE_DEVICE i64 maximum(i64 a, i64 b) { return a < b ? b : a; }
FXFUSE_DEVICE i64 minimum(i64 a, i64 b) { return b < a ? b : a; }
FXFUSE_DEVICE bool maximum(bool a, bool b) { return a || b; }
FXFUSE_DEVICE bool minimum(bool a, bool b) { return a && b; }

// Bounds that are numbers, not NaN: NaN stays as it is, and so does -0.0 but for a bound of zero on a GPU, as in torch.
FXFUSE_DEVICE float at_least(float x, float low) {
#ifdef __CUDA_ARCH__
  return maximum(x, low);
#else
  return x < low ? low : x;
#endif
}
FXFUSE_DEVICE float at_most(float x, float high) {
#ifdef __CUDA_ARCH__
  return minimum(x, high);
#else
  return high < x ? high : x;
#endif
}
FXFUSE_DEVICE float clamp(float x, float low, float high) { return at_most(at_least(x, low), high); }
FXFUSE_DEVICE float relu(float x) { return at_least(x, 0.0f); }
FXFUSE_DEVICE float sign(float x) { return (float)((0.0f < x) - (x < 0.0f)); }
FXFUSE_DEVICE float threshold(float x, float limit, float value) { return x <= limit ? value : x; }
FXFUSE_DEVICE float hardshrink(float x, float lambd) { return x >= -lambd && x <= lambd ? 0.0f : x; }
FXFUSE_DEVICE float softshrink(float x, float lambd) {
  return is_nan(x) ? x : x > lambd ? x - lambd : x < -lambd ? x + lambd : 0.0f;
}

// --- activations -----------------------------------------------------------------------------------
FXFUSE_DEVICE float reciprocal_root(float x) {
#ifdef __CUDA_ARCH__
  return rsqrtf(x);
#else
  return 1.0f / sqrtf(x);
#endif
}

// 1/x for normal x > 0, to the last bit but one, and 0 beyond 2^126: a division branches, and a convolution's epilogue has
// few warps.
FXFUSE_DEVICE float reciprocal_of_normal(float x) {
#ifdef __CUDA_ARCH__
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return 1.0f / x;
#endif
}

// A power of two by which the reciprocal of `by` is neither Inf nor has fewer bits than other numbers.
FXFUSE_DEVICE float factor_of(float by) {
  return fabsf(by) < 5.42101086e-20f ? 18446744073709551616.f : fabsf(by) > 18446744073709551616.f ? 5.42101086e-20f : 1.f;
}

// v / by of many v, without a branch. As a division has it, to the last bit, where that is a number of so few bits as v / v.
struct Divisor {
  float factor, by, reciprocal;
  Divisor() = default;
  FXFUSE_DEVICE Divisor(float factor, float by, float reciprocal) : factor(factor), by(by), reciprocal(reciprocal) {}
  explicit FXFUSE_DEVICE Divisor(float all) : factor(factor_of(all)), by(all * factor), reciprocal(1.f / by) {}
  FXFUSE_DEVICE float operator()(float v) const {
    const float q = v * reciprocal, rest = fmaf(-q, by, v);  // of what is not finite, and by zero, it is NaN
    return (rest != 0.f && is_finite(rest) ? fmaf(rest, reciprocal, q) : q) * factor;  // or -0 would be 0
  }
};

// The same of one v.
FXFUSE_DEVICE float divide(float v, float all) {
#ifdef __CUDA_ARCH__
  const float factor = factor_of(all), by = all * factor;
  return Divisor(factor, by, reciprocal_of_normal(by))(v);
#else
  return v / all;
#endif
}

// 2^x to the last bits but two, where less than 2^-126 may be 0.
FXFUSE_DEVICE float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return exp2f(x);
#endif
}

// exp(x), as a power of two: a quarter of expf's instructions. Its error is that of an x which is off by half a unit;
// less than 2^-126 is 0.
FXFUSE_DEVICE float exponential(float x) { return power_of_two(x * 1.4426950408889634f); }

// Four instructions on a GPU; their error is that of rounding x.
FXFUSE_DEVICE float sigmoid(float x) {
#ifdef __CUDA_ARCH__
  const float power = power_of_two(x * -1.4426950408889634f);
#else
  const float power = expf(-x);
#endif
  return reciprocal_of_normal(1.0f + power);
}
FXFUSE_DEVICE float silu(float x) { return x * sigmoid(x); }
// The same for |x| <= 1 + 2^-7 without special functions, of which an SM makes an eighth of the multiply-adds. Odd
// polynomials whose largest error there is the least (a minimax fit by Lawson's iteration, with one coefficient after the
// other rounded to float32): 6.9e-8 of sigmoid, 1.1e-7 as float32 computes it, which is what the four instructions above
// err by; 6.1e-8 and 1.7e-7 of tanh, relative to it.
FXFUSE_DEVICE float sigmoid_of_small(float x) {
  const float s = x * x;
  const float slope = fmaf(s, fmaf(s, fmaf(s, -0.00016889095f, 0.002053138f), -0.020825088f), 0.24999939f);
  return fmaf(x, slope, 0.5f);
}
FXFUSE_DEVICE float silu_of_small(float x) { return x * sigmoid_of_small(x); }
FXFUSE_DEVICE float tanh_of_small(float x) {
  const float s = x * x;
  const float high = fmaf(s, fmaf(s, fmaf(s, 0.0010403999f, -0.0062104077f), 0.020310253f), -0.053476162f);
  return x * fmaf(s, fmaf(s, fmaf(s, high, 0.13325965f), -0.3333296f), 1.0f);
}
// tanh(log(1 + e)) is (e^2 + 2e) / (e^2 + 2e + 2); from 20 on it is one, and e^2 a float.
FXFUSE_DEVICE float mish(float x) {
  const float e = power_of_two((x < 20.0f ? x : 20.0f) * 1.4426950408889634f), n = fmaf(e, e, 2.0f * e);
  return x * (n * reciprocal_of_normal(n + 2.0f));
}
FXFUSE_DEVICE float softsign(float x) { return divide(x, 1.0f + fabsf(x)); }
FXFUSE_DEVICE float tanhshrink(float x) { return x - tanhf(x); }
FXFUSE_DEVICE float log_sigmoid(float x) { return (x < 0.0f ? x : 0.0f) - log1pf(expf(-fabsf(x))); }
FXFUSE_DEVICE float hardsigmoid(float x) { return clamp(x + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f); }
FXFUSE_DEVICE float hardswish(float x) { return x * clamp(x + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f); }
FXFUSE_DEVICE float prelu(float x, float slope) { return x > 0.0f ? x : x * slope; }
// Of a slope that is known where this is compiled.
FXFUSE_DEVICE float leaky_relu(float x, float slope) {
  return 0.0f < slope && slope <= 1.0f ? maximum(x, x * slope) : prelu(x, slope);
}
FXFUSE_DEVICE float elu(float x, float alpha) { return x > 0.0f ? x : expm1f(x) * alpha; }
FXFUSE_DEVICE float celu(float x, float alpha, float inverse) {
  return x > 0.0f ? x : expm1f(x * inverse) * alpha;
}
FXFUSE_DEVICE float selu(float x) {
  const float scale = 1.0507009873554805f, alpha = 1.6732632423543772f;
  return x > 0.0f ? x * scale : expm1f(x) * (alpha * scale);
}
// x times the normal distribution's part below x: erfc(|x| / sqrt(2)) / 2 is exp(-x^2 / 2) and a polynomial in 1 / (1 + p|x|),
// as Abramowitz and Stegun have it (7.1.26), of a degree more and fitted as above: its error is 3.1e-8, and 1.9e-7 |x| is that of
// all this, for 3.5e-7 |x| of erff.
FXFUSE_DEVICE float gelu(float x) {
  const float t = reciprocal_of_normal(fmaf(fabsf(x), 0.40305087f, 1.0f)), power = power_of_two(x * x * -0.7213475204444817f);
  const float high = fmaf(t, fmaf(t, fmaf(t, 0.05504653f, -0.24525833f), 0.31637216f), 0.031482354f);
  const float beyond = fmaf(t, fmaf(t, high, 0.18353182f), 0.1588255f) * t * power;
  return x * (x > 0.0f ? 1.0f - beyond : beyond);
}
// (1 + tanh(u)) / 2 is sigmoid(2u).
FXFUSE_DEVICE float gelu_tanh(float x) { return x * sigmoid(1.5957691216057308f * fmaf(0.044715f * x, x * x, x)); }
FXFUSE_DEVICE float softplus(float x, float beta, float limit) {
  return x * beta > limit ? x : log1pf(expf(x * beta)) / beta;
}

// --- several operands ------------------------------------------------------------------------------
FXFUSE_DEVICE float lerp(float a, float b, float weight) {
  return fabsf(weight) < 0.5f ? a + weight * (b - a) : b - (b - a) * (1.0f - weight);
}

}  // namespace fxfuse::pw

#endif  // FXFUSE_POINTWISE_CUH
