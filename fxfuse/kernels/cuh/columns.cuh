// Which output channels the columns of a tile are.
#pragma once
#include "ptx.cuh"

namespace fxfuse {

// Of every eight columns of accumulators each of four threads has two. Where channels are neighbours in memory, several such
// blocks hold channels in another order: those of a thread are `Problem::neighbours` in a row, and are stored at once. Of
// the blocks that are left it is half as many, and so on.
template <class Problem>
struct Columns {
  static constexpr int blocks = Problem::columns / 8;
  struct Together {
    int first, count;  // blocks
  };
  static FXFUSE_INLINE constexpr Together together(int j) {  // with block j
    int first = 0;
    for (int n = Problem::neighbours / 2; n > 1; n /= 2) {
      const int end = first + (blocks - first) / n * n;
      if (j < end) return {first + (j - first) / n * n, n};
      first = end;
    }
    return {j, 1};
  }
  // The channel, in its tile, of column `j * 8 + thread * 2 + e`.
  static FXFUSE_INLINE constexpr int channel(int j, int thread, int e) {
    const Together with = together(j);
    return with.first * 8 + thread * 2 * with.count + (j - with.first) * 2 + e;
  }
};

}  // namespace fxfuse
