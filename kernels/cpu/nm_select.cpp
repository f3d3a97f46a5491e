// Keep the N best of every M consecutive channels of each token: nm_select.py's reference in C++.

#include "correction.h"
#include "floats.h"
#include "interface.h"
#include "memory.h"
#include "selection.h"

template SelectWhole<Magnitude<Float32>> select_whole_of<Magnitude<Float32>>(int);
template SelectWhole<Magnitude<BFloat16>> select_whole_of<Magnitude<BFloat16>>(int);
template SelectWhole<Magnitude<Float16>> select_whole_of<Magnitude<Float16>>(int);
template SelectWhole<Weighted<Float32>> select_whole_of<Weighted<Float32>>(int);
template SelectWhole<Weighted<BFloat16>> select_whole_of<Weighted<BFloat16>>(int);
template SelectWhole<Weighted<Float16>> select_whole_of<Weighted<Float16>>(int);

namespace {

template <class T, class Score>
void select_tokens(const Tokens& p, void* to, Parallel parallel) {
  using Bits = typename T::Bits;
  const auto select = select_whole_of<Score>(p.m);
  const auto correction = Correction(p.correction);
  prefer_huge_pages(to, p.tokens * p.channels * int64_t(sizeof(Bits)));
  for_each_piece(p.tokens, piece_of(p), p.threads, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const Bits* x = static_cast<const Bits*>(p.x) + token * p.x_stride;
      Bits* y = static_cast<Bits*>(to) + token * p.channels;
      if (token % p.sequence < p.dense) {
        std::copy_n(x, p.channels, y);
        continue;
      }
      select_token<Score>(select, x, factor_of(p, token), y, p.channels, p.n);
      if (correction != NONE) correct_token<T>(x, y, p.channels, correction);
    }
  });
}

template <class T>
void run(const Tokens& p, void* to, Parallel parallel) {
  (p.factor ? select_tokens<T, Weighted<T>> : select_tokens<T, Magnitude<T>>)(p, to, parallel);
}

}  // namespace

extern "C" {
void nm_select_float32(const Tokens* p, void* y, Parallel parallel) {
  run<Float32>(*p, y, parallel);
}
void nm_select_bfloat16(const Tokens* p, void* y, Parallel parallel) {
  run<BFloat16>(*p, y, parallel);
}
void nm_select_float16(const Tokens* p, void* y, Parallel parallel) {
  run<Float16>(*p, y, parallel);
}
}
