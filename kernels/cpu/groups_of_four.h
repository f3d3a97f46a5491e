// Rows in steps of four registers: register k has channel k of LANES groups of four.
//
// So the rivals of a group meet without changing places, and the four codes of a group are one
// word of 32 bits. A step in this order is `arranged`. Values of 16 bits stay in pairs: channels
// 0 and 1 of a group are a word, as are 2 and 3.

#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <type_traits>

#include "floats.h"
#include "vectors.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// Wider than REGISTER with AVX-512: here differences do what comparisons, slow there, do elsewhere.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = REGISTER / 4;
#endif
constexpr int STEP = 4 * LANES;  // channels
using Floats = Vector<float, LANES>;
using Words = Vector<uint32_t, LANES>;
using Ints = Vector<int32_t, LANES>;

template <int FIRST, int... LANE>
INLINE Words every_other(Words left, Words right, std::integer_sequence<int, LANE...>) {
  return pick<(2 * LANE + FIRST)...>(left, right);
}
INLINE Words evens(Words left, Words right) {
  return every_other<0>(left, right, LANE_NUMBERS<LANES>);
}
INLINE Words odds(Words left, Words right) {
  return every_other<1>(left, right, LANE_NUMBERS<LANES>);
}

template <class V>
INLINE V larger(V left, V right) {
  return left > right ? left : right;
}

template <class Scalar, class V>
INLINE Scalar largest_lane(V values) {
  Scalar lanes[sizeof(V) / sizeof(Scalar)];
  store(lanes, values);
  return *std::max_element(std::begin(lanes), std::end(lanes));
}

// A step of 16-bit values.
template <class T>
struct Groups {
  using Bits = uint16_t;
  using Magnitudes = Vector<int16_t, 2 * LANES>;
  Words pairs[2];

  INLINE static Groups of(const Bits* x) {
    const Words left = load<Words>(x), right = load<Words>(x + 2 * LANES);
    return {{evens(left, right), odds(left, right)}};
  }
  INLINE static Groups arranged(const Bits* from) {
    return {{load<Words>(from), load<Words>(from + 2 * LANES)}};
  }
  INLINE void arrange(Bits* to) const {
    store(to, pairs[0]);
    store(to + 2 * LANES, pairs[1]);
  }
  INLINE Floats channel(int k) const {
    return k % 2 ? T::template widen_upper<Floats>(pairs[k / 2])
                 : T::template widen_lower<Floats>(pairs[k / 2]);
  }
  INLINE void keep(const Ints (&marks)[4]) {
    for (int k = 0; k < 4; k += 2) {
      const Words both = (Words)marks[k] >> 16 | ((Words)marks[k + 1] & 0xFFFF0000);
      pairs[k / 2] &= (Words)((Magnitudes)both >> 15);
    }
  }
  INLINE void add_squares(Floats (&sums)[4]) const {
#if defined(__AVX512BF16__)  // it flushes denormals, which are far below any energy that counts
    if constexpr (std::is_same_v<T, BFloat16>) {
      for (int k = 0; k < 2; ++k)
        sums[k] = (Floats)_mm512_dpbf16_ps((__m512)sums[k], (__m512bh)pairs[k], (__m512bh)pairs[k]);
      return;
    }
#endif
    for (int k = 0; k < 4; ++k) sums[k] += channel(k) * channel(k);
  }
  INLINE void measure(Magnitudes& largest) const {
    for (const Words pair : pairs) largest = larger(largest, (Magnitudes)(pair & 0x7FFF7FFF));
  }
  static int32_t float_bits(Magnitudes largest) {
    return bits_as<int32_t>(T::template widen<float>(uint32_t(largest_lane<int16_t>(largest))));
  }
};

template <>
struct Groups<Float32> {
  using Bits = uint32_t;
  using Magnitudes = Ints;
  Words channels[4];

  INLINE static Groups of(const Bits* x) {
    const Groups in = arranged(x);
    const Words *from = in.channels, even[2] = {evens(from[0], from[1]), evens(from[2], from[3])},
                odd[2] = {odds(from[0], from[1]), odds(from[2], from[3])};
    return {{evens(even[0], even[1]), evens(odd[0], odd[1]), odds(even[0], even[1]),
             odds(odd[0], odd[1])}};
  }
  INLINE static Groups arranged(const Bits* from) {
    return {{load<Words>(from), load<Words>(from + LANES), load<Words>(from + 2 * LANES),
             load<Words>(from + 3 * LANES)}};
  }
  INLINE void arrange(Bits* to) const {
    for (int k = 0; k < 4; ++k) store(to + k * LANES, channels[k]);
  }
  INLINE Floats channel(int k) const { return (Floats)channels[k]; }
  INLINE void keep(const Ints (&marks)[4]) {
    for (int k = 0; k < 4; ++k) channels[k] &= (Words)(marks[k] >> 31);
  }
  INLINE void add_squares(Floats (&sums)[4]) const {
    for (int k = 0; k < 4; ++k) sums[k] += channel(k) * channel(k);
  }
  INLINE void measure(Magnitudes& largest) const {
    for (const Words values : channels) largest = larger(largest, (Ints)(values & 0x7FFFFFFF));
  }
  static int32_t float_bits(Magnitudes largest) { return largest_lane<int32_t>(largest); }
};

// Return, bit by bit, what two of the three are, after inverting the first TURNED of them.
template <int TURNED>
INLINE Ints two_of(Ints a, Ints b, Ints c) {
#if defined(__AVX512F__)
  constexpr int A = TURNED > 0 ? 0x0F : 0xF0;
  constexpr int B = TURNED > 1 ? 0x33 : 0xCC;
  constexpr int C = TURNED > 2 ? 0x55 : 0xAA;
  constexpr int TRUTH = (A & B) | (C & (A | B));
  return (Ints)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)c, TRUTH);
#else
  if (TURNED > 0) a = ~a;
  if (TURNED > 1) b = ~b;
  if (TURNED > 2) c = ~c;
  return (a & b) | (c & (a | b));
#endif
}

// Mark, by the sign, the two best of each group: those that win against two or three. Of two equal
// keys the lower channel wins. Keys are not negative, so no difference of two overflows.
INLINE void best_two(const Ints (&key)[4], Ints (&marks)[4]) {
  const Ints lost01 = key[0] - key[1], lost02 = key[0] - key[2], lost03 = key[0] - key[3];
  const Ints lost12 = key[1] - key[2], lost13 = key[1] - key[3], lost23 = key[2] - key[3];
  marks[0] = two_of<3>(lost01, lost02, lost03);
  marks[1] = two_of<2>(lost12, lost13, lost01);
  marks[2] = two_of<1>(lost23, lost02, lost12);
  marks[3] = two_of<0>(lost03, lost13, lost23);
}
