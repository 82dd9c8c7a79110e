// Means and variances of the outputs from the products of x with itself: those of every residue class are sums over the
// parts of x that it reads, and times weights they are its sum and its sum of squares.
#pragma once
#include "correlation.cuh"

namespace fxfuse {

constexpr int kMomentsThreads = 512, kMostPatch = 64;
constexpr int kChannels = 16;               // output channels of a block
constexpr int kSquares = 4608, kRows = 96;  // elements and rows of the matrices M that are in shared memory
static_assert(kMostPatch <= kRows && kMostPatch * (kMostPatch + 1) <= kSquares, "every class has room");

template <class T>
constexpr double kLargest = 3.4e38;
template <>
constexpr double kLargest<Half> = 65504.0;

constexpr int kAtOnce = 8;  // sums that are on their way at the same time
static_assert(kMostParts % kAtOnce == 0, "there is room for as many as are read at once");

// A row of a class's M in shared memory: [column, and behind them a sum of x]. Rows lie one behind the other.
struct MatrixRow {
  int first;             // how many elements are to be made for the rows in front of it: those from the diagonal on
  int place, a, of;      // where it begins; which row of which class it is
  int columns;
};

// What the sums of a class need of the parts: the element of M at row a and column b, or the sum of x for b = the number
// of columns. `sums` are those of every part, which begins at `begins`.
template <class Problem>
FXFUSE_INLINE double element_of(const MatrixRow& row, int b, int parts, const Size* begins, const double* const* sums,
                                const Size& sizes, const Size& out) {
  constexpr int channels = Problem::in_channels;
  const int first_tap = Problem::tap_begin(row.of);
  const bool one = b == row.columns;
  if (one) b = row.a;
  Offset from = Problem::tap(first_tap + row.a / channels), to = Problem::tap(first_tap + b / channels);
  Offset lag = {to.d - from.d, to.h - from.h, to.w - from.w};
  int first = row.a % channels, second = b % channels;
  if (lag.d < 0 || (lag.d == 0 && (lag.h < 0 || (lag.h == 0 && lag.w < 0)))) {  // only the other one is there
    lag = {-lag.d, -lag.h, -lag.w};
    from = to;
    const int other = first;
    first = second, second = other;
  }
  // what the class's outputs read of x by the tap of the first factor; the other one is zero outside of x
  const Offset at = Problem::residue(row.of);
  const int end_d = min((out.d - at.d + Problem::stride_d - 1) / Problem::stride_d + from.d, sizes.d);
  const int end_h = min((out.h - at.h + Problem::stride_h - 1) / Problem::stride_h + from.h, sizes.h);
  const int end_w = min((out.w - at.w + Problem::stride_w - 1) / Problem::stride_w + from.w, sizes.w);
  // the column of ones lies behind those of all shifts
  const int entry = Problem::entry(lag) + second * Problem::rows * 8 +
                    (one ? (Problem::copies - Problem::ones) * channels : first);
  double sum = 0;
  for (int part = 0; part < parts; part += kAtOnce) {
    double value[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) value[k] = sums[part + k][entry];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const Size begin = begins[part + k];
      const bool there = begin.d >= from.d & begin.d < end_d & begin.h >= from.h & begin.h < end_h & begin.w >= from.w &
                         begin.w < end_w;
      sum += there ? value[k] : 0;
    }
  }
  return sum;
}

// Mean and squares around it of every output channel of a sample: a block per sample, group and kChannels channels. Where
// an output may not be finite in `Out`, they are made of the outputs, one by one, as they would be stored. `room` is for
// sums of parts that several jobs have products of.
template <class Problem, class Out, class T, class Bias>
FXFUSE_INLINE void moments_of_products(const T* x, const T* w, const Bias* bias, const DirectGeometry& s, const Parts& p,
                                       const Size& out, int out_channels, const double* products, double* room,
                                       Moments* moments) {
  constexpr int channels = Problem::in_channels, warps = kMomentsThreads / 32;
  constexpr int entries = (channels * Problem::rows + 15) / 16 * Problem::windows * kResult;
  __shared__ double m[kSquares];
  __shared__ MatrixRow rows_of[kRows];
  __shared__ float weights[kRows][kChannels];
  __shared__ Size begins[kMostParts];
  __shared__ const double* sums[kMostParts];
  __shared__ int wrong[kChannels];
  const int blocks = (out_channels + kChannels - 1) / kChannels, which = blockIdx.x / blocks, n = which / Problem::groups;
  const int group = which - n * Problem::groups, first_channel = (blockIdx.x - which * blocks) * kChannels;
  const Size sizes = {s.depth, s.height, s.width};
  products += (int64_t)which * p.jobs * entries;
  room += (int64_t)blockIdx.x * p.several * entries;
  for (int part = threadIdx.x; part < kMostParts; part += kMomentsThreads) {  // what is no part begins in no class
    begins[part] = part < p.parts ? p.from(part) : Size{-0x7fffffff, 0, 0};
    sums[part] = part < p.several ? room + part * entries : products + (part < p.parts ? (int64_t)p.begin[part] * entries : 0);
  }
  for (int i = threadIdx.x; i < p.several * entries; i += kMomentsThreads) {
    const int part = i / entries, jobs = p.jobs_of(part);
    const double* const from = products + (int64_t)p.begin[part] * entries + i - part * entries;
    double sum = 0;
    for (int job = 0; job < jobs; job += kAtOnce) {
      double value[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) value[k] = from[(int64_t)min(job + k, jobs - 1) * entries];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) sum += job + k < jobs ? value[k] : 0;
    }
    room[i] = sum;
  }
  const int mine = threadIdx.x % kChannels, column = min(first_channel + mine, out_channels - 1);
  double sum = 0, squares = 0;
  for (int r = 0; r < Problem::classes;) {  // as many classes at a time as there is room for
    int last = r, rows = 0, size = 0, all = 0;
    for (; last < Problem::classes; ++last) {
      const int columns = (Problem::tap_begin(last + 1) - Problem::tap_begin(last)) * channels;
      if (rows + columns > kRows || size + columns * (columns + 1) > kSquares) break;
      const int a = threadIdx.x - rows;
      if (a >= 0 && a < columns)
        rows_of[threadIdx.x] = {all + a * (columns + 1) - a * (a - 1) / 2, size + a * (columns + 1), a, last, columns};
      rows += columns, size += columns * (columns + 1), all += columns * (columns + 3) / 2;
    }
    const int first_row = Problem::tap_begin(r) * channels;
#pragma unroll 4
    for (int row = threadIdx.x / kChannels; row < rows; row += kMomentsThreads / kChannels) {
      const int at = first_row + row, tap = Problem::tap(at / channels).index;
      weights[row][mine] =
          to_float(w[((int64_t)(group * channels + at % channels) * out_channels + column) * Problem::volume + tap]);
    }
    __syncthreads();  // sums of parts are there, too
    for (int i = threadIdx.x; i < all; i += kMomentsThreads) {
      int at = 0;
#pragma unroll
      for (int half = 64; half; half /= 2)
        if (at + half < rows && rows_of[at + half].first <= i) at += half;
      const MatrixRow row = rows_of[at];
      const int b = row.a + i - row.first;
      const double made = element_of<Problem>(row, b, p.parts, begins, sums, sizes, out);
      m[row.place + b] = made;
      if (b < row.columns) m[row.place + (b - row.a) * (row.columns + 1) + row.a] = made;  // M is symmetric
    }
    __syncthreads();
    for (int at = threadIdx.x / kChannels; at < rows; at += kMomentsThreads / kChannels) {
      const MatrixRow row = rows_of[at];
      double product = 0;
#pragma unroll 4
      for (int b = 0; b < row.columns; ++b) product += m[row.place + b] * weights[at - row.a + b][mine];
      sum += m[row.place + row.columns] * weights[at][mine], squares += product * weights[at][mine];
    }
    __syncthreads();
    r = last;
  }
  sum += __shfl_xor_sync(~0u, sum, kChannels), squares += __shfl_xor_sync(~0u, squares, kChannels);
  double(*const found)[2][kChannels] = (double(*)[2][kChannels])m;  // of a warp
  if ((threadIdx.x & 31) < kChannels) {
    found[threadIdx.x / 32][0][mine] = sum;
    found[threadIdx.x / 32][1][mine] = squares;
  }
  __syncthreads();
  const int all = out_channels * Problem::groups, c = group * out_channels + first_channel + mine;
  moments += (int64_t)n * all;
  const double outputs = (double)((int64_t)out.d * out.h * out.w);
  if (threadIdx.x < kChannels) {
    bool finite_all = true;
    if (first_channel + mine < out_channels) {
      sum = squares = 0;
#pragma unroll
      for (int warp = 0; warp < warps; ++warp) sum += found[warp][0][mine], squares += found[warp][1][mine];
      const double shift = bias ? to_float(bias[c]) : 0.f, mean = sum / outputs, around = squares - sum * mean;
      // no output is further from zero than the root of this; the comparison fails where something is NaN
      finite_all = squares + shift * (2 * sum + shift * outputs) < kLargest<Out> * kLargest<Out>;
      moments[c] = {outputs, mean + shift, around < 0 ? 0 : around};
    }
    wrong[mine] = !finite_all;
  }
  __syncthreads();
  Geometry g = {};
  g.out_channels = out_channels;
  const Input<T, T, Identity> in(x, {});
  for (int i = 0; i < kChannels; ++i) {
    if (!wrong[i]) continue;
    const int channel = group * out_channels + first_channel + i;
    const float shift = bias ? to_float(bias[channel]) : 0.f;
    Statistics::Running some;
    for (int64_t at = threadIdx.x; at < (int64_t)out.d * out.h * out.w; at += kMomentsThreads) {
      const int64_t rest = at / out.w;
      const int at_w = (int)(at - rest * out.w), at_h = (int)(rest % out.h), at_d = (int)(rest / out.h);
      const float y = direct_value<Problem>(in, w, s, g, n, group, first_channel + i, at_d, at_h, at_w) + shift;
      some.add(to_float(from_float<Out>(y)));
    }
    const Moments made = block_merged<kMomentsThreads>(some, m);
    if (threadIdx.x == 0) moments[channel] = made;
  }
}

}  // namespace fxfuse
