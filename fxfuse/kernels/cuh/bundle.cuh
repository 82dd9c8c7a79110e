// Pointwise operators on small tensors, many of them in one launch: a thread per element, one output behind the other.
#pragma once
#include "dependent.cuh"
#include "pointwise.cuh"

namespace fxfuse {

constexpr int kBundleThreads = 256;

// `Part`: outputs of one size and layout; `elements(a)` of each, and `make`, which stores those at position i.
template <class Part, class... Others, class Arguments>
FXFUSE_DEVICE void bundle_at(const Arguments& a, unsigned i) {
  const unsigned elements = Part::elements(a);
  if (i < elements) {
    Part::make(a, i);
  } else if constexpr (sizeof...(Others) > 0) {
    bundle_at<Others...>(a, i - elements);
  }
}

template <class... Parts, class Arguments>
FXFUSE_DEVICE void bundle(const Arguments& a) {
  bundle_at<Parts...>(a, blockIdx.x * (unsigned)kBundleThreads + threadIdx.x);
}

}  // namespace fxfuse
