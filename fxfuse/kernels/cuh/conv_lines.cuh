// Where the positions of a tile lie whose matrix rows are output channels (`by_channel`): in the tensor, and in the lines of
// shared memory through which their results go.
#pragma once
#include "conv_gather.cuh"

namespace fxfuse {

constexpr int kMostAlign = 16;  // elements of a sector

// Lines of shared memory: eight of each of a warpgroup's warps.
template <class Problem>
struct Lines {
  static constexpr int number = kConsumers;
  struct Shared {
    FXFUSE_INLINE void init() {}
  };
  static FXFUSE_INLINE int bytes(const Geometry&) { return 32 * Problem::pitch * (int)sizeof(float); }
  float* memory;
  FXFUSE_INLINE Lines(const Geometry&, uint8_t* memory, Shared&) : memory((float*)memory) {}
};

// The warp and lane of a thread, and its warpgroup's part of the tile.
template <class Problem>
struct SectorPlace {
  int lane, warp;
  Tile box;
  FXFUSE_INLINE SectorPlace(const Geometry&, int, int warp, int lane) : lane(lane), warp(warp) {}
  FXFUSE_INLINE void move(const Geometry& g, const Tile& tile, int group, int) { box = part_of(g, tile, group); }
};

// Where the positions of a warpgroup's part lie, in shared memory. A `place` counts the elements of a channel that the part
// has, in the order of positions; it is congruent modulo a sector to the offset in memory, from the part's begin, so
// runs of neighbours are apart by what that takes.
template <class Problem>
struct SectorTable {
  static constexpr int positions = Problem::m_tiles * 64, turns = positions / Problem::at_once;
  static constexpr int kOffsets = Problem::streams ? 1 : kMostAlign + Problem::places + 2 * kMostAlign;  // of one run it is the place
  struct Group {
    alignas(8) int at[positions];                                // where a position's results go in a line, in bytes
    int packed[positions];                                       // the position in the box, ten bits per dim
    unsigned char inside[positions];                             // one bit per class
    int offset[kOffsets];                                        // of a place in memory; -1 where there is nothing
    int begin[turns + 1];                                        // the first place of each turn
    int known[4];                                                // what all of it is made for
  };
  Group groups[kConsumers];
  FXFUSE_INLINE void init() {
    for (Group& group : groups) group.known[0] = -1;
  }
};

// How places follow from positions, for one warpgroup's part of a tile.
template <class Problem, class Out>
struct Sectors {
  static constexpr int align = kSector / sizeof(Out);
  const Geometry& g;
  const Tile& t;
  int stride_d, stride_h;
  bool merged;      // rows of a position in d follow each other in memory
  int apart, rows;  // places from one run to the next; region rows in front of the part
  int start;        // offset in front of a linear part's first position
  int size_d, size_h, size_w;  // positions of the box that are in the tensor; of w, elements
  int length;                  // elements of the tensor in a part that is one run

  FXFUSE_INLINE Sectors(const Destination<Out>& to, const Geometry& g, const Tile& t, const Residue& residue, int group)
      : g(g), t(t), stride_d((int)to.stride.d), stride_h(g.out_w) {  // of a tensor with one row, its stride may be any
    merged = Problem::stride_h == 1 && g.tiles_w == 1 && g.half_w == 0 && g.box_w * Problem::stride_w == g.out_w;
    rows = g.row_base[group * Problem::m_tiles] - group * g.part_rows + t.skip;
    auto left = [](int out, int at, int step, int box) {  // of `box` positions those whose element is one of `out`
      const int n = (out - at + step - 1) / step;
      return n < 0 ? 0 : n < box ? n : box;
    };
    size_d = left(g.out_d, t.d * Problem::stride_d + residue.d, Problem::stride_d, g.box_d);
    size_h = left(g.out_h, t.h * Problem::stride_h + residue.h, Problem::stride_h, g.box_h);
    const int elements = g.out_w - t.w * Problem::stride_w, most = g.box_w * Problem::stride_w;
    size_w = elements < most ? elements : most;
    int longest = most, shortest = size_w;
    start = 0;
    if (merged) {
      longest = shortest = g.box_h * stride_h;
      if (g.linear) {
        start = offset_in_plane(rows);
        const int end = offset_in_plane(rows + Problem::m_tiles * 64), last = size_h * stride_h;
        longest = end - start, shortest = (end < last ? end : last) - start;
      }
    }
    length = size_d > 0 && shortest > 0 ? min(shortest, size_h * stride_h) : 0;
    apart = (longest + 3 * align - 3) & ~(align - 1);
  }
  // Of the row `at` of a plane of the region, or of the next one that is a position.
  FXFUSE_INLINE int offset_in_plane(int at) const {
    const int y = g.by_region_w.of(at), x = at - y * g.region_w;
    return y * stride_h + (x < g.box_w ? x : g.box_w) * Problem::stride_w;
  }
  FXFUSE_INLINE int offset(int z, int y, int x) const {
    return z * Problem::stride_d * stride_d + y * Problem::stride_h * stride_h + x * Problem::stride_w - start;
  }
  FXFUSE_INLINE int place(int z, int y, int x) const {
    const int run = merged ? z : z * g.box_h + y, first = merged ? z * Problem::stride_d * stride_d : offset(z, y, 0);
    return run * apart + (first & (align - 1)) + offset(z, y, x) - first;
  }
  // Of position p, be it outside the box: then that of the next one inside, or of the end.
  FXFUSE_INLINE int next_place(int p) const {
    int z, y, x;
    position(p, z, y, x);
    if (x > g.box_w) x = g.box_w;
    if (y >= g.box_h) y = g.box_h - 1, x = g.box_w;
    if (z >= g.box_d) z = g.box_d - 1, y = g.box_h - 1, x = g.box_w;
    return place(z, y, x);
  }
  FXFUSE_INLINE void position(int p, int& z, int& y, int& x) const {
    const int at = rows + (p >> 3) * g.row_group + (p & 7), plane = g.by_region_w.of(at);
    z = g.by_region_h.of(plane), y = plane - z * g.region_h, x = at - plane * g.region_w;
  }

  // By all threads of a warpgroup.
  FXFUSE_INLINE void fill(typename SectorTable<Problem>::Group& table, int group) const {
    int* const known = table.known;
    if (known[0] == size_d && known[1] == size_h && known[2] == size_w && known[3] == t.skip) return;
    named_barrier(1 + group, 128);  // it has been read
    const int thread = threadIdx.x & 127;
    constexpr bool offsets = Problem::keeps && !Problem::streams;
    if (offsets) {
      for (int i = thread; i < SectorTable<Problem>::kOffsets; i += 128) table.offset[i] = -1;
      named_barrier(1 + group, 128);
    }
    for (int p = thread; p < SectorTable<Problem>::positions; p += 128) {
      const int turn = p / Problem::at_once, frame = next_place(turn * Problem::at_once) & ~(align - 1);
      int z, y, x;
      position(p, z, y, x);
      const bool inside = z < size_d && y < size_h && x < g.box_w;
      int classes = 0;
      if (inside) {
        const int at = place(z, y, x), to = offset(z, y, x);
#pragma unroll
        for (int q = 0; q < Problem::residues; ++q)
          if (x * Problem::stride_w + q < size_w) {
            classes |= 1 << q;
            if (offsets) table.offset[kMostAlign + at + q] = to + q;
          }
        table.at[p] = (at - frame) * (int)sizeof(Out);
      }
      // what is not stored goes behind all that is
      if (!classes) table.at[p] = Problem::pitch * 4 - (Problem::streams ? (align + 4) * (int)sizeof(Out) : 2 * kSector);
      table.inside[p] = classes;
      table.packed[p] = z << 20 | y << 10 | x;
    }
    if (thread <= SectorTable<Problem>::turns) {
      const bool end = thread == SectorTable<Problem>::turns;
      const int begin = end ? next_place(SectorTable<Problem>::positions - 1) + Problem::stride_w : next_place(thread * Problem::at_once);
      table.begin[thread] = Problem::streams && (end || begin > length) ? length : begin;
    }
    if (thread == 0) known[0] = size_d, known[1] = size_h, known[2] = size_w, known[3] = t.skip;
    named_barrier(1 + group, 128);
  }
};

}  // namespace fxfuse
