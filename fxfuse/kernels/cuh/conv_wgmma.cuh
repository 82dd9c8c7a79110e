// A dense 3-D convolution, given as residue classes of taps, on Hopper's warpgroup matrix instructions.
//
// An output position o of a transposed convolution with stride s is o = s*q + r with a residue r per dim. It
// reads x[q + delta] for the taps of its residue class, and delta does not depend on q. So a thread block
// takes a box of positions q, brings x there with a halo into shared memory once, as rows of channels, and every
// tap multiplies the same rows through a shifted descriptor. Only weights stream.
//
// Rows of a matrix instruction are 8 groups of 8 consecutive w; columns are `columns` output channels of up to
// `residues` residue classes at a time: a pass. Or the other way round, `by_channel`: rows are 64 output channels of a class,
// columns the positions. What becomes of the accumulators is the epilogue's affair. One warp copies, two warpgroups
// multiply; where results go through an `outbox`, two more warps take them out. Both warpgroups have parts of one tile, and
// multiply them with the same weights at the same time. Or, `pingpong`, each is a team with tiles of its own, x of which
// comes from a warp of its own, and all weights stay: teams multiply by turns, and the matrix units have the products of
// one while the other works off its accumulators.
//
// `Problem` (emitted) has: Epilogue; Table, what that keeps in shared memory, and Outbox (conv_outbox.cuh); constants chunk
// (numbers of a row), chunk_channels (channels of these), columns, residues, m_tiles, accumulator_tiles, accumulators (of each), stages, stage_bytes, passes, x_buffers,
// samples, inner (conv_tiles.cuh), by_pass (a tile has one of the passes, all of which have as many bytes of weights),
// resident (x stays for all passes: it has one chunk), idle (some pass has no step), runs, slabs (of x along d that are told
// apart), by_slab (each of them is copied, waited for and given back by itself), in_turn (a tile's steps are those of every
// run of every pass, one behind the other), turns (and runs begin before the one in front has ended), even (all passes have
// as many classes), pingpong, chunk_weights (then from those of a chunk to the next one's, in units of 16 bytes); static
// functions pass_begin(i), step(i), run_begin(pass, i, slab) and residue(pass, i) that read its tables; wgmma, the instruction
// for a run of residues. Of an `exact` problem, which has windows, wgmma is that for a window; window(i), the columns of those
// of a run; windows, how many a thread has room for; together, steps whose products are made before any are added.
#pragma once
#include "conv_windows.cuh"

namespace fxfuse {

// Operands of positions that a warpgroup's instructions have: one per 64, or one for all where these are an instruction's
// columns.
template <class Problem>
constexpr int kRowTiles = Problem::by_channel && !Problem::exact ? 1 : Problem::m_tiles;

// The step that comes next, of a problem `in_turn`.
struct NextStep {
  int number;
  StepAddress step;
};

// What of the output lies in shared memory goes out from there: a warp per multiplying warpgroup.
template <class Problem, class Outbox>
FXFUSE_INLINE void conv_send(const Geometry& g, const typename Problem::Epilogue::Arguments& arguments, Outbox outbox, int group) {
  for (int index = first_tile(0); index < g.tiles; index = next_tile<Problem>(index))
    Problem::Epilogue::send(arguments, g, outbox, part_of(g, tile_at<Problem>(g, index), group), group);
  stored_bytes_read();  // or shared memory may be another block's
}

// The stage of weights that `ring` is at, when it is there: in units of 16 bytes.
template <class Problem>
FXFUSE_INLINE uint32_t begin_stage(uint32_t stages, Barriers<Problem>& barriers, const Ring& ring) {
  const uint32_t stage = stages + (Problem::pingpong ? 0 : ring.slot * (Problem::stage_bytes / 16));
  if (!Problem::pingpong) barrier_wait(&barriers.full[ring.slot], ring.phase);
  wgmma_fence();
  return stage;
}

// By all threads: the stage's products are done. There is one stage of a `pingpong` problem, and it stays.
template <class Problem>
FXFUSE_INLINE void give_back_stage(Barriers<Problem>& barriers, int stage, bool leader) {
  if (!Problem::pingpong && leader) barrier_arrive(&barriers.empty[stage]);
}

// All products are done: of the stage that `ring` is at, and of the one `before`, if there is one.
template <class Problem>
FXFUSE_INLINE void end_products(Barriers<Problem>& barriers, Ring& ring, int before, bool leader) {
  wgmma_wait<0>();
  if (before >= 0) give_back_stage(barriers, before, leader);
  give_back_stage(barriers, ring.slot, leader);
  ring.template next<Problem::stages>();
}

// The steps of a pass that multiply run `r` of residue classes; then those of the next runs. One loop per run, with
// nothing on its way at its end: ptxas serialises instructions whose accumulators meet others behind a branch.
template <class Problem, int r, class Meanwhile>
FXFUSE_INLINE void conv_run(float (&acc)[Problem::accumulator_tiles][Problem::accumulators],
                            const uint32_t (&rows)[kRowTiles<Problem>], uint32_t rows_high, const StepAddress* steps,
                            uint32_t stages, int pass, const Geometry& g, Slabs slabs, Barriers<Problem>& barriers, Ring& ring,
                            SlabRing& apart, NextStep& next, bool leader, Meanwhile meanwhile) {
  constexpr int row_bytes = Problem::chunk * 2;
  constexpr uint64_t weights_high = descriptor<row_bytes>(0, 8 * row_bytes) >> 32;
  constexpr bool in_turn = Problem::in_turn, last = r + 1 == Problem::runs;
  if constexpr (Problem::by_slab && Problem::runs > 1 && r == 0) apart.came = SlabRing::first(g, slabs);
  int begin = next.number, end = 0;
  if constexpr (!in_turn) begin = Problem::run_begin(pass, r, slabs.begin), end = Problem::run_begin(pass, r, slabs.end);
  if constexpr (Problem::slabs > 1) settle(begin), settle(end);  // read once, not for every step
  if (in_turn || (!Problem::idle && Problem::runs == 1 && Problem::slabs == 1) || begin < end) {
    int before = -1;  // the stage whose products were on their way when the current one began
    uint32_t stage = 0;
    int slab = 0, came = SlabRing::first(g, slabs), gone = came;  // by slab: the batch's, those that came and went
    if constexpr (Problem::by_slab && r > 0) came = apart.came;
    StepAddress step = in_turn ? next.step : steps[begin];
    int s = begin;
    bool goes_on;
    typename Windows<Problem, r>::Accumulators window;
#pragma unroll 1
    do {
      if (step.weights & kBegins) {
        if (s > begin) {
          if (before >= 0) give_back_stage(barriers, before, leader);
          before = ring.slot;
          ring.template next<Problem::stages>();
          if constexpr (Problem::by_slab && last)  // the products of smaller d are done
            for (; gone + g.first_planes <= slab; ++gone)
              if (leader) barrier_arrive(&barriers.x_empty[gone]);
        }
        if constexpr (Problem::by_slab)
          for (slab = step.weights / kSlab; came <= slab; ++came) barrier_wait(&barriers.x_full[came], apart.phase(came));
        stage = begin_stage<Problem>(stages, barriers, ring);
      }
      auto take = [&] {
        const StepAddress taken = step;
        ++s;
        goes_on = in_turn ? !(taken.weights & kLast) : s < end;
        step = steps[s];  // one more than there are is there
        return taken;
      };
      const StepAddress taken = take();
      const uint32_t weights = stage + (taken.weights & 0xffff), x = taken.x;
      const bool ends = taken.weights & kEnds;
      if constexpr (Problem::exact) {
        if (Problem::together > 2 && taken.weights & kFour)
          Windows<Problem, r>::multiply(acc, rows, rows_high, stage, {taken, take(), take(), take()}, window);
        else if (Problem::together > 1 && !ends)
          Windows<Problem, r>::multiply(acc, rows, rows_high, stage, {taken, take()}, window);
        else
          Windows<Problem, r>::multiply(acc, rows, rows_high, stage, {taken}, window);
      } else if constexpr (Problem::by_channel) {
        constexpr int first = Problem::run_first(r) * Problem::columns / 64, count = Problem::run_count(r) * Problem::columns / 64;
#pragma unroll
        for (int i = 0; i < count; ++i)
#pragma unroll
          for (int k = 0; k < Problem::chunk / 16; ++k)
            Problem::template wgmma<0, 0>(acc[first + i], weights_high << 32 | (weights + i * (64 * row_bytes / 16) + k * 2),
                                          (uint64_t)rows_high << 32 | (rows[0] + x + k * 2));
      } else {
#pragma unroll
        for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
          for (int k = 0; k < Problem::chunk / 16; ++k)
            Problem::template wgmma<Problem::run_first(r), Problem::run_count(r)>(
                acc[i], (uint64_t)rows_high << 32 | (rows[i] + x + k * 2), weights_high << 32 | (weights + k * 2));
      }
      if (ends && !Problem::exact) {
        wgmma_commit();
        wgmma_wait<1>();  // the products of the stage before are done
      }
    } while (goes_on);
    next = {s, step};
    if constexpr (in_turn && last) meanwhile();
    end_products<Problem>(barriers, ring, before, leader);
    if constexpr (Problem::by_slab) {
      if constexpr (last)
        for (; gone < came; ++gone)
          if (leader) barrier_arrive(&barriers.x_empty[gone]);
      if constexpr (Problem::runs == 1) apart.next(SlabRing::first(g, slabs), came);
      if constexpr (Problem::runs > 1) apart.came = came;
    }
  }
  if constexpr (Problem::by_slab && Problem::runs > 1 && last) {  // this run may have had no steps
    const int first = SlabRing::first(g, slabs);
    if (begin >= end)
      for (int k = first; k < apart.came; ++k)
        if (leader) barrier_arrive(&barriers.x_empty[k]);
    apart.next(first, apart.came);
  }
  if constexpr (r + 1 < Problem::runs)
    conv_run<Problem, r + 1>(acc, rows, rows_high, steps, stages, pass, g, slabs, barriers, ring, apart, next, leader, meanwhile);
}

// The steps of a pass of a problem that `turns`: all its runs, one behind the other, of which each begins, by 64 rows of
// the warpgroup, while the other rows' last products are on their way. The first step of a run is no part of a loop: ptxas
// serialises instructions whose accumulators meet those of others behind a branch.
template <class Problem, int r, class Meanwhile>
FXFUSE_INLINE void conv_turns(float (&acc)[Problem::accumulator_tiles][Problem::accumulators],
                              const uint32_t (&rows)[kRowTiles<Problem>], uint32_t rows_high, const StepAddress* steps,
                              uint32_t stages, Barriers<Problem>& barriers, Ring& ring, int before, NextStep& next, bool leader,
                              Meanwhile meanwhile) {
  constexpr int row_bytes = Problem::chunk * 2;
  constexpr uint64_t weights_high = descriptor<row_bytes>(0, 8 * row_bytes) >> 32;
  auto multiply = [&](int i, uint32_t weights, uint32_t x) {
#pragma unroll
    for (int k = 0; k < Problem::chunk / 16; ++k)
      Problem::template wgmma<Problem::run_first(r), Problem::run_count(r)>(
          acc[i], (uint64_t)rows_high << 32 | (rows[i] + x + k * 2), weights_high << 32 | (weights + k * 2));
    wgmma_commit();
  };
  StepAddress step = next.step;
  auto take = [&] {  // the step, and the next one: one more than there are is there
    const StepAddress taken = step;
    step = steps[++next.number];
    return taken;
  };
  auto give_back = [&] {  // the stage before, whose products are done
    if (before >= 0) give_back_stage(barriers, before, leader);
    before = -1;
  };
  auto leave_stage = [&] {  // while its products may be on their way
    give_back();
    before = ring.slot;
    ring.template next<Problem::stages>();
  };
  if (r > 0) leave_stage();
  uint32_t stage = begin_stage<Problem>(stages, barriers, ring);
  StepAddress taken = take();
#pragma unroll
  for (int i = 0; i < Problem::m_tiles; ++i) {
    if (r > 0) wgmma_wait<Problem::m_tiles - 1>(), wgmma_fence();  // the products of these rows are done
    multiply(i, stage + (taken.weights & 0xffff), taken.x);
  }
  give_back();
#pragma unroll 1
  while (!(taken.weights & kLast)) {
    if (step.weights & kBegins) {
      leave_stage();
      stage = begin_stage<Problem>(stages, barriers, ring);
    }
    taken = take();
#pragma unroll
    for (int i = 0; i < Problem::m_tiles; ++i) multiply(i, stage + (taken.weights & 0xffff), taken.x);
    if (!Problem::pingpong) wgmma_wait<Problem::m_tiles>();  // the products of the steps before are done
  }
  next.step = step;
  if constexpr (r + 1 < Problem::runs) {
    conv_turns<Problem, r + 1>(acc, rows, rows_high, steps, stages, barriers, ring, before, next, leader, meanwhile);
  } else {
    meanwhile();
    end_products<Problem>(barriers, ring, before, leader);
  }
}

template <class Problem>
FXFUSE_INLINE void conv_consume(const Geometry& g, const typename Problem::Epilogue::Arguments& arguments, typename Problem::Table& table,
                                const StepAddress* steps, float* gathered, typename Problem::Outbox outbox, uint8_t* x, uint8_t* stages,
                                Barriers<Problem>& all, Common<Problem>& common, int group, int team) {
  constexpr int row_bytes = Problem::chunk * 2;
  Barriers<Problem>* settled = &all;
  settle_shared(settled), settle_shared(steps);
  Barriers<Problem>& barriers = *settled;
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  const bool leader = (threadIdx.x & 127) == 0;
  Ring xs, ws;
  SlabRing apart;
  float acc[Problem::accumulator_tiles][Problem::accumulators];
  typename Problem::Place place(g, group, warp, lane);
  const uint32_t rows_high = (uint32_t)(descriptor<row_bytes>(0, g.row_group * row_bytes) >> 32);
  const uint32_t weights = (uint32_t)descriptor<row_bytes>(shared_address(stages), 0);
  auto done_with_x = [&] {  // the next tile's is copied while accumulators become results
    if (leader) barrier_arrive(&barriers.x_empty[xs.slot]);
    xs.template next<Problem::x_buffers>();
  };
  uint32_t bases[kRowTiles<Problem>];
#pragma unroll
  for (int i = 0; i < kRowTiles<Problem>; ++i) {
    bases[i] = (uint32_t)descriptor<row_bytes>(
        shared_address(x) + g.row_base[group * Problem::m_tiles + i] * row_bytes, 0);
    asm volatile("" : "+r"(bases[i]));  // not to be computed again for every step
  }
  Turn<Problem> turn(g, common, team);
  if (Problem::pingpong && first_tile(team) < g.tiles) barrier_wait(&common.weights, 0);
  for (int index = first_tile(team); index < g.tiles; index = next_tile<Problem>(index)) {
    const Tile tile = tile_at<Problem>(g, index);
    const Slabs slabs = slabs_of<Problem>(g, tile, low_of<Problem>(g, index));
    place.move(g, tile, group, warp);
    NextStep next{0, steps[0]};
    typename Problem::Epilogue epilogue(arguments, g, table, gathered, outbox, place, group);
#pragma unroll 1
    for (int pass = first_pass<Problem>(index); pass < end_of_passes<Problem>(index); ++pass) {
#pragma unroll
      for (int i = 0; i < Problem::accumulator_tiles; ++i)
#pragma unroll
        for (int j = 0; j < Problem::accumulators; ++j) acc[i][j] = 0.f;
      typename Problem::Epilogue::Ready ready;
      auto meanwhile = [&] {  // the last products are on their way
        if constexpr (Problem::pingpong && Problem::in_turn) turn.end(lane);
        epilogue.prepare(ready, pass);
      };
      const int begin = Problem::pass_begin(pass), end = Problem::pass_begin(pass + 1);
      if constexpr (Problem::pingpong) {
        if (!Problem::resident || pass == 0) barrier_wait(&barriers.x_full[xs.slot], xs.phase);
        turn.begin();
      }
      if (!Problem::idle || begin < end || (Problem::resident && pass == 0)) {
        int chunk = 0;
#pragma unroll 1
        do {  // at least once, or ptxas makes another epilogue for no products at all
          if (!Problem::by_slab && (!Problem::resident || pass == 0)) barrier_wait(&barriers.x_full[xs.slot], xs.phase);
          uint32_t rows[kRowTiles<Problem>];  // low words of descriptors; a shift adds to them
#pragma unroll
          for (int i = 0; i < kRowTiles<Problem>; ++i)
            rows[i] = bases[i] + xs.slot * (g.region_stride / 16) + place.box.skip * (row_bytes / 16);
          if constexpr (Problem::turns)
            conv_turns<Problem, 0>(acc, rows, rows_high, steps, weights + chunk * Problem::chunk_weights, barriers, ws, -1, next, leader, meanwhile);
          else
            conv_run<Problem, 0>(acc, rows, rows_high, steps, weights + chunk * Problem::chunk_weights, pass, g, slabs, barriers, ws, apart, next, leader, meanwhile);
          if (!Problem::by_slab && (!Problem::resident || pass + 1 == Problem::passes)) done_with_x();
        } while (++chunk < g.chunks);
      } else if (Problem::resident && pass + 1 == Problem::passes) {
        done_with_x();
      }
      if constexpr (Problem::pingpong && !Problem::in_turn) turn.end(lane);
      epilogue.pass(acc, pass, ready);
    }
    epilogue.finish();
  }
}

template <class Problem>
FXFUSE_INLINE void conv_wgmma(const TensorMap* map, const uint8_t* weights, const Geometry& g,
                              const typename Problem::Epilogue::Arguments& arguments) {
  using Outbox = typename Problem::Outbox;
  static_assert(!(Problem::pingpong && Problem::outbox), "a team's warp copies where another one would send");
  extern __shared__ uint8_t raw[];
  __shared__ Barriers<Problem> barriers[kTeams<Problem>];
  __shared__ typename Outbox::Shared out[Outbox::number];
  __shared__ Common<Problem> common;
  __shared__ typename Problem::Table table;
  __shared__ StepAddress steps[Problem::steps + 1];
  uint8_t* stages = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
  uint8_t* x = stages + Problem::stages * Problem::stage_bytes;
  const int x_bytes = Problem::x_buffers * g.region_stride;
  uint8_t* rest = x + kTeams<Problem> * x_bytes;
  auto outbox = [&](int group) { return Outbox(g, rest + group % Outbox::number * Outbox::bytes(g), out[group % Outbox::number]); };
  if (threadIdx.x == 0) {
    prefetch_map(map);
    for (Barriers<Problem>& one : barriers) one.init();
    table.init(), common.init();
    for (typename Outbox::Shared& one : out) one.init();
    barrier_init_fence();
  }
  for (int i = threadIdx.x; i < Problem::steps; i += kThreads) {
    const Step s = Problem::step(i);
    const int rows = ((s.d * g.region_h + (Problem::inner == 1 ? s.w : s.h)) * g.region_w + (Problem::inner == 1 ? s.h : s.w)) * Problem::samples;
    const uint32_t ends = (s.last & 1 ? kEnds : 0) | (s.last & 2 ? kLast : 0) | (s.last & 4 ? kFour : 0);
    const uint32_t where = (s.batch ? kBegins : 0) | ends | (Problem::by_slab ? s.d * kSlab : 0);
    steps[i] = {(uint32_t)(rows * (Problem::chunk * 2 / 16)), s.weights | where};
  }
  __syncthreads();
  begin_dependent();
  if (threadIdx.x < 128) {
    registers_down<Problem::outbox ? 72 : Problem::pingpong ? 40 : 24>();
    if (Problem::outbox && threadIdx.x >= 64) conv_send<Problem>(g, arguments, outbox(threadIdx.x / 32 - 2), threadIdx.x / 32 - 2);
    const int team = threadIdx.x / 32;
    if (team < kTeams<Problem> && threadIdx.x % 32 == 0)
      conv_copy<Problem>(map, weights, g, x + team * x_bytes, stages, barriers[team], common, team);
  } else {
    registers_up<Problem::outbox ? 216 : Problem::pingpong ? 232 : 240>();
    int group = threadIdx.x / 128 - 1;
    if (Problem::pingpong) group = __shfl_sync(~0u, group, 0);  // the same all over a warp, or ptxas serialises the products
    const int team = Problem::pingpong ? group : 0;
    conv_consume<Problem>(g, arguments, table, steps, (float*)(rest + Outbox::number * Outbox::bytes(g)), outbox(group), x + team * x_bytes,
                          stages, barriers[team], common, group, team);
  }
}

}  // namespace fxfuse
