// Threads, and the floating-point environment of each.

#pragma once

#include <atomic>
#include <cfenv>
#include <cstdint>

// Arithmetic as IEEE 754 has it while this lives: round to nearest, keep denormals.
// torch.set_flush_denormal changes that for some threads, which must not change an answer.
class IeeeArithmetic {
 public:
  IeeeArithmetic() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~IeeeArithmetic() { std::fesetenv(&saved_); }
  IeeeArithmetic(const IeeeArithmetic&) = delete;
  IeeeArithmetic& operator=(const IeeeArithmetic&) = delete;

 private:
  std::fenv_t saved_;
};

// GOMP_parallel of the OpenMP runtime that PyTorch itself has loaded, or null. It is handed in rather
// than linked, for a second runtime would spin against the first one.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Call body(begin, end) for pieces of [0, count). Threads take pieces as they get ready, so that a
// busy core delays only itself.
template <class Body>
void for_each_piece(int64_t count, int64_t piece, int threads, Parallel parallel, Body body) {
  struct Work {
    const int64_t count, piece;
    const Body& body;
    std::atomic<int64_t> next{0};

    void run() {
      const IeeeArithmetic ieee;
      for (int64_t begin; (begin = next.fetch_add(piece)) < count;)
        body(begin, begin + piece < count ? begin + piece : count);
    }
  };
  Work work{count, piece, body};
  const int64_t pieces = (count + piece - 1) / piece;
  if (threads > pieces) threads = int(pieces);
  if (threads <= 1 || !parallel) return work.run();
  parallel([](void* data) { static_cast<Work*>(data)->run(); }, &work, unsigned(threads), 0);
}
