// The threads of the process, which are PyTorch's.

#pragma once

#include <dlfcn.h>

#include <cstdint>

#include "../cpu/interface.h"
#include "tensors.h"

// Return GOMP_parallel of the OpenMP runtime that PyTorch uses, or null: then nothing is parallel.
inline Parallel openmp_parallel() {
  static const Parallel found = [] {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Parallel>(torch ? dlsym(torch, "GOMP_parallel") : nullptr);
  }();
  return found;
}

// Return how many threads work on `size` elements of which fewer than `least` are left to one.
inline int32_t threads_for(int64_t size, int64_t least) {
  return size < least ? 1 : int32_t(torch::stable::get_num_threads());
}
