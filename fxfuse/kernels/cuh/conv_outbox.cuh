// Stores of a convolution's results as runs of neighbours in memory: the multiplying warpgroups put blocks of channels
// into shared memory and go on, a warp per warpgroup takes them from there. Of a `joint` problem the rows of one
// warpgroup are followed by those of the other: both fill the same blocks, and runs go through them. A tile then may
// send every sector that its runs begin, and none that the tile in front of it began: it computes what is `over`.
#pragma once
#include "conv_store.cuh"

namespace fxfuse {

// What of a pass's results follows each other in memory: `count` runs per position in d (`merged`) or per row of
// positions. Class q lies in run `of(q)`, from the place of its position `h(q)` rows and `w(q)` elements further;
// class `first(u)` begins run u. For one class per position:
struct OneRun {
  static constexpr int count = 1;
  static constexpr bool merged = true;
  static __device__ constexpr int of(int) { return 0; }
  static __device__ constexpr int first(int) { return 0; }
  static __device__ constexpr int h(int) { return 0; }
  static __device__ constexpr int w(int) { return 0; }
};

// Where a run begins in a channel of the tensor, and how long it is; nothing is stored where that is not positive.
struct Run {
  int offset, length;
};
constexpr int kSector = 32;  // bytes; one that is written in part costs about four times a whole one
constexpr int kRuns = 64;       // that a part of a tile has at most
constexpr int kMostBlocks = 8;  // of channels on their way to memory

// The runs of one warpgroup's part of a tile: `box`; of a joint problem that is all of the tile.
template <class Problem, class Runs>
struct RunPlan {
  int number, rows, pitch;  // how many of them; rows of positions that each has; elements from one to the next
  int start, longest;       // elements in front of a run from the box's begin; of the longest run

  template <class Out>
  FXFUSE_INLINE RunPlan(const Destination<Out>& to, const Geometry& g, const Tile& box, const Extent& o, int group) {
    constexpr int align = kSector / sizeof(Out);
    const int row = (int)to.stride.h;
    number = g.box_d * Runs::count * (Runs::merged ? 1 : g.box_h);
    start = 0, longest = g.box_w * o.step_w;
    if (Runs::merged) {
      longest = g.box_h * o.step_h * row;
      if (g.linear) {  // from the first position of the row where it begins, or of the next
        const int begin = box.skip + group * (g.row_base[Problem::m_tiles] - g.part_rows), end = begin + Problem::m_tiles * 64;
        auto place_of = [&](int at) {
          const int h = g.by_region_w.of(at), w = at - h * g.region_w;
          return h * row + (w < row ? w : row);
        };
        start = place_of(begin), longest = place_of(end) - start;
      }
    }
    pitch = (longest + (Problem::joint ? g.over * o.step_w : 0) + 2 * align - 1) & ~(align - 1);
  }

  // The run of class run `u` of a position (z) or row of positions (z, y): where it begins in a channel of the tensor.
  template <class Out, int classes>
  FXFUSE_INLINE int offset(const Destination<Out>& to, const Tile& box, const Extent& o, const Residue (&residue)[classes],
                           int z, int y, int u) const {
    const Residue one = residue[Runs::first(u)];
    const int d = (box.d + z) * o.step_d + one.d, h = Runs::merged ? box.h * o.step_h : (box.h + y) * o.step_h + one.h;
    return d * (int)to.stride.d + h * (int)to.stride.h + box.w * o.step_w + start;
  }

  // Its length; not positive where it is outside the tensor.
  template <int classes>
  FXFUSE_INLINE int length(const Tile& box, const Extent& o, const Residue (&residue)[classes], int z, int y, int u) const {
    const Residue one = residue[Runs::first(u)];
    if (!one.valid || (box.d + z) * o.step_d + one.d >= o.size_d) return 0;
    if (Runs::merged) {
      const int left = (o.size_h - box.h * o.step_h) * o.size_w - start;
      return longest < left ? longest : left;
    }
    if ((box.h + y) * o.step_h + one.h >= o.size_h) return 0;
    const int left = o.size_w - box.w * o.step_w;
    return longest < left ? longest : left;
  }
};

// Blocks of `Problem::lines` channels in shared memory, of a warpgroup or of both: as many as there is room for.
template <class Problem>
struct Outbox {
  static constexpr int groups = Problem::joint ? kConsumers : 1;  // that fill a block; as many warps send them by turns
  static constexpr int number = kConsumers / groups;              // of outboxes
  struct Shared {
    uint64_t full[kMostBlocks], empty[kMostBlocks];
    Run runs[groups][kRuns];  // for each of the warps that send them
    FXFUSE_INLINE void init() {
      for (int i = 0; i < kMostBlocks; ++i) barrier_init(&full[i], 4 * groups), barrier_init(&empty[i], 1);
    }
  };
  static constexpr int block = Problem::lines * Problem::pitch;  // elements
  static FXFUSE_INLINE int bytes(const Geometry& g) { return g.outbox_blocks * block * Problem::itemsize; }
  uint8_t* memory;
  Shared& shared;
  int blocks;
  Ring ring = {};
  int leaving = -1;  // of who sends: the block that copies may still read; and whose turn it is
  int turn = 0;
  FXFUSE_INLINE Outbox(const Geometry& g, uint8_t* memory, Shared& shared) : memory(memory), shared(shared), blocks(g.outbox_blocks) {}
  template <class Out>
  FXFUSE_INLINE Out* line(int number) const {
    return (Out*)memory + ring.slot * block + number * Problem::pitch;
  }
  // By a warp that sends, whose last `pending` groups of copies may still read others.
  template <int pending>
  FXFUSE_INLINE void give_back() {
    if (leaving < 0) return;
    stored_bytes_read<pending>();
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(&shared.empty[leaving]);
    leaving = -1;
  }
};

// Where a thread's results of a pass go in a block, every run at a place that is congruent to its address modulo a sector.
// In bytes, of which addresses matter here only as far as their place in a sector.
template <class Problem, class Runs, class Out, int classes>
struct Staging {
  static constexpr int outside = Problem::pitch - 64 / (int)sizeof(Out);  // what is not stored goes there
  uint32_t inside, sample;  // of every result, whether it is stored; where channel 0 of the tile is
  // in the line of a channel but for the shift of its run, which is congruent to begin
  int slot[Problem::m_tiles][2][classes], begin[Problem::m_tiles][2], origin[Runs::count];

  FXFUSE_INLINE Staging() {}
  FXFUSE_INLINE Staging(const Destination<Out>& to, const Geometry& g, const Place<Problem>& place, const Extent& o,
                        const Residue (&residue)[classes], int group) {
    const Tile& t = place.box;
    const int channel0 = t.group * g.out_channels + t.column * Problem::columns, row = (int)to.stride.h;
    const RunPlan<Problem, Runs> plan(to, g, t, o, group);
    sample = (uint32_t)(uint64_t)(to.out + t.n * to.stride.n + channel0 * to.stride.c);
    inside = inside_mask(g, place, o, residue, true);
    const int step_d = o.step_d * (int)to.stride.d, step_h = o.step_h * row;
#pragma unroll
    for (int u = 0; u < Runs::count; ++u) origin[u] = plan.offset(to, t, o, residue, 0, 0, u) * (int)sizeof(Out);
#pragma unroll
    for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int z = place.z(i, r), y = place.y(i, r), x = place.x(i, r) * o.step_w;
        const int at = Runs::merged ? z : z * g.box_h + y, local = Runs::merged ? y * step_h + x - plan.start : x;
        begin[i][r] = (z * step_d + (Runs::merged ? 0 : y * step_h)) * (int)sizeof(Out);
#pragma unroll
        for (int q = 0; q < classes; ++q)
          slot[i][r][q] = (int)sizeof(Out) *
                          (inside >> ((i * 2 + r) * classes + q) & 1
                               ? (at * Runs::count + Runs::of(q)) * plan.pitch + local + (Runs::merged ? Runs::h(q) * row : 0) + Runs::w(q)
                               : outside);
      }
  }
  // All of it is made here, and not later.
  FXFUSE_INLINE void settle_all() {
    settle(inside), settle(sample);
#pragma unroll
    for (int u = 0; u < Runs::count; ++u) settle(origin[u]);
#pragma unroll
    for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        settle(begin[i][r]);
#pragma unroll
        for (int q = 0; q < classes; ++q) settle(slot[i][r][q]);
      }
  }
};

// Puts value(i, r, j, e, q) of all accumulators of a warpgroup into its outbox.
template <class Problem, class Runs, class Out, int classes, class Value, class Expression>
FXFUSE_INLINE void stage_runs(const Staging<Problem, Runs, Out, classes>& where, Outbox<Problem>& outbox, const Destination<Out>& to,
                              const Geometry& g, const Place<Problem>& place, const Extent& o, const Residue (&residue)[classes],
                              int group, const Value& value, const Expression& expression) {
  constexpr int halves = Problem::lines / 4;
  const int first = place.box.column * Problem::columns;
#pragma unroll
  for (int block = 0; block < Problem::columns / Problem::lines; ++block) {
    if (!Problem::filled && first + block * Problem::lines / 8 * 8 >= g.out_channels) break;
    barrier_wait(&outbox.shared.empty[outbox.ring.slot], outbox.ring.phase ^ 1);
#pragma unroll
    for (int half = 0; half < halves; ++half) {
      const int j = (block * halves + half) / 2, e = (block * halves + half) & 1;
      schedule_barrier();
      const int column = place.column(j, e);
      if (!Problem::filled && first + column >= g.out_channels) continue;
      const Results<Problem, Value, Expression> results(g, place, value, expression, j, e);
      char* const line = (char*)outbox.template line<Out>(half * 4 + (place.lane & 3));
      uint32_t address = where.sample + (uint32_t)column * (uint32_t)to.stride.c * (uint32_t)sizeof(Out);
      // or the places of a column serve all eighth ones behind it, in registers that operands need
      if (sizeof(typename Expression::Channel) > 8) settle(address);
#pragma unroll
      for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int u = 0; u < Runs::count; ++u) {
            char* const shifted = line + ((address + where.origin[u] + where.begin[i][r]) & (kSector - 1));
#pragma unroll
            for (int q = 0; q < classes; ++q)
              if (Runs::of(q) == u)
                *(Out*)(shifted + where.slot[i][r][q]) =
                    from_float<Out>(results(place, o, residue[q], where.inside >> ((i * 2 + r) * classes + q) & 1, i, r, q));
          }
    }
    bulk_after_shared();
    __syncwarp();
    if (place.lane == 0) barrier_arrive(&outbox.shared.full[outbox.ring.slot]);
    outbox.ring.next(outbox.blocks);
  }
  named_barrier(1 + group, 128);  // or ptxas takes the warps to have parted, and serialises the next products
}

template <class Problem, class Runs, class Out, int classes, class Value, class Expression>
FXFUSE_INLINE void stage_runs(Outbox<Problem>& outbox, const Destination<Out>& to, const Geometry& g, const Place<Problem>& place,
                              const Extent& o, const Residue (&residue)[classes], int group, const Value& value,
                              const Expression& expression) {
  const Staging<Problem, Runs, Out, classes> where(to, g, place, o, residue, group);
  stage_runs(where, outbox, to, g, place, o, residue, group, value, expression);
}

// Sends what `stage_runs` puts there: a warp, several channels at once, the whole 16 bytes of a run as one bulk copy and the
// elements in front of them and behind them one by one. Of joint blocks two warps send every other one. While copies read a
// block the next one is sent, if it is there.
template <class Problem, class Runs, class Out, int classes>
FXFUSE_INLINE void send_runs(Outbox<Problem>& outbox, const Destination<Out>& to, const Geometry& g, const Tile& t, const Extent& o,
                             const Residue (&residue)[classes], int group) {
  constexpr int align = kSector / sizeof(Out), unit = 16 / sizeof(Out), lines = Problem::lines;
  constexpr int senders = Outbox<Problem>::groups, at_once = 32 / lines;
  const int lane = threadIdx.x & 31, sender = Problem::joint ? group : 0;
  const int number = lane / at_once, part = lane % at_once;
  const int first = t.column * Problem::columns, channel0 = t.group * g.out_channels + first;
  const RunPlan<Problem, Runs> plan(to, g, t, o, group);
  const bool whole = Problem::joint && g.over > 0;  // sectors: from the first that begins in a run, to that in which it ends
  const int up_begin = whole && t.h > 0 ? align - 1 : 0, up_end = whole && (t.h + g.box_h) * o.step_h < o.size_h ? align - 1 : 0;
  __syncwarp();  // what was there has been read
  for (int run = lane; run < plan.number; run += 32) {
    const int u = run % Runs::count, at = run / Runs::count, z = Runs::merged ? at : g.by_box_h.of(at), y = at - z * g.box_h;
#pragma unroll
    for (int k = 0; k < Runs::count; ++k)
      if (u == k) outbox.shared.runs[sender][run] = {plan.offset(to, t, o, residue, z, y, k), plan.length(t, o, residue, z, y, k)};
  }
  __syncwarp();
  // a block of four channels has every other one of eight
  const int column = lines == 8 ? (number & 3) * 2 + number / 4 : number * 2;
  Out* const channel = to.out + t.n * to.stride.n + (channel0 + column) * to.stride.c;
  const int left = g.out_channels - first - column;  // of this and the channels behind it
#pragma unroll 1
  for (int block = 0; block < Problem::columns / lines; ++block) {
    const int skipped = lines == 8 ? block * 8 : block / 2 * 8 + (block & 1);
    if (first + skipped / 8 * 8 >= g.out_channels) break;
    const bool mine = outbox.turn == sender;
    if (++outbox.turn == senders) outbox.turn = 0;
    if (!mine) {
      outbox.ring.next(outbox.blocks);
      continue;
    }
    Out* const out = channel + skipped * to.stride.c;
    const Out* from = outbox.template line<Out>(number);
    uint64_t* const full = &outbox.shared.full[outbox.ring.slot];
    if (!__any_sync(~0u, barrier_ready(full, outbox.ring.phase))) outbox.template give_back<0>();
    barrier_wait(full, outbox.ring.phase);
    if (skipped < left) {
#pragma unroll 1
      for (int run = 0; run < plan.number; ++run, from += plan.pitch) {
        const Run one = outbox.shared.runs[sender][run];
        if (one.length <= 0) continue;
        const int shift = (int)((uint64_t)(out + one.offset) / sizeof(Out)) & (align - 1);
        const int first = (shift + up_begin) & ~up_begin, length = ((shift + one.length + up_end) & ~up_end) - first;
        Out* const begin = out + one.offset + (first - shift);
        int head = -first & (unit - 1);
        head = head < length ? head : length;
        const int body = (length - head) & ~(unit - 1);
        if (body > 0 && run % at_once == part) store_bytes(begin + head, from + first + head, body * (uint32_t)sizeof(Out));
#pragma unroll 1
        for (int edge = part; edge < 2 * unit - 2; edge += at_once) {
          const int k = edge < head ? edge : edge + body;
          if (k < length) begin[k] = from[first + k];
        }
      }
    }
    store_bytes_group();
    outbox.template give_back<1>();
    outbox.leaving = outbox.ring.slot;
    outbox.ring.next(outbox.blocks);
  }
}

}  // namespace fxfuse
