// Mean and variance of a transposed convolution's output without that output, for few input channels. A class of outputs
// is y = b + w . patch, so that the sum of (y - b)^2 is w^T M w, where M holds the sums of products of every two elements
// of a patch. Such a sum depends on the distance of the two alone, but for where it begins and ends: x's positions are
// cut into parts, boxes that no such border runs through, and for every part and distance ("lag") the products are added
// up once, in float64 on the matrix units. All sums are in a fixed order.
#pragma once
#include "conv_direct.cuh"

namespace fxfuse {

constexpr int kCorrelationThreads = 256, kMomentsThreads = 128;
constexpr int kTileElements = 5888, kTilePositions = 1024;  // of x in shared memory, all there is of it
constexpr int kMostCuts = 9, kMostParts = 128, kMostJobs = 512, kMostPatch = 64;

// The parts, w varying fastest, and the jobs that they are divided into, one block each.
struct Parts {
  int jobs;
  int count[3];                      // parts per dim
  int cut[3][kMostCuts];             // where they begin, and where the last one ends
  int begin[kMostParts + 1];         // the first job of each part
  int tile[kMostParts];              // positions of a tile of each part: d + 2^11 * h + 2^22 * w
};

struct Offset {
  int d, h, w, index;
};

// i / by for 0 <= i < 2^20
struct Reciprocal {
  int by;
  float reciprocal;
  FXFUSE_INLINE explicit Reciprocal(int by) : by(by), reciprocal(1.f / (float)by) {}
  FXFUSE_INLINE int operator()(int i) const { return (int)(((float)i + 0.5f) * reciprocal); }
};

FXFUSE_INLINE int volume(const Size& s) { return s.d * s.h * s.w; }

FXFUSE_INLINE int part_of(const Parts& p, int job) {
  int part = 0;
  while (p.begin[part + 1] <= job) ++part;
  return part;
}

// How a box of x lies in shared memory: with distances that let lags to neighbours lie in different banks.
struct Pitch {
  int row, plane, channel;
  static FXFUSE_INLINE int spread(int least, int to) { return least + ((to - least) & 15); }
  FXFUSE_INLINE explicit Pitch(const Size& box)
      : row(spread(box.w, 6)), plane(spread(row * box.h, 2)), channel(spread(plane * box.d, 4)) {}
};

// Fills `tile`, as doubles, with the box `size` of every channel of x from (d0, h0, w0) on; zeros outside of x.
template <class Problem, class T>
FXFUSE_INLINE void load_tile(double* tile, const Pitch& pitch, const T* x, const Strides& stride, const Size& sizes,
                             const Size& size, int d0, int h0, int w0) {
  const Reciprocal by_w(size.w), by_h(size.h), by_d(size.d);
#pragma unroll 4
  for (int i = threadIdx.x; i < Problem::in_channels * volume(size); i += kCorrelationThreads) {
    const int row = by_w(i), plane = by_h(row), c = by_d(plane);
    const int at_d = plane - c * size.d, at_h = row - plane * size.h, at_w = i - row * size.w;
    const int d = d0 + at_d, h = h0 + at_h, w = w0 + at_w;
    const bool inside = d >= 0 && d < sizes.d && h >= 0 && h < sizes.h && w >= 0 && w < sizes.w;
    tile[c * pitch.channel + at_d * pitch.plane + at_h * pitch.row + at_w] =
        inside ? (double)to_float(x[c * stride.c + d * stride.d + h * stride.h + w * stride.w]) : 0.0;
  }
}

// The products of a job: [lag and channel of the second factor][channel of the first factor; 1 behind them]. A block per
// sample, group and job.
template <class Problem, class T>
FXFUSE_INLINE void correlate(const T* x, const Strides& stride, const Size& sizes, const Parts& p, double* products) {
  constexpr int channels = Problem::in_channels, row_tiles = (Problem::columns + 15) / 16;
  constexpr int warps = kCorrelationThreads / 32;
  __shared__ double tile[kTileElements];
  __shared__ uint16_t places[kTilePositions];
  const int which = blockIdx.x / p.jobs, job = blockIdx.x - which * p.jobs, n = which / Problem::groups;
  x += n * stride.n + (int64_t)(which - n * Problem::groups) * channels * stride.c;
  const int part = part_of(p, job), row = part / p.count[2], pd = row / p.count[1];
  const int ph = row - pd * p.count[1], pw = part - row * p.count[2];
  const Size from = {p.cut[0][pd], p.cut[1][ph], p.cut[2][pw]};
  const Size all = {p.cut[0][pd + 1] - from.d, p.cut[1][ph + 1] - from.h, p.cut[2][pw + 1] - from.w};
  const Size most = {p.tile[part] & 2047, p.tile[part] >> 11 & 2047, p.tile[part] >> 22};
  const int tiles_h = (all.h + most.h - 1) / most.h, tiles_w = (all.w + most.w - 1) / most.w;
  const int tiles = (all.d + most.d - 1) / most.d * tiles_h * tiles_w;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, column = lane >> 2;
  double acc[row_tiles][4];
#pragma unroll
  for (int i = 0; i < row_tiles; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[i][e] = 0;
  for (int t = job - p.begin[part]; t < tiles; t += p.begin[part + 1] - p.begin[part]) {
    const int over = t / tiles_w, td = over / tiles_h * most.d, th = over % tiles_h * most.h, tw = t % tiles_w * most.w;
    const Size box = {min(most.d, all.d - td), min(most.h, all.h - th), min(most.w, all.w - tw)};
    const Size size = {box.d + Problem::span_d, box.h + Problem::span_h, box.w + Problem::span_w};
    const Pitch pitch(size);
    __syncthreads();  // what was there has been read
    load_tile<Problem>(tile, pitch, x, stride, sizes, size, from.d + td, from.h + th - Problem::low_h,
                       from.w + tw - Problem::low_w);
    const Reciprocal by_w(box.w), by_h(box.h);
    for (int i = threadIdx.x; i < volume(box); i += kCorrelationThreads) {
      const int line = by_w(i), d = by_h(line), h = line - d * box.h, w = i - line * box.w;
      places[i] = d * pitch.plane + (h + Problem::low_h) * pitch.row + w + Problem::low_w;
    }
    int second[row_tiles][2];
#pragma unroll
    for (int i = 0; i < row_tiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = i * 16 + r * 8 + column, c = at / Problem::lags;
        const Offset lag = at < Problem::columns ? Problem::lag(at - c * Problem::lags) : Offset{};
        second[i][r] = (at < Problem::columns ? c * pitch.channel : 0) + lag.d * pitch.plane + lag.h * pitch.row + lag.w;
      }
    __syncthreads();
#pragma unroll 2
    for (int i = warp * 4 + (lane & 3); i < (volume(box) + 3 & ~3); i += warps * 4) {
      const bool there = i < volume(box);
      const double* at = tile + places[there ? i : 0];
      const double first = !there || column > channels ? 0.0 : column == channels ? 1.0 : at[column * pitch.channel];
#pragma unroll
      for (int k = 0; k < row_tiles; ++k) mma_double(acc[k], at[second[k][0]], at[second[k][1]], first);
    }
  }
  for (int turn = 0; turn < warps; ++turn) {  // one warp after the other adds what it has
    __syncthreads();
    if (warp != turn) continue;
#pragma unroll
    for (int i = 0; i < row_tiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        double& sum = tile[(i * 16 + (e >> 1) * 8 + column) * 8 + (lane & 3) * 2 + (e & 1)];
        sum = turn == 0 ? acc[i][e] : sum + acc[i][e];
      }
  }
  __syncthreads();
  products += (int64_t)blockIdx.x * Problem::entries;
  for (int i = threadIdx.x; i < Problem::entries; i += kCorrelationThreads) {
    const int at = i / (channels + 1);
    products[i] = tile[at * 8 + i - at * (channels + 1)];
  }
}

// Sums and sums of squares of every output channel, bias aside, over the outputs of one residue class: [channel]. A block
// per sample, group and class.
template <class Problem, class T>
FXFUSE_INLINE void square(const T* weight, const Parts& p, const Size& sizes, const Size& out, int out_channels,
                          const double* products, double2* sums) {
  constexpr int channels = Problem::in_channels;
  __shared__ double m[kMostPatch][kMostPatch + 1];
  __shared__ double ones[kMostPatch];  // sums of x
  __shared__ Size begins[kMostJobs];  // where a job's part does
  const int which = blockIdx.x / Problem::classes, r = blockIdx.x - which * Problem::classes;
  const int first_tap = Problem::tap_begin(r), columns = (Problem::tap_begin(r + 1) - first_tap) * channels;
  for (int job = threadIdx.x; job < p.jobs; job += kCorrelationThreads) {
    const int part = part_of(p, job), row = part / p.count[2], pd = row / p.count[1];
    begins[job] = {p.cut[0][pd], p.cut[1][row - pd * p.count[1]], p.cut[2][part - row * p.count[2]]};
  }
  __syncthreads();
  const Offset at = Problem::residue(r);
  const int count_d = (out.d - at.d + Problem::stride_d - 1) / Problem::stride_d;
  const int count_h = (out.h - at.h + Problem::stride_h - 1) / Problem::stride_h;
  const int count_w = (out.w - at.w + Problem::stride_w - 1) / Problem::stride_w;
  products += (int64_t)which * p.jobs * Problem::entries;
  for (int e = threadIdx.x; e < columns * (columns + 1); e += kCorrelationThreads) {
    int a = e / (columns + 1), b = e - a * (columns + 1);
    if (b < a) continue;  // M is symmetric
    const bool one = b == columns;
    if (one) b = a;
    Offset from = Problem::tap(first_tap + a / channels), to = Problem::tap(first_tap + b / channels);
    Offset lag = {to.d - from.d, to.h - from.h, to.w - from.w};
    int first = a % channels, second = b % channels;
    if (lag.d < 0 || (lag.d == 0 && (lag.h < 0 || (lag.h == 0 && lag.w < 0)))) {  // only the other one is there
      lag = {-lag.d, -lag.h, -lag.w};
      from = to;
      const int other = first;
      first = second, second = other;
    }
    // what the class's outputs read of x by the tap of the first factor; the other one is zero outside of x
    const Size end = {min(count_d + from.d, sizes.d), min(count_h + from.h, sizes.h), min(count_w + from.w, sizes.w)};
    const int entry = (second * Problem::lags + Problem::lag_index(lag)) * (channels + 1) + (one ? channels : first);
    double sum = 0;
#pragma unroll 8
    for (int job = 0; job < p.jobs; ++job) {
      const Size at = begins[job];
      if (at.d >= from.d && at.d < end.d && at.h >= from.h && at.h < end.h && at.w >= from.w && at.w < end.w)
        sum += products[(int64_t)job * Problem::entries + entry];
    }
    if (one)
      ones[a] = sum;
    else
      m[a][b] = m[b][a] = sum;
  }
  __syncthreads();
  const int lane = threadIdx.x & 31, group = which % Problem::groups;
  weight += (int64_t)group * channels * out_channels * Problem::volume;
  for (int c = threadIdx.x >> 5; c < out_channels; c += kCorrelationThreads / 32) {
    auto of = [&](int column) {
      const int at = (column % channels * out_channels + c) * Problem::volume;
      return (double)to_float(weight[at + Problem::tap(first_tap + column / channels).index]);
    };
    double w[2], sum = 0, squares = 0;  // a lane has two columns
#pragma unroll
    for (int k = 0; k < 2; ++k) w[k] = lane + 32 * k < columns ? of(lane + 32 * k) : 0;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int a = lane + 32 * k;
      double row = 0;
      for (int b = 0; b < columns; ++b) {
        const double other = __shfl_sync(~0u, b < 32 ? w[0] : w[1], b & 31);
        if (a < columns) row += m[a][b] * other;
      }
      if (a < columns) sum += w[k] * ones[a], squares += w[k] * row;
    }
    for (int distance = 16; distance; distance /= 2) {
      sum += __shfl_xor_sync(~0u, sum, distance);
      squares += __shfl_xor_sync(~0u, squares, distance);
    }
    if (lane == 0) sums[(int64_t)blockIdx.x * out_channels + c] = {sum, squares};
  }
}

template <class T>
constexpr double kLargest = 3.4e38;
template <>
constexpr double kLargest<Half> = 65504.0;

// Mean and squares around it of a sample and channel: a block each. Where an output may not be finite in `Out`, they are
// made of the outputs, one by one, as they would be stored.
template <class Problem, class Out, class T, class Bias>
FXFUSE_INLINE void moments_of_sums(const T* x, const T* w, const Bias* bias, const DirectGeometry& s, const Size& out,
                                   int out_channels, const double2* sums, Moments* moments) {
  const int all = out_channels * Problem::groups, n = blockIdx.x / all, c = blockIdx.x - n * all;
  const int group = c / out_channels, column = c - group * out_channels;
  sums += (int64_t)(n * Problem::groups + group) * Problem::classes * out_channels + column;
  double sum = 0, squares = 0;
#pragma unroll
  for (int r = 0; r < Problem::classes; ++r) {
    const double2 one = sums[r * out_channels];
    sum += one.x, squares += one.y;
  }
  const float shift = bias ? to_float(bias[c]) : 0.f;
  const int64_t size = (int64_t)out.d * out.h * out.w;
  const double count = (double)size, mean = sum / count;
  // no output is further from zero than the root of this; the comparison fails where something is NaN
  if (squares + shift * (2 * sum + shift * count) < kLargest<Out> * kLargest<Out>) {
    const double around = squares - sum * mean;
    if (threadIdx.x == 0) moments[blockIdx.x] = {count, mean + shift, around < 0 ? 0 : around};
    return;
  }
  Geometry g = {};
  g.out_channels = out_channels;
  Running mine;
  for (int64_t i = threadIdx.x; i < size; i += kMomentsThreads) {
    const int64_t rest = i / out.w;
    const int at_w = (int)(i - rest * out.w), at_h = (int)(rest % out.h), at_d = (int)(rest / out.h);
    const float y = direct_value<Problem>(x, w, s, g, n, group, column, at_d, at_h, at_w) + shift;
    mine.add(to_float(from_float<Out>(y)));
  }
  __shared__ double room[3 * kMomentsThreads];
  const Moments made = block_moments<kMomentsThreads>(mine, room);
  if (threadIdx.x == 0) moments[blockIdx.x] = made;
}

}  // namespace fxfuse
