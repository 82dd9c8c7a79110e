// What a convolution on matrix instructions needs first: x as rows of channels and weights as packed tiles, both in
// 16-bit numbers. float32 is scaled by a power of two per sample and per output channel, so that the largest finite
// value lies in [2^14, 2^15), or so many bits below where weights are added. Of large samples only some values are looked
// at first, and the largest of these comes to lie in [2^12, 2^13); what does not fit then is found while the rows are
// made, which are made again. Samples that half precision cannot carry so are marked for the direct kernel.
#pragma once
#include "columns.cuh"
#include "combine.cuh"

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

constexpr int kFewTiny = 64;  // values below half's normal numbers that a sample may have: see Taken

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
  int span;                      // a power of two: 64, or more where the rows are short, or channels neighbours
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

// What brings the values of a sample into half's range: a power of two; and bits of magnitudes.
struct Scaling {
  float scale;
  uint32_t limit;     // the largest that fits
  uint32_t smallest;  // below it half's numbers are denormal
};
FXFUSE_INLINE Scaling scaling_by(float scale) {
  const float one = reciprocal_of_power(scale);
  return {scale, __float_as_uint(fminf(65504.f * one, 3.402823466e38f)), __float_as_uint(6.103515625e-5f * one)};
}
constexpr uint32_t kInfinity = 0x7f800000u;

// Of values on their way: the largest magnitude, and of float32 how many are too small for half's normal numbers.
template <bool scaled, bool watched>
struct Taken {
  const Scaling by;
  uint32_t most = 0;
  int tiny = 0;
  FXFUSE_INLINE float operator()(float v) {
    if (!scaled && !watched) return v;
    look(v);
    return scaled ? v * by.scale : v;
  }
  FXFUSE_INLINE void look(float v) {
    const uint32_t bits = __float_as_uint(v) & 0x7fffffffu;
    most = most > bits ? most : bits;
    if (!scaled) return;
    tiny += bits - 1 < by.smallest - 1;  // zero is not
  }
  // A few tiny values may lose precision: their error is below 2^-37 of the sample's largest. Many would show.
  FXFUSE_INLINE void tell(const SampleState& state, int n) const {
    if (!scaled && !watched) return;
    if (most >= kInfinity) atomicOr(&state.marks[n], kMarked);
    if (!scaled) return;
    if (most > by.limit) atomicMax(&state.above[n], most);
    if (tiny && state.marks[n] <= kFewTiny) atomicAdd(&state.marks[n], (uint32_t)tiny);  // more of them changes nothing
  }
};

// A row of positions has 16-bit numbers of all channels. Of an exact problem it has two for each: those of the channels of a
// chunk, then what these leave of the values, then the next chunk's.
template <class Problem>
FXFUSE_INLINE int remainders(int channel) {  // in front of it
  return Problem::exact ? channel & -Problem::chunk_channels : 0;
}

// Eight values as 16-bit numbers.
template <class Half16, class Problem>
FXFUSE_INLINE void store_eight(Half16* to, const float (&values)[8]) {
  alignas(16) Half16 v[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) v[k] = from_float<Half16>(values[k]);
  *(uint4*)to = *(const uint4*)v;
  if (!Problem::exact) return;
#pragma unroll
  for (int k = 0; k < 8; ++k) v[k] = from_float<Half16>(values[k] - to_float(v[k]));
  *(uint4*)(to + Problem::chunk_channels) = *(const uint4*)v;
}

// A block of x of any strides to rows of channels: [sample][position][group][padded channel]; `span` positions of up to
// 4096 / span channels of one sample, of 8192 / span where four are read together, 16384 / span where eight are.
template <class X, class Half16, class Problem>
FXFUSE_INLINE void block_to_rows(int block, const X& x, Half16* rows, const SampleState& state, const RowGeometry& g,
                                 const Scaling& by) {
  using T = typename X::In;
  __shared__ float tiles[64 * 65];
  const int span = g.span, pitch = span + 1, shift = 31 - __clz(span);
  auto tile = [&](int row, int p) -> float& { return tiles[row * pitch + p]; };
  const int64_t stride_n = g.stride_n, stride_c = g.stride_c, stride_d = g.stride_d, stride_h = g.stride_h,
                stride_w = g.stride_w;
  const int height = g.height, width = g.width, channels = g.channels, padded = g.padded;
  const int block_x = block % g.blocks_positions, block_rest = block / g.blocks_positions;
  const int row_length = padded * g.groups, blocks_y = (row_length + 63) / 64, block_y = block_rest % blocks_y;
  const int plane = height * width, positions = g.depth * plane;
  const int first = block_x * span, row0 = block_y * 64, n = block_rest / blocks_y;
  const int wide = row_length - row0 < 64 ? row_length - row0 : 64;  // a multiple of 16
  const int units = wide / 8;
  Taken<Problem::scaled, Problem::watched> take{by};
  const int length = row_length + remainders<Problem>(row_length);
  auto row_of = [&](int p, int unit) {
    const int at = row0 + unit * 8;
    return rows + ((int64_t)n * positions + first + p) * length + row0 + unit * 8 + remainders<Problem>(at);
  };
  auto channel_of = [&](int row) {  // -1 for padding
    const int group = (row0 + row) / padded, c = row0 + row - group * padded;
    return c < channels ? group * channels + c : -1;
  };
  auto source = [&](int channel) { return x.at + n * stride_n + (int64_t)channel * stride_c; };
  using Known = decltype(x.channel(0, 0));
  auto given = [&](const Known& known, float v, int channel, int at) {  // what is made of x there
    const int d = at / plane, h = (at - d * plane) / width;
    return x(known, v, n, channel, d, h, at - d * plane - h * width);
  };
  if constexpr (sizeof(T) == 4) {
    if (g.at_once) {
      for (int i = threadIdx.x; i < units << (shift - 2); i += blockDim.x) {
        const int quad = i / units, unit = i - quad * units, p = quad * 4;
        if (first + p >= positions) break;
        const int group = (row0 + unit * 8) / padded, c = row0 + unit * 8 - group * padded;
        const float* const from = source(group * channels + c) + first + p;
        float4 read[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) read[k] = c + k < channels ? *(const float4*)(from + k * stride_c) : make_float4(0.f, 0.f, 0.f, 0.f);
        if constexpr (!X::plain) {
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            if (c + k >= channels) continue;
            const int channel = group * channels + c + k, at = first + p;
            const Known known = x.channel(n, channel);
            read[k] = {given(known, read[k].x, channel, at), given(known, read[k].y, channel, at + 1),
                       given(known, read[k].z, channel, at + 2), given(known, read[k].w, channel, at + 3)};
          }
        }
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          float values[8];
#pragma unroll
          for (int k = 0; k < 8; ++k) values[k] = take(q == 0 ? read[k].x : q == 1 ? read[k].y : q == 2 ? read[k].z : read[k].w);
          store_eight<Half16, Problem>(row_of(p + q, unit), values);
        }
      }
      take.tell(state, n);
      return;
    }
  }
  if (stride_w == 1 && stride_h == width && stride_d == plane) {  // positions are neighbours
    constexpr int count = 16 / sizeof(T);  // elements that are read at once
    const bool aligned = positions % count == 0 && stride_c % count == 0 && stride_n % count == 0 && ((uint64_t)x.at & 15) == 0;
    if (aligned) {
      constexpr int log2 = sizeof(T) == 4 ? 2 : 3;
#pragma unroll 2
      for (int i = threadIdx.x; i < wide << (shift - log2); i += blockDim.x) {
        const int row = i >> (shift - log2), p = (i - (row << (shift - log2))) * count;
        const int channel = channel_of(row), at = first + p;
        const bool there = channel >= 0 && at < positions;
        alignas(16) T v[count] = {};
        if (there) *(uint4*)v = *(const uint4*)(source(channel) + at);
        const Known known = x.channel(n, there ? channel : 0);
#pragma unroll
        for (int k = 0; k < count; ++k) {
          const float value = to_float(v[k]);
          tile(row, p + k) = take(there ? given(known, value, channel, at + k) : value);
        }
      }
    } else {
      for (int i = threadIdx.x; i < wide << shift; i += blockDim.x) {
        const int row = i >> shift, p = i & (span - 1);
        const int channel = channel_of(row), at = first + p;
        const bool there = channel >= 0 && at < positions;
        tile(row, p) = there ? take(given(x.channel(n, channel), to_float(source(channel)[at]), channel, at)) : 0.f;
      }
    }
  } else if (stride_c == 1 && stride_h == width * stride_w && stride_d == plane * stride_w) {
    // channels are neighbours, and positions follow each other: a thread has the same eight channels of all its positions
    const bool at_once = (channels & 7) == 0 && (((stride_w | stride_n) * sizeof(T)) & 15) == 0 && ((uint64_t)x.at & 15) == 0;
    const int together = blockDim.x / units, begin = threadIdx.x / units, unit = threadIdx.x - begin * units;
    const int group = (row0 + unit * 8) / padded, c = row0 + unit * 8 - group * padded, channel = group * channels + c;
    const int there = min(max(channels - c, 0), 8);
    Known known[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) known[k] = x.channel(n, k < there ? channel + k : 0);
    const T* from = x.at + n * stride_n + (first + begin) * stride_w + channel;
    Half16* to = row_of(begin, unit);
    const int end = begin < together ? min(span, positions - first) : 0;
    constexpr int batch = sizeof(T) == 2 ? 4 : X::plain ? 2 : 1;  // positions that are on their way
#pragma unroll 1
    for (int p = begin; p < end; p += batch * together) {
      alignas(16) T v[batch][8] = {};
#pragma unroll
      for (int b = 0; b < batch; ++b, from += together * stride_w) {
        if (p + b * together >= end) continue;
        if (at_once && there) {
#pragma unroll
          for (int k = 0; k < (int)(8 * sizeof(T) / 16); ++k) ((uint4*)v[b])[k] = ((const uint4*)from)[k];
        } else {
#pragma unroll
          for (int k = 0; k < 8; ++k)
            if (k < there) v[b][k] = from[k];
        }
      }
#pragma unroll
      for (int b = 0; b < batch; ++b, to += together * length) {
        if (p + b * together >= end) continue;
        float values[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const float value = to_float(v[b][k]);
          values[k] = take(k < there ? given(known[k], value, channel + k, first + p + b * together) : value);
        }
        store_eight<Half16, Problem>(to, values);
      }
    }
    take.tell(state, n);
    return;
  } else {
    const bool by_channel = stride_c == 1;
    for (int i = threadIdx.x; i < wide << shift; i += blockDim.x) {
      const int row = by_channel ? i % wide : i >> shift, p = by_channel ? i / wide : i & (span - 1);
      const int channel = channel_of(row), at = first + p, d = at / plane, h = (at - d * plane) / width,
                w = at - d * plane - h * width;
      tile(row, p) = channel >= 0 && at < positions
                         ? take(x(to_float(source(channel)[d * stride_d + h * stride_h + w * stride_w]), n, channel, d, h, w))
                         : 0.f;
    }
  }
  __syncthreads();
  take.tell(state, n);
  for (int i = threadIdx.x; i < span * units; i += blockDim.x) {
    const int p = i / units, unit = i - p * units;
    if (first + p >= positions) break;
    float values[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) values[k] = tile(unit * 8 + k, p);
    store_eight<Half16, Problem>(row_of(p, unit), values);
  }
  __syncthreads();
}

// What is made of eight 16-bit numbers of neighbouring positions, of which `at` is the first.
template <class X>
FXFUSE_INLINE void make_octs(uint32_t (&octs)[4], const X& x, int n, int channel, int at, const RowGeometry& g) {
  using T = typename X::In;
  const auto known = x.channel(n, channel);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int position = at + i, line = position / g.width, d = line / g.height, shift = i % 2 * 16;
    const float v = to_float(T{(uint16_t)(octs[i / 2] >> shift)});
    const T made = from_float<T>(x(known, v, n, channel, d, line - d * g.height, position - line * g.width));
    octs[i / 2] = (octs[i / 2] & (0xffff0000u >> shift)) | (uint32_t)made.bits << shift;
  }
}

// The same of 16-bit numbers of neighbouring positions, eight of which are read together: a thread turns those of eight
// channels by moving bytes alone.
template <class X, class Problem>
FXFUSE_INLINE void block_of_octs_to_rows(int block, const X& x, typename X::In* rows, const SampleState& state,
                                         const RowGeometry& g) {
  using T = typename X::In;
  const int row_length = g.padded * g.groups, blocks_y = (row_length + 63) / 64, positions = g.depth * g.height * g.width;
  const int block_rest = block / g.blocks_positions, n = block_rest / blocks_y, row0 = (block_rest - n * blocks_y) * 64;
  const int first = (block - block_rest * g.blocks_positions) * g.span, octs = min(g.span, positions - first) / 8;
  const int units = min(row_length - row0, 64) / 8;
  Taken<false, Problem::watched> take{{1.f, 0, 0}};
#pragma unroll 1
  for (int i = threadIdx.x; i < octs * units; i += blockDim.x) {
    const int oct = i / units, row = row0 + (i - oct * units) * 8, group = row / g.padded, c = row - group * g.padded;
    const int p = first + oct * 8;
    const int channel = group * g.channels + c;
    const T* from = x.at + n * g.stride_n + channel * g.stride_c + p;
    uint32_t read[8][4];  // of channels, two positions each
#pragma unroll
    for (int k = 0; k < 8; ++k, from += g.stride_c) {
      const uint4 v = c + k < g.channels ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
      read[k][0] = v.x, read[k][1] = v.y, read[k][2] = v.z, read[k][3] = v.w;
    }
    if constexpr (!X::plain) {
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (c + k < g.channels) make_octs(read[k], x, n, channel + k, p, g);
    }
    if (Problem::watched)
#pragma unroll
      for (int k = 0; k < 8; ++k)
#pragma unroll
        for (uint32_t two : read[k]) take.look(to_float(T{(uint16_t)two})), take.look(to_float(T{(uint16_t)(two >> 16)}));
    T* to = rows + ((int64_t)n * positions + p) * row_length + row;
#pragma unroll
    for (int q = 0; q < 8; ++q, to += row_length) {
      auto two = [&](int k) { return __byte_perm(read[k][q / 2], read[k + 1][q / 2], q % 2 ? 0x7632 : 0x5410); };
      *(uint4*)to = make_uint4(two(0), two(2), two(4), two(6));
    }
  }
  take.tell(state, n);
}

// How rows are made where each is of one position.
struct RowsApart {
  template <class X, class Half16, class Problem>
  static FXFUSE_INLINE void block(int block, const X& x, Half16* rows, const SampleState& state, const RowGeometry& g,
                                  const Scaling& by) {
    if constexpr (sizeof(typename X::In) == 2)
      if (g.at_once) return block_of_octs_to_rows<X, Problem>(block, x, rows, state, g);
    block_to_rows<X, Half16, Problem>(block, x, rows, state, g, by);
  }
};

// Of 16-bit numbers that are multiplied as they lie, channels next to each other: whether all are finite. `span` units of
// eight a block.
template <class X>
FXFUSE_INLINE void look_at(int block, const X& x, const SampleState& state, const RowGeometry& g) {
  using T = typename X::In;
  const int n = block / g.blocks_positions, wide = g.channels * g.groups, each = wide / 8, plane = g.height * g.width;
  const int64_t units = (int64_t)g.depth * plane * each, first = (int64_t)(block - n * g.blocks_positions) * g.span;
  const bool dense = g.stride_w == wide && g.stride_h == g.width * g.stride_w && g.stride_d == plane * g.stride_w;
  const T* const sample = x.at + n * g.stride_n;
  Taken<false, true> take{{1.f, 0, 0}};
#pragma unroll 8
  for (int k = threadIdx.x; k < g.span; k += blockDim.x) {
    const int64_t unit = first + k;
    if (unit >= units) break;
    int64_t at = unit * 8;
    if (!dense) {
      const int position = (int)(unit / each), d = position / plane, line = position - d * plane, h = line / g.width;
      at = d * g.stride_d + h * g.stride_h + (line - h * g.width) * g.stride_w + (unit - (int64_t)position * each) * 8;
    }
    const uint4 v = *(const uint4*)(sample + at);
    const uint32_t read[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (uint32_t two : read) take.look(to_float(T{(uint16_t)two})), take.look(to_float(T{(uint16_t)(two >> 16)}));
  }
  take.tell(state, n);
}

FXFUSE_INLINE int blocks_of_a_sample(const RowGeometry& g) { return g.blocks_positions * ((g.padded * g.groups + 63) / 64); }

template <class X, class Half16, class Problem>
FXFUSE_INLINE void to_rows(int block, const X& x, Half16* rows, const SampleState& state, const RowGeometry& g) {
  if constexpr (Problem::watched && X::plain)
    if (rows == nullptr) return look_at(block, x, state, g);
  Scaling by{1.f, 0, 0};
  if (Problem::scaled) {  // every warp for itself
    const int of_a_sample = blocks_of_a_sample(g), n = block / of_a_sample;
    float largest = 0.f;
    for (int i = threadIdx.x & 31; i < state.parts; i += 32) largest = fmaxf(largest, state.largest[n * state.parts + i]);
#pragma unroll
    for (int o = 16; o; o >>= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, o));
    by = scaling_by(scale_for(largest) * (state.every > 1 ? 0.25f : 1.f));
    if (largest == 0.f && state.every > 1) by.limit = 0, by.smallest = 1;  // nothing is known
    if (block == n * of_a_sample && threadIdx.x == 0) state.scale[n] = reciprocal_of_power(by.scale);
  }
  Problem::Rows::template block<X, Half16, Problem>(block, x, rows, state, g, by);
}

// Of 16-bit numbers that are looked at: no sample is marked yet.
FXFUSE_INLINE void unmark_samples(const SampleState& state, int count) {
  for (int n = blockIdx.x * blockDim.x + threadIdx.x; n < count; n += gridDim.x * blockDim.x) state.marks[n] = 0;
}

// Once more the rows of samples of which `measure` has not seen how large they are.
template <class X, class Half16, class Problem>
FXFUSE_INLINE void to_rows_again(const X& x, Half16* rows, const SampleState& state, const RowGeometry& g) {
  const int of_a_sample = blocks_of_a_sample(g), samples = g.blocks / of_a_sample;
  auto wanted = [&](int n) { return state.above[n] != 0 && state.above[n] < kInfinity; };
  bool some = false;
  for (int n = threadIdx.x; n < samples; n += blockDim.x) some |= wanted(n);
  if (!__syncthreads_or(some)) return;
  for (int n = 0; n < samples; ++n) {
    if (!wanted(n)) continue;
    Scaling by = scaling_by(scale_for(__uint_as_float(state.above[n])));
    by.limit = ~0u;  // `above` is what all blocks read
    if (blockIdx.x == 0 && threadIdx.x == 0) state.scale[n] = reciprocal_of_power(by.scale);
    for (int block = blockIdx.x; block < of_a_sample; block += gridDim.x)
      Problem::Rows::template block<X, Half16, Problem>(n * of_a_sample + block, x, rows, state, g, by);
  }
}

// The place of weights in a tile: of column 0 of the tile's, in chunk 0.
struct Packed {
  int pass_offset, pass_bytes;  // bytes from the tile's begin to the pass, and of the pass, with one chunk
  int offset;                   // bytes from there
};
// Those that are added there for one of the positions of a row; none for a residue class that has none at this step.
struct Taps {
  int tap;           // -1 for none
  int first, count;  // of more of them
};

// One 16-byte unit per thread: 8 input channels of one output channel at one place, or, of an exact problem, what the 16-bit
// numbers leave of them. Neighbouring threads read neighbouring taps, and output channels behind those. `blocks` of them for
// each group, column tile and chunk. Zeros between the channels of the model's groups that are `joined`. Where rows have a
// channel at several `offsets`, each has taps of its own.
template <class Problem, class T, class Half16, bool scaled>
FXFUSE_INLINE void pack_weights(int block, int blocks, const T* w, uint8_t* packed, const float* scale, int chunks,
                                int column_tiles, int in_channels, int out_channels, int volume, int weight_bytes) {
  constexpr int units = Problem::chunk / 8, each = Problem::columns * Problem::packed, offsets = Problem::offsets;
  const int block_rest = block / blocks, index = (block - block_rest * blocks) * blockDim.x + threadIdx.x;
  const int unit = index / each, rest = index - unit * each, row = rest / Problem::packed;
  if (unit >= units) return;
  const int at_step = rest - row * Problem::packed;
  const Packed place = Problem::place(at_step);
  const int tile = block_rest / chunks, chunk = block_rest - tile * chunks;
  const int group = tile / column_tiles, column = (tile - group * column_tiles) * Problem::columns +
                                                  Columns<Problem>::channel(row / 8, row / 2 % 4, row % 2);
  const bool there = column < out_channels;
  const int outs = out_channels / Problem::joined, one = column / outs;  // of the model's groups
  const float s = scaled && there ? scale[group * out_channels + column] : 1.f;
  const bool remainder = Problem::exact && unit * 8 >= Problem::chunk_channels;
  const int first = chunk * Problem::chunk_channels + unit * 8 - (remainder ? Problem::chunk_channels : 0);
  const int begin = first / offsets;
  const T* const from = w + ((int64_t)(group * (in_channels / offsets) + begin) * outs + column - one * outs) * volume;
  Taps taps = Problem::taps(at_step, 0);
  alignas(16) Half16 values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (Problem::headroom > 0) schedule_barrier();  // sums are made one by one: registers are scarce
    const int channel = (first + i) / offsets, offset = first + i - channel * offsets;
    const T* const at = from + (int64_t)(offsets == 1 ? i : channel - begin) * outs * volume;
    const bool own = Problem::joined == 1 || channel / Problem::in_channels == one;
    const bool inside = there && own && first + i < in_channels;
    if constexpr (offsets > 1) taps = Problem::taps(at_step, offset);
    float v = inside && taps.tap >= 0 ? to_float(at[taps.tap]) * s : 0.f;
    if (Problem::headroom > 0 && inside)
      for (int k = 0; k < taps.count; ++k) v = fmaf(to_float(at[Problem::tap(taps.first + k)]), s, v);
    values[i] = from_float<Half16>(v);
    if (remainder) values[i] = from_float<Half16>(v - to_float(values[i]));
  }
  const int swizzled = unit ^ (units == 8 ? row & 7 : units == 4 ? (row >> 1) & 3 : (row >> 2) & 1);
  uint8_t* const to = packed + (int64_t)tile * weight_bytes + place.pass_offset * chunks + chunk * place.pass_bytes +
                      place.offset + (row * units + swizzled) * 16;
  *(uint4*)to = *(const uint4*)values;
}

}  // namespace fxfuse
