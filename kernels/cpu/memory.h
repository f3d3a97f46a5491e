// Fresh memory: a large result costs more in page faults than in arithmetic.

#pragma once

#include <cstdint>

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
