// Reductions over w in a convolution's epilogue: a warpgroup's part of a tile has whole rows of the output.
//
// Accumulators of a row lie in many threads. Where that part is blocks of 8 by 8 positions, they are eight threads, which exchange
// their sums (`reduce_lines`). Else those of a few channels at a time go through shared memory, from where some threads of a warp
// take each row, and reduce it as map_rows.cuh does (`reduce_rows`). Rows are stored, or what a pool makes of those of a position: one
// whose window and stride are the convolution's stride.
//
// `Problem::Along`: a reduction of fold.cuh with constants held (in registers), lanes, count, each (else, of HeldRow) and whole
// (a row fills what is there for it), or NoAlong. Columns of accumulators are in the order of channels.
#pragma once
#include "combine.cuh"
#include "conv_outbox.cuh"
#include "fold.cuh"
#include "held_row.cuh"

namespace fxfuse {

struct NoAlong {};
constexpr int kMostHeld = 192;  // accumulators of a thread, and of rows that it holds at once, for which there are registers

// What is made of results: of rows, and of what is left of them.
template <class Out, class Expression, class Behind>
struct RowArguments {
  static constexpr bool pools = false;
  Destination<Out> to;
  alignas(8) Expression expression;
  alignas(8) Behind behind;
};
// The same with a pool of rows, `After` them, and `Behind` it.
template <class Out, class Combine_, class Expression, class After, class Behind>
struct RowPoolArguments {
  using Combine = Combine_;
  static constexpr bool pools = true;
  Destination<Out> to;
  alignas(8) Expression expression;
  alignas(8) After after;
  alignas(8) Behind behind;
  alignas(8) int pooled_d;  // extents of the result
  int pooled_h, pooled_w;
  float factor;  // of a sum
};

// The rows of `Problem::lines` channels in shared memory, in floats. `Runs`: of the classes, one for each row of the output
// that a row of positions has.
template <class Problem, class Runs>
struct AlongPlan {
  int rows, pitch, channel;  // of a channel; from one to the next; from channel to channel, which leaves the banks apart
  int buffers;

  FXFUSE_INLINE AlongPlan(const Geometry& g, const Extent& o) {
    using Along = typename Problem::Along;
    rows = g.box_d * g.box_h * Runs::count;
    pitch = Along::count > 1 ? o.size_w : (o.size_w + 1) & ~1;
    channel = ((rows * pitch + 11) & ~15) + 4;
    buffers = Problem::lines * channel * 2 <= Outbox<Problem>::bytes(g) / (int)sizeof(float) ? 2 : 1;
  }
};

// Puts the accumulators of a block of `Problem::lines` channels there, as results of the convolution. `width`, `reversed`: as
// of store_direct; `inside`: a bit for every position and element of it along w.
template <class Problem, class Runs, int width, bool reversed, int classes, class Value>
FXFUSE_INLINE void put_rows(float* to, const AlongPlan<Problem, Runs>& plan, const int (&row)[Problem::m_tiles][2], uint32_t inside,
                            int lane, int block, const Value& value) {
  constexpr bool both = Problem::lines == 8;
  constexpr int left = reversed ? 1 : 0;
  const int j = both ? block : block / 2;
#pragma unroll
  for (int k = 0; k < (both ? 2 : 1); ++k) {
    const int e = both ? k : block & 1;
    float* const line = to + (both ? (lane & 3) * 2 + e : lane & 3) * plan.channel;
    const auto column = value.column(j, e);
#pragma unroll
    for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int q = 0; q < classes; q += width) {
          const int w = Runs::w(width == 2 ? q + left : q);  // of a pair the first one's
          if (!(inside >> ((i * 2 + r) * Problem::stride_w + w) & 1)) continue;
          float* const there = line + row[i][r] + Runs::of(q) * plan.pitch + w;
          if constexpr (width == 2)  // behind the last element of an odd row there is room
            *(float2*)there = make_float2(value(column, i, r, j, e, q + left), value(column, i, r, j, e, q + 1 - left));
          else
            *there = value(column, i, r, j, e, q);
        }
  }
}

// A row as its threads have it, through `Before`, reduced: what result() needs of every element.
template <class Problem, class Held, class Channel, class Before>
FXFUSE_INLINE auto reduced_row(Held& held, const float* from, const Before& before, const Channel& of, int n, int c, int d, int h) {
  using Along = typename Problem::Along;
#pragma unroll
  for (int k = 0; k < Along::each; ++k) {
    const int w = held.at(k);
    Vector<float, Along::count> v = {};
    if (w < held.length) v = *(const Vector<float, Along::count>*)(from + w);
#pragma unroll
    for (int e = 0; e < Along::count; ++e) held.v[k * Along::count + e] = w < held.length ? before(of, v.v[e], n, c, d, h, w + e) : 0.f;
  }
  return Along::fold(held, held.length);
}

// A pool's value, from what it combines.
template <class Arguments>
FXFUSE_INLINE float pooled(float v, const Arguments& a) {
  if constexpr (Arguments::pools) return Arguments::Combine::scaled(v, a.factor);
  return v;
}

// Reduces the rows of a warpgroup's part of a tile, value(column, i, r, j, e, q) through a.expression, and stores what is made
// of them.
template <class Problem, class Out, int classes, class Value, class Arguments>
FXFUSE_INLINE void reduce_rows(const Arguments& a, const Geometry& g, const Place<Problem>& place, const Extent& o,
                               const Residue (&residue)[classes], const Outbox<Problem>& outbox, int group, const Value& value) {
  using Along = typename Problem::Along;
  using Runs = typename Problem::Runs;
  constexpr bool pools = Arguments::pools;  // all residue classes are there
  constexpr int width = Problem::pair != 0 ? 2 : 1, lines = Problem::lines, blocks = Problem::columns / lines;
  constexpr bool reversed = Problem::pair < 0;
  constexpr int lanes = Along::lanes, count = Along::count, each = Along::each, at_once = 128 / lanes;
  constexpr int rows_each = pools ? Runs::count : 1;  // that a result is made of
  const Tile& t = place.box;
  const AlongPlan<Problem, Runs> plan(g, o);
  static_assert(Problem::m_tiles * 2 * Problem::stride_w <= 32, "one bit per position and element along w");
  uint32_t inside = 0;  // rows that are not have room
  int row[Problem::m_tiles][2];
#pragma unroll
  for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int x = place.x(i, r) * Problem::stride_w;
      row[i][r] = (place.z(i, r) * g.box_h + place.y(i, r)) * Runs::count * plan.pitch + x;
#pragma unroll
      for (int w = 0; w < Problem::stride_w; ++w)
        if (place.inside(i, r) && x + w < o.size_w) inside |= 1u << ((i * 2 + r) * Problem::stride_w + w);
    }
  const int first = t.column * Problem::columns, units = lines * plan.rows / rows_each;
  HeldRow<lanes, count, each> held;
  held.lane = threadIdx.x % lanes, held.length = Along::whole ? lanes * count * each : o.size_w, held.shared = nullptr;
  named_barrier(1 + group, 128);  // what was there has been read, also where a pass before had no products to meet at
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    const int column0 = lines == 8 ? block * 8 : block / 2 * 8 + (block & 1);
    if (first + column0 >= g.out_channels) break;
    float* const buffer = (float*)outbox.memory + (block & plan.buffers - 1) * lines * plan.channel;
    if (block > 0 && plan.buffers == 1) named_barrier(1 + group, 128);
#pragma unroll
    for (int k = 0; k < blocks; ++k)  // registers have no index
      if (k == block) put_rows<Problem, Runs, width, reversed, classes>(buffer, plan, row, inside, place.lane, k, value);
    named_barrier(1 + group, 128);
#pragma unroll 1
    for (int from = 0; from < units; from += at_once) {  // the same for all threads of a warp
      const int unit = from + (threadIdx.x & 127) / lanes, line = unit % lines, at = unit < units ? unit / lines : 0;
      const int position = pools ? at : at / Runs::count, z = g.by_box_h.of(position), y = position - z * g.box_h;
      const int column = column0 + line * (lines == 8 ? 1 : 2), channel = t.group * g.out_channels + first + column;
      bool there = unit < units && first + column < g.out_channels;
      float combined[each * count];
      int d, h;
#pragma unroll
      for (int u = 0; u < rows_each; ++u) {
        const int run = pools ? u : at % Runs::count;
        d = (t.d + z) * o.step_d, h = (t.h + y) * o.step_h;
#pragma unroll
        for (int k = 0; k < Runs::count; ++k)
          if (k == run) d += residue[Runs::first(k)].d, h += residue[Runs::first(k)].h;
        there = there && d < o.size_d && h < o.size_h;
        const int n = t.n, c = there ? channel : 0, in_d = there ? d : 0, in_h = there ? h : 0;  // an element that there is
        const float* const begin = buffer + line * plan.channel + (position * Runs::count + run) * plan.pitch;
        const auto made = reduced_row<Problem>(held, begin, a.expression, a.expression.channel(n, c), n, c, in_d, in_h);
#pragma unroll
        for (int k = 0; k < each * count; ++k) {
          const float y = Along::result(held.v[k], made);
          if constexpr (pools) {
            const int w = held.at(k / count) + k % count;
            const float v = w < held.length ? a.after(y, n, c, in_d, in_h, w) : 0.f;
            combined[k] = u == 0 ? v : Arguments::Combine::combine(combined[k], v);
          } else {
            combined[k] = y;
          }
        }
      }
      if (!there) continue;
      constexpr int step_w = pools ? Problem::stride_w : 1, stored = count / step_w;
      if constexpr (pools) d = t.d + z, h = t.h + y;
      const auto of = a.behind.channel(t.n, channel);
      Out* const to = a.to.out + t.n * a.to.stride.n + channel * a.to.stride.c + d * a.to.stride.d + h * a.to.stride.h;
#pragma unroll
      for (int k = 0; k < each; ++k) {
        const int w = held.at(k) / step_w;
        if (held.at(k) >= held.length) continue;
        Vector<Out, stored> made;
#pragma unroll
        for (int e = 0; e < stored; ++e) {
          float y = combined[k * count + e * step_w];
          if constexpr (pools)
#pragma unroll
            for (int i = 1; i < step_w; ++i) y = Arguments::Combine::combine(y, combined[k * count + e * step_w + i]);
          made.v[e] = from_float<Out>(a.behind(of, pooled(y, a), t.n, channel, d, h, w + e));
        }
        *(Vector<Out, stored>*)(to + w) = made;
      }
    }
  }
}

// A row of positions that are eight apart in a thread's accumulators, for the reductions of fold.cuh: eight threads of a warp,
// whose lanes are a multiple of four apart, have it. `whole`: all of it are elements of the output, else those `inside`.
template <int elements, bool whole>
struct HeldLine {
  float v[elements];
  uint32_t inside;

  template <class Combine, class Of>
  FXFUSE_INLINE float all(float zero, Combine combine, Of of) const {
    float r[2] = {zero, zero};  // two at a time: none waits for the one before
#pragma unroll
    for (int k = 0; k < elements; ++k)
      if (whole || (inside >> k & 1)) r[k % 2] = combine(r[k % 2], of(v[k]));
    float one = combine(r[0], r[1]);
#pragma unroll
    for (int o = 4; o < 32; o *= 2) one = combine(one, __shfl_xor_sync(~0u, one, o));
    return one;
  }
  template <class Made>
  FXFUSE_INLINE void make(Made made) {
#pragma unroll
    for (int k = 0; k < elements; ++k) v[k] = made(v[k]);
  }
  FXFUSE_INLINE void subtract(float shift) {
    make([&](float v) { return v - shift; });
  }
  FXFUSE_INLINE void raise(const Powers& powers) { make(powers); }
};

// The same as reduce_rows where a warpgroup's part of a tile is eight rows of positions, in blocks of 8 by 8: what a thread has
// of a row lies in its own accumulators, and the rest in those of seven others. A turn takes one or both of the columns that a thread
// has of eight, as there are registers, in two rows of positions: of one of the rows of the output that those have.
template <class Problem, class Out, int classes, class Value, class Arguments>
FXFUSE_INLINE void reduce_lines(const Arguments& a, const Geometry& g, const Place<Problem>& place, const Extent& o,
                                const Residue (&residue)[classes], const Value& value) {
  using Along = typename Problem::Along;
  using Runs = typename Problem::Runs;
  constexpr bool pools = Arguments::pools;  // all residue classes are there
  constexpr int step_w = Problem::stride_w, each = Problem::m_tiles * step_w, accumulators = Problem::m_tiles * Problem::columns * classes / 2;
  constexpr int together = accumulators + 8 * each <= kMostHeld ? 2 : 1, parts = 2 / together;  // columns; so many times
  constexpr int turns = Problem::columns / 8 * parts * Runs::count;
  constexpr int made_each = pools ? Problem::m_tiles : each, stored_w = pools ? 1 : step_w;
  using Line = HeldLine<each, Along::whole>;
  const Tile& t = place.box;
  const int first = t.column * Problem::columns;
  float made[2][together][made_each];
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    const int u = turn % Runs::count, j = turn / Runs::count / parts, e0 = turn / Runs::count % parts;
    if (first + j * 8 >= g.out_channels) break;
    int x = place.lane >> 2;
    settle(x);  // or the places of all operands along w are made before, and something is spilt
    auto w_of = [&](int k) { return (k / step_w * 8 + x) * step_w + k % step_w; };
    uint32_t inside = 0;
#pragma unroll
    for (int k = 0; k < each; ++k)
      if (w_of(k) < o.size_w) inside |= 1u << k;
    Line line[2][together];
#pragma unroll
    for (int from = 0; from < turns; ++from) {  // registers have no index
      if (from != turn) continue;
#pragma unroll
      for (int c = 0; c < together; ++c) {
        const int at = from / Runs::count / parts, e = from / Runs::count % parts + c;
        const auto column = value.column(at, e);
#pragma unroll
        for (int q = 0; q < classes; ++q) {
          if (Runs::of(q) != from % Runs::count) continue;
#pragma unroll
          for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r)
              line[r][c].v[i * step_w + Runs::w(q)] = value(column, i, r, at, e, q);
        }
      }
    }
    Residue run = residue[Runs::first(0)];
#pragma unroll
    for (int k = 1; k < Runs::count; ++k)
      if (k == u) run = residue[Runs::first(k)];
    const int n = t.n;
    // all that is computed comes before any branch, so that none of it waits for another
#pragma unroll
    for (int c = 0; c < together; ++c) {
      const int channel = Results<Problem, Value, Identity>::channel_of(g, place, j, e0 + c);
      const auto before = a.expression.channel(n, channel);
      const auto behind = a.behind.channel(n, channel);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at_d = (t.d + place.z(0, r)) * o.step_d + run.d, at_h = (t.h + place.y(0, r)) * o.step_h + run.h;
        const bool there = at_d < o.size_d && at_h < o.size_h;
        const int d = there ? at_d : 0, h = there ? at_h : 0;  // an element that there is
        auto w = [&](int k) { return Along::whole || w_of(k) < o.size_w ? w_of(k) : 0; };
        Line& one = line[r][c];
        one.inside = inside;
#pragma unroll
        for (int k = 0; k < each; ++k) one.v[k] = a.expression(before, one.v[k], n, channel, d, h, w(k));
        const auto reduced = Along::fold(one, Along::whole ? 8 * each : o.size_w);
#pragma unroll
        for (int k = 0; k < each; ++k) {
          const float v = Along::result(one.v[k], reduced);
          if constexpr (pools) {
            float& all = made[r][c][k / step_w];
            const float next = a.after(v, n, channel, d, h, w(k));
            all = k % step_w == 0 && u == 0 ? next : Arguments::Combine::combine(all, next);
          } else {
            made[r][c][k] = a.behind(behind, v, n, channel, d, h, w(k));
          }
        }
      }
    }
    if (pools && u + 1 < Runs::count) continue;
    if constexpr (pools) {
#pragma unroll
      for (int c = 0; c < together; ++c) {
        const int channel = Results<Problem, Value, Identity>::channel_of(g, place, j, e0 + c);
        const auto behind = a.behind.channel(n, channel);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int z = t.d + place.z(0, r), y = t.h + place.y(0, r);
          const bool there = z < a.pooled_d && y < a.pooled_h;
#pragma unroll
          for (int i = 0; i < Problem::m_tiles; ++i) {
            const int w = i * 8 + x;
            made[r][c][i] = a.behind(behind, pooled(made[r][c][i], a), n, channel, there ? z : 0, there ? y : 0, w < a.pooled_w ? w : 0);
          }
        }
      }
    }
    const Residue stored = pools ? Residue{0, 0, 0, 1} : run;
    Extent to_ = o;
    if constexpr (pools) to_ = {a.pooled_d, a.pooled_h, a.pooled_w, 1, 1, 1};
    const bool pairs = stored_w == 2 && to_.size_w % 2 == 0;
#pragma unroll
    for (int c = 0; c < together; ++c)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int d = (t.d + place.z(0, r)) * to_.step_d + stored.d, h = (t.h + place.y(0, r)) * to_.step_h + stored.h;
        const bool column = Problem::filled || first + place.column(j, e0 + c) < g.out_channels;
        if (!(column && d < to_.size_d && h < to_.size_h)) continue;
        const int channel = Results<Problem, Value, Identity>::channel_of(g, place, j, e0 + c);
        Out* const to = a.to.out + n * a.to.stride.n + channel * a.to.stride.c + d * a.to.stride.d + h * a.to.stride.h;
#pragma unroll
        for (int i = 0; i < Problem::m_tiles; ++i) {
          const int w = (i * 8 + x) * stored_w;
          const float* const y = made[r][c] + i * stored_w;
          if (pairs) {
            if (w < to_.size_w) store_two(to + w, y[0], y[stored_w - 1]);
          } else {
#pragma unroll
            for (int k = 0; k < stored_w; ++k)
              if (w + k < to_.size_w) to[w + k] = from_float<Out>(y[k]);
          }
        }
      }
  }
}

// The epilogue that reduces rows. `RowArguments` or `RowPoolArguments`.
template <class Problem, class Out, class Arguments_>
struct ReduceRows {
  using Arguments = Arguments_;
  const Arguments& a;
  const Geometry& g;
  ChannelTable<Problem>& table;
  Outbox<Problem>& outbox;
  const Place<Problem>& place;
  const int group;
  const typename ChannelTable<Problem>::Fetched fetched;

  FXFUSE_INLINE ReduceRows(const Arguments& a, const Geometry& g, ChannelTable<Problem>& table, float*, Outbox<Problem>& outbox,
                           const Place<Problem>& place, int group)
      : a(a), g(g), table(table), outbox(outbox), place(place), group(group), fetched(table.fetch(a.to, g, place)) {}

  struct Ready {};
  FXFUSE_INLINE void prepare(Ready&, int) {}
  FXFUSE_INLINE void pass(float (&acc)[Problem::m_tiles][Problem::columns * Problem::residues / 2], int pass, const Ready&) {
    if (pass == 0) table.fill(fetched, group);
    const Place<Problem> place = this->place.now();
    const Classes<Problem> classes(pass);
    auto kept = [&](int i, int r, int j, int e, int q) { return acc[i][(q * (Problem::columns / 8) + j) * 4 + r * 2 + e]; };
    const Scaled<Problem, decltype(kept)> value{kept, table, place, group, fetched};
    if constexpr (Problem::Along::held)
      reduce_lines<Problem, Out>(a, g, place, extent_of<Problem>(g), classes.each, value);
    else
      reduce_rows<Problem, Out>(a, g, place, extent_of<Problem>(g), classes.each, outbox, group, value);
  }
  FXFUSE_INLINE void finish() {}
  static FXFUSE_INLINE void send(const Arguments&, const Geometry&, Outbox<Problem>&, const Tile&, int) {}
};

}  // namespace fxfuse
