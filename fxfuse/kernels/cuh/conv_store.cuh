// Where a convolution's results lie, and how they are stored straight from registers.
#pragma once
#include "columns.cuh"
#include "combine.cuh"
#include "conv_wgmma.cuh"
#include "statistics.cuh"

namespace fxfuse {

struct Residue {
  unsigned char d, h, w, valid;
};

// Strides in elements; n, c, d, h, w.
struct Strides {
  int64_t n, c, d, h, w;
};

// The output's positions as stores see them: `size` of them; a step of q is `step` of them.
struct Extent {
  int size_d, size_h, size_w;
  int step_d, step_h, step_w;
};

// The residue classes of a pass.
template <class Problem>
struct Classes {
  Residue each[Problem::residues];
  FXFUSE_INLINE explicit Classes(int pass) {
#pragma unroll
    for (int q = 0; q < Problem::residues; ++q) each[q] = Problem::residue(pass, q);
  }
};

template <class Problem>
FXFUSE_INLINE Extent extent_of(const Geometry& g) {
  return {g.out_d, g.out_h, g.out_w, Problem::stride_d, Problem::stride_h, Problem::stride_w};
}

// A position in a box: three fields of ten bits, the last of which is not set. One that is not in it is beyond every limit,
// and negative.
constexpr int kField = 511, kTops = (kField + 1) * (1 << 20 | 1 << 10 | 1);
constexpr int kOutside = kField << 20 | kField << 10 | kField | 1 << 31;

// Where the rows and columns of a thread's accumulators lie.
template <class Problem>
struct Place {
  int packed[Problem::m_tiles][2];  // position in the box, ten bits per dim; kOutside outside it
  int lane, skip = 0;
  Tile box;  // of this warpgroup

  FXFUSE_INLINE Place(const Geometry& g, int group, int warp, int lane_) : lane(lane_) { locate(g, group, warp); }
  FXFUSE_INLINE void locate(const Geometry& g, int group, int warp) {
#pragma unroll
    for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // thread `lane` of `warp` holds rows lane/4 and lane/4 + 8 of the warp's 16
        const int row = g.row_base[group * Problem::m_tiles + i] - group * g.part_rows + skip +
                        (warp * 2 + r) * g.row_group + (lane >> 2), at = row / Problem::samples;
        const int plane = g.by_region_w.of(at), z = g.by_region_h.of(plane), outer = plane - z * g.region_h,
                  inner = at - plane * g.region_w;
        const int y = Problem::inner == 1 ? inner : outer, x = Problem::inner == 1 ? outer : inner;
        const bool over = Problem::joint && y == g.box_h && x < g.over;
        packed[i][r] = z < g.box_d && ((y < g.box_h && x < g.box_w) || over) ? z << 20 | y << 10 | x : kOutside;
        settle(packed[i][r]);  // computed once, not for every use
      }
  }
  // To a warpgroup's part of a tile.
  FXFUSE_INLINE void move(const Geometry& g, const Tile& tile, int group, int warp) {
    box = part_of(g, tile, group);
    if (tile.skip == skip) return;  // divisions, which the tiles of a block may have in common
    skip = tile.skip;
    locate(g, group, warp);
  }
  // The same, but nothing that follows from it is computed before, while products need the registers.
  FXFUSE_INLINE Place now() const {
    Place p = *this;
#pragma unroll
    for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) settle(p.packed[i][r]);
    settle(p.box.d), settle(p.box.h), settle(p.box.w), settle(p.lane);
    return p;
  }
  FXFUSE_INLINE bool inside(int i, int r) const { return packed[i][r] >= 0; }
  // Which sample of the set a row is of: the same in every tile of rows.
  FXFUSE_INLINE int sample(int r) const {
    return Problem::samples == 1 ? 0 : ((threadIdx.x >> 5) * 16 + r * 8 + (lane >> 2)) % Problem::samples;
  }
  FXFUSE_INLINE int n(int r) const { return box.n + sample(r); }
  FXFUSE_INLINE bool there(const Geometry& g, int r) const { return Problem::samples == 1 || n(r) < g.samples; }
  // One that there is: behind the last sample, the last.
  FXFUSE_INLINE int one_there(const Geometry& g, int r) const { return there(g, r) ? n(r) : g.samples - 1; }
  // Whether all rows of a thread are positions of the box, and all elements of these are some of the output.
  FXFUSE_INLINE bool whole(const Geometry& g, const Extent& o) const {
    int any = 0;
#pragma unroll
    for (int i = 0; i < Problem::m_tiles; ++i) any |= packed[i][0] | packed[i][1];
    return any >= 0 && (box.d + g.box_d) * o.step_d <= o.size_d && (box.h + g.box_h) * o.step_h <= o.size_h &&
           (box.w + g.box_w) * o.step_w <= o.size_w && (Problem::samples == 1 || box.n + Problem::samples <= g.samples);
  }
  FXFUSE_INLINE int z(int i, int r) const { return packed[i][r] >> 20; }
  FXFUSE_INLINE int y(int i, int r) const { return packed[i][r] >> 10 & 1023; }
  FXFUSE_INLINE int x(int i, int r) const { return packed[i][r] & 1023; }
  // The channel of the tile that accumulator 4*j + e belongs to.
  FXFUSE_INLINE int column(int j, int e) const { return Columns<Problem>::channel(j, lane & 3, e); }
};

// What every epilogue is given. Null where there is none.
template <class Out>
struct Destination {
  Out* out;
  Strides stride;
  const float *bias, *sample_scale, *channel_scale;  // one per output channel, sample, output channel
  Partials partials;
};

// What turns an accumulator into a result of the convolution.
struct Affine {
  float scale, bias;
};

// Scale and bias of a tile's output channels, in shared memory: one copy per warpgroup. A product of two scales that no
// float holds is the direct kernel's affair. They are on their way while the tile's products are: each thread fetches
// some, and fills them in behind.
template <class Problem>
struct ChannelTable {
  static constexpr int each = (Problem::columns + 127) / 128;  // of a thread
  static constexpr int samples = Problem::samples == 1 ? 1 : 2;  // of a thread's rows: see Place::sample
  struct Fetched {
    float sample[samples], scale[each], bias[each];
  };
  Affine channels[kConsumers][Problem::columns];
  FXFUSE_INLINE void init() {}

  template <class Out>
  static FXFUSE_INLINE Fetched fetch(const Destination<Out>& to, const Geometry& g, const Place<Problem>& place) {
    const Tile& t = place.box;
    Fetched f;
#pragma unroll
    for (int r = 0; r < samples; ++r) {
      f.sample[r] = Problem::scaled ? to.sample_scale[place.one_there(g, r)] : 1.f;
      settle(f.sample[r]);
    }
#pragma unroll
    for (int k = 0; k < each; ++k) {
      const int i = (threadIdx.x & 127) + k * 128, column = t.column * Problem::columns + i;
      const bool inside = i < Problem::columns && column < g.out_channels;
      const int c = t.group * g.out_channels + (inside ? column : 0);
      f.scale[k] = Problem::scaled ? to.channel_scale[c] : 1.f, f.bias[k] = to.bias ? to.bias[c] * Problem::bias_scale : 0.f;
      settle(f.scale[k]), settle(f.bias[k]);  // now, not where they are needed
    }
    return f;
  }
  FXFUSE_INLINE void fill(const Fetched& f, int group) {
    named_barrier(1 + group, 128);  // the last tile's reads are done
#pragma unroll
    for (int k = 0; k < each; ++k) {
      const int i = (threadIdx.x & 127) + k * 128;
      if (i < Problem::columns) channels[group][i] = {samples == 1 ? f.sample[0] * f.scale[k] * Problem::weight_scale : f.scale[k], f.bias[k]};
    }
    named_barrier(1 + group, 128);
  }
};

// Accumulators kept(i, r, j, e, q) as results of the convolution. Of a set each row has the scale of its sample.
template <class Problem, class Kept>
struct Scaled {
  using Column = Affine;
  Kept kept;
  const ChannelTable<Problem>& table;
  const Place<Problem>& place;
  int group;
  const typename ChannelTable<Problem>::Fetched& fetched;
  FXFUSE_INLINE Affine column(int j, int e) const { return table.channels[group][place.column(j, e)]; }
  FXFUSE_INLINE float operator()(const Affine& of, int i, int r, int j, int e, int q) const {
    const float y = kept(i, r, j, e, q);
    if constexpr (Problem::scaled && Problem::samples > 1) return fmaf(y, fetched.sample[r] * of.scale * Problem::weight_scale, of.bias);
    return Problem::scaled ? fmaf(y, of.scale, of.bias) : y * Problem::weight_scale + of.bias;
  }
  FXFUSE_INLINE float operator()(int i, int r, int j, int e, int q) const { return (*this)(column(j, e), i, r, j, e, q); }
};

// Accumulators that are results.
template <class Kept>
struct Made {
  struct Column {};
  Kept kept;
  FXFUSE_INLINE Column column(int, int) const { return {}; }
  FXFUSE_INLINE float operator()(const Column&, int i, int r, int j, int e, int q) const { return kept(i, r, j, e, q); }
  FXFUSE_INLINE float operator()(int i, int r, int j, int e, int q) const { return kept(i, r, j, e, q); }
};
template <class Kept>
FXFUSE_INLINE Made<Kept> made(Kept kept) {
  return {kept};
}

// Of positions of a box those whose element of a class is one of the output: `limits - packed` has the top bit of each field.
// `most_h`: rows of the box that may be.
FXFUSE_INLINE int limits_of(const Tile& t, const Extent& o, const Residue& residue, int most_h) {
  auto last = [&](int size, int at, int step, int from, int field) {
    const int n = (int)((unsigned)(size - at + step - 1) / (unsigned)step) - from, most = n < field ? n : field;
    return kField + (residue.valid && most > 0 ? most : 0);
  };
  return last(o.size_d, residue.d, o.step_d, t.d, kField) << 20 | last(o.size_h, residue.h, o.step_h, t.h, most_h) << 10 |
         last(o.size_w, residue.w, o.step_w, t.w, kField);
}

// One bit for every row of a thread and class, (i * 2 + r) * classes + q: whether it is an element of the output, and of
// the box; or, with `over`, of what the next box's first sector begins with.
template <class Problem, int classes>
FXFUSE_INLINE uint32_t inside_mask(const Geometry& g, const Place<Problem>& place, const Extent& o,
                                   const Residue (&residue)[classes], bool over = false) {
  constexpr int bits = Problem::m_tiles * 2 * classes;
  static_assert(bits <= 32, "one bit per row and class");
  if constexpr (Problem::even && !Problem::joint)  // most tiles are, of an output whose sizes its tiles divide
    if (place.whole(g, o)) return ~0u >> (32 - bits);
  uint32_t inside = 0;
#pragma unroll
  for (int q = 0; q < classes; ++q) {
    const int most_h = Problem::joint ? g.box_h + (over && residue[q].h == 0) : kField;
    const int limits = limits_of(place.box, o, residue[q], most_h);
#pragma unroll
    for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (place.there(g, r) && (limits - place.packed[i][r] & kTops) == kTops) inside |= 1u << ((i * 2 + r) * classes + q);
  }
  return inside;
}

// Two neighbours in memory, aligned.
template <class T>
FXFUSE_INLINE void store_two(T* to, float a, float b) {
  if constexpr (sizeof(T) == 4)
    store_at_once(to, __float_as_uint(a), __float_as_uint(b));
  else
    *(uint32_t*)to = two_of<T>(a, b);
}
// As many as there are values: up to 16 bytes.
template <class T, int count>
FXFUSE_INLINE void store_some(T* to, const float (&v)[count]) {
  static_assert(count % 2 == 0 && count * sizeof(T) <= 16, "stored at once");
  if constexpr (count == 2)
    store_two(to, v[0], v[1]);
  else if constexpr (sizeof(T) == 4)
    store_at_once(to, __float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
  else if constexpr (count == 4)
    store_at_once(to, two_of<T>(v[0], v[1]), two_of<T>(v[2], v[3]));
  else
    store_at_once(to, two_of<T>(v[0], v[1]), two_of<T>(v[2], v[3]), two_of<T>(v[4], v[5]), two_of<T>(v[6], v[7]));
}

// The results of one column: expression(value). What of both is the same in all its rows is read once, here.
template <class Problem, class Value, class Expression>
struct Results {
  const Value& value;
  const Expression& expression;
  const Tile& t;
  int j, e, n[2], channel;  // samples of rows r: see Place::sample
  typename Value::Column column;
  typename Expression::Channel of[2];

  FXFUSE_INLINE Results(const Geometry& g, const Place<Problem>& place, const Value& value, const Expression& expression, int j, int e)
      : value(value), expression(expression), t(place.box), j(j), e(e), n{place.one_there(g, 0), place.one_there(g, 1)},
        channel(channel_of(g, place, j, e)), column(value.column(j, e)), of{expression.channel(n[0], channel), {}} {
    if constexpr (Problem::samples > 1) of[1] = expression.channel(n[1], channel);
  }
  // One that there is: beyond the last column, the last.
  static FXFUSE_INLINE int channel_of(const Geometry& g, const Place<Problem>& place, int j, int e) {
    int column = place.box.column * Problem::columns + place.column(j, e);
    if (!Problem::filled && column >= g.out_channels) column = g.out_channels - 1;
    return place.box.group * g.out_channels + column;
  }
  // Of any row, unless the expression is `local`: of one inside the tensor.
  FXFUSE_INLINE float operator()(int i, int r, int q, int d, int h, int w) const {
    return expression(of[Problem::samples > 1 ? r : 0], value(column, i, r, j, e, q), n[r], channel, d, h, w);
  }
  // Of any row; zero outside the tensor where it has to be something.
  FXFUSE_INLINE float operator()(const Place<Problem>& place, const Extent& o, const Residue& residue, bool inside, int i, int r, int q) const {
    if (Expression::local && !inside) return 0.f;
    return (*this)(i, r, q, (t.d + place.z(i, r)) * o.step_d + residue.d, (t.h + place.y(i, r)) * o.step_h + residue.h,
                   (t.w + place.x(i, r)) * o.step_w + residue.w);
  }
};

// Stores value(i, r, j, e, q) for all accumulators of a warpgroup, straight from registers: eight neighbouring threads
// have neighbouring q. `classes` residue classes, the `width` innermost of which are neighbours along w, increasing from
// class q with q % width == 0 (reversed: decreasing).
template <class Problem, class Out, int classes, int width, bool reversed, class Value, class Expression>
FXFUSE_INLINE void store_direct(const Destination<Out>& to, const Geometry& g, const Place<Problem>& place,
                                const Extent& o, const Residue (&residue)[classes], const Value& value,
                                const Expression& expression) {
  constexpr int rows = Problem::m_tiles * 2, left = reversed ? 1 : 0;
  const Tile& t = place.box;
  const int stride_d = (int)to.stride.d, stride_h = (int)to.stride.h;
  const uint32_t inside = inside_mask(g, place, o, residue);
  int offset[rows][classes / width], origin[classes / width];  // of the leftmost one; of that of the box's first position
  uint32_t pairs = 0, odd = 0;        // one bit per pair: both are inside; its offset is odd
#pragma unroll
  for (int p = 0; p < classes / width; ++p) {
    const Residue& one = residue[p * width + (width == 2 ? left : 0)];
    origin[p] = (t.d * o.step_d + one.d) * stride_d + (t.h * o.step_h + one.h) * stride_h + t.w * o.step_w + one.w;
  }
#pragma unroll
  for (int at = 0; at < rows; ++at)
#pragma unroll
    for (int p = 0; p < classes / width; ++p) {
      const int i = at / 2, r = at & 1;
      offset[at][p] = origin[p] + place.z(i, r) * o.step_d * stride_d + place.y(i, r) * o.step_h * stride_h + place.x(i, r) * o.step_w;
      if constexpr (Problem::samples > 1) offset[at][p] += place.sample(r) * (int)to.stride.n;
      const int bit = at * classes + p * width;
      if (width == 2) pairs |= (inside >> bit & inside >> (bit + 1) & 1) << bit, odd |= (uint32_t)(offset[at][p] & 1) << bit;
    }
  const int first = t.column * Problem::columns, channel0 = t.group * g.out_channels + first;
  Out* const sample = to.out + t.n * to.stride.n + channel0 * to.stride.c;
#pragma unroll
  for (int j = 0; j < Problem::columns / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      schedule_barrier();  // or the loads of all columns are hoisted, and the accumulators spilt
      const int column = place.column(j, e);
      if (first + column >= g.out_channels) continue;  // keeps the columns apart, too: or ptxas begins them all at once
      const Results<Problem, Value, Expression> results(g, place, value, expression, j, e);
      Out* out = sample + column * to.stride.c;
      settle(out);  // an address takes one instruction from here
      const uint32_t at_once = pairs & ((uint64_t)out / sizeof(Out) & 1 ? odd : ~odd);
#pragma unroll
      for (int at = 0; at < rows; ++at)
#pragma unroll
        for (int p = 0; p < classes / width; ++p) {
          const int i = at / 2, r = at & 1, bit = at * classes + p * width;
          Out* const to_ = out + (uint32_t)offset[at][p];
          auto result = [&](int k) { return results(place, o, residue[p * width + k], inside >> (bit + k) & 1, i, r, p * width + k); };
          if constexpr (width == 1) {
            if (inside >> bit & 1) *to_ = from_float<Out>(result(0));
          } else {
            const float v[2] = {result(0), result(1)};
            if (at_once >> bit & 1) {
              store_two(to_, v[left], v[1 - left]);
            } else {
#pragma unroll
              for (int k = 0; k < 2; ++k)
                if (inside >> (bit + k) & 1) to_[k ^ left] = from_float<Out>(v[k]);
            }
          }
        }
    }
}

// Those of `count` blocks of eight columns from j on, value(j, e): see Columns.
template <int count, class Out, class Value>
FXFUSE_INLINE void store_blocks(Out* out, int j, const Value& value) {
  float v[2 * count];
#pragma unroll
  for (int k = 0; k < 2 * count; ++k) v[k] = value(j + k / 2, k % 2);
  store_some(out, v);
}

// Stores the channels of a position that a thread has, value(j, e), of a tensor whose channels are neighbours. `out`: where
// the tile's first one lies; `channels`: so many there are from it on.
template <class Problem, class Out, class Value>
FXFUSE_INLINE void store_position(Out* out, int lane, int channels, const Value& value) {
  using Tile = Columns<Problem>;
#pragma unroll
  for (int j = 0; j < Tile::blocks; ++j) {
    const int count = Tile::together(j).count, channel = Tile::channel(j, lane & 3, 0);
    if (Tile::together(j).first != j) continue;
    if constexpr (Problem::neighbours == 1) {  // an odd number of them: nothing is aligned
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (channel + e < channels) out[channel + e] = from_float<Out>(value(j, e));
      continue;
    }
    if (!Problem::filled && channel >= channels) continue;  // there are all of a thread's, or none
    if (count == 1) store_blocks<1>(out + channel, j, value);
    if constexpr (Problem::neighbours >= 4)
      if (count == 2) store_blocks<2>(out + channel, j, value);
    if constexpr (Problem::neighbours >= 8)
      if (count == 4) store_blocks<4>(out + channel, j, value);
  }
}

// Stores kept(i, r, j, e, q), which are results, of a tensor whose channels are neighbours.
template <class Problem, class Out, int classes, class Kept>
FXFUSE_INLINE void store_channels(const Destination<Out>& to, const Geometry& g, const Place<Problem>& place,
                                  const Extent& o, const Residue (&residue)[classes], const Kept& kept) {
  const Tile& t = place.box;
  const int first = t.column * Problem::columns;
  Out* const sample = to.out + t.n * to.stride.n + t.group * g.out_channels + first;
  const uint32_t inside = inside_mask(g, place, o, residue);
#pragma unroll
  for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      schedule_barrier();  // or the addresses of all rows are made first
      Out* const row = sample + place.sample(r) * to.stride.n + (t.d + place.z(i, r)) * o.step_d * to.stride.d +
                       (t.h + place.y(i, r)) * o.step_h * to.stride.h + (t.w + place.x(i, r)) * o.step_w * to.stride.w;
#pragma unroll
      for (int q = 0; q < classes; ++q) {
        if (!(inside >> ((i * 2 + r) * classes + q) & 1)) continue;
        Out* const out = row + residue[q].d * to.stride.d + residue[q].h * to.stride.h + residue[q].w * to.stride.w;
        store_position<Problem>(out, place.lane, g.out_channels - first, [&](int j, int e) { return kept(i, r, j, e, q); });
      }
    }
}

}  // namespace fxfuse
