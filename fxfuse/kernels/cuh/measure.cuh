// How large x and the weights are, before they become 16-bit numbers. float32 is scaled by a power of two per sample and per
// output channel, so that the largest finite value lies in [2^14, 2^15), or so many bits below where weights are added. Of
// large samples only some values are looked at, and the largest of these comes to lie in [2^12, 2^13).
#pragma once
#include "combine.cuh"
#include "ptx.cuh"

namespace fxfuse {

// x as it lies in memory, and what is made of an element on the way, which a tensor of `T` would hold.
template <class In_, class T, class Front>
struct Input {
  using In = In_;
  static constexpr bool plain = false;
  const In* at;
  const Front& front;
  FXFUSE_INLINE auto channel(int n, int c) const { return front.channel(n, c); }
  template <class Channel>
  FXFUSE_INLINE float operator()(const Channel& known, float v, int n, int c, int d, int h, int w) const {
    return to_float(from_float<T>(front(known, v, n, c, d, h, w)));
  }
  FXFUSE_INLINE float operator()(float v, int n, int c, int d, int h, int w) const {
    return (*this)(channel(n, c), v, n, c, d, h, w);
  }
};
template <class T>
struct Input<T, T, Identity> : Identity {
  using In = T;
  static constexpr bool plain = true;
  const T* at;
  FXFUSE_INLINE Input(const T* x, const Identity&) : at(x) {}
};

// The power of two that brings `largest` into [2^14, 2^15); 1 for zero.
FXFUSE_INLINE float scale_for(float largest) {
  if (largest == 0.f) return 1.f;
  int exponent = (int)(__float_as_uint(largest) >> 23) - 127;  // -127 for a denormal
  int k = 14 - exponent;
  k = k > 126 ? 126 : k;
  return __uint_as_float((uint32_t)(k + 127) << 23);
}
FXFUSE_INLINE float reciprocal_of_power(float s) { return __uint_as_float((254u << 23) - __float_as_uint(s)); }

FXFUSE_INLINE float block_maximum(float v) {
  __shared__ float parts[32];
#pragma unroll
  for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, o));
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = v;
  __syncthreads();
  v = threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x & 31] : 0.f;
#pragma unroll
  for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, o));
  v = __shfl_sync(~0u, v, 0);
  if (threadIdx.x == 0) parts[0] = v;
  __syncthreads();
  return parts[0];
}

// Per sample. `parts` blocks look for the largest finite magnitude, in one of `every` runs of values.
struct SampleState {
  float* largest;   // samples * parts
  uint32_t* above;  // samples: where some value does not fit the scale, the bits of the largest magnitude; else 0
  uint32_t* marks;  // samples; 0 or few: matrix instructions; else the direct kernel
  float* scale;     // samples: 1/scale, for the epilogue
  int parts;        // a multiple of 32
  int every;
};
// Per output channel.
struct ChannelState {
  float *scale, *reciprocal, *bias;
  uint32_t* wrong;  // some weight is not finite
};
constexpr uint32_t kMarked = 1u << 30;

// One block per output channel: its scale, with `headroom` bits for sums of its weights, and its bias.
template <class B, int headroom>
FXFUSE_INLINE void measure_weights(int channel, const float* w, const B* bias, const ChannelState& out, int in_channels,
                                   int out_channels, int volume) {
  const int group = channel / out_channels, column = channel - group * out_channels;
  float largest = 0.f;
  bool wrong = false;
  auto take = [&](float v) {
    v = fabsf(v);
    if (finite(v)) largest = fmaxf(largest, v);
    else wrong = true;
  };
  auto taps = [&](int c) { return w + ((int64_t)(group * in_channels + c) * out_channels + column) * volume; };
  if (volume % 4 == 0 && ((uint64_t)w & 15) == 0) {
    const int fours = volume / 4;
#pragma unroll 8
    for (int i = threadIdx.x; i < in_channels * fours; i += blockDim.x) {
      const int c = i / fours;
      const float4 v = ((const float4*)taps(c))[i - c * fours];
      take(v.x), take(v.y), take(v.z), take(v.w);
    }
  } else {
#pragma unroll 4
    for (int i = threadIdx.x; i < in_channels * volume; i += blockDim.x) {
      const int c = i / volume;
      take(taps(c)[i - c * volume]);
    }
  }
  wrong = __syncthreads_or(wrong);
  largest = block_maximum(largest);
  if (threadIdx.x == 0) {
    const float s = scale_for(largest) / (1 << headroom);
    out.scale[channel] = s;
    out.reciprocal[channel] = reciprocal_of_power(s);
    out.bias[channel] = bias ? to_float(bias[channel]) : 0.f;
    out.wrong[channel] = wrong;
  }
}

// The bias of all output channels in float32, by all blocks.
template <class B>
FXFUSE_INLINE void widen(const B* bias, float* to, int channels) {
  for (int c = blockIdx.x * blockDim.x + threadIdx.x; c < channels; c += gridDim.x * blockDim.x) to[c] = to_float(bias[c]);
}

// What the input is and becomes: rows of channels.
struct RowGeometry {
  int64_t stride_n, stride_c, stride_d, stride_h, stride_w;
  int depth, height, width;
  int channels, padded, groups;  // per group
  int blocks, blocks_positions;  // of `span` positions times of 64 channels, in all; of `span` positions
  int span;                      // a power of two: 64, or more where the rows are short, or channels neighbours. Of x that
                                 // is only looked at: units of eight numbers, and blocks of so many of them
  int at_once;                   // neighbouring positions of a channel that are read together, 16 bytes of them; or 0
  int rows_d, rows_h, rows_w;    // positions of a sample that have a row
};

// One block per part of a dense sample of `size` floats. A warp reads runs of 32 units, of 4 floats or one.
template <class X>
FXFUSE_INLINE void measure_sample(int index, const X& x, const SampleState& out, int64_t size, const RowGeometry& g) {
  const int n = index / out.parts, part = index - n * out.parts, lane = threadIdx.x & 31;
  const float* const from = x.at + n * size;
  float largest = 0.f;
  auto take = [&](float v, int64_t at) {
    if constexpr (!X::plain) {  // of a dense sample, in whatever order its dims are
      const uint32_t place = (uint32_t)at;
      auto along = [&](int64_t stride, int count) { return count == 1 ? 0 : (int)(place / (uint32_t)stride % (uint32_t)count); };
      v = x(v, n, along(g.stride_c, g.channels * g.groups), along(g.stride_d, g.depth), along(g.stride_h, g.height),
            along(g.stride_w, g.width));
    }
    v = fabsf(v);
    if (finite(v)) largest = fmaxf(largest, v);
  };
  const bool aligned = ((uint64_t)from & 15) == 0;
  const int64_t units = aligned ? size / 4 : size;
  const int runs = (int)((units + 31) / 32), warps = blockDim.x / 32, step = out.parts * warps;
#pragma unroll 4
  for (int k = part * warps + threadIdx.x / 32; k <= (runs - 1) / out.every; k += step) {
    // not always the first one: sizes are powers of two, too
    const int64_t at = ((int64_t)k * out.every + (uint32_t)k * 7u % (uint32_t)out.every) * 32 + lane;
    if (at >= units) continue;
    if (aligned) {
      const float4 v = ((const float4*)from)[at];
      take(v.x, at * 4), take(v.y, at * 4 + 1), take(v.z, at * 4 + 2), take(v.w, at * 4 + 3);
    } else {
      take(from[at], at);
    }
  }
  if (aligned && part == 0 && threadIdx.x < size % 4) take(from[units * 4 + threadIdx.x], units * 4 + threadIdx.x);
  largest = block_maximum(largest);
  if (threadIdx.x == 0) {
    out.largest[index] = largest;
    if (part == 0) out.marks[n] = 0, out.above[n] = 0;
  }
}

}  // namespace fxfuse
