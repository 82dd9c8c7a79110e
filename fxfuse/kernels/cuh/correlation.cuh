// Mean and variance of a transposed convolution's output without that output, for few input channels. A class of outputs
// is y = b + w . patch, so that the sum of (y - b)^2 is w^T M w, where M holds the sums of products of every two elements
// of a patch. Such a sum depends on the distance of the two alone, but for where it begins and ends: x's positions are
// cut into parts, boxes that no such border runs through, and for every part and distance ("lag") the products are added
// up once, in float64 on the matrix units. All sums are in a fixed order. A tile of x lies in shared memory in float32, and
// its numbers become float64 as they are read: half the traffic, and nothing to be done before copies may begin.
#pragma once
#include "conv_direct.cuh"

namespace fxfuse {

constexpr int kCorrelationThreads = 128;
constexpr int kTileElements = 9600, kAlone = kTileElements / (kCorrelationThreads / 32);  // of a block's tile, a warp's
constexpr int kMostCuts = 9, kMostParts = 128;
constexpr int kResult = 128, kSummed = 4;  // numbers of a matrix instruction's result; results that are added up at a time
constexpr int kShort = 4;                  // steps of walks that are made across the rows
static_assert(kCorrelationThreads / 32 * kSummed * kResult * 2 <= kTileElements, "the warps' results lie where a tile was");

// The parts, and the jobs that they are divided into. The `wide` first jobs are a block's, the other ones a warp's; the
// `several` first parts have more than one.
struct Parts {
  int blocks, wide, jobs, several, parts;  // blocks: of a sample and group
  int cut[3][kMostCuts];          // per dim, where parts begin, and where the last one ends
  int begin[kMostParts + 1];      // the first job of each part
  int tile[kMostParts];           // positions of a tile of each part: d + 2^11 * h + 2^22 * w
  int place[kMostParts];          // digits of base 32: which part it is along d, h and w; of Pitch

  FXFUSE_INLINE int digit(int part, int i) const { return place[part] >> 5 * i & 31; }
  FXFUSE_INLINE Size from(int part) const {
    return {cut[0][digit(part, 0)], cut[1][digit(part, 1)], cut[2][digit(part, 2)]};
  }
  FXFUSE_INLINE Size end(int part) const {
    return {cut[0][digit(part, 0) + 1], cut[1][digit(part, 1) + 1], cut[2][digit(part, 2) + 1]};
  }
  FXFUSE_INLINE int jobs_of(int part) const { return begin[part + 1] - begin[part]; }
};

struct Offset {
  int d, h, w, index;
};

// Which sample and group a block is of, and which one of theirs. Parts of all samples lie side by side, whole tiles first:
// what is left for the last multiprocessors are edges and corners.
struct BlockPlace {
  int which, block;
  FXFUSE_INLINE explicit BlockPlace(const Parts& p) {
    int at = blockIdx.x;
    settle(at);  // made anew wherever it is needed: it takes no registers elsewhere
    const int all = gridDim.x / p.blocks;
    block = at / all, which = at - block * all;
  }
};

// i / by for 0 <= i < 2^20. (i + 0.5) / by is 0.5 / by or more from every integer; two roundings and an approximation move
// it by less than (i + 0.5) / by / 2^22.
struct Reciprocal {
  int by;
  float reciprocal;
  FXFUSE_INLINE explicit Reciprocal(int by) : by(by), reciprocal(about_one_over((float)by)) {}
  FXFUSE_INLINE int operator()(int i) const { return (int)(((float)i + 0.5f) * reciprocal); }
};

// How a box of x lies in shared memory: at distances at which few lanes meet in a bank.
struct Pitch {
  int row, plane, channel;
  static FXFUSE_INLINE int spaced(int least, int to) { return least + ((to - least) & 31); }
  FXFUSE_INLINE Pitch(const Size& box, const Parts& p, int part)
      : row(box.w + p.digit(part, 3)),
        plane(spaced(row * box.h, p.digit(part, 4))),
        channel(spaced(plane * box.d, p.digit(part, 5))) {}
};

// The positions of a part's t-th tile, `box` from `from` on. There are `count` tiles.
struct PartTile {
  Size from, box;
  int count;
  FXFUSE_INLINE PartTile(const Parts& p, int part, int t) : from(p.from(part)) {
    const Size end = p.end(part), most = {p.tile[part] & 2047, p.tile[part] >> 11 & 2047, p.tile[part] >> 22};
    const int tiles_h = tiles(end.h - from.h, most.h), tiles_w = tiles(end.w - from.w, most.w);
    count = tiles(end.d - from.d, most.d) * tiles_h * tiles_w;
    const int over = Reciprocal(tiles_w)(t), at_d = Reciprocal(tiles_h)(over);
    from.d += at_d * most.d, from.h += (over - at_d * tiles_h) * most.h, from.w += (t - over * tiles_w) * most.w;
    box = {min(most.d, end.d - from.d), min(most.h, end.h - from.h), min(most.w, end.w - from.w)};
  }
  static FXFUSE_INLINE int tiles(int size, int most) { return Reciprocal(most)(size + most - 1); }
  // with what its positions' lags reach
  template <class Problem>
  FXFUSE_INLINE Size size() const {
    return {box.d + Problem::span_d, box.h + Problem::span_h, box.w + Problem::span_w};
  }
};

// Threads that share a job, a warp or a block, meet.
template <int threads>
FXFUSE_INLINE void meet() {
  if (threads == 32)
    __syncwarp();
  else
    __syncthreads();
}

// Brings `count` numbers of x into shared memory, `stride` apart there and `pitch` apart here.
FXFUSE_INLINE void load_run(float* to, int pitch, const float* from, int64_t stride, int count) {
#pragma unroll 4
  for (int k = 0; k < count; ++k, from += stride, to += pitch) copy_word(to, from);  // through no register: none waits
}
template <class T>
FXFUSE_INLINE void load_run(float* to, int pitch, const T* from, int64_t stride, int count) {
  constexpr int batch = 8;  // on its way before some of it is waited for
  for (int first = 0; first < count; first += batch) {
    T read[batch];
#pragma unroll
    for (int k = 0; k < batch; ++k, from += stride)
      if (first + k < count) read[k] = *from;
#pragma unroll
    for (int k = 0; k < batch; ++k, to += pitch)
      if (first + k < count) *to = to_float(read[k]);
  }
}

// Fills `tile` with the box `size` of every channel of x from `at` on; zeros outside of x. Neighbouring threads read along
// w. A thread reads runs along d or h, where that takes less.
template <class Problem, int threads, class T>
FXFUSE_INLINE void load_tile(float* tile, const Pitch& pitch, const T* x, const Strides& stride, const Size& sizes,
                             const Size& size, const Size& at) {
  const int thread = threadIdx.x % threads, log = size.w > 16 ? 5 : size.w > 8 ? 4 : size.w > 4 ? 3 : 2;
  const int step = threads >> log;
  // to begin a run takes as long as some of its elements
  auto cost = [&](int across, int along) { return (across + step - 1 & -step) * (along + 6); };
  const bool along_d = cost(size.h, size.d) < cost(size.d, size.h);
  const int along = along_d ? size.d : size.h, along_at = along_d ? at.d : at.h, along_x = along_d ? sizes.d : sizes.h;
  const int across = along_d ? size.h : size.d, across_at = along_d ? at.h : at.d, across_x = along_d ? sizes.h : sizes.d;
  const int64_t along_stride = along_d ? stride.d : stride.h, across_stride = along_d ? stride.h : stride.d;
  const int along_pitch = along_d ? pitch.plane : pitch.row, across_pitch = along_d ? pitch.row : pitch.plane;
  const int before = min(max(-along_at, 0), along), end = max(min(along_x - along_at, along), before);  // what is in x
  for (int w = thread & (1 << log) - 1; w < size.w; w += 1 << log) {
    const T* from_w = x + (at.w + w) * stride.w + (along_at + before) * along_stride;
    float* to_w = tile + w;
    for (int c = 0; c < Problem::in_channels; ++c, from_w += stride.c, to_w += pitch.channel)
      for (int i = thread >> log; i < across; i += step) {
        float* const to = to_w + i * across_pitch;
        const bool inside = (unsigned)(at.w + w) < (unsigned)sizes.w && (unsigned)(across_at + i) < (unsigned)across_x;
        const int first = inside ? before : along, last = inside ? end : along;
        for (int k = 0; k < first; ++k) to[k * along_pitch] = 0;
        load_run(to + first * along_pitch, along_pitch, from_w + (across_at + i) * across_stride, along_stride, last - first);
        for (int k = last; k < along; ++k) to[k * along_pitch] = 0;
      }
  }
  copied_words();
}

// How the positions of a box are walked along: rows, cut into pieces of `length` where that takes fewer steps. A lane has
// one of four pieces, all of which are walked along at the same time.
template <class Problem>
struct Walks {
  static constexpr int more = (Problem::copies - 1) * Problem::unit;  // steps beyond a piece's positions
  int cut, length, pieces, steps;  // 2^cut pieces of a row; steps of a walk, and `all` of them
  int all;
  FXFUSE_INLINE explicit Walks(const Size& box) : all(0x7fffffff) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int each = (box.w + (1 << i) - 1) >> i, count = box.d * box.h << i, of = (count + 3 >> 2) * (each + more);
      if (of < all) cut = i, length = each, pieces = count, steps = each + more, all = of;
    }
  }
};

// Adds the products of a tile's positions, as far as they are this warp's: [window and tile of rows][rows][columns]. Rows
// are channels of the second factor at Problem::rows distances each, and at the next ones along w; columns are channels
// of the first factor at every shift along w, and ones.
template <class Problem, int warps, int tiles, int results>
FXFUSE_INLINE void add_products(double (&acc)[results][4], const float* tile, const Pitch& pitch, const Size& box) {
  constexpr int channels = Problem::in_channels, windows = Problem::windows;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % warps;
  int column = lane >> 2;
  settle(column);  // what follows from it is made for every tile anew, and takes no registers while one is loaded
  const Walks<Problem> walks(box);
  int second[tiles][2];
#pragma unroll
  for (int i = 0; i < tiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = min(i * 16 + r * 8 + column, channels * Problem::rows - 1), c = at / Problem::rows;
      const Offset row = Problem::row(at - c * Problem::rows);
      second[i][r] = c * pitch.channel + row.d * pitch.plane + row.h * pitch.row + row.w;
    }
  const bool counts = column < channels * Problem::copies, one = column == channels * Problem::copies;
  const int shift = (one ? Problem::ones : column / channels) * Problem::unit;
  const int first = (counts ? column % channels * pitch.channel : 0) + shift;
  const Reciprocal by_steps(walks.steps), by_h(box.h);
  const int end = walks.all * (warp + 1) / warps;
  int step = walks.all * warp / warps;
  // across the rows, which takes less than short walks; of many tiles there are no registers for both
  if (tiles <= 4 && walks.cut == 0 && walks.steps <= kShort && box.h >= 4) {
    const int quads = walks.pieces + 3 >> 2;
    const Reciprocal by_quads(quads);
    while (step < end) {
      const int t = by_quads(step), quad = step - t * quads, until = min(quads, quad + end - step);
      const int along = Problem::low_w - Walks<Problem>::more + t;
      const bool valid = (counts || one) && (unsigned)(t - Walks<Problem>::more + shift) < (unsigned)box.w;
      int line = quad * 4 + (lane & 3), h = line - by_h(line) * box.h;
      const float* const begin = tile + Problem::low_h * pitch.row + along;  // of the first row
      const float* at = begin + by_h(line) * pitch.plane + h * pitch.row;
      step += until - quad;
#pragma unroll tiles > 2 ? 1 : 2
      for (int q = quad; q < until; ++q) {
        const bool there = line < walks.pieces;
        const float* const from = there ? at : begin;
        float factor = 0;
        if (valid && there) factor = one ? 1.f : from[first];
#pragma unroll
        for (int k = 0; k < windows; ++k)
#pragma unroll
          for (int i = 0; i < tiles; ++i)
            mma_double(acc[k * tiles + i], from[second[i][0] + k], from[second[i][1] + k], factor);
        line += 4, h += 4, at += 4 * pitch.row;
        if (h >= box.h) h -= box.h, at += pitch.plane - box.h * pitch.row;
      }
    }
    return;
  }
  while (step < end) {
    const int walk = by_steps(step), begin = step - walk * walks.steps, until = min(walks.steps, begin + end - step);
    const int mine = walk * 4 + (lane & 3), piece = mine < walks.pieces ? mine : 0, line = piece >> walks.cut;
    const int d = by_h(line), h = line - d * box.h, wanted = (piece - (line << walks.cut)) * walks.length;
    const int w = min(wanted, box.w - walks.length);  // a row's last piece begins where it is as long as the other ones
    const int skip = wanted - w, left = (counts || one) && mine < walks.pieces ? max(walks.length - skip, 0) : 0;
    const float* at =
        tile + d * pitch.plane + (h + Problem::low_h) * pitch.row + w + Problem::low_w - Walks<Problem>::more + begin;
    const int before = skip + Walks<Problem>::more - shift;  // steps until this lane's column has its piece's first position
    const bool reads = counts && left > 0;
    const float constant = one && left > 0 ? 1.f : 0.f;
    double window[tiles][2][windows];
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int k = 0; k + 1 < windows; ++k) window[i][r][k] = at[second[i][r] + k];
    auto products = [&](int t, double factor) {  // of the t-th step from here
#pragma unroll
      for (int i = 0; i < tiles; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) window[i][r][windows - 1] = at[second[i][r] + windows - 1 + t];
#pragma unroll
      for (int k = 0; k < windows; ++k)
#pragma unroll
        for (int i = 0; i < tiles; ++i) mma_double(acc[k * tiles + i], window[i][0][k], window[i][1][k], factor);
#pragma unroll
      for (int i = 0; i < tiles; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int k = 0; k + 1 < windows; ++k) window[i][r][k] = window[i][r][k + 1];
    };
    // columns of all shifts have positions, but in the first steps and the last ones; and in a piece that is skipped
    const int all_from = walks.cut == 0 ? Walks<Problem>::more : walks.steps, all_until = walks.steps - Walks<Problem>::more;
    constexpr int some = results > 4 ? 1 : results > 2 ? 2 : 4;
    for (int t = begin; t < until;) {
      if (t >= all_from && t + some <= min(until, all_until)) {
        float factor[some];
#pragma unroll
        for (int k = 0; k < some; ++k) {
          factor[k] = constant;
          if (reads) factor[k] = at[first + k];
        }
#pragma unroll
        for (int k = 0; k < some; ++k) products(k, factor[k]);
        t += some, at += some;
      } else {
        float factor = 0;
        if ((unsigned)(t - before) < (unsigned)left) factor = one ? 1.f : at[first];
        products(0, factor);
        ++t, ++at;
      }
    }
    step += until - begin;
  }
}

// The products of a job, by a block's threads or a warp's, in their own shared memory.
template <class Problem, int threads, class T>
FXFUSE_INLINE void correlate_job(float* tile, const T* x, const Strides& stride, const Size& sizes, const Parts& p, int job,
                                 double* products) {
  constexpr int channels = Problem::in_channels, tiles = (channels * Problem::rows + 15) / 16;
  constexpr int results = tiles * Problem::windows, warps = threads / 32;
  int part = warps == 1 ? p.parts - (p.jobs - job) : 0;  // a warp's part has no other job, and is one of the last ones
  if (warps > 1)
    while (p.begin[part + 1] <= job) ++part;
  double acc[results][4];
#pragma unroll
  for (int i = 0; i < results; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[i][e] = 0;
  for (int t = job - p.begin[part];; t += p.jobs_of(part)) {
    const PartTile at(p, part, t);
    if (t >= at.count) break;
    const Size size = at.template size<Problem>();
    const Pitch pitch(size, p, part);
    if (warps > 1) meet<threads>();  // what was there has been read
    load_tile<Problem, threads>(tile, pitch, x, stride, sizes, size,
                                {at.from.d, at.from.h - Problem::low_h, at.from.w - Problem::low_w});
    meet<threads>();
    add_products<Problem, warps, tiles>(acc, tile, pitch, at.box);
    if (warps == 1) break;  // a warp's is one tile
  }
  products += (BlockPlace(p).which * (int64_t)p.jobs + job) * (results * kResult);
  // a lane's numbers: of two rows, two neighbouring columns
  const int lane = threadIdx.x & 31, thread = threadIdx.x % threads, mine = (lane >> 2) * 8 + (lane & 3) * 2;
#pragma unroll
  for (int first = 0; first < results; first += kSummed) {
    const int some = min(kSummed, results - first);
    double* const summed = (double*)tile;
    double* const to = warps == 1 ? products + first * kResult : summed + thread / 32 * kSummed * kResult;
    if (warps > 1) meet<threads>();
#pragma unroll
    for (int i = 0; i < kSummed; ++i)
      if (first + i < results) {
        const double(&v)[4] = acc[first + i < results ? first + i : 0];
        *(double2*)(to + i * kResult + mine) = {v[0], v[1]};
        *(double2*)(to + i * kResult + mine + kResult / 2) = {v[2], v[3]};
      }
    if (warps > 1) {
      meet<threads>();
      for (int i = thread; i < some * kResult; i += threads) {
        double sum = summed[i];
#pragma unroll
        for (int warp = 1; warp < warps; ++warp) sum += summed[warp * kSummed * kResult + i];
        products[first * kResult + i] = sum;
      }
    }
  }
}

// The products of every sample, group and job.
template <class Problem, class T>
FXFUSE_INLINE void correlate(const T* x, const Strides& stride, const Size& sizes, const Parts& p, double* products) {
  extern __shared__ uint8_t raw[];
  float* const tile = (float*)raw;
  const BlockPlace at(p);
  const int n = at.which / Problem::groups;
  x += n * stride.n + (int64_t)(at.which - n * Problem::groups) * Problem::in_channels * stride.c;
  if (at.block < p.wide) {
    correlate_job<Problem, kCorrelationThreads>(tile, x, stride, sizes, p, at.block, products);
    return;
  }
  const int warp = threadIdx.x / 32, job = p.wide + (at.block - p.wide) * (kCorrelationThreads / 32) + warp;
  if (job < p.jobs) correlate_job<Problem, 32>(tile + warp * kAlone, x, stride, sizes, p, job, products);
}

}  // namespace fxfuse
