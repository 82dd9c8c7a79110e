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
// multiply; where results go through an `outbox`, two more warps take them out.
//
// Of outputs of few positions, `samples` of x (8 to 64: a set) lie side by side in the region: row (d, outer, inner, sample),
// where `inner` says which of h (1) and w (2) is the inner one. The 64 rows of an instruction are then all samples of
// 64 / samples neighbours along that, and a step's shift is so many times longer: no row is one of the halo's.
//
// `Problem` (emitted) has: Epilogue; Table, what that keeps in shared memory, and Outbox (conv_outbox.cuh); constants chunk
// (channels), columns, residues, m_tiles, accumulator_tiles, accumulators (of each), stages, stage_bytes, passes, x_buffers,
// samples, inner, by_pass (a tile has one of the passes, all of which have as many bytes of weights),
// resident (x stays for all passes: it has one chunk), idle (some pass has no step), runs, slabs (of x along d that are told
// apart), by_slab (each of them is copied, waited for and given back by itself), in_turn (a tile's steps are those of every
// run of every pass, one behind the other), even (all passes have as many classes); static functions pass_begin(i),
// step(i), run_begin(pass, i, slab) and residue(pass, i) that read its tables; wgmma, the instruction for a run of residues.
#pragma once
#include "divisor.cuh"
#include "ptx.cuh"

namespace fxfuse {

// One tap of one or more residue classes, contiguous among the pass's: from `first`, `count` of them.
struct Step {
  unsigned char d, h, w;         // delta less the least delta: below 256, as are sizes of what a copy brings
  unsigned char last;            // 1: of its stage; 3: and of its run
  unsigned short weights;        // offset in the stage, in units of 16 bytes
  unsigned short batch;          // units of 16 bytes of the stage that starts here; 0: the stage goes on
};

struct Geometry {
  int samples, groups, column_tiles, tiles_d, tiles_h, tiles_w, tiles;
  int tile_d, tile_h, tile_w;        // positions q of a tile; in a linear one, tile_h rows of a plane of the region
  int box_d, box_h, box_w;           // and of the part of one warpgroup; or of a tile whose rows both share
  int half_d, half_h, half_w;        // from the first warpgroup's part to the second's
  int linear;                        // consecutive rows of a plane, from anywhere: its width is the output's
  int over;                          // positions of the row behind the box, whose results complete its last sectors
  int region_h, region_w;            // of the box with halo, rows of shared memory; of sets the outer and the inner size
  int copied_h, copied_w;            // of what a copy brings: other sizes where x lies there as planes
  int region_bytes, region_stride;   // bytes that a copy brings; bytes from one buffer to the next
  int low_d, low_h, low_w;           // the least delta per dim
  int row_group;                     // rows from one group of eight to the next
  int row_base[16];                  // first row of each m64 tile
  int part_rows;                     // of the region, from where one warpgroup's places are counted to the other's
  int chunks;                        // of input channels, per group
  int out_d, out_h, out_w;           // extents of the convolution's output
  int out_channels;                  // per group
  int weight_bytes;                  // of one group and column tile, packed
  int outbox_blocks;                 // of a multiplying warpgroup
  int in_d;                          // planes of x
  int first_planes;                  // by slab, planes of the region in the first one: tile_d, or all where they come at once
  Divisor by_columns, by_w, by_h, by_d, by_groups;  // column_tiles, tiles_w, tiles_h, tiles_d, groups
  Divisor by_region_w, by_region_h, by_box_h;
};

// A tile's place: its sample, group, tile of output channels in the group, first position; which of the sample's it is;
// and how many rows of the region are in front of a linear one's. Of a set the first sample.
struct Tile {
  int n, group, column, d, h, w, number, skip;
};

template <class Problem>
FXFUSE_INLINE Tile tile_at(const Geometry& g, int index) {
  auto next = [&](const Divisor& by, int count) {
    const int rest = by.of(index), found = index - rest * count;
    index = rest;
    return found;
  };
  Tile t;
  if constexpr (Problem::by_pass) index /= Problem::passes;
  t.column = next(g.by_columns, g.column_tiles);
  const int w = next(g.by_w, g.tiles_w), h = next(g.by_h, g.tiles_h), d = next(g.by_d, g.tiles_d);
  t.number = (d * g.tiles_h + h) * g.tiles_w + w;
  t.w = w * g.tile_w, t.h = h * g.tile_h, t.d = d * g.tile_d, t.skip = 0;
  if (g.linear) {
    const int row = g.by_region_w.of(t.h);
    t.skip = t.h - row * g.region_w, t.h = row;
  }
  t.group = next(g.by_groups, g.groups);
  t.n = index * Problem::samples;
  return t;
}

// The passes of a tile.
template <class Problem>
FXFUSE_INLINE int first_pass(int index) {
  return Problem::by_pass ? index % Problem::passes : 0;
}
template <class Problem>
FXFUSE_INLINE int end_of_passes(int index) {
  return Problem::by_pass ? index % Problem::passes + 1 : Problem::passes;
}

// A warpgroup's part of it.
FXFUSE_INLINE Tile part_of(const Geometry& g, Tile t, int group) {
  t.d += group * g.half_d, t.h += group * g.half_h, t.w += group * g.half_w;
  return t;
}

// The least delta per dim: where x of a tile begins. By pass that of its own taps, which reach less far.
struct Low {
  int d, h, w;
};
template <class Problem>
FXFUSE_INLINE Low low_of(const Geometry& g, int index) {
  if constexpr (Problem::by_pass) return Problem::low(index % Problem::passes);
  return {g.low_d, g.low_h, g.low_w};
}

// Slabs of x that the steps of a tile read, by the d of the steps: those from `begin` to `end` have planes of x, the others
// are padding. Products with them are left out, where they are told apart.
struct Slabs {
  int begin, end;
};

template <class Problem>
FXFUSE_INLINE Slabs slabs_of(const Geometry& g, const Tile& t, const Low& low) {
  if constexpr (Problem::slabs == 1) return {0, 1};
  const int first = t.d + low.d, begin = 1 - g.tile_d - first, end = g.in_d - first;
  return {min(max(begin, 0), Problem::slabs), min(max(end, 0), Problem::slabs)};
}

constexpr int kConsumers = 2;                     // warpgroups that multiply
constexpr int kThreads = 128 * (kConsumers + 1);  // and one that copies

// Of the buffers of x, or of the slabs of the only one, and of weights.
template <class Problem>
struct Barriers {
  static constexpr int of_x = Problem::by_slab ? Problem::slabs : Problem::x_buffers;
  uint64_t x_full[of_x], x_empty[of_x];
  uint64_t full[Problem::stages], empty[Problem::stages];
  FXFUSE_INLINE void init() {
    for (int i = 0; i < of_x; ++i) barrier_init(&x_full[i], 1), barrier_init(&x_empty[i], kConsumers);
    for (int i = 0; i < Problem::stages; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], kConsumers);
  }
};

// Operands of positions that a warpgroup's instructions have: one per 64, or one for all where positions are columns.
template <class Problem>
constexpr int kRowTiles = Problem::by_channel ? 1 : Problem::m_tiles;

struct Ring {
  int slot = 0, phase = 0;
  FXFUSE_INLINE void next(int size) {
    if (++slot == size) slot = 0, phase ^= 1;
  }
  template <int size>
  FXFUSE_INLINE void next() {
    next(size);
  }
};

// Slabs of x that come and go one by one. The first one is what the first positions along d and the least delta read; each
// of the others is the plane that the next delta needs, too.
struct SlabRing {
  uint32_t phases = 0;  // a bit per slab
  int came = 0;         // of the slabs of a chunk those that an earlier run of steps has waited for
  static FXFUSE_INLINE int first(const Geometry& g, Slabs slabs) { return max(slabs.begin - g.first_planes + 1, 0); }
  FXFUSE_INLINE int phase(int slab) const { return phases >> slab & 1; }
  FXFUSE_INLINE void next(int begin, int end) { phases ^= (1u << end) - (1u << begin); }
};

// Copies slab `k` to its place in x; `copy(to, barrier, plane)` brings one plane of the region, or all.
template <class Problem, class Copy>
FXFUSE_INLINE void copy_slab(const Geometry& g, int k, uint8_t* x, Barriers<Problem>& barriers, SlabRing& ring, Copy copy) {
  const int planes = g.tile_d + Problem::slabs - 1, each = g.first_planes == planes ? planes : 1;
  const int begin = k == 0 ? 0 : min(g.first_planes + k - 1, planes), end = min(g.first_planes + k, planes);
  const int bytes = g.region_h * g.region_w * (Problem::samples * Problem::chunk * 2);
  barrier_wait(&barriers.x_empty[k], ring.phase(k) ^ 1);
  barrier_expect(&barriers.x_full[k], (end - begin) * bytes);
  for (int plane = begin; plane < end; plane += each) copy(x + plane * bytes, &barriers.x_full[k], plane);
  ring.next(k, k + 1);
}

template <class Problem>
FXFUSE_INLINE void conv_copy(const TensorMap* map, const uint8_t* weights, const Geometry& g, uint8_t* x, uint8_t* stages,
                             Barriers<Problem>& barriers) {
  Ring xs, ws;
  SlabRing apart;
  bulk_after_stores();
  for (int index = blockIdx.x; index < g.tiles; index += gridDim.x) {
    const Tile t = tile_at<Problem>(g, index);
    const Low low = low_of<Problem>(g, index);
    const Slabs slabs = slabs_of<Problem>(g, t, low);
    const uint8_t* from = weights + (int64_t)(t.group * g.column_tiles + t.column) * g.weight_bytes;
    if constexpr (Problem::by_pass) from += index % Problem::passes * (g.weight_bytes / Problem::passes);
    for (int pass = first_pass<Problem>(index); pass < end_of_passes<Problem>(index); ++pass) {
      const int begin = Problem::pass_begin(pass), end = Problem::pass_begin(pass + 1);
      if (begin == end && !(Problem::resident && pass == 0)) continue;
      for (int chunk = 0; chunk < g.chunks; ++chunk) {
        int source = t.group * g.chunks + chunk, slab = SlabRing::first(g, slabs);
        if (Problem::exact) {  // high, high, low: against high, low, high of the weights
          const int part = g.chunks / 3, which = chunk / part;
          source = (which == 2 ? g.groups * part : 0) + t.group * part + chunk - which * part;
        }
        auto copy = [&](uint8_t* to, uint64_t* full, int plane) {
          if constexpr (Problem::samples == 1) {
            copy_box(to, map, full, source * Problem::chunk, t.w + low.w, t.h + low.h, t.d + low.d + plane, t.n);
          } else {  // of a map whose dims are in the order of the rows
            const int h = t.h + low.h, w = t.w + low.w;
            copy_box(to, map, full, source * Problem::chunk, t.n, Problem::inner == 1 ? h : w, Problem::inner == 1 ? w : h,
                     t.d + low.d + plane);
          }
        };
        if (!Problem::by_slab && (!Problem::resident || pass == 0)) {
          barrier_wait(&barriers.x_empty[xs.slot], xs.phase ^ 1);
          barrier_expect(&barriers.x_full[xs.slot], g.region_bytes);
          copy(x + xs.slot * g.region_stride, &barriers.x_full[xs.slot], 0);
          xs.template next<Problem::x_buffers>();
        }
        for (int s = begin; s < end; ++s) {
          const Step step = Problem::step(s);
          const uint32_t bytes = step.batch * 16u;
          if (bytes == 0) continue;
          if (Problem::slabs == 1 || (step.d >= slabs.begin && step.d < slabs.end)) {
            if constexpr (Problem::by_slab)
              for (; slab <= step.d; ++slab) copy_slab<Problem>(g, slab, x, barriers, apart, copy);
            barrier_wait(&barriers.empty[ws.slot], ws.phase ^ 1);
            barrier_expect(&barriers.full[ws.slot], bytes);
            copy_bytes(stages + ws.slot * Problem::stage_bytes, from, bytes, &barriers.full[ws.slot]);
            ws.template next<Problem::stages>();
          }
          from += bytes;
        }
      }
    }
  }
}

// A step as the multiplying warpgroups read it, from shared memory.
struct StepAddress {
  uint32_t x;        // units of 16 bytes that the rows are shifted by
  uint32_t weights;  // units of 16 bytes from the stage's begin; kBegins and kEnds where a stage does; kLast where a run ends;
                     // kSlab times its d
};
constexpr uint32_t kBegins = 1u << 16, kEnds = 1u << 17, kLast = 1u << 18, kSlab = 1u << 19;

// The step that comes next, of a problem `in_turn`.
struct NextStep {
  int number;
  StepAddress step;
};

// What of the output lies in shared memory goes out from there: a warp per multiplying warpgroup.
template <class Problem, class Outbox>
FXFUSE_INLINE void conv_send(const Geometry& g, const typename Problem::Epilogue::Arguments& arguments, Outbox outbox, int group) {
  for (int index = blockIdx.x; index < g.tiles; index += gridDim.x)
    Problem::Epilogue::send(arguments, g, outbox, part_of(g, tile_at<Problem>(g, index), group), group);
  stored_bytes_read();  // or shared memory may be another block's
}

// Adds the accumulators of a run to sums that are kept as float32 should be, and empties them: the matrix units
// truncate as they accumulate.
template <class Problem, int r>
FXFUSE_INLINE void promote(float (&acc)[Problem::accumulator_tiles][Problem::accumulators],
                           float (&sum)[Problem::accumulator_tiles][Problem::accumulators]) {
  constexpr int first = Problem::run_first(r) * Problem::columns, end = first + Problem::run_count(r) * Problem::columns;
  constexpr bool by_channel = Problem::by_channel;  // then the run's channels are some of the tiles
#pragma unroll
  for (int i = by_channel ? first / 64 : 0; i < (by_channel ? end / 64 : Problem::accumulator_tiles); ++i)
#pragma unroll
    for (int j = by_channel ? 0 : first / 2; j < (by_channel ? Problem::accumulators : end / 2); ++j)
      sum[i][j] += acc[i][j], acc[i][j] = 0.f;
}

// The steps of a pass that multiply run `r` of residue classes; then those of the next runs. One loop per run, with
// nothing on its way at its end: ptxas serialises instructions whose accumulators meet others behind a branch.
template <class Problem, int r, class Meanwhile>
FXFUSE_INLINE void conv_run(float (&acc)[Problem::accumulator_tiles][Problem::accumulators],
                            float (&sum)[Problem::accumulator_tiles][Problem::accumulators],
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
#pragma unroll 1
    do {
      if (step.weights & kBegins) {
        if (s > begin) {
          if (before >= 0 && leader) barrier_arrive(&barriers.empty[before]);
          before = ring.slot;
          ring.template next<Problem::stages>();
          if constexpr (Problem::by_slab && last)  // the products of smaller d are done
            for (; gone + g.first_planes <= slab; ++gone)
              if (leader) barrier_arrive(&barriers.x_empty[gone]);
        }
        if constexpr (Problem::by_slab)
          for (slab = step.weights / kSlab; came <= slab; ++came) barrier_wait(&barriers.x_full[came], apart.phase(came));
        stage = stages + ring.slot * (Problem::stage_bytes / 16);
        barrier_wait(&barriers.full[ring.slot], ring.phase);
        wgmma_fence();
      }
      const uint32_t weights = stage + (step.weights & 0xffff), x = step.x;
      const bool ends = step.weights & kEnds;
      ++s;
      goes_on = in_turn ? !(step.weights & kLast) : s < end;
      step = steps[s];  // one more than there are is there
      if constexpr (Problem::by_channel) {
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
      if (ends) {
        wgmma_commit();
        if constexpr (Problem::exact) {
          wgmma_wait<0>();
          promote<Problem, r>(acc, sum);
        } else {
          wgmma_wait<1>();  // the products of the stage before are done
        }
      }
    } while (goes_on);
    next = {s, step};
    if constexpr (in_turn && last) meanwhile();
    wgmma_wait<0>();
    if (before >= 0 && leader) barrier_arrive(&barriers.empty[before]);
    if (leader) barrier_arrive(&barriers.empty[ring.slot]);
    ring.template next<Problem::stages>();
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
    conv_run<Problem, r + 1>(acc, sum, rows, rows_high, steps, stages, pass, g, slabs, barriers, ring, apart, next, leader, meanwhile);
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
  if (r > 0) {
    if (before >= 0 && leader) barrier_arrive(&barriers.empty[before]);
    before = ring.slot;
    ring.template next<Problem::stages>();
  }
  uint32_t stage = stages + ring.slot * (Problem::stage_bytes / 16);
  barrier_wait(&barriers.full[ring.slot], ring.phase);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < Problem::m_tiles; ++i) {
    if (r > 0) wgmma_wait<Problem::m_tiles - 1>(), wgmma_fence();  // these rows' products are done
    multiply(i, stage + (step.weights & 0xffff), step.x);
  }
  if (r > 0 && leader) barrier_arrive(&barriers.empty[before]);
  before = -1;
  bool goes_on = !(step.weights & kLast);
  step = steps[++next.number];
#pragma unroll 1
  while (goes_on) {
    if (step.weights & kBegins) {
      if (before >= 0 && leader) barrier_arrive(&barriers.empty[before]);
      before = ring.slot;
      ring.template next<Problem::stages>();
      stage = stages + ring.slot * (Problem::stage_bytes / 16);
      barrier_wait(&barriers.full[ring.slot], ring.phase);
      wgmma_fence();
    }
    const uint32_t weights = stage + (step.weights & 0xffff), x = step.x;
    goes_on = !(step.weights & kLast);
    step = steps[++next.number];  // one more than there are is there
#pragma unroll
    for (int i = 0; i < Problem::m_tiles; ++i) multiply(i, weights, x);
    wgmma_wait<Problem::m_tiles>();
  }
  next.step = step;
  if constexpr (r + 1 < Problem::runs) {
    conv_turns<Problem, r + 1>(acc, rows, rows_high, steps, stages, barriers, ring, before, next, leader, meanwhile);
  } else {
    meanwhile();
    wgmma_wait<0>();
    if (before >= 0 && leader) barrier_arrive(&barriers.empty[before]);
    if (leader) barrier_arrive(&barriers.empty[ring.slot]);
    ring.template next<Problem::stages>();
  }
}

template <class Problem>
FXFUSE_INLINE void conv_consume(const Geometry& g, const typename Problem::Epilogue::Arguments& arguments, typename Problem::Table& table,
                                const StepAddress* steps, float* gathered, typename Problem::Outbox outbox, uint8_t* x, uint8_t* stages, Barriers<Problem>& all) {
  constexpr int row_bytes = Problem::chunk * 2;
  Barriers<Problem>* settled = &all;
  settle_shared(settled), settle_shared(steps);
  Barriers<Problem>& barriers = *settled;
  const int group = threadIdx.x / 128 - 1, lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  const bool leader = (threadIdx.x & 127) == 0;
  Ring xs, ws;
  SlabRing apart;
  float acc[Problem::accumulator_tiles][Problem::accumulators];
  float sum[Problem::accumulator_tiles][Problem::accumulators];  // of an exact problem
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
  for (int index = blockIdx.x; index < g.tiles; index += gridDim.x) {
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
        for (int j = 0; j < Problem::accumulators; ++j) acc[i][j] = 0.f, sum[i][j] = 0.f;
      typename Problem::Epilogue::Ready ready;
      auto meanwhile = [&] { epilogue.prepare(ready, pass); };  // the last products end
      const int begin = Problem::pass_begin(pass), end = Problem::pass_begin(pass + 1);
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
            conv_turns<Problem, 0>(acc, rows, rows_high, steps, weights, barriers, ws, -1, next, leader, meanwhile);
          else
            conv_run<Problem, 0>(acc, sum, rows, rows_high, steps, weights, pass, g, slabs, barriers, ws, apart, next, leader, meanwhile);
          if (!Problem::by_slab && (!Problem::resident || pass + 1 == Problem::passes)) done_with_x();
        } while (++chunk < g.chunks);
      } else if (Problem::resident && pass + 1 == Problem::passes) {
        done_with_x();
      }
      if constexpr (Problem::exact)
        epilogue.pass(sum, pass, ready);
      else
        epilogue.pass(acc, pass, ready);
    }
    epilogue.finish();
  }
}

template <class Problem>
FXFUSE_INLINE void conv_wgmma(const TensorMap* map, const uint8_t* weights, const Geometry& g,
                              const typename Problem::Epilogue::Arguments& arguments) {
  using Outbox = typename Problem::Outbox;
  extern __shared__ uint8_t raw[];
  __shared__ Barriers<Problem> barriers;
  __shared__ typename Outbox::Shared out[Outbox::number];
  __shared__ typename Problem::Table table;
  __shared__ StepAddress steps[Problem::steps + 1];
  uint8_t* stages = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
  uint8_t* x = stages + Problem::stages * Problem::stage_bytes;
  uint8_t* rest = x + Problem::x_buffers * g.region_stride;
  auto outbox = [&](int group) { return Outbox(g, rest + group % Outbox::number * Outbox::bytes(g), out[group % Outbox::number]); };
  if (threadIdx.x == 0) {
    prefetch_map(map);
    barriers.init(), table.init();
    for (typename Outbox::Shared& one : out) one.init();
    barrier_init_fence();
  }
  for (int i = threadIdx.x; i < Problem::steps; i += kThreads) {
    const Step s = Problem::step(i);
    const int rows = ((s.d * g.region_h + (Problem::inner == 1 ? s.w : s.h)) * g.region_w + (Problem::inner == 1 ? s.h : s.w)) * Problem::samples;
    const uint32_t ends = (s.last & 1 ? kEnds : 0) | (s.last & 2 ? kLast : 0);
    const uint32_t where = (s.batch ? kBegins : 0) | ends | (Problem::by_slab ? s.d * kSlab : 0);
    steps[i] = {(uint32_t)(rows * (Problem::chunk * 2 / 16)), s.weights | where};
  }
  __syncthreads();
  begin_dependent();
  if (threadIdx.x < 128) {
    registers_down<Problem::outbox ? 72 : 24>();
    if (Problem::outbox && threadIdx.x >= 64) conv_send<Problem>(g, arguments, outbox(threadIdx.x / 32 - 2), threadIdx.x / 32 - 2);
    if (threadIdx.x == 0) conv_copy<Problem>(map, weights, g, x, stages, barriers);
  } else {
    registers_up<Problem::outbox ? 216 : 240>();
    conv_consume<Problem>(g, arguments, table, steps, (float*)(rest + Outbox::number * Outbox::bytes(g)), outbox(threadIdx.x / 128 - 1), x, stages, barriers);
  }
}

}  // namespace fxfuse
