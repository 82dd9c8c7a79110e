// The convolution of conv_wgmma.cuh for few input channels: x is copied as it lies, a plane of positions for every channel,
// and each warp multiplies sixteen positions with eight numbers at a time, which its lanes pick there (factors.py). Numbers
// are TF32's, whose range is that of float32, and which hold 16-bit numbers as they are: nothing is scaled, and no rows are
// made.
//
// One warp copies; the next one looks at what came, and marks samples for the direct kernel: those with Inf or NaN, which
// classes that are added up would mix, or with denormal numbers, which are lost. Two warpgroups multiply, as there;
// accumulators lie in their registers as those of warpgroup instructions do.
//
// `Problem` has, beside what that of conv_wgmma.cuh has of sizes and epilogue: instructions, of all passes; static functions
// factor(i), eight per instruction; tap(i); series(pass, q), where the instructions of a class begin.
#pragma once
#include "conv_wgmma.cuh"
#include "prepare.cuh"

namespace fxfuse {

// A number of a position, at the least delta and so many positions further, as many as a copy has. Its weight is the sum of
// those of `count` taps: what fills up has none, and multiplies the first channel with zero.
struct Factor {
  unsigned char d, h, w, channel;
  unsigned short first, count;
};

// Whether `v` is zero, or a normal number that is one when it is rounded, too.
FXFUSE_INLINE bool ordinary(float v) {
  constexpr uint32_t least = 1u << 24, end = 254u << 24;  // 2^-126 and 2^127
  const uint32_t twice = __float_as_uint(v) << 1;         // without its sign
  return twice == 0 || twice - least < end - least;
}

// Of an ordinary number, what the matrix units read as the nearest one of TF32: they leave out the last 13 bits.
FXFUSE_INLINE uint32_t tf32_of(float v) { return __float_as_uint(v) + 0x1000u; }
template <class T>
FXFUSE_INLINE uint32_t tf32_of(T v) { return __float_as_uint(to_float(v)); }

// Of 16 bytes of numbers, whether all are ordinary.
FXFUSE_INLINE bool all_ordinary(const float4* at) {
  const float4 v = *at;
  return ordinary(v.x) & ordinary(v.y) & ordinary(v.z) & ordinary(v.w);
}
template <class T>
FXFUSE_INLINE bool all_ordinary(const T* at) {
  const uint4 v = *(const uint4*)at;
  auto both = [](uint32_t two) {
    T low, high;
    low.bits = (uint16_t)two, high.bits = (uint16_t)(two >> 16);
    return ordinary(to_float(low)) & ordinary(to_float(high));
  };
  return both(v.x) & both(v.y) & both(v.z) & both(v.w);
}
FXFUSE_INLINE bool all_ordinary(const float* at) { return all_ordinary((const float4*)at); }

template <class Problem>
struct PlanarBarriers {
  uint64_t copied[Problem::x_buffers], empty[Problem::x_buffers];  // read by those who multiply, and who looks at it
  FXFUSE_INLINE void init() {
    for (int i = 0; i < Problem::x_buffers; ++i) barrier_init(&copied[i], 1), barrier_init(&empty[i], kConsumers + 1);
  }
};

// Weights and places of all instructions, as lanes read them: two of each.
template <class Problem>
struct Factors {
  static constexpr int blocks = Problem::columns / 8;
  uint2* weights;   // [instruction][eight output channels][lane]
  int2* places;     // [instruction][lane % 4]: elements from a position

  FXFUSE_INLINE explicit Factors(uint8_t* memory)
      : weights((uint2*)memory), places((int2*)(weights + Problem::instructions * blocks * 32)) {}

  // By all threads of a block; whether some weight is not ordinary.
  template <class T>
  FXFUSE_INLINE bool fill(const T* from, const Geometry& g) const {
    constexpr int volume = Problem::kernel_d * Problem::kernel_h * Problem::kernel_w, at_once = 8;
    bool odd = false;
    for (int i = threadIdx.x; i < Problem::instructions * blocks * 32; i += kThreads) {
      const int lane = i & 31, column = i / 32 % blocks * 8 + lane / 4, instruction = i / 32 / blocks;
      const Factor two[2] = {Problem::factor(instruction * 8 + lane % 4), Problem::factor(instruction * 8 + 4 + lane % 4)};
      const int most = column < g.out_channels ? max(two[0].count, two[1].count) : 0;
      float sums[2] = {0.f, 0.f};
      for (int first = 0; first < most; first += at_once) {  // loads of several taps are on their way together
        float values[2][at_once];
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int t = 0; t < at_once; ++t) {
            const bool there = first + t < two[k].count;
            const int tap = Problem::tap(there ? two[k].first + first + t : 0);
            const float v = to_float(from[(two[k].channel * g.out_channels + column) * volume + tap]);
            values[k][t] = there ? v : 0.f;
          }
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int t = 0; t < at_once; ++t) odd |= !ordinary(values[k][t]), sums[k] += values[k][t];
      }
      weights[i] = {tf32_of(sums[0]), tf32_of(sums[1])};
    }
    const int plane = g.region_bytes / (int)(Problem::in_channels * sizeof(T));
    for (int i = threadIdx.x; i < Problem::instructions * 8; i += kThreads) {
      const Factor f = Problem::factor(i);
      const int place = f.channel * plane + (f.d * g.copied_h + f.h) * g.copied_w + f.w;
      ((int*)places)[(i / 8 * 4 + i % 4) * 2 + i / 4 % 2] = place;
    }
    return odd;
  }
};

// Where x of a tile begins along w; and how many positions in front of that its copy does, which begins at a multiple of 16
// bytes.
template <class Problem>
FXFUSE_INLINE int begin_of_planes(const Geometry& g, const Tile& t) {
  return t.w * Problem::step_w + g.low_w;
}
template <class Problem, class T>
FXFUSE_INLINE int ahead_of_planes(const Geometry& g, const Tile& t) {
  return begin_of_planes<Problem>(g, t) & (16 / (int)sizeof(T) - 1);
}

template <class Problem, class T>
FXFUSE_INLINE void copy_planes(const TensorMap* map, const Geometry& g, uint8_t* x, PlanarBarriers<Problem>& barriers) {
  Ring xs;
  bulk_after_stores();
  for (int index = blockIdx.x; index < g.tiles; index += gridDim.x) {
    const Tile t = tile_at<Problem>(g, index);
    barrier_wait(&barriers.empty[xs.slot], xs.phase ^ 1);
    barrier_expect(&barriers.copied[xs.slot], g.region_bytes);
    const int d = t.d * Problem::step_d + g.low_d, h = t.h * Problem::step_h + g.low_h;
    const int w = begin_of_planes<Problem>(g, t) - ahead_of_planes<Problem, T>(g, t);
    copy_box(x + xs.slot * g.region_stride, map, &barriers.copied[xs.slot], w, h, d, 0, t.n);
    xs.template next<Problem::x_buffers>();
  }
}

// A warp. `odd`: some weight is.
template <class Problem, class T>
FXFUSE_INLINE void mark_samples(const Geometry& g, const T* x, uint32_t* marks, bool odd, PlanarBarriers<Problem>& barriers) {
  const int lane = threadIdx.x & 31, units = g.region_bytes / 16;
  Ring xs;
  for (int index = blockIdx.x; index < g.tiles; index += gridDim.x) {
    const T* const at = x + xs.slot * (g.region_stride / (int)sizeof(T));
    barrier_wait(&barriers.copied[xs.slot], xs.phase);
    bool marked = odd;
#pragma unroll 4
    for (int i = lane; i < units; i += 32) marked |= !all_ordinary(at + i * (16 / (int)sizeof(T)));
    if (marked) marks[tile_at<Problem>(g, index).n] = kMarked;
    __syncwarp();
    if (lane == 0) barrier_arrive(&barriers.empty[xs.slot]);
    xs.template next<Problem::x_buffers>();
  }
}

// Products of the instructions from `begin` to `end`, all of class q: `x` has the planes, of which `rows` are this lane's
// positions.
template <class Problem, int q, class T>
FXFUSE_INLINE void multiply_series(float (&acc)[Problem::m_tiles][Problem::columns * Problem::residues / 2], const T* x,
                                   const int (&rows)[Problem::m_tiles][2], const Factors<Problem>& factors, int begin, int end) {
  const int lane = threadIdx.x & 31;
#pragma unroll 4
  for (int s = begin; s < end; ++s) {
    const int2 place = factors.places[s * 4 + lane % 4];
    uint32_t a[Problem::m_tiles][4];
#pragma unroll
    for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        a[i][r] = tf32_of(x[rows[i][r] + place.x]);
        a[i][r + 2] = tf32_of(x[rows[i][r] + place.y]);
      }
#pragma unroll
    for (int j = 0; j < Problem::columns / 8; ++j) {
      const uint2 b = factors.weights[(s * (Problem::columns / 8) + j) * 32 + lane];
      constexpr int first = q * (Problem::columns / 8) * 4;
#pragma unroll
      for (int i = 0; i < Problem::m_tiles; ++i) mma_tf32<first>(acc[i], j * 4, a[i], b);
    }
  }
}

// Those of a pass, from class q on.
template <class Problem, int q = 0, class T>
FXFUSE_INLINE void multiply_planes(float (&acc)[Problem::m_tiles][Problem::columns * Problem::residues / 2], const T* x,
                                   const int (&rows)[Problem::m_tiles][2], const Factors<Problem>& factors, int pass) {
  multiply_series<Problem, q>(acc, x, rows, factors, Problem::series(pass, q), Problem::series(pass, q + 1));
  if constexpr (q + 1 < Problem::residues) multiply_planes<Problem, q + 1>(acc, x, rows, factors, pass);
}

template <class Problem, class T>
FXFUSE_INLINE void consume_planes(const Geometry& g, const typename Problem::Epilogue::Arguments& arguments,
                                  typename Problem::Table& table, float* gathered, typename Problem::Outbox outbox,
                                  const T* x, const Factors<Problem>& factors, PlanarBarriers<Problem>& barriers) {
  const int group = threadIdx.x / 128 - 1, lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  Ring xs;
  float acc[Problem::m_tiles][Problem::columns * Problem::residues / 2];
  typename Problem::Place place(g, group, warp, lane);
  auto at = [&](int d, int h, int w) {
    return (d * Problem::step_d * g.copied_h + h * Problem::step_h) * g.copied_w + w * Problem::step_w;
  };
  for (int index = blockIdx.x; index < g.tiles; index += gridDim.x) {
    const Tile tile = tile_at<Problem>(g, index);
    place.move(g, tile, group, warp);
    typename Problem::Epilogue epilogue(arguments, g, table, gathered, outbox, place, group);
    const int part = group * at(g.half_d, g.half_h, g.half_w) + ahead_of_planes<Problem, T>(g, tile);
    int rows[Problem::m_tiles][2];
#pragma unroll
    for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        rows[i][r] = place.inside(i, r) ? part + at(place.z(i, r), place.y(i, r), place.x(i, r)) : part;
    barrier_wait(&barriers.copied[xs.slot], xs.phase);
#pragma unroll 1
    for (int pass = 0; pass < Problem::passes; ++pass) {
#pragma unroll
      for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
        for (int j = 0; j < Problem::columns * Problem::residues / 2; ++j) acc[i][j] = 0.f;
      multiply_planes<Problem>(acc, x + xs.slot * (g.region_stride / (int)sizeof(T)), rows, factors, pass);
      if (pass + 1 == Problem::passes) {  // the next tile but one is copied while accumulators become results
        named_barrier(1 + group, 128);
        if ((threadIdx.x & 127) == 0) barrier_arrive(&barriers.empty[xs.slot]);
        xs.template next<Problem::x_buffers>();
      }
      epilogue.pass(acc, pass, {});
    }
    epilogue.finish();
  }
}

template <class Problem, class T>
FXFUSE_INLINE void conv_planar(const TensorMap* map, const T* weights, const Geometry& g, uint32_t* marks,
                               const typename Problem::Epilogue::Arguments& arguments) {
  using Outbox = typename Problem::Outbox;
  extern __shared__ uint8_t raw[];
  __shared__ PlanarBarriers<Problem> barriers;
  __shared__ typename Outbox::Shared out[Outbox::number];
  __shared__ typename Problem::Table table;
  uint8_t* const stage = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
  uint8_t* const x = stage + Problem::stage_bytes;
  uint8_t* const rest = x + Problem::x_buffers * g.region_stride;
  auto outbox = [&](int group) { return Outbox(g, rest + group % Outbox::number * Outbox::bytes(g), out[group % Outbox::number]); };
  if (threadIdx.x == 0) {
    prefetch_map(map);
    barriers.init(), table.init();
    for (typename Outbox::Shared& one : out) one.init();
    barrier_init_fence();
  }
  begin_dependent();
  const Factors<Problem> factors(stage);
  const bool odd = __syncthreads_or(factors.fill(weights, g));
  if (threadIdx.x < 128) {
    registers_down<72>();
    if (Problem::outbox && threadIdx.x >= 64) conv_send<Problem>(g, arguments, outbox(threadIdx.x / 32 - 2), threadIdx.x / 32 - 2);
    if (threadIdx.x >= 32 && threadIdx.x < 64) mark_samples<Problem>(g, (const T*)x, marks, odd, barriers);
    if (threadIdx.x == 0) copy_planes<Problem, T>(map, g, x, barriers);
  } else {
    registers_up<216>();
    consume_planes<Problem>(g, arguments, table, (float*)(rest + Outbox::number * Outbox::bytes(g)), outbox(threadIdx.x / 128 - 1), (const T*)x, factors, barriers);
  }
}

}  // namespace fxfuse
