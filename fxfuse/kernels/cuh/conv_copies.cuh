// What a warp copies into shared memory for those that multiply: x, and weights of the steps.
#pragma once
#include "conv_tiles.cuh"

namespace fxfuse {

// One tap of one or more residue classes, contiguous among the pass's: from `first`, `count` of them.
struct Step {
  unsigned char d, h, w;         // delta less the least delta: below 256, as are sizes of what a copy brings
  unsigned char last;            // 1: of its stage; 2: of its run; 4: first of four that are taken together
  unsigned short weights;        // offset in the stage, in units of 16 bytes
  unsigned short batch;          // units of 16 bytes of the stage that starts here; 0: the stage goes on
};

// Of the buffers of x, or of the slabs of the only one, and of weights.
template <class Problem>
struct Barriers {
  static constexpr int of_x = Problem::by_slab ? Problem::slabs : Problem::x_buffers;
  uint64_t x_full[of_x], x_empty[of_x];
  uint64_t full[Problem::stages], empty[Problem::stages];
  FXFUSE_INLINE void init() {
    for (int i = 0; i < of_x; ++i) barrier_init(&x_full[i], 1), barrier_init(&x_empty[i], kSharing<Problem>);
    for (int i = 0; i < Problem::stages; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], kSharing<Problem>);
  }
};

// What teams have in common: that all weights are there, and whose turn it is to multiply (by passes that each has done).
template <class Problem>
struct Common {
  uint64_t weights, done[kTeams<Problem>];
  FXFUSE_INLINE void init() {
    barrier_init(&weights, 1);
    for (uint64_t& one : done) barrier_init(&one, 4);  // a team's warps, of which none is two turns behind then
  }
};

// A team's turns to multiply: the first team begins, then each waits for the other's last one, as long as that has any,
// and tells of its own as long as the other one waits for them.
template <class Problem>
struct Turn {
  Common<Problem>& common;
  int team, left, awaited, phase = 0;  // turns that the other team will have; of its own those that are waited for
  bool first;
  FXFUSE_INLINE Turn(const Geometry& g, Common<Problem>& common, int team) : common(common), team(team), first(team == 0) {
    const int step = kTeams<Problem> * (int)gridDim.x;
    left = Problem::pingpong ? (g.tiles - first_tile(team ^ 1) + step - 1) / step * Problem::passes : 0;
    awaited = left - team;  // the first team does not wait for its first turn
  }
  FXFUSE_INLINE void begin() {
    if (!first && left > 0) barrier_wait(&common.done[team ^ 1], phase), phase ^= 1, --left;
    first = false;
  }
  FXFUSE_INLINE void end(int lane) {
    __syncwarp();
    if (lane == 0 && awaited-- > 0) barrier_arrive(&common.done[team]);
  }
};

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
                             Barriers<Problem>& barriers, Common<Problem>& common, int team) {
  Ring xs, ws;
  SlabRing apart;
  bulk_after_stores();
  if (Problem::pingpong && team == 0 && blockIdx.x < g.tiles) {  // all of them, for all tiles of both teams
    const Tile t = tile_at<Problem>(g, blockIdx.x);
    barrier_expect(&common.weights, g.weight_bytes);
    copy_bytes(stages, weights + (int64_t)(t.group * g.column_tiles + t.column) * g.weight_bytes, g.weight_bytes, &common.weights);
  }
  for (int index = first_tile(team); index < g.tiles; index = next_tile<Problem>(index)) {
    const Tile t = tile_at<Problem>(g, index);
    const Low low = low_of<Problem>(g, index);
    const Slabs slabs = slabs_of<Problem>(g, t, low);
    const uint8_t* from = weights + (int64_t)(t.group * g.column_tiles + t.column) * g.weight_bytes;
    if constexpr (Problem::by_pass) from += index % Problem::passes * (g.weight_bytes / Problem::passes);
    for (int pass = first_pass<Problem>(index); pass < end_of_passes<Problem>(index); ++pass) {
      const int begin = Problem::pass_begin(pass), end = Problem::pass_begin(pass + 1);
      if (begin == end && !(Problem::resident && pass == 0)) continue;
      for (int chunk = 0; chunk < g.chunks; ++chunk) {
        const int source = t.group * g.chunks + chunk;
        int slab = SlabRing::first(g, slabs);
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
        for (int s = begin; s < end && !Problem::pingpong; ++s) {
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

}  // namespace fxfuse
