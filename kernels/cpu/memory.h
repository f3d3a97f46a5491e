// Memory: large results cost more in page faults than in arithmetic, and small ones pass.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

constexpr int64_t HUGE_PAGE = 2 << 20;

// Ask for huge pages under `bytes` at `start`, about to be written for the first time: advice, which
// the system may ignore and which changes no content.
inline void prefer_huge_pages(void* start, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  if (bytes < 2 * HUGE_PAGE) return;
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (uintptr_t(start) + page - 1) / page * page;
  const uintptr_t end = (uintptr_t(start) + uintptr_t(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory of one's own, without the C++ runtime, which the library does not need otherwise.
template <class V>
using Memory = std::unique_ptr<V[], Free>;

template <class V>
Memory<V> memory_for(int64_t count) {
  return Memory<V>(static_cast<V*>(std::malloc(size_t(count) * sizeof(V))));
}
