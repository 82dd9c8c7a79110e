// What becomes of a convolution's accumulators: scaled, biased, sent through an expression, combined, stored.
#pragma once
#include "conv_wgmma.cuh"

namespace fxfuse {

struct Residue {
  unsigned char d, h, w, valid;
};

// y itself.
struct Identity {
  FXFUSE_INLINE float operator()(float y, int, int, int, int, int) const { return y; }
};

// Strides in elements; n, c, d, h, w.
struct Strides {
  int64_t n, c, d, h, w;
};

// Where the rows and columns of a thread's accumulators lie in the tensor.
template <class Problem>
struct Place {
  int d[Problem::m_tiles][2], h[Problem::m_tiles][2], w[Problem::m_tiles][2];  // q; d is -1 outside the tile
  int n, channel, lane;  // channel: the first one of the tile in its group
  int first;             // and of the group in the tensor

  FXFUSE_INLINE Place(const Geometry& g, const Tile& t, int group, int warp, int lane_) : n(t.n), lane(lane_) {
    channel = t.column * Problem::columns;
    first = t.group * g.out_channels;
#pragma unroll
    for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // thread `lane` of `warp` holds rows lane/4 and lane/4 + 8 of the warp's 16
        const int at = g.row_base[group * Problem::m_tiles + i] + (warp * 2 + r) * g.row_group + (lane >> 2);
        const int plane = at / g.region_w, z = plane / g.region_h;
        const int y = plane - z * g.region_h, x = at - plane * g.region_w;
        const bool inside = z < g.tile_d && y < g.tile_h && x < g.tile_w;
        d[i][r] = inside ? t.d + z : -1;
        h[i][r] = t.h + y;
        w[i][r] = t.w + x;
      }
  }
  FXFUSE_INLINE int column(int j, int e) const { return channel + j * 8 + (lane & 3) * 2 + e; }
};

// What every epilogue is given. Null where there is none.
template <class Out>
struct Destination {
  Out* out;
  Strides stride;
  const float *bias, *sample_scale, *channel_scale;  // one per output channel, sample, output channel
};

// Scale and bias of a tile's output channels, in shared memory: one copy per warpgroup.
template <class Problem>
struct ChannelTable {
  float scale[kConsumers][Problem::columns], bias[kConsumers][Problem::columns];

  template <class Out>
  FXFUSE_INLINE void fill(const Destination<Out>& to, const Geometry& g, const Tile& t, int group) {
    named_barrier(1 + group, 128);  // the last tile's reads are done
    for (int i = threadIdx.x & 127; i < Problem::columns; i += 128) {
      const int column = t.column * Problem::columns + i, c = t.group * g.out_channels + column;
      const bool inside = column < g.out_channels;
      scale[group][i] = inside && to.channel_scale ? to.channel_scale[c] : 1.f;
      bias[group][i] = inside && to.bias ? to.bias[c] : 0.f;
    }
    named_barrier(1 + group, 128);
  }
};

// Two neighbours in memory, at once where they are aligned.
template <class T>
FXFUSE_INLINE void store_pair(T* to, float a, float b) {
  if constexpr (sizeof(T) == 4) {
    if (((uint64_t)to & 7) == 0) {
      *(float2*)to = make_float2(a, b);
      return;
    }
  } else {
    if (((uint64_t)to & 3) == 0) {
      const T x = from_float<T>(a), y = from_float<T>(b);
      *(uint32_t*)to = (uint32_t)x.bits | (uint32_t)y.bits << 16;
      return;
    }
  }
  to[0] = from_float<T>(a), to[1] = from_float<T>(b);
}

// Every output of the convolution, through `Expression`, to `out`.
template <class Problem, class Out, class Expression>
struct Store {
  struct Arguments {
    Destination<Out> to;
    alignas(8) Expression expression;
  };
  const Arguments& a;
  const Geometry& g;
  ChannelTable<Problem>& table;
  const int index, group, warp, lane;

  FXFUSE_INLINE Store(const Arguments& a, const Geometry& g, ChannelTable<Problem>& table, int index, int group,
                      int warp, int lane)
      : a(a), g(g), table(table), index(index), group(group), warp(warp), lane(lane) {
    table.fill(a.to, g, tile_at(g, index), group);
  }

  FXFUSE_INLINE void pass(const float (&acc)[Problem::m_tiles][Problem::columns * Problem::residues / 2], int pass) {
    const Place<Problem> place(g, tile_at(g, index), group, warp, lane);
    const float sample_scale = Problem::scaled ? a.to.sample_scale[place.n] : 1.f;
    const int step_d = (int)a.to.stride.d, step_h = (int)a.to.stride.h, step_w = (int)a.to.stride.w;
    int offset[Problem::m_tiles][2];  // of the position with residue zero
    uint32_t valid = 0;
    Residue residue[Problem::residues];
    int residue_offset[Problem::residues];
#pragma unroll
    for (int q = 0; q < Problem::residues; ++q) {
      residue[q] = Problem::residue(pass, q);
      residue_offset[q] = residue[q].d * step_d + residue[q].h * step_h + residue[q].w * step_w;
    }
#pragma unroll
    for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int d = place.d[i][r] * Problem::stride_d, h = place.h[i][r] * Problem::stride_h,
                  w = place.w[i][r] * Problem::stride_w;
        offset[i][r] = d * step_d + h * step_h + w * step_w;
#pragma unroll
        for (int q = 0; q < Problem::residues; ++q)
          if (residue[q].valid && d >= 0 && d + residue[q].d < g.out_d && h + residue[q].h < g.out_h &&
              w + residue[q].w < g.out_w)
            valid |= 1u << ((i * 2 + r) * Problem::residues + q);
      }
    Out* const sample = a.to.out + place.n * a.to.stride.n;
    const bool neighbours = Problem::pair != 0 && step_w == 1;
#pragma unroll
    for (int j = 0; j < Problem::columns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        schedule_barrier();  // or the loads of all columns are hoisted, and the accumulators spilt
        const int column = place.column(j, e);
        if (column >= g.out_channels) continue;
        const int c = place.first + column;
        const float scale = table.scale[group][j * 8 + (lane & 3) * 2 + e];
        const float bias = table.bias[group][j * 8 + (lane & 3) * 2 + e];
        Out* const out = sample + c * a.to.stride.c;
        auto value = [&](int i, int r, int q) {
          float y = acc[i][(q * (Problem::columns / 8) + j) * 4 + r * 2 + e];
          if (Problem::scaled) y = y * sample_scale * scale;
          return a.expression(y + bias, place.n, c, place.d[i][r] * Problem::stride_d + residue[q].d,
                              place.h[i][r] * Problem::stride_h + residue[q].h,
                              place.w[i][r] * Problem::stride_w + residue[q].w);
        };
#pragma unroll
        for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            if constexpr (Problem::pair != 0) {
#pragma unroll
              for (int q = 0; q < Problem::residues; q += 2) {
                constexpr int left = Problem::pair > 0 ? 0 : 1;
                const uint32_t both = valid >> ((i * 2 + r) * Problem::residues + q) & 3;
                Out* const to = out + offset[i][r];
                if (both == 3 && neighbours) {
                  store_pair(to + residue_offset[q + left], value(i, r, q + left), value(i, r, q + 1 - left));
                } else {
                  if (both & 1) to[residue_offset[q]] = from_float<Out>(value(i, r, q));
                  if (both & 2) to[residue_offset[q + 1]] = from_float<Out>(value(i, r, q + 1));
                }
              }
            } else {
#pragma unroll
              for (int q = 0; q < Problem::residues; ++q)
                if (valid >> ((i * 2 + r) * Problem::residues + q) & 1)
                  out[offset[i][r] + residue_offset[q]] = from_float<Out>(value(i, r, q));
            }
          }
      }
  }
  FXFUSE_INLINE void finish() {}
};

struct Maximum {
  static FXFUSE_INLINE float zero() { return __uint_as_float(0xff800000u); }
  static FXFUSE_INLINE float combine(float a, float b) { return max_or_nan(a, b); }
};
struct Sum {
  static FXFUSE_INLINE float zero() { return 0.f; }
  static FXFUSE_INLINE float combine(float a, float b) { return a + b; }
};

// All residue classes of a position q become one value: a pool whose window and stride are the convolution's stride,
// or the first half of one whose window and stride are multiples of it. In registers; then `After`, and the store.
template <class Problem, class Out, class Combine, class Before, class After>
struct Pool {
  struct Arguments {
    Destination<Out> to;
    alignas(8) Before before;
    alignas(8) After after;
    alignas(8) int pooled_d;  // extents of the result
    int pooled_h, pooled_w;
    float factor;  // of a sum
  };
  const Arguments& a;
  const Geometry& g;
  ChannelTable<Problem>& table;
  const int index, group, warp, lane;
  float best[Problem::m_tiles][Problem::columns / 2];

  FXFUSE_INLINE Pool(const Arguments& a, const Geometry& g, ChannelTable<Problem>& table, int index, int group,
                     int warp, int lane)
      : a(a), g(g), table(table), index(index), group(group), warp(warp), lane(lane) {
    table.fill(a.to, g, tile_at(g, index), group);
#pragma unroll
    for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
      for (int j = 0; j < Problem::columns / 2; ++j) best[i][j] = Combine::zero();
  }

  FXFUSE_INLINE void pass(const float (&acc)[Problem::m_tiles][Problem::columns * Problem::residues / 2], int pass) {
    const Place<Problem> place(g, tile_at(g, index), group, warp, lane);
    const float sample_scale = Problem::scaled ? a.to.sample_scale[place.n] : 1.f;
#pragma unroll
    for (int q = 0; q < Problem::residues; ++q) {
      const Residue residue = Problem::residue(pass, q);
      bool valid[Problem::m_tiles][2];
      int od[Problem::m_tiles][2], oh[Problem::m_tiles][2], ow[Problem::m_tiles][2];
#pragma unroll
      for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          od[i][r] = place.d[i][r] * Problem::stride_d + residue.d;
          oh[i][r] = place.h[i][r] * Problem::stride_h + residue.h;
          ow[i][r] = place.w[i][r] * Problem::stride_w + residue.w;
          valid[i][r] = residue.valid && od[i][r] < g.out_d && oh[i][r] < g.out_h && ow[i][r] < g.out_w;
        }
#pragma unroll
      for (int j = 0; j < Problem::columns / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!Problem::bare) schedule_barrier();
          const int column = place.column(j, e);
          const int c = place.first + (column < g.out_channels ? column : 0);
          const float scale = table.scale[group][j * 8 + (lane & 3) * 2 + e];
          const float bias = table.bias[group][j * 8 + (lane & 3) * 2 + e];
#pragma unroll
          for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              float y = acc[i][(q * (Problem::columns / 8) + j) * 4 + r * 2 + e];
              if (!Problem::bare) {
                if (Problem::scaled) y = y * sample_scale * scale;
                y = a.before(y + bias, place.n, c, od[i][r], oh[i][r], ow[i][r]);
              }
              float& z = best[i][j * 4 + r * 2 + e];
              if (valid[i][r]) z = Combine::combine(z, y);
            }
        }
    }
  }

  FXFUSE_INLINE void finish() {
    const Place<Problem> place(g, tile_at(g, index), group, warp, lane);
    const float sample_scale = Problem::scaled ? a.to.sample_scale[place.n] : 1.f;
    const int step_d = (int)a.to.stride.d, step_h = (int)a.to.stride.h, step_w = (int)a.to.stride.w;
    Out* const sample = a.to.out + place.n * a.to.stride.n;
#pragma unroll
    for (int j = 0; j < Problem::columns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        schedule_barrier();
        const int column = place.column(j, e);
        if (column >= g.out_channels) continue;
        const int c = place.first + column;
        const float scale = table.scale[group][j * 8 + (lane & 3) * 2 + e];
        const float bias = table.bias[group][j * 8 + (lane & 3) * 2 + e];
        Out* const out = sample + c * a.to.stride.c;
#pragma unroll
        for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int d = place.d[i][r], h = place.h[i][r], w = place.w[i][r];
            if (d < 0 || d >= a.pooled_d || h >= a.pooled_h || w >= a.pooled_w) continue;
            float y = best[i][j * 4 + r * 2 + e] * a.factor;
            if (Problem::bare) y = (Problem::scaled ? y * sample_scale * scale : y) + bias;
            out[d * step_d + h * step_h + w * step_w] = from_float<Out>(a.after(y, place.n, c, d, h, w));
          }
      }
  }
};

}  // namespace fxfuse
