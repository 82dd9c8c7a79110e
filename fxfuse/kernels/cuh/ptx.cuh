// What CUDA C++ has no words for: barriers, bulk copies, warpgroup matrix instructions, conversions. sm_90a.
#pragma once
#include "dependent.cuh"

#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#else
#include <stdint.h>
#endif

#define FXFUSE_INLINE __device__ __forceinline__

namespace fxfuse {

template <class T>
struct RemovePointer;
template <class T>
struct RemovePointer<T*> {
  typedef T type;
};

// A CUtensorMap, opaque here.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

// 8 or 16 aligned bytes in global memory, in one instruction: of an assignment the compiler may make two or four.
FXFUSE_INLINE void store_at_once(void* to, uint32_t a, uint32_t b) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(a), "r"(b));
}
FXFUSE_INLINE void store_at_once(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(a), "r"(b), "r"(c), "r"(d));
}

FXFUSE_INLINE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// --- mbarriers ---------------------------------------------------------------------------------------
FXFUSE_INLINE void barrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals));
}
FXFUSE_INLINE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FXFUSE_INLINE void barrier_expect(uint64_t* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
FXFUSE_INLINE void barrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
FXFUSE_INLINE void barrier_wait(uint64_t* b, uint32_t parity) {
  asm volatile(
      "{.reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra D; bra W; D: }" ::"r"(
          shared_address(b)),
      "r"(parity)
      : "memory");
}
// Whether it need not be waited for.
FXFUSE_INLINE bool barrier_ready(uint64_t* b, uint32_t parity) {
  uint32_t ready;
  asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(ready)
               : "r"(shared_address(b)), "r"(parity)
               : "memory");
  return ready;
}
// The compiler moves no load or store across.
FXFUSE_INLINE void schedule_barrier() { asm volatile("" ::: "memory"); }
// The compiler makes `v` here: what follows from it is not made earlier, nor put together with what it was made of.
FXFUSE_INLINE void settle(int& v) { asm volatile("" : "+r"(v)); }
FXFUSE_INLINE void settle(uint32_t& v) { asm volatile("" : "+r"(v)); }
FXFUSE_INLINE void settle(float& v) { asm volatile("" : "+f"(v)); }
template <class T>
FXFUSE_INLINE void settle(T*& v) {  // to global memory
  size_t address = __cvta_generic_to_global(v);
  asm volatile("" : "+l"(address));
  v = (T*)__cvta_global_to_generic(address);
}
// The same of shared memory. Or its address, which two instructions tell late, is made wherever it is used.
template <class T>
FXFUSE_INLINE void settle_shared(T*& v) {
  uint32_t address = shared_address(v);
  asm volatile("" : "+r"(address));
  v = (T*)__cvta_shared_to_generic(address);
}
// Threads of a subset of the warps meet.
FXFUSE_INLINE void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }


// --- a word into shared memory -----------------------------------------------------------------------------------------
// It is there for this thread behind copied_words(), for other ones behind where they meet then.
FXFUSE_INLINE void copy_word(float* to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
FXFUSE_INLINE void copied_words() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// --- bulk copies into shared memory, and out of it --------------------------------------------------------------------
FXFUSE_INLINE void copy_box(void* to, const TensorMap* map, uint64_t* b, int c, int w, int h, int d, int n) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6,%7}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(b)), "r"(c), "r"(w), "r"(h), "r"(d), "r"(n)
      : "memory");
}
FXFUSE_INLINE void copy_bytes(void* to, const void* from, uint32_t bytes, uint64_t* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(b))
               : "memory");
}
// What kernels in front stored in global memory is there for this thread's copies.
FXFUSE_INLINE void bulk_after_stores() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
// What this thread has put into shared memory is there for copies out of it.
FXFUSE_INLINE void bulk_after_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// From shared to global memory; addresses and `bytes` are multiples of 16.
FXFUSE_INLINE void store_bytes(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
// This thread's store_bytes since the last time are a group.
FXFUSE_INLINE void store_bytes_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until what they read may be overwritten, of all groups but the last `pending`.
template <int pending>
FXFUSE_INLINE void stored_bytes_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}
// The same of all store_bytes.
FXFUSE_INLINE void stored_bytes_read() { store_bytes_group(), stored_bytes_read<0>(); }
FXFUSE_INLINE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// --- wgmma ---------------------------------------------------------------------------------------------
// A K-major operand whose rows are as long as the swizzle: 32, 64 or 128 bytes. `group` is the distance in
// bytes between groups of eight rows. The swizzle acts on address bits, so `address` may be any row.
template <int row_bytes>
__device__ __forceinline__ constexpr uint64_t descriptor(uint32_t address, uint32_t group) {
  constexpr uint64_t swizzle = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
  return (uint64_t)((address & 0x3FFFF) >> 4) | (uint64_t(1) << 16) | ((uint64_t)(group >> 4) << 32) | (swizzle << 62);
}
FXFUSE_INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FXFUSE_INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
FXFUSE_INLINE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
template <int registers>
FXFUSE_INLINE void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
FXFUSE_INLINE void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// --- a warp's matrix instruction of float64 -------------------------------------------------------------
// c += a b for 16x4 a, 4x8 b. A lane has rows lane/4 and lane/4 + 8 of column lane%4 of a, row lane%4 of column lane/4 of
// b, and columns lane%4*2 and the next one of c, of both rows.
FXFUSE_INLINE void mma_double(double (&c)[4], double a0, double a1, double b) {
  asm volatile(
      "mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
      : "d"(a0), "d"(a1), "d"(b));
}

// --- a warp's matrix instruction of TF32 ----------------------------------------------------------------------------
// c += a b for 16x8 a, 8x8 b. A lane has rows lane/4 and lane/4 + 8 of columns lane%4 and lane%4 + 4 of a, these rows of
// column lane/4 of b, and columns lane%4*2 and the next one of c, of both rows, from `first` + `at` on. The last 13 bits of
// a and b are not read.
template <int first, int size>
FXFUSE_INLINE void mma_tf32(float (&c)[size], int at, const uint32_t (&a)[4], const uint2& b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[first + at]), "+f"(c[first + at + 1]), "+f"(c[first + at + 2]), "+f"(c[first + at + 3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

// --- numbers -------------------------------------------------------------------------------------------
FXFUSE_INLINE float about_one_over(float v) {  // to the last digit or the one before
  float made;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(made) : "f"(v));
  return made;
}
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
FXFUSE_INLINE float to_float(float v) { return v; }
FXFUSE_INLINE float to_float(Half v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}
FXFUSE_INLINE float to_float(BFloat v) { return __uint_as_float((uint32_t)v.bits << 16); }
template <class T>
FXFUSE_INLINE T from_float(float v);
template <>
FXFUSE_INLINE float from_float<float>(float v) {
  return v;
}
template <>
FXFUSE_INLINE Half from_float<Half>(float v) {
  Half h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(v));
  return h;
}
template <>
FXFUSE_INLINE BFloat from_float<BFloat>(float v) {
  BFloat h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h.bits) : "f"(v));
  return h;
}
// Two numbers of 16 bits in a word, the first in the lower half.
template <class T>
FXFUSE_INLINE uint32_t two_of(float a, float b);
template <>
FXFUSE_INLINE uint32_t two_of<Half>(float a, float b) {
  uint32_t two;
  asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(two) : "f"(a), "f"(b));
  return two;
}
template <>
FXFUSE_INLINE uint32_t two_of<BFloat>(float a, float b) {
  uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(two) : "f"(a), "f"(b));
  return two;
}
// The larger one; NaN where either is NaN, as torch's max pools have it.
FXFUSE_INLINE float max_or_nan(float a, float b) {
  float f;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(f) : "f"(a), "f"(b));
  return f;
}
FXFUSE_INLINE bool finite(float v) { return (__float_as_uint(v) & 0x7f800000u) != 0x7f800000u; }

}  // namespace fxfuse
