// How the kernels of a call follow each other: programmatic dependent launch. A kernel may begin while those in front
// of it still run; it then does what needs no memory of theirs, and waits.
#pragma once

namespace fxfuse {

// Every thread of a kernel passes here, whatever it does afterwards, before it reads or writes global memory: behind it
// the kernels in front have ended, with all that they wrote. It waits for the one in front alone. That one has waited
// for its own in the same way, or it could not have ended, so that memory is free for all to use again, too.
// The next kernel may begin from here on, as soon as all blocks of this one have: it takes no place from them.
__device__ __forceinline__ void begin_dependent() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace fxfuse
