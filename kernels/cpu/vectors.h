// Vector registers, in the extensions that GCC and Clang share: the compiler maps them to AVX-512,
// AVX2, NEON or whatever the machine has.

#pragma once

#include <cstring>
#include <utility>

#define INLINE [[gnu::always_inline]] inline

// Not 64 with AVX-512: its comparisons go by way of mask registers, which made 8:16 1.5 times slower
// (4-core AMD EPYC Genoa VM).
#if defined(__AVX2__)
constexpr int REGISTER = 32;  // bytes
#else
constexpr int REGISTER = 16;
#endif

template <class Scalar, int LANES>
using Vector __attribute__((vector_size(LANES * sizeof(Scalar)))) = Scalar;

template <int LANES>
constexpr auto LANE_NUMBERS = std::make_integer_sequence<int, LANES>{};

template <class V, class Scalar>
INLINE V load(const Scalar* from) {
  V values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

template <class V, class Scalar>
INLINE void store(Scalar* to, V values) {
  std::memcpy(to, &values, sizeof values);
}

template <class V, class Scalar>
INLINE V fill(Scalar value) {
  return V{} + value;
}

// Return the lanes of `left` and `right`, numbered through, that LANE... names.
template <int... LANE, class V>
INLINE V pick(V left, V right) {
#if defined(__clang__)
  return __builtin_shufflevector(left, right, LANE...);
#else
  return __builtin_shuffle(left, right, decltype(left < right){LANE...});
#endif
}

// Return the values with lane i and lane i XOR D exchanged.
template <int D, class V, int... LANE>
INLINE V exchange(V values, std::integer_sequence<int, LANE...>) {
  return pick<(LANE ^ D)...>(values, values);
}

// Return every STEP-th of the STEP * LANES scalars at `from`, beginning with number `first`. STEP is
// 1 or 2.
template <int STEP, class V, class Scalar, int... LANE>
INLINE V load_every(const Scalar* from, int first, std::integer_sequence<int, LANE...>) {
  if constexpr (STEP == 1) return load<V>(from);
  const V left = load<V>(from), right = load<V>(from + sizeof...(LANE));
  return first ? pick<(2 * LANE + 1)...>(left, right) : pick<(2 * LANE)...>(left, right);
}
