// Which tile is where: of the output, of x, and of the slabs of x along d.
//
// Of outputs of few positions, `samples` of x (8 to 64: a set) lie side by side in the region: row (d, outer, inner, sample),
// where `inner` says which of h (1) and w (2) is the inner one. The 64 rows of an instruction are then all samples of
// 64 / samples neighbours along that, and a step's shift is so many times longer: no row is one of the halo's.
#pragma once
#include "divisor.cuh"
#include "ptx.cuh"

namespace fxfuse {

constexpr int kConsumers = 2;                     // warpgroups that multiply
constexpr int kThreads = 128 * (kConsumers + 1);  // and one that copies

// Warpgroups that share a tile, and tiles that a block has at a time: of those each has its team.
template <class Problem>
constexpr int kSharing = Problem::pingpong ? 1 : kConsumers;
template <class Problem>
constexpr int kTeams = kConsumers / kSharing<Problem>;
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
  if (Problem::pingpong) t.group = next(g.by_groups, g.groups);  // a block's tiles have the same weights
  const int w = next(g.by_w, g.tiles_w), h = next(g.by_h, g.tiles_h), d = next(g.by_d, g.tiles_d);
  t.number = (d * g.tiles_h + h) * g.tiles_w + w;
  t.w = w * g.tile_w, t.h = h * g.tile_h, t.d = d * g.tile_d, t.skip = 0;
  if (g.linear) {
    const int row = g.by_region_w.of(t.h);
    t.skip = t.h - row * g.region_w, t.h = row;
  }
  if (!Problem::pingpong) t.group = next(g.by_groups, g.groups);
  t.n = index * Problem::samples;
  return t;
}

// The tiles of a team.
FXFUSE_INLINE int first_tile(int team) { return blockIdx.x + team * gridDim.x; }
template <class Problem>
FXFUSE_INLINE int next_tile(int index) {
  return index + kTeams<Problem> * gridDim.x;
}
// What warpgroups write once per part of a tile, or of a pass of it: where, of all of these.
template <class Problem>
FXFUSE_INLINE int slot_of(int number, int group) {
  return number * kSharing<Problem> + group % kSharing<Problem>;
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

}  // namespace fxfuse
