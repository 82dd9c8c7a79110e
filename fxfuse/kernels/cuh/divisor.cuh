// Divisions by numbers that a launch knows: a multiplication and a shift.
#pragma once
#include "ptx.cuh"

namespace fxfuse {

// n / divisor for n from 0 to 2^31 - 1.
struct Divisor {
  unsigned multiplier, shift;
  FXFUSE_INLINE int of(int n) const { return (int)(((uint64_t)(unsigned)n * multiplier) >> shift); }
};

}  // namespace fxfuse
