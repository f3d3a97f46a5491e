// What nm_select and nm_quantize are asked to select from.

#pragma once

#include <algorithm>
#include <cstdint>

struct Tokens {
  const void* x;            // [tokens, channels], rows x_stride apart
  const float* factor;      // [experts, channels] or null
  const int32_t* ends;      // [experts]: where the tokens of each expert end; null: one expert
  int64_t tokens, channels, x_stride;
  int64_t sequence, dense;  // of every `sequence` tokens the first `dense` keep all channels
  int64_t experts;
  int32_t n, m, correction, threads;
};

// Return the factor of a token: that of the first expert whose tokens end after it, or the last.
inline const float* factor_of(const Tokens& p, int64_t token) {
  if (!p.ends) return p.factor;
  const int64_t expert = std::upper_bound(p.ends, p.ends + p.experts, token) - p.ends;
  return p.factor + std::min(expert, p.experts - 1) * p.channels;
}

// Return how many tokens a thread takes at a time.
inline int64_t piece_of(const Tokens& p) {
  constexpr int64_t CHANNELS = 1 << 14;
  return std::max<int64_t>(1, CHANNELS / p.channels);
}
