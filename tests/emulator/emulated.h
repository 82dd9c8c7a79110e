// CUDA's names for a host compiler: the kernels of a block run as fibers of one thread, see runtime.cpp.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __constant__ static const

struct float2 {
  alignas(8) float x;
  float y;
};
struct double2 {
  alignas(16) double x;
  double y;
};
struct float4 {
  alignas(16) float x;
  float y, z, w;
};
struct int2 {
  alignas(8) int x;
  int y;
};
struct uint2 {
  alignas(8) unsigned x;
  unsigned y;
};
struct uint4 {
  alignas(16) unsigned x;
  unsigned y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// --- the runtime ----------------------------------------------------------------------------------------
extern "C" {
extern uint3 threadIdx, blockIdx, blockDim, gridDim;
// Runs `body(parameters)` as every thread of every block. Null, or what went wrong.
const char* emulated_run(void (*body)(void**), void** parameters, const int* grid, int block, int dynamic_bytes);
[[noreturn]] void emulated_fail(const char* why);
uint8_t* emulated_dynamic();                    // the block's dynamic shared memory
void* emulated_static(const void* which, int bytes);  // a variable of it, by whatever is its own
uint32_t emulated_address(const void* shared);  // of something in there
void emulated_meet(int barrier, int threads);   // threads 0: all of the block
int emulated_meet_or(int value);
void emulated_warp(const void* given, void* all, int size);  // what every lane gives, in order of lanes
void emulated_barrier_init(uint64_t* barrier, int arrivals);
void emulated_barrier_arrive(uint64_t* barrier, int bytes);
void emulated_barrier_wait(uint64_t* barrier, int parity);
int emulated_barrier_ready(uint64_t* barrier, int parity);
void emulated_copy(void* to, const void* from, int bytes, uint64_t* barrier);
void emulated_copy_box(void* to, const void* map, uint64_t* barrier, const int* at);
void emulated_copy_word(void* to, const void* from);
void emulated_copied_words();
void emulated_store(void* to, const void* from, int bytes);
void emulated_store_group();
void emulated_stored(int pending);
void emulated_begin_dependent();
int emulated_left_early();  // of the threads of the last run, those that have not called it
void emulated_wgmma(float* accumulators, uint64_t x, uint64_t y, int columns, int bfloat, int anew);
void emulated_wgmma_commit();
void emulated_wgmma_wait(int pending);
}

namespace emulated {
template <size_t... i>
struct Indices {};
template <size_t count, size_t... i>
struct Count : Count<count - 1, count - 1, i...> {};
template <size_t... i>
struct Count<0, i...> {
  typedef Indices<i...> type;
};
// A parameter, where its type wants it.
template <class T>
struct Parameter {
  alignas(T) char bytes[sizeof(T)];
  explicit Parameter(const void* from) { memcpy(bytes, from, sizeof(T)); }
  const T& value() const { return *(const T*)bytes; }
};
template <class... Given, size_t... i>
void apply(void (*kernel)(Given...), void** parameters, Indices<i...>) {
  kernel(Parameter<Given>(parameters[i]).value()...);
}
template <class... Given>
void call(void (*kernel)(Given...), void** parameters) {
  apply(kernel, parameters, typename Count<sizeof...(Given)>::type());
}
}  // namespace emulated

// --- intrinsics -----------------------------------------------------------------------------------------
inline float __uint_as_float(unsigned v) {
  float f;
  memcpy(&f, &v, 4);
  return f;
}
inline unsigned __float_as_uint(float v) {
  unsigned u;
  memcpy(&u, &v, 4);
  return u;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned which) {
  const uint64_t both = (uint64_t)b << 32 | a;
  unsigned made = 0;
  for (int i = 0; i < 4; ++i) made |= (unsigned)(both >> (which >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return made;
}
inline int __clz(unsigned v) { return v ? __builtin_clz(v) : 32; }
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float rsqrtf(float v) { return 1.f / sqrtf(v); }
inline void __syncthreads() { emulated_meet(0, 0); }
inline int __syncthreads_or(int v) { return emulated_meet_or(v); }
template <class T>
T __shfl_sync(unsigned, T v, int lane) {
  T all[32];
  emulated_warp(&v, all, sizeof(T));
  return all[lane & 31];
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int distance) {
  return __shfl_sync(mask, v, (int)(threadIdx.x & 31) ^ distance);
}
inline void __syncwarp() { __shfl_sync(~0u, 0, 0); }
inline int __any_sync(unsigned, int v) {
  int all[32], any = 0;
  emulated_warp(&v, all, sizeof(int));
  for (int one : all) any |= one;
  return any != 0;
}
template <class T, class V>
T atomicAdd(T* at, V v) {
  const T before = *at;
  *at += v;
  return before;
}
template <class T, class V>
T atomicMax(T* at, V v) {
  const T before = *at;
  if (before < v) *at = v;
  return before;
}
template <class T, class V>
T atomicOr(T* at, V v) {
  const T before = *at;
  *at |= v;
  return before;
}
