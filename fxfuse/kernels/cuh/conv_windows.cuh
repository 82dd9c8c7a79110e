// Products of float32's own accuracy. Of every number there are two of 16 bits, the rounded one and what that leaves of it
// (`prepare.cuh`): rows of x and of weights have both, a chunk's first parts in front of its second ones. All products but
// those of two second parts are added. The matrix units truncate as they accumulate, so that accumulators, a `window` of up
// to 64 columns, or of 128 positions, have the products of one or two steps alone, the small ones first, and are added to
// float32 sums. Where there are two windows, one is added while the other one's products are on their way.
#pragma once
#include "conv_copies.cuh"

namespace fxfuse {

// A step as the multiplying warpgroups read it, from shared memory.
struct StepAddress {
  uint32_t x;        // units of 16 bytes that the rows are shifted by
  uint32_t weights;  // units of 16 bytes from the stage's begin; kBegins and kEnds where a stage does; kLast where a run ends;
                     // kFour where three more of the stage are to be taken with it; kSlab times its d
};
constexpr uint32_t kBegins = 1u << 16, kEnds = 1u << 17, kLast = 1u << 18, kFour = 1u << 19, kSlab = 1u << 20;

// Of steps that multiply run `r` of residue classes, the windows: tiles of rows, and parts of their columns.
template <class Problem, int r, bool exact = Problem::exact>
struct Windows {
  struct Accumulators {};
};
template <class Problem, int r>
struct Windows<Problem, r, true> {
  static constexpr bool by_channel = Problem::by_channel;
  static constexpr int first = Problem::run_first(r) * Problem::columns, columns = Problem::run_count(r) * Problem::columns;
  static constexpr int width = Problem::window(r), parts = (by_channel ? 64 * Problem::m_tiles : columns) / width;
  static constexpr int count = parts * (by_channel ? columns / 64 : Problem::m_tiles), buffers = Problem::windows;
  using Accumulators = float[buffers][width / 2];
  using Sums = float[Problem::accumulator_tiles][Problem::accumulators];
  static constexpr int slices = Problem::chunk_channels / 16;  // of 16 numbers, in two units of 16 bytes

  // Adds a window's products to the sums that they belong to.
  static FXFUSE_INLINE void add(Sums& sums, const float (&window)[width / 2], int i) {
    const int tile = i / parts + (by_channel ? first / 64 : 0);
    const int begin = i % parts * (width / 2) + (by_channel ? 0 : first / 2);
#pragma unroll
    for (int k = 0; k < width / 2; ++k) sums[tile][begin + k] += window[k];
  }

  // The products of steps of the same stage, all of them: of four steps windows have the first two's or the last two's.
  template <int all_steps, int count_rows>
  static FXFUSE_INLINE void multiply(Sums& sums, const uint32_t (&rows)[count_rows], uint32_t rows_high, uint32_t stage,
                                     const StepAddress (&steps)[all_steps], Accumulators& window) {
    constexpr int row_bytes = Problem::chunk * 2;
    constexpr uint64_t weights_high = descriptor<row_bytes>(0, 8 * row_bytes) >> 32;
    constexpr int count_steps = all_steps > 2 ? 2 : all_steps, all = count * (all_steps / count_steps);
#pragma unroll
    for (int j = 0; j < all + buffers; ++j) {
      const int i = j % count;
      if (j >= buffers) {
        if (buffers > 1 && j <= all)
          wgmma_wait<1>();
        else
          wgmma_wait<0>();
        add(sums, window[j % buffers], (j - buffers) % count);
      }
      if (j >= all) continue;
      uint32_t xs[count_steps], ws[count_steps];
#pragma unroll
      for (int k = 0; k < count_steps; ++k) {
        const StepAddress& step = steps[j / count * count_steps + k];
        xs[k] = rows[by_channel ? i % parts * (width / 64) : i / parts] + step.x;
        ws[k] = stage + (step.weights & 0xffff) + (by_channel ? i / parts * 64 : i % parts * width) * (row_bytes / 16);
        asm volatile("" : "+r"(xs[k]), "+r"(ws[k]));  // now: registers are scarce
      }
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 3 * slices * count_steps; ++k) {
        const int which = k / (slices * count_steps);  // of x and weights: low and high, high and low, high and high
        const int of_x = (which == 0 ? slices : 0) + k % slices, of_weights = (which == 1 ? slices : 0) + k % slices;
        const uint32_t x = xs[k / slices % count_steps] + of_x * 2, w = ws[k / slices % count_steps] + of_weights * 2;
        const uint64_t positions = (uint64_t)rows_high << 32 | x, channels = weights_high << 32 | w;
        const uint64_t a = by_channel ? channels : positions, b = by_channel ? positions : channels;
        if (k == 0)
          Problem::template wgmma<width, true>(window[j % buffers], a, b);
        else
          Problem::template wgmma<width, false>(window[j % buffers], a, b);
      }
      wgmma_commit();
    }
  }
};

}  // namespace fxfuse
