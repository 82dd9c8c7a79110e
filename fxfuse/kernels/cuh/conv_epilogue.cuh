// What becomes of a convolution's accumulators: scaled, biased, sent through an expression, combined, stored.
#pragma once
#include "conv_along.cuh"
#include "conv_fold.cuh"
#include "conv_gather.cuh"
#include "conv_wide.cuh"

namespace fxfuse {

// Makes what is stored of all accumulators, expression(value), in their place: `kept`. Zero outside the tensor, where
// statistics want it, which are of rounded values, or where an expression is not to be asked.
template <class Problem, class Out, int classes, class Kept, class Value, class Expression>
FXFUSE_INLINE void replace(const Geometry& g, const Place<Problem>& place, const Extent& o, const Residue (&residue)[classes],
                           Kept kept, const Value& value, const Expression& expression) {
  constexpr bool masked = Problem::gathers || Expression::local;
  uint32_t inside = 0;
  if constexpr (masked) inside = inside_mask(g, place, o, residue, true);
#pragma unroll
  for (int j = 0; j < Problem::columns / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      schedule_barrier();
      if (!Problem::gathers && place.box.column * Problem::columns + place.column(j, e) >= g.out_channels) continue;  // keeps the columns apart
      const Results<Problem, Value, Expression> results(g, place, value, expression, j, e);
      uint32_t here = inside;
      if constexpr (masked) settle(here);  // or a register per row keeps its bit
#pragma unroll
      for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int q = 0; q < classes; ++q) {
            const bool one = !masked || (here >> ((i * 2 + r) * classes + q) & 1);
            const float result = results(place, o, residue[q], one, i, r, q);
            kept(i, r, j, e, q) = Problem::gathers ? as_stored<Out>(result, one) : result;
          }
    }
}

// The store that the emitted layout asks for, of a tensor whose positions along w are neighbours. `Runs`: of the classes, where
// they go through an outbox.
template <class Problem, class Runs, class Out, int classes, int width, bool reversed, class Value, class Expression>
FXFUSE_INLINE void store(const Destination<Out>& to, const Geometry& g, const Place<Problem>& place, const Extent& o,
                         const Residue (&residue)[classes], Outbox<Problem>& outbox, int group, const Value& value, const Expression& expression) {
  if constexpr (Problem::outbox)
    stage_runs<Problem, Runs, Out>(outbox, to, g, place, o, residue, group, value, expression);
  else if constexpr (Problem::wide)
    store_wide<Problem, Out, classes, width, reversed>(to, g, place, o, residue, value, expression);
  else
    store_direct<Problem, Out, classes, width, reversed>(to, g, place, o, residue, value, expression);
}

// Stores expression(value), and its statistics. Where both want the same values, or where a store goes through all channels
// of a position before the next, they are made once, column by column, in the place of the accumulators: what a column's
// results have in common is read once, not for each of them.
template <class Problem, class Runs, class Out, int width, bool reversed, int classes, class Kept, class Value, class Expression>
FXFUSE_INLINE void deliver(const Destination<Out>& to, const Geometry& g, const Place<Problem>& place, const Extent& o,
                           const Residue (&residue)[classes], Outbox<Problem>& outbox, float* gathered, int group, int pass,
                           int passes, Kept kept, const Value& value, const Expression& expression) {
  constexpr bool in_place = Problem::keeps && (Problem::gathers || Problem::channels_last);
  if constexpr (in_place) {
    replace<Problem, Out>(g, place, o, residue, kept, value, expression);
    const Identity same;
    if constexpr (Problem::gathers) gather<Problem, Out, true>(to, g, place, o, residue, gathered, group, pass, passes, made(kept), same);
    if constexpr (Problem::channels_last)
      store_channels(to, g, place, o, residue, kept);
    else
      store<Problem, Runs, Out, classes, width, reversed>(to, g, place, o, residue, outbox, group, made(kept), same);
  } else if constexpr (Problem::keeps) {
    store<Problem, Runs, Out, classes, width, reversed>(to, g, place, o, residue, outbox, group, value, expression);
  } else {
    gather<Problem, Out, false>(to, g, place, o, residue, gathered, group, pass, passes, value, expression);
  }
}

// Every output of the convolution, through `Expression`, to `out`; or a reduction of it over channels, through `Behind`.
template <class Problem, class Out, class Expression, class Behind>
struct Store {
  struct Arguments {
    Destination<Out> to;
    alignas(8) Expression expression;
    alignas(8) Behind behind;
  };
  const Arguments& a;
  const Geometry& g;
  ChannelTable<Problem>& table;
  float* gathered;
  Outbox<Problem>& outbox;
  const Place<Problem>& place;
  const int group;
  const typename ChannelTable<Problem>::Fetched fetched;

  FXFUSE_INLINE Store(const Arguments& a, const Geometry& g, ChannelTable<Problem>& table, float* gathered, Outbox<Problem>& outbox,
                      const Place<Problem>& place, int group)
      : a(a), g(g), table(table), gathered(gathered), outbox(outbox), place(place), group(group),
        fetched(table.fetch(a.to, g, place)) {}

  // What needs no accumulators, and is made while the last products of a pass are on their way: where results go.
  static constexpr bool stages = Problem::in_turn && Problem::outbox && Problem::keeps && !Problem::gathers && !Problem::folds;
  struct Ready {
    Staging<Problem, typename Problem::Runs, Out, Problem::residues> where;
  };
  FXFUSE_INLINE void prepare(Ready& ready, int pass) {
    if constexpr (stages) {
      fill(pass);
      ready.where = {a.to, g, place.now(), extent_of<Problem>(g), Classes<Problem>(pass).each, group};
      ready.where.settle_all();
    }
  }
  FXFUSE_INLINE void fill(int pass) {
    if (Problem::by_pass || pass == 0) table.fill(fetched, group);
  }

  FXFUSE_INLINE void pass(float (&acc)[Problem::m_tiles][Problem::columns * Problem::residues / 2], int pass, const Ready& ready) {
    if constexpr (!stages) fill(pass);
    const Place<Problem> place = this->place.now();
    const Classes<Problem> classes(pass);
    const auto& residue = classes.each;
    auto kept = [&](int i, int r, int j, int e, int q) -> float& {
      return acc[i][(q * (Problem::columns / 8) + j) * 4 + r * 2 + e];
    };
    const Scaled<Problem, decltype(kept)> value{kept, table, place, group, fetched};
    constexpr int width = Problem::pair != 0 ? 2 : 1;
    constexpr bool reversed = Problem::pair < 0;
    using Runs = typename Problem::Runs;
    const Extent o = extent_of<Problem>(g);
    if constexpr (Problem::folds) {
      fold<Problem, Runs, Out, width, reversed>(a.to, g, place, o, residue, outbox, group, kept, value, a.expression, a.behind);
      return;
    }
    if constexpr (stages)
      stage_runs(ready.where, outbox, a.to, g, place, o, residue, group, value, a.expression);
    else
      deliver<Problem, Runs, Out, width, reversed>(a.to, g, place, o, residue, outbox, gathered, group, pass, Problem::passes, kept, value, a.expression);
  }
  FXFUSE_INLINE void finish() {}

  // What a warp sends of a warpgroup's part of a tile.
  static FXFUSE_INLINE void send(const Arguments& a, const Geometry& g, Outbox<Problem>& outbox, const Tile& part, int group) {
    const Extent o = extent_of<Problem>(g);
#pragma unroll 1
    for (int pass = 0; pass < Problem::passes; ++pass)
      send_runs<Problem, typename Problem::Runs>(outbox, a.to, g, part, o, Classes<Problem>(pass).each, group);
  }
};

// All residue classes of a position q become one value: a pool whose window and stride are the convolution's stride,
// or the first half of one whose window and stride are multiples of it. In registers, or, of a `merged` problem, by the
// matrix units; then `After`, and the store; or a reduction over channels of that, and `Behind`. Of a `monotone` problem only
// the largest and the smallest value go through `Before`, and the larger of both results is the maximum.
template <class Problem, class Out, class Combine, class Before, class After, class Behind>
struct Pool {
  struct Arguments {
    Destination<Out> to;
    alignas(8) Before before;
    alignas(8) After after;
    alignas(8) Behind behind;
    alignas(8) int pooled_d;  // extents of the result
    int pooled_h, pooled_w;
    float factor;  // of a sum
  };
  using Runs = typename Problem::Runs;
  const Arguments& a;
  const Geometry& g;
  ChannelTable<Problem>& table;
  float* gathered;
  Outbox<Problem>& outbox;
  const Place<Problem>& place;
  const int group;
  const typename ChannelTable<Problem>::Fetched fetched;
  float best[Problem::m_tiles][Problem::columns / 2];
  static constexpr int with_least = Problem::monotone ? 1 : 0;
  float least[1 + (Problem::m_tiles - 1) * with_least][1 + (Problem::columns / 2 - 1) * with_least];  // negated

  FXFUSE_INLINE Pool(const Arguments& a, const Geometry& g, ChannelTable<Problem>& table, float* gathered, Outbox<Problem>& outbox,
                     const Place<Problem>& place, int group)
      : a(a), g(g), table(table), gathered(gathered), outbox(outbox), place(place), group(group),
        fetched(table.fetch(a.to, g, place)) {
#pragma unroll
    for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
      for (int j = 0; j < Problem::columns / 2; ++j) {
        best[i][j] = Combine::zero();
        if constexpr (Problem::monotone) least[i][j] = Combine::zero();
      }
  }

  struct Ready {};
  FXFUSE_INLINE void prepare(Ready&, int) {}

  FXFUSE_INLINE void pass(float (&acc)[Problem::m_tiles][Problem::columns * Problem::residues / 2], int pass, const Ready&) {
    if (pass == 0) table.fill(fetched, group);
    if constexpr (Problem::merged) {
      conclude(acc);
      return;
    }
    const Place<Problem> place = this->place.now();
    auto kept = [&](int i, int r, int j, int e, int q) { return acc[i][(q * (Problem::columns / 8) + j) * 4 + r * 2 + e]; };
    const Scaled<Problem, decltype(kept)> value{kept, table, place, group, fetched};
    const Extent o = extent_of<Problem>(g);
#pragma unroll
    for (int q = 0; q < Problem::residues; ++q) {
      const Residue residue[1] = {Problem::residue(pass, q)};
      const uint32_t inside = inside_mask(g, place, o, residue);
      bool valid[Problem::m_tiles * 2];  // predicates, which are few
#pragma unroll
      for (int at = 0; at < Problem::m_tiles * 2; ++at) valid[at] = inside >> at & 1;
      auto combine = [&](int i, int r, int j, int e, float y) {
        float& z = best[i][j * 4 + r * 2 + e];
        if (valid[i * 2 + r]) {
          z = Combine::combine(z, y);
          if constexpr (Problem::monotone) {
            float& least_z = least[i][j * 4 + r * 2 + e];
            least_z = Combine::combine(least_z, -y);
          }
        }
      };
#pragma unroll
      for (int j = 0; j < Problem::columns / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if constexpr (Problem::bare || Problem::monotone) {
#pragma unroll
            for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
              for (int r = 0; r < 2; ++r) combine(i, r, j, e, kept(i, r, j, e, q));
          } else {
            schedule_barrier();
            const Results<Problem, decltype(value), Before> results(g, place, value, a.before, j, e);
#pragma unroll
            for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
              for (int r = 0; r < 2; ++r) combine(i, r, j, e, results(place, o, residue[0], valid[i * 2 + r], i, r, q));
          }
        }
    }
  }

  FXFUSE_INLINE void finish() {
    if constexpr (Problem::monotone) through_before();
    if constexpr (!Problem::merged) conclude(best);
  }

  // The larger result of the largest value and of the smallest one, in the place of the former. An accumulator's scale is
  // positive.
  FXFUSE_INLINE void through_before() {
    const Place<Problem> place = this->place.now();
    auto kept = [&](int i, int r, int j, int e, int q) {
      const int at = j * 4 + r * 2 + e;
      return q == 0 ? best[i][at] : -least[i][at];
    };
    const Scaled<Problem, decltype(kept)> value{kept, table, place, group, fetched};
#pragma unroll
    for (int j = 0; j < Problem::columns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        schedule_barrier();
        const Results<Problem, decltype(value), Before> results(g, place, value, a.before, j, e);
#pragma unroll
        for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
          for (int r = 0; r < 2; ++r)
            best[i][j * 4 + r * 2 + e] = Combine::combine(results(i, r, 0, 0, 0, 0), results(i, r, 1, 0, 0, 0));
      }
  }

  FXFUSE_INLINE void conclude(float (&combined)[Problem::m_tiles][Problem::columns / 2]) {
    const Place<Problem> place = this->place.now();
    auto kept = [&](int i, int r, int j, int e, int) { return Combine::scaled(combined[i][j * 4 + r * 2 + e], a.factor); };
    if constexpr (Problem::bare)
      conclude(combined, place, Scaled<Problem, decltype(kept)>{kept, table, place, group, fetched});
    else
      conclude(combined, place, made(kept));
  }
  template <class Value>
  FXFUSE_INLINE void conclude(float (&combined)[Problem::m_tiles][Problem::columns / 2], const Place<Problem>& place, const Value& value) {
    const Extent o{a.pooled_d, a.pooled_h, a.pooled_w, 1, 1, 1};
    const Residue residue[1] = {{0, 0, 0, 1}};
    auto kept = [&](int i, int r, int j, int e, int) -> float& { return combined[i][j * 4 + r * 2 + e]; };
    if constexpr (Problem::folds) {
      fold<Problem, Runs, Out, 1, false>(a.to, g, place, o, residue, outbox, group, kept, value, a.after, a.behind);
      return;
    }
    deliver<Problem, Runs, Out, 1, false>(a.to, g, place, o, residue, outbox, gathered, group, 0, 1, kept, value, a.after);
  }

  static FXFUSE_INLINE void send(const Arguments& a, const Geometry& g, Outbox<Problem>& outbox, const Tile& part, int group) {
    const Extent o{a.pooled_d, a.pooled_h, a.pooled_w, 1, 1, 1};
    const Residue residue[1] = {{0, 0, 0, 1}};
    send_runs<Problem, Runs>(outbox, a.to, g, part, o, residue, group);
  }
};

}  // namespace fxfuse
