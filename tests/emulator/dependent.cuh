// The name of fxfuse/kernels/cuh/dependent.cuh, on the emulated machine: kernels run one behind the other.
#pragma once

namespace fxfuse {
inline void begin_dependent() { emulated_begin_dependent(); }
}  // namespace fxfuse
