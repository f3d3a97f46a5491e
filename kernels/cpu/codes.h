// One scale and int8 codes of a row of kept values: codes.py's reference in C++.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "groups_of_four.h"

constexpr float LIMIT = 127;
constexpr float SMALLEST_SCALE = 0x1p-126f;
constexpr float ROUND = 0x1.8p23f;  // the last place of a sum with it is worth 1

// Four values of each group, times `smooth` (arranged) if there is one.
template <class T, bool SMOOTH>
INLINE Floats value_of(const Groups<T>& kept, const float* smooth, int k) {
  const Floats value = kept.channel(k);
  return SMOOTH ? value * load<Floats>(smooth + k * LANES) : value;
}

// The largest magnitude of a row, as bits that order like it, NaN above infinity.
template <class T, bool SMOOTH>
struct Peak {
  using Magnitudes = std::conditional_t<SMOOTH, Ints, typename Groups<T>::Magnitudes>;
  Magnitudes largest{};

  INLINE void meet(const Groups<T>& kept, const float* smooth) {
    if constexpr (SMOOTH) {
      for (int k = 0; k < 4; ++k)
        largest = larger(largest, (Ints)value_of<T, SMOOTH>(kept, smooth, k) & 0x7FFFFFFF);
    } else {
      kept.measure(largest);
    }
  }

  int32_t float_bits() const {
    if constexpr (SMOOTH) return largest_lane<int32_t>(largest);
    else return Groups<T>::float_bits(largest);
  }
};

// Call body(step, channel) for each step of a row; the last one may be a copy, padded with zeros.
template <class Bits, class Body>
INLINE void each_step(const Bits* row, int64_t channels, Body body) {
  int64_t at = 0;
  for (; at + STEP <= channels; at += STEP) body(row + at, at);
  if (at == channels) return;
  Bits rest[STEP] = {};
  std::copy(row + at, row + channels, rest);
  body(rest, at);
}

template <class T, bool ARRANGED>
INLINE Groups<T> groups_of(const typename T::Bits* step) {
  return ARRANGED ? Groups<T>::arranged(step) : Groups<T>::of(step);
}

template <class T, bool SMOOTH>
int32_t peak_of(const typename T::Bits* row, const float* smooth, int64_t channels) {
  Peak<T, SMOOTH> peak;
  each_step(row, channels, [&](auto step, int64_t at) __attribute__((always_inline)) {
    peak.meet(groups_of<T, !SMOOTH>(step), smooth + at);  // without one any order will do
  });
  return peak.float_bits();
}

// Write the codes of a row whose largest magnitude has the bits `peak`; return its scale.
template <class T, bool SMOOTH, bool ARRANGED>
float encode(const typename T::Bits* row, int32_t peak, const float* smooth, int8_t* codes,
             int64_t channels) {
  if (peak >= Float32::INFINITE) {
    std::fill_n(codes, channels, int8_t(0));
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = std::max(bits_as<float>(peak) / LIMIT, SMALLEST_SCALE);
  const float inverse = 1 / scale;
  each_step(row, channels, [&](auto step, int64_t at) __attribute__((always_inline)) {
    const Groups<T> kept = groups_of<T, ARRANGED>(step);
    Words code[4];  // in the lowest byte
    for (int k = 0; k < 4; ++k)
      code[k] = (Words)(value_of<T, SMOOTH>(kept, smooth + at, k) * inverse + ROUND);
    const Words low = (code[0] & 0xFF) | code[1] << 8, high = (code[2] & 0xFF) | code[3] << 8;
    const Words all = (low & 0xFFFF) | high << 16;
    if (at + STEP <= channels) store(codes + at, all);
    else std::memcpy(codes + at, &all, size_t(channels - at));
  });
  return scale;
}
