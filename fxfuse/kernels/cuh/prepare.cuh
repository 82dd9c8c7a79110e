// x as rows of channels, in 16-bit numbers: what a convolution on matrix instructions reads. float32 is scaled; what does not
// fit the scale that `measure` has guessed is found here, and such rows are made again. Samples that half precision cannot
// carry so are marked for the direct kernel.
#pragma once
#include "measure.cuh"

namespace fxfuse {

constexpr int kFewTiny = 64;  // values below half's normal numbers that a sample may have: see Taken

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
// 4096 / span channels of one sample, of 8192 / span where four are read together, 16384 / span where eight are, and
// 32768 / span where channels are neighbours.
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

}  // namespace fxfuse
