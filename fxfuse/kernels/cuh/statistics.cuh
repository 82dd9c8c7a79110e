// Statistics in three stages, everything in a fixed order: parts of slots of elements, in float32; per sample, piece of the
// slots and channel; of groups of those. The later stages are in float64. What parts are, and how they become one, is a
// kind's affair: mean and variance; maximum and sum of exponentials; maximum and minimum.
#pragma once
#include "fold.cuh"
#include "ptx.cuh"

namespace fxfuse {

// Parts of a sample's elements: [sample][slot][kind][channel], and how many elements every [sample][slot] has of a channel.
struct Partials {
  float2* parts;
  int* counts;
  int slots, channels;
};

// What is known of a slot's elements of a channel: two numbers.
struct Part {
  float x, y;
};

// How two parts of `a` and `b` elements become one.
struct Weights {
  float a, b, both;
  FXFUSE_INLINE Weights(int na, int nb) {
    const float reciprocal = 1.f / (float)(na + nb > 0 ? na + nb : 1);
    a = (float)na * reciprocal, b = (float)nb * reciprocal, both = (float)na * b;
  }
};

// Of any number of elements: their mean, and the sum of squares around it. Of none, all is zero.
struct Moments {
  double count, mean, squares;
  FXFUSE_INLINE void merge(const Moments& o) {
    if (o.count == 0) return;
    const double all = count + o.count, d = o.mean - mean;
    mean = (count * mean + o.count * o.mean) / all;  // Inf stays Inf
    squares += o.squares + d * d * (count * o.count / all);
    count = all;
  }
};
// From sums around a shift; `sum` is around zero.
FXFUSE_INLINE Moments moments_of(double count, double sum, double shifted, double squares) {
  if (count == 0) return {0, 0, 0};
  const double around = squares - shifted * shifted / count;
  return {count, sum / count, around < 0 ? 0 : around};
}

// A kind has
//   of(make, value, inside, reciprocal): the part of `count` elements, as far as they are inside(k), else zero, which
//       make(k) gives once, in order, and value(k) from then on; `reciprocal` of how many those are
//   merged(x, y, weights): of two parts
//   Merged: what becomes of parts; Running, of elements that come one by one, and Added, of parts and of what others have
//       merged, become one. `Added` is some numbers, around a reference, that threads exchange.
//   results: how many numbers it has in the end, which Added::result(k, eps) gives.

// Mean, sum of squares around it; in the end mean, variance, 1 / sqrt(variance + eps).
struct Statistics {
  static constexpr int results = 3;
  using Merged = Moments;
  template <int count, class Make, class Value, class Inside>
  static FXFUSE_INLINE Part of(const Make& make, const Value& value, const Inside& inside, float reciprocal) {
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int k = 0; k < count; ++k) sum += make(k);
    const float mean = sum * reciprocal;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const float d = inside(k) ? value(k) - mean : 0.f;
      squares = fmaf(d, d, squares);
    }
    return {mean, squares};
  }
  static FXFUSE_INLINE Part merged(const Part& x, const Part& y, const Weights& w) {
    const float d = y.x - x.x;
    return {w.a * x.x + w.b * y.x, x.y + y.y + d * d * w.both};  // Inf stays Inf
  }
  // From sums around the first element.
  struct Running {
    double count = 0, sum = 0, shift = 0, shifted = 0, squares = 0;
    FXFUSE_INLINE void add(float v) {
      if (count == 0) shift = v;
      const double d = v - shift;
      count += 1, sum += v, shifted += d, squares += d * d;
    }
    FXFUSE_INLINE Merged made() const { return moments_of(count, sum, shifted, squares); }
  };
  struct Added {
    double v[4] = {0, 0, 0, 0};  // count, sum, sum less shift, squares
    double shift;
    explicit FXFUSE_INLINE Added(double reference) : shift(reference) {}
    FXFUSE_INLINE void add(const float2& part, int count) {
      const double k = count, mean = part.x, d = mean - shift;
      v[0] += k, v[1] += k * mean, v[2] += k * d, v[3] += part.y + k * d * d;
    }
    FXFUSE_INLINE void add(const Merged& m) {
      const double d = m.mean - shift;
      v[0] += m.count, v[1] += m.count * m.mean, v[2] += m.count * d, v[3] += m.squares + m.count * d * d;
    }
    FXFUSE_INLINE void merge(const Added& o) {
#pragma unroll
      for (int k = 0; k < 4; ++k) v[k] += o.v[k];
    }
    FXFUSE_INLINE Merged made() const { return moments_of(v[0], v[1], v[2], v[3]); }
    FXFUSE_INLINE float result(int k, double eps) const {
      const Merged m = made();
      const double var = m.squares / m.count;
      return k == 0 ? (float)m.mean : k == 1 ? (float)var : (float)(1.0 / sqrt(var + eps));
    }
  };
  static FXFUSE_INLINE double reference(const Merged& m) { return m.mean; }
};

// Two numbers that need no count, of which parts of no elements change nothing. `Pair` merges two of them.
template <class Pair>
struct OfPairs {
  using Merged = Pair;
  struct Running : Pair {
    FXFUSE_INLINE Running() : Pair(Pair::nothing()) {}
    FXFUSE_INLINE void add(float v) { this->merge(Pair::one(v)); }
    FXFUSE_INLINE Merged made() const { return *this; }
  };
  struct Added {
    double v[2];
    explicit FXFUSE_INLINE Added(double) { set(Pair::nothing()); }
    FXFUSE_INLINE void set(const Pair& pair) { v[0] = pair.x, v[1] = pair.y; }
    FXFUSE_INLINE Merged made() const { return Pair{v[0], v[1]}; }
    FXFUSE_INLINE void add(const Pair& other) {
      Pair mine = made();
      mine.merge(other), set(mine);
    }
    FXFUSE_INLINE void add(const float2& part, int count) {
      if (count) add(Pair{part.x, part.y});
    }
    FXFUSE_INLINE void merge(const Added& o) { add(o.made()); }
    FXFUSE_INLINE float result(int k, double) const { return made().result(k); }
  };
  static FXFUSE_INLINE double reference(const Merged&) { return 0; }
};
FXFUSE_INLINE double larger_or_nan(double a, double b) { return a != a || a > b ? a : b; }

// Maximum, and the sum of exp(element - maximum): NaN of a maximum that is Inf, as in torch's softmax. Of none, or where
// all are -Inf, the sum is zero until the end. There: the maximum, the sum's reciprocal and logarithm, and the logarithm
// of the sum of exp(element).
struct SumOfExponentials {
  double x, y;
  static FXFUSE_INLINE SumOfExponentials nothing() { return {-pw::infinity(), 0}; }
  static FXFUSE_INLINE SumOfExponentials one(float v) { return {v, 1}; }
  FXFUSE_INLINE void merge(const SumOfExponentials& o) {
    const double m = larger_or_nan(x, o.x), shift = m == -pw::infinity() ? 0 : m;  // -Inf less -Inf would be NaN
    y = y * expf((float)(x - shift)) + o.y * expf((float)(o.x - shift)), x = m;
  }
  FXFUSE_INLINE float result(int k) const {
    const double sum = y + (x - x);
    return (float)(k == 0 ? x : k == 1 ? 1 / sum : k == 2 ? log(sum) : x - x == 0 ? x + log(y) : x);
  }
};
struct Exponentials : OfPairs<SumOfExponentials> {
  static constexpr int results = 4;
  template <int count, class Make, class Value, class Inside>
  static FXFUSE_INLINE Part of(const Make& make, const Value& value, const Inside& inside, float) {
    const float nothing = -pw::infinity();
    float m = nothing, sum = 0.f;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const float made = make(k);
      m = max_or_nan(m, inside(k) ? made : nothing);
    }
    const float shift = shift_of(m);
#pragma unroll
    for (int k = 0; k < count; ++k) sum += exponential((inside(k) ? value(k) : nothing) - shift);
    return {m, sum};
  }
  static FXFUSE_INLINE Part merged(const Part& x, const Part& y, const Weights&) {
    const float m = max_or_nan(x.x, y.x), shift = shift_of(m);
    return {m, x.y * exponential(x.x - shift) + y.y * exponential(y.x - shift)};
  }
  static FXFUSE_INLINE float shift_of(float m) { return m == -pw::infinity() ? 0.f : m; }
};

// Maximum, and maximum of what is negated; in the end maximum and minimum.
struct Largest {
  double x, y;
  static FXFUSE_INLINE Largest nothing() { return {-pw::infinity(), -pw::infinity()}; }
  static FXFUSE_INLINE Largest one(float v) { return {v, -v}; }
  FXFUSE_INLINE void merge(const Largest& o) { x = larger_or_nan(x, o.x), y = larger_or_nan(y, o.y); }
  FXFUSE_INLINE float result(int k) const { return (float)(k == 0 ? x : -y); }
};
struct Extremes : OfPairs<Largest> {
  static constexpr int results = 2;
  template <int count, class Make, class Value, class Inside>
  static FXFUSE_INLINE Part of(const Make& make, const Value& value, const Inside& inside, float) {
    const float nothing = -pw::infinity();
    Part p = {nothing, nothing};
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const float made = make(k);
      p.x = max_or_nan(p.x, inside(k) ? made : nothing);
      p.y = max_or_nan(p.y, inside(k) ? -made : nothing);
    }
    return p;
  }
  static FXFUSE_INLINE Part merged(const Part& x, const Part& y, const Weights&) {
    return {max_or_nan(x.x, y.x), max_or_nan(x.y, y.y)};
  }
};

// Those that are gathered of the same elements.
template <class... Each>
struct Kinds {
  static constexpr int count = 0;
};
template <class First, class... Others>
struct Kinds<First, Others...> {
  static constexpr int count = 1 + sizeof...(Others);
  template <int number, class Unused = void>
  struct At {
    using Kind = typename Kinds<Others...>::template At<number - 1>::Kind;
  };
  template <class Unused>
  struct At<0, Unused> {
    using Kind = First;
  };
};
template <class Problem, int number>
using KindOf = typename Problem::Kinds::template At<number>::Kind;

// What all threads of a block have `added`, a power of two of them, in a fixed order.
template <int threads, class Added>
FXFUSE_INLINE void block_add(Added& added) {
  constexpr int numbers = sizeof(added.v) / sizeof(double);
  __shared__ double shared[numbers][threads];
  auto there = [&](int thread) {
    Added found = added;
#pragma unroll
    for (int k = 0; k < numbers; ++k) found.v[k] = shared[k][thread];
    return found;
  };
  auto keep = [&] {
#pragma unroll
    for (int k = 0; k < numbers; ++k) shared[k][threadIdx.x] = added.v[k];
  };
  keep();
  __syncthreads();
  for (int half = threads / 2; half; half /= 2) {
    if (threadIdx.x < half) added.merge(there(threadIdx.x + half)), keep();
    __syncthreads();
  }
  added = there(0);
  __syncthreads();
}

// Of all elements of a block's threads, a power of two of them, in a fixed order. `shared` is used before and after.
template <int threads, class Running, int doubles>
FXFUSE_INLINE auto block_merged(const Running& mine, double (&shared)[doubles]) {
  using Merged = decltype(mine.made());
  static_assert(sizeof(shared) >= threads * sizeof(Merged), "there is room for what each thread has");
  Merged* const all = (Merged*)shared;
  __syncthreads();
  all[threadIdx.x] = mine.made();
  __syncthreads();
  for (int half = threads / 2; half; half /= 2) {
    if (threadIdx.x < half) all[threadIdx.x].merge(all[threadIdx.x + half]);
    __syncthreads();
  }
  const Merged made = all[0];
  __syncthreads();
  return made;
}

constexpr int kMergeThreads = 256, kMerged = 8;  // per kMerged channels of a sample
constexpr int kMergeSlots = 256;                 // that a block reads at once

// Where no elements are looked at instead of their parts.
template <class Kind>
struct NoElements {
  FXFUSE_INLINE bool wanted(int) { return false; }
  FXFUSE_INLINE typename Kind::Running of(int, int, int, int) const { return {}; }
};

// Merges the parts of a sample's channels, those of the kind of this `number` among `kinds`, into [sample][piece][channel],
// where a piece is one of `pieces` equal runs of slots, none of them empty: a block for each and kMerged channels.
// Neighbouring threads read the channels of a slot, so that a warp reads whole sectors; all that a thread reads is on its
// way before it waits for some of it. Where `elements.wanted(n)`, a sample's statistics are made of its elements:
// elements.of(n, c, thread, threads) are those of a thread.
template <class Kind, class Elements>
FXFUSE_INLINE void merge_partials(const Partials& p, int kinds, int number, int pieces, typename Kind::Merged* out, Elements elements) {
  using Added = typename Kind::Added;
  using Merged = typename Kind::Merged;
  constexpr int lanes = kMergeThreads / kMerged, warps = kMergeThreads / 32, each = kMergeSlots / lanes;
  constexpr int numbers = sizeof(Added::v) / sizeof(double);
  __shared__ double shared[kMergeThreads * sizeof(Merged) / sizeof(double)];
  const int blocks = (p.channels + kMerged - 1) / kMerged, row = blockIdx.x / blocks, n = row / pieces, piece = row - n * pieces;
  const int first = (blockIdx.x - row * blocks) * kMerged, mine = threadIdx.x % kMerged;
  const bool there = first + mine < p.channels;
  const int size = (p.slots + pieces - 1) / pieces, begin = piece * size, end = p.slots < begin + size ? p.slots : begin + size;
  const int step = p.channels * kinds;
  const float2* const parts = p.parts + (int64_t)n * p.slots * step + number * p.channels + (there ? first + mine : 0);
  const int* const counts = p.counts + (int64_t)n * p.slots;
  float2 part[each];
  int count[each];
  auto load = [&](int slot) {
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const int at = slot + i * lanes;
      part[i] = at < end ? parts[(int64_t)at * step] : float2{0.f, 0.f};
      count[i] = at < end ? counts[at] : 0;
    }
  };
  const float reference = parts[(int64_t)begin * step].x;
  int slot = begin + threadIdx.x / kMerged;
  load(slot);
  Added all(reference);  // which waits for it
  while (true) {
#pragma unroll
    for (int i = 0; i < each; ++i) all.add(part[i], count[i]);  // of an empty slot there is nothing
    slot += kMergeSlots;
    if (slot >= end) break;
    load(slot);
  }
  static_assert(sizeof(shared) >= warps * numbers * kMerged * sizeof(double), "there is room for what each warp has");
  double(*const found)[numbers][kMerged] = (double(*)[numbers][kMerged])shared;  // of a warp
#pragma unroll
  for (int distance = kMerged; distance < 32; distance *= 2) {
    Added other = all;
#pragma unroll
    for (int k = 0; k < numbers; ++k) other.v[k] = __shfl_xor_sync(~0u, all.v[k], distance);
    all.merge(other);
  }
#pragma unroll
  for (int k = 0; k < numbers; ++k)
    if ((threadIdx.x & 31) < kMerged) found[threadIdx.x / 32][k][mine] = all.v[k];
  __syncthreads();
  if (threadIdx.x < kMerged && there) {
#pragma unroll
    for (int warp = 1; warp < warps; ++warp) {
      Added other = all;
#pragma unroll
      for (int k = 0; k < numbers; ++k) other.v[k] = found[warp][k][mine];
      all.merge(other);
    }
    out[(int64_t)row * p.channels + first + mine] = all.made();
  }
  if (!elements.wanted(n)) return;
  for (int i = 0; i < kMerged && first + i < p.channels; ++i) {
    const typename Kind::Running some = elements.of(n, first + i, piece * kMergeThreads + threadIdx.x, pieces * kMergeThreads);
    const Merged made = block_merged<kMergeThreads>(some, shared);
    if (threadIdx.x == 0) out[(int64_t)row * p.channels + first + i] = made;
  }
}

constexpr int kFinishThreads = 128;

// [result][sample][channel] of groups of `members` channels, or, where `batch`, of all samples. A block per group (and
// sample).
template <class Kind>
FXFUSE_INLINE void finish_statistics(const typename Kind::Merged* merged, float* results, int samples, int channels,
                                     int members, bool batch, int pieces, double eps) {
  const int groups = channels / members, row = blockIdx.x / groups, group = blockIdx.x - row * groups;
  const typename Kind::Merged* const from = merged + (int64_t)row * pieces * channels + group * members;
  const int count = members * pieces * (batch ? samples : 1);
  typename Kind::Added all(Kind::reference(from[0]));
  for (int i = threadIdx.x; i < count; i += kFinishThreads) {
    const int at = i / members;
    all.add(from[(int64_t)at * channels + i - at * members]);
  }
  block_add<kFinishThreads>(all);
  float made[Kind::results];
#pragma unroll
  for (int k = 0; k < Kind::results; ++k) made[k] = all.result(k, eps);
  const int size = (batch ? 1 : samples) * channels;
  for (int i = threadIdx.x; i < members; i += kFinishThreads)
#pragma unroll
    for (int k = 0; k < Kind::results; ++k) results[k * size + row * channels + group * members + i] = made[k];
}

}  // namespace fxfuse
