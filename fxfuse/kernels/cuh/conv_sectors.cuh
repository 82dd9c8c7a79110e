// What becomes of accumulators whose matrix rows are output channels (`by_channel`): a thread has two channels of every 64,
// with up to 64 positions each, so that what belongs to a channel is in registers; a warp has whole channels. It puts
// some positions of eight of them into shared memory, one line per channel, and sends those sectors of memory that are
// complete; one that is not waits there for the next positions. Of a part that is one run in memory (`streams`) these
// follow from where it begins and ends.
#pragma once
#include "conv_lines.cuh"

namespace fxfuse {

// What results of one of a thread's channels have in common.
template <class Expression>
struct ChannelOperands {
  int channel;
  Affine affine;
  typename Expression::Channel of;
};

// The results of that channel: expression(y) of accumulator y, for the thread's position k in class q.
template <class Problem, class Expression>
struct ChannelResults {
  const Expression& expression;
  const typename SectorTable<Problem>::Group& table;
  const Tile& t;
  const Residue& residue;
  const ChannelOperands<Expression>& operands;
  int lane;

  FXFUSE_INLINE static int position(int k, int lane) { return k / 2 * 8 + (lane & 3) * 2 + (k & 1); }
  // Of any position, unless the expression is `local`: zero outside the tensor there.
  FXFUSE_INLINE float operator()(float y, int q, int k) const {
    y = Problem::scaled ? fmaf(y, operands.affine.scale, operands.affine.bias) : y * Problem::weight_scale + operands.affine.bias;
    int d = 0, h = 0, w = 0;
    if constexpr (Expression::local) {
      const int p = position(k, lane), packed = table.packed[p];
      if (!(table.inside[p] >> q & 1)) return 0.f;
      d = (t.d + (packed >> 20)) * Problem::stride_d + residue.d, h = (t.h + (packed >> 10 & 1023)) * Problem::stride_h + residue.h,
      w = (t.w + (packed & 1023)) * Problem::stride_w + q;
    }
    return expression(operands.of, y, t.n, operands.channel, d, h, w);
  }
};

// Every output of the convolution, through `Expression`, to `out`, and its statistics.
template <class Problem, class Out, class Expression, class Behind>
struct StoreSectors {
  struct Arguments {
    Destination<Out> to;
    alignas(8) Expression expression;
    alignas(8) Behind behind;
  };
  using Accumulators = float[Problem::accumulator_tiles][Problem::accumulators];
  using Table = SectorTable<Problem>;
  static constexpr int kTiles = Problem::columns / 64, kClasses = Problem::residues, kEach = Problem::accumulators / 2;
  static constexpr int kWords = (kEach + 31) / 32, align = kSector / sizeof(Out), unit = 16 / sizeof(Out);
  const Arguments& a;
  const Geometry& g;
  typename Table::Group& table;
  const Lines<Problem> lines;
  const SectorPlace<Problem>& place;
  const int group;
  static constexpr bool kAhead = sizeof(typename Expression::Channel) <= 16;
  ChannelOperands<Expression> operands[kTiles][2];  // loaded while products are on their way, if there is room

  FXFUSE_INLINE StoreSectors(const Arguments& a, const Geometry& g, Table& table, float*, const Lines<Problem>& lines,
                             const SectorPlace<Problem>& place, int group)
      : a(a), g(g), table(table.groups[group]), lines(lines), place(place), group(group) {
    const Tile& t = place.box;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int column = t.column * Problem::columns + this->column(i, r);
        const int c = t.group * g.out_channels + (Problem::filled || column < g.out_channels ? column : g.out_channels - 1);
        operands[i][r].channel = c;
        operands[i][r].affine = {Problem::scaled ? a.to.sample_scale[t.n] * a.to.channel_scale[c] * Problem::weight_scale : 1.f,
                                    a.to.bias ? a.to.bias[c] * Problem::bias_scale : 0.f};
        if (kAhead) operands[i][r].of = a.expression.channel(t.n, c);
      }
  }

  struct Ready {};
  FXFUSE_INLINE void prepare(Ready&, int) {}

  FXFUSE_INLINE void pass(Accumulators& acc, int pass, const Ready&) {
    const Tile& t = place.box;
    const Residue residue = Problem::residue(pass, 0);  // along w: of class q it is q
    const Sectors<Problem, Out> sectors(a.to, g, t, residue, group);
    sectors.fill(table, group);
    if (!Problem::streams) named_barrier(1 + group, 128);  // or ptxas takes the warps to have parted there
    if constexpr (Problem::gathers) gather(acc, residue, pass);
    if constexpr (Problem::streams)
      stream(acc, residue, sectors.start);
    else if constexpr (Problem::keeps)
      keep(acc, residue);
    named_barrier(1 + group, 128);  // or ptxas takes the warps to have parted, and serialises the next products
  }
  FXFUSE_INLINE void finish() {}
  static FXFUSE_INLINE void send(const Arguments&, const Geometry&, const Lines<Problem>&, const Tile&, int) {}

  // Where the part begins in the sample, whichever its channel.
  FXFUSE_INLINE Out* origin(const Residue& residue) const {
    const Tile& t = place.box;
    return a.to.out + t.n * a.to.stride.n + (t.d * Problem::stride_d + residue.d) * a.to.stride.d +
           (t.h * Problem::stride_h + residue.h) * a.to.stride.h + t.w * Problem::stride_w;
  }
  // Of the thread's channel r of the tile's i-th 64.
  FXFUSE_INLINE int column(int i, int r) const { return i * 64 + place.warp * 16 + r * 8 + place.lane / 4; }
  FXFUSE_INLINE bool there(int i, int r) const {
    return Problem::filled || place.box.column * Problem::columns + column(i, r) < g.out_channels;
  }
  FXFUSE_INLINE ChannelResults<Problem, Expression> results(const Residue& residue, int i, int r) {
    if (!kAhead) operands[i][r].of = a.expression.channel(place.box.n, operands[i][r].channel);
    return {a.expression, table, place.box, residue, operands[i][r], place.lane};
  }
  static FXFUSE_INLINE float& of(Accumulators& acc, int i, int r, int q, int k) {
    return acc[q * kTiles + i][k / 2 * 4 + r * 2 + (k & 1)];
  }

  // Partial statistics of this part's elements, a slot per warpgroup and pass; makes results of the accumulators.
  FXFUSE_INLINE void gather(Accumulators& acc, const Residue& residue, int pass) {
    const Tile& t = place.box;
    uint32_t inside[kClasses][kWords];
    int count = 0;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
#pragma unroll
      for (int q = 0; q < kClasses; ++q) inside[q][word] = 0;
#pragma unroll
      for (int k = 0; k < 32 && word * 32 + k < kEach; k += 2) {
        const uint32_t two = *(const unsigned short*)&table.inside[ChannelResults<Problem, Expression>::position(word * 32 + k, place.lane)];
#pragma unroll
        for (int q = 0; q < kClasses; ++q) inside[q][word] |= (two >> q & 1) << k | (two >> (8 + q) & 1) << (k + 1);
      }
#pragma unroll
      for (int q = 0; q < kClasses; ++q) count += __popc(inside[q][word]);
    }
    const float reciprocal = 1.f / (float)(count > 0 ? count : 1);
    const int two = __shfl_xor_sync(~0u, count, 1);
    const Weights first(count, two);
    const int four = __shfl_xor_sync(~0u, count + two, 2);
    const Weights second(count + two, four);
    const int64_t slot = (int64_t)t.n * a.to.partials.slots + (t.number * Problem::passes + pass) * kConsumers + group;
    if (place.warp == 0 && place.lane == 0 && t.group == 0 && t.column == 0) a.to.partials.counts[slot] = count + two + four;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        schedule_barrier();
        const ChannelResults<Problem, Expression> results = this->results(residue, i, r);
        auto value = [&](int at) { return of(acc, i, r, at / kEach, at % kEach); };
        auto within = [&](int at) { return inside[at / kEach][at % kEach / 32] >> (at % kEach & 31) & 1; };
        auto make = [&](int at) {
          const int q = at / kEach, k = at % kEach;
          return of(acc, i, r, q, k) = as_stored<Out>(results(value(at), q, k), within(at));
        };
        gather_channel<0>(make, value, within, reciprocal, first, second, slot, operands[i][r].channel, there(i, r));
      }
  }
  // The parts of one of the thread's channels, of all kinds from this `number` on; those of four threads become one.
  template <int number, class Make, class Value, class Inside>
  FXFUSE_INLINE void gather_channel(const Make& make, const Value& value, const Inside& inside, float reciprocal,
                                    const Weights& first, const Weights& second, int64_t slot, int channel, bool there) const {
    using Kind = KindOf<Problem, number>;
    auto exchange = [&](const Part& mine, int distance, const Weights& w) {
      const Part other = {__shfl_xor_sync(~0u, mine.x, distance), __shfl_xor_sync(~0u, mine.y, distance)};
      return Kind::merged(mine, other, w);
    };
    const Part mine = Kind::template of<kClasses * kEach>(make, value, inside, reciprocal);
    const Part all = exchange(exchange(mine, 1, first), 2, second);
    if ((place.lane & 3) == 0 && there)
      ((Part*)a.to.partials.parts)[(slot * Problem::Kinds::count + number) * a.to.partials.channels + channel] = all;
    if constexpr (number + 1 < Problem::Kinds::count) gather_channel<number + 1>(value, value, inside, reciprocal, first, second, slot, channel, there);
  }

  // Stores the results. A warp's eight lines are those of eight channels: four threads with the same accumulators write
  // a line, eight others read it, so that they write whole lines of memory.
  FXFUSE_INLINE void keep(Accumulators& acc, const Residue& residue) {
    const Tile& t = place.box;
    Out* const sample = origin(residue);
    Out* const lines = (Out*)(this->lines.memory + place.warp * 8 * Problem::pitch);
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        schedule_barrier();
        const ChannelResults<Problem, Expression> results = this->results(residue, i, r);
        const int first = t.column * Problem::columns + i * 64 + place.warp * 16 + r * 8;
        const Sent sent[2] = {sent_of(sample, lines, first, 0), sent_of(sample, lines, first, 1)};
        const int line = place.lane / 4;
        const int shift = (int)((uint64_t)(sample + (t.group * g.out_channels + first + line) * a.to.stride.c) / sizeof(Out)) & (align - 1);
        Out* const mine = lines + line * kPitch;
#pragma unroll
        for (int turn = 0; turn < Table::turns; ++turn) {
          const int begin = table.begin[turn], until = table.begin[turn + 1];
          put(acc, results, i, r, turn, (char*)(mine + shift));
          __syncwarp();
          send(sent, begin, until, turn + 1 == Table::turns);
          if (turn + 1 < Table::turns) {  // what is there of the next sector goes to where the next turn expects it
            const int end = until + shift & ~(align - 1);
            const uint2 rest = ((const uint2*)(mine + end - (begin & ~(align - 1))))[place.lane & 3];
            __syncwarp();
            ((uint2*)(mine + end - (until & ~(align - 1))))[place.lane & 3] = rest;
          }
          __syncwarp();
        }
      }
  }

  // Puts results of the thread's channel into its line, for one turn.
  FXFUSE_INLINE void put(Accumulators& acc, const ChannelResults<Problem, Expression>& results, int i, int r, int turn, char* to) const {
    constexpr int each = Problem::at_once / 4;
    int2 at[each / 2];  // all of them are on their way before the first is used
#pragma unroll
    for (int k = 0; k < each; k += 2)
      at[k / 2] = *(const int2*)&table.at[ChannelResults<Problem, Expression>::position(turn * each + k, place.lane)];
#pragma unroll
    for (int k = 0; k < each; k += 2)
#pragma unroll
      for (int q = 0; q < kClasses; ++q) {
        float one = of(acc, i, r, q, turn * each + k), two = of(acc, i, r, q, turn * each + k + 1);
        if (!Problem::gathers) one = results(one, q, turn * each + k), two = results(two, q, turn * each + k + 1);
        ((Out*)(to + at[k / 2].x))[q] = from_float<Out>(one), ((Out*)(to + at[k / 2].y))[q] = from_float<Out>(two);
      }
  }

  // The same where the part is one run: places are offsets.
  FXFUSE_INLINE void stream(Accumulators& acc, const Residue& residue, int start) {
    const Tile& t = place.box;
    Out* const sample = origin(residue) + start;
    Out* const lines = (Out*)(this->lines.memory + place.warp * 8 * Problem::pitch);
    Out* const mine = lines + place.lane / 4 * kPitch;
    const int part = place.lane & 3;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        schedule_barrier();
        const ChannelResults<Problem, Expression> results = this->results(residue, i, r);
        const int first = t.column * Problem::columns + i * 64 + place.warp * 16 + r * 8;
        const Sent sent[2] = {sent_of(sample, lines, first, 0), sent_of(sample, lines, first, 1)};
        const Out* const out = sample + (t.group * g.out_channels + first + place.lane / 4) * a.to.stride.c;
        const int shift = (int)((uint64_t)out / sizeof(Out)) & (align - 1);
        int carried = 0;  // where the last turn left off, in the line
#pragma unroll
        for (int turn = 0; turn < Table::turns; ++turn) {
          const bool last = turn + 1 == Table::turns;
          const int begin = table.begin[turn], until = table.begin[turn + 1], frame = begin & ~(align - 1);
          uint2 rest;  // what is there of a sector that this turn completes
          if (turn > 0) rest = ((const uint2*)(mine + carried))[part];
          __syncwarp();  // it has been read, and what was sent
          if (turn > 0) ((uint2*)(mine + (begin + shift & ~(align - 1)) - frame))[part] = rest;
          if (turn > 0) __syncwarp();
          put(acc, results, i, r, turn, (char*)(mine + shift));
          __syncwarp();
#pragma unroll
          for (int h = 0; h < 2; ++h) send_run(sent[h], begin, until, last);
          carried = (until + shift & ~(align - 1)) - frame;
        }
      }
  }

  static constexpr int kPitch = Problem::pitch * 4 / sizeof(Out), kAtOnce = 8 / unit;  // units of a line that a thread sends at once
  // One of the channels that a thread sends.
  struct Sent {
    Out* out;
    const Out* line;
    const int* offset;  // of what is in the line
    int shift;
    bool there;
  };
  // Of the warp's eight lines from channel `first` on, which lie at `lines`.
  FXFUSE_INLINE Sent sent_of(Out* sample, const Out* lines, int first, int h) const {
    const int line = h * 4 + place.lane / 8;
    Sent s;
    s.out = sample + (place.box.group * g.out_channels + first + line) * a.to.stride.c;
    s.shift = (int)((uint64_t)s.out / sizeof(Out)) & (align - 1);
    s.there = Problem::filled || first + line < g.out_channels;
    s.line = lines + line * kPitch, s.offset = table.offset + kMostAlign - s.shift;
    settle(s.out);
    return s;
  }
  // Of a run the sectors that offsets from `begin` until `until` complete; the last turn's incomplete one, too.
  FXFUSE_INLINE void send_run(const Sent& sent, int begin, int until, bool last) const {
    constexpr int most = (Problem::at_once * kClasses + 2 * align) / (8 * unit) + 1;  // units of a thread
    // elements of the line, from the sector on where the run begins: at `shift`
    const int sector = begin + sent.shift & ~(align - 1), from = max(sector, sent.shift), part = place.lane & 7;
    const int to = last ? until + sent.shift : until + sent.shift & ~(align - 1);
    const Out* const line = sent.line - (begin & ~(align - 1));
    Out* const out = sent.out - sent.shift;
    if (!sent.there) return;
#pragma unroll
    for (int m = 0; m < most; ++m) {
      const int at = sector + (part + m * 8) * unit;
      if (at >= from && at + unit <= to) *(uint4*)(out + at) = *(const uint4*)(line + at);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // one by one what of a unit is in front of the run's begin or behind its end
      const int end = i == 0 ? from : to, at = (end & ~(unit - 1)) + part;
      if ((end & unit - 1) && part < unit && at >= from && at < to) out[at] = line[at];
    }
  }
  // The sectors that places from `begin` until `until` complete; the last turn's incomplete one, too.
  FXFUSE_INLINE void send(const Sent (&sent)[2], int begin, int until, bool last) const {
    const int frame = begin & ~(align - 1), part = (place.lane & 7) * unit;
    int at[2], end[2];  // the thread's unit, and where units end
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      at[h] = (begin + sent[h].shift & ~(align - 1)) + part;
      end[h] = sent[h].there ? until + sent[h].shift + (last ? align - 1 : 0) & ~(align - 1) : 0;
    }
#pragma unroll 1
    do {
      uint4 data[2][kAtOnce];
      int from[2][kAtOnce], to[2][kAtOnce];  // offsets of a unit's first and last element
      bool parts = false;
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int m = 0; m < kAtOnce; ++m) {
          from[h][m] = to[h][m] = -1;
          if (at[h] + m * 8 * unit >= end[h]) continue;
          from[h][m] = sent[h].offset[at[h] + m * 8 * unit], to[h][m] = sent[h].offset[at[h] + m * 8 * unit + unit - 1];
          data[h][m] = *(const uint4*)(sent[h].line + at[h] + m * 8 * unit - frame);
        }
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int m = 0; m < kAtOnce; ++m) {
          if (from[h][m] >= 0 && to[h][m] - from[h][m] == unit - 1) *(uint4*)(sent[h].out + (uint32_t)from[h][m]) = data[h][m];
          parts |= (from[h][m] ^ to[h][m]) < 0;
        }
      if (__any_sync(~0u, parts)) {  // a run ends or begins there
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int m = 0; m < kAtOnce; ++m)
            if ((from[h][m] ^ to[h][m]) < 0) {
#pragma unroll
              for (int e = 0; e < unit; ++e) {
                const int one = sent[h].offset[at[h] + m * 8 * unit + e];
                if (one >= 0) sent[h].out[(uint32_t)one] = element(data[h][m], e);
              }
            }
      }
      at[0] += kAtOnce * 8 * unit, at[1] += kAtOnce * 8 * unit;
    } while (__any_sync(~0u, at[0] < end[0] || at[1] < end[1]));
  }
  static FXFUSE_INLINE Out element(const uint4& unit_, int e) {
    const uint32_t words[4] = {unit_.x, unit_.y, unit_.z, unit_.w};
    if constexpr (sizeof(Out) == 4)
      return __uint_as_float(words[e]);
    else
      return {(uint16_t)(words[e / 2] >> e % 2 * 16)};
  }
};

}  // namespace fxfuse
