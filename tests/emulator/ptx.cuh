// The names of fxfuse/kernels/cuh/ptx.cuh, on the emulated machine.
#pragma once
#include "dependent.cuh"
#include "pointwise.cuh"

#define FXFUSE_INLINE inline

namespace fxfuse {

template <class T>
struct RemovePointer;
template <class T>
struct RemovePointer<T*> {
  typedef T type;
};

struct alignas(64) TensorMap {
  uint64_t words[16];
};

inline uint32_t shared_address(const void* p) { return emulated_address(p); }

inline void barrier_init(uint64_t* b, int arrivals) { emulated_barrier_init(b, arrivals); }
inline void barrier_init_fence() {}
inline void barrier_expect(uint64_t* b, uint32_t bytes) { emulated_barrier_arrive(b, (int)bytes); }
inline void barrier_arrive(uint64_t* b) { emulated_barrier_arrive(b, 0); }
inline void barrier_wait(uint64_t* b, uint32_t parity) { emulated_barrier_wait(b, (int)parity); }
inline bool barrier_ready(uint64_t* b, uint32_t parity) { return emulated_barrier_ready(b, (int)parity); }
inline void schedule_barrier() {}
inline void store_at_once(void* to, uint32_t a, uint32_t b) { *(uint2*)to = make_uint2(a, b); }
inline void store_at_once(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) { *(uint4*)to = make_uint4(a, b, c, d); }
template <class T>
void settle(T&) {}
template <class T>
void settle_shared(T*&) {}
inline void named_barrier(int id, int threads) { emulated_meet(id, threads); }

inline void copy_word(float* to, const float* from) { emulated_copy_word(to, from); }
inline void copied_words() { emulated_copied_words(); }

inline void copy_box(void* to, const TensorMap* map, uint64_t* b, int c, int w, int h, int d, int n) {
  const int at[5] = {c, w, h, d, n};
  emulated_copy_box(to, map, b, at);
}
inline void copy_bytes(void* to, const void* from, uint32_t bytes, uint64_t* b) { emulated_copy(to, from, (int)bytes, b); }
inline void bulk_after_stores() {}
inline void bulk_after_shared() {}
inline void store_bytes(void* to, const void* from, uint32_t bytes) { emulated_store(to, from, (int)bytes); }
inline void store_bytes_group() { emulated_store_group(); }
template <int pending>
void stored_bytes_read() {
  emulated_stored(pending);
}
inline void stored_bytes_read() { store_bytes_group(), stored_bytes_read<0>(); }
inline void prefetch_map(const TensorMap*) {}

template <int row_bytes>
constexpr uint64_t descriptor(uint32_t address, uint32_t group) {
  constexpr uint64_t swizzle = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
  return (uint64_t)((address & 0x3FFFF) >> 4) | (uint64_t(1) << 16) | ((uint64_t)(group >> 4) << 32) | (swizzle << 62);
}
inline void wgmma_fence() {}
inline void wgmma_commit() { emulated_wgmma_commit(); }
template <int pending>
void wgmma_wait() {
  emulated_wgmma_wait(pending);
}
template <int registers>
void registers_down() {}
template <int registers>
void registers_up() {}

inline void mma_double(double (&c)[4], double a0, double a1, double b) {
  const double given[3] = {a0, a1, b};
  double all[32][3];
  emulated_warp(given, all, sizeof(given));
  const int lane = threadIdx.x & 31;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 4; ++k) c[i] += all[(lane & ~3) + k][i >> 1] * all[((lane & 3) * 2 + (i & 1)) * 4 + k][2];
}

template <int first, int size>
void mma_tf32(float (&c)[size], int at, const uint32_t (&a)[4], const uint2& b) {
  const uint32_t given[6] = {a[0], a[1], a[2], a[3], b.x, b.y};
  uint32_t all[32][6];
  emulated_warp(given, all, sizeof(given));
  const int lane = threadIdx.x & 31;
  auto number = [&](int lane, int i) { return __uint_as_float(all[lane][i] & ~0x1fffu); };
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 8; ++k)
      c[first + at + i] += number((lane & ~3) + (k & 3), (i >> 1) + (k >> 2) * 2) *
                           number(((lane & 3) * 2 + (i & 1)) * 4 + (k & 3), 4 + (k >> 2));
}

inline float about_one_over(float v) { return 1.f / v; }
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
inline float to_float(float v) { return v; }
inline float to_float(Half v) { return pw::f16_of(v.bits); }
inline float to_float(BFloat v) { return __uint_as_float((uint32_t)v.bits << 16); }
template <class T>
T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline Half from_float<Half>(float v) {
  const float rounded = pw::to_f16(v), size = fabsf(rounded);
  const uint16_t sign = __float_as_uint(v) >> 16 & 0x8000;
  if (v != v) return {0x7fff};
  if (size > 65504.f) return {(uint16_t)(sign | 0x7c00)};
  return {(uint16_t)(sign | __float_as_uint(size * 0x1p-112f) >> 13)};  // the exponent moves from a bias of 127 to one of 15
}
template <>
inline BFloat from_float<BFloat>(float v) {
  return {(uint16_t)(v != v ? 0x7fff : __float_as_uint(pw::to_bf16(v)) >> 16)};
}
template <class T>
uint32_t two_of(float a, float b) {
  return (uint32_t)from_float<T>(a).bits | (uint32_t)from_float<T>(b).bits << 16;
}
inline float max_or_nan(float a, float b) { return pw::maximum(a, b); }
inline bool finite(float v) { return (__float_as_uint(v) & 0x7f800000u) != 0x7f800000u; }

}  // namespace fxfuse
