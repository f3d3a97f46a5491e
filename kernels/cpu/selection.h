// Select channels in vector registers: the reference of nm_select.py in C++.
//
// A group lies side by side in vector registers, as integer keys that order like its scores. Each
// channel meets its M - 1 rivals as the keys change places: its rival at distance d is the channel
// numbered XOR d. The N channels of a group that lose to fewer than N stay.

#pragma once

#include <algorithm>
#include <limits>

#include "floats.h"
#include "vectors.h"

// ---- keys ---------------------------------------------------------------------------------------
//
// A register of values has SPLIT registers of keys: one if keys are as wide as values, else two, of
// the even and of the odd channels.

// |x|: its bits, every NaN being one more than infinity.
template <class T>
struct Magnitude {
  using Bits = typename T::Bits;
  using Key = typename T::Key;
  static constexpr int SPLIT = 1;

  template <class Keys, class Values>
  INLINE static Keys keys(Values x, const float*, int64_t, int) {
    const Keys magnitude = (Keys)x & std::numeric_limits<Key>::max();
    const Keys not_a_number = fill<Keys>(Key(T::INFINITE + 1));
    return magnitude < not_a_number ? magnitude : not_a_number;
  }
};

// |x · factor| in float32, as above.
template <class T>
struct Weighted {
  using Bits = typename T::Bits;
  using Key = Float32::Key;
  static constexpr int SPLIT = sizeof(Key) / sizeof(Bits);

  template <class Keys, class Values>
  INLINE static Keys keys(Values x, const float* factor, int64_t channel, int odd) {
    constexpr int LANES = sizeof(Keys) / sizeof(Key);
    using Words = Vector<uint32_t, LANES>;
    using Floats = Vector<float, LANES>;
    const auto factors = load_every<SPLIT, Floats>(factor + channel, odd, LANE_NUMBERS<LANES>);
    const Words words = SPLIT == 1 ? (Words)x : odd ? (Words)x >> 16 : (Words)x & 0xFFFF;
    const Floats score = T::template widen<Floats>(words) * factors;
    return Magnitude<Float32>::keys<Keys>(score, factor, channel, 0);
  }
};

// ---- losses -------------------------------------------------------------------------------------

// Return 1 in the lanes whose rival, D lanes away, is the lower channel and so wins a tie.
template <int D, class Keys, int... LANE>
INLINE Keys lower_lanes(std::integer_sequence<int, LANE...>) {
  return Keys{((LANE ^ D) < LANE)...};
}

// Count, below zero, what the channels of a group, in SPAN registers, lose at distance D.
//
// Of a channel's number in the group the bits below SPLIT and those from SPLIT * LANES on tell its
// register; the bits between tell its lane.
template <int D, int SPLIT, class Keys, int SPAN>
INLINE void meet(const Keys (&keys)[SPAN], Keys (&losses)[SPAN]) {
  using Key = std::decay_t<decltype(keys[0][0])>;
  constexpr int LANES = sizeof(Keys) / sizeof(Key);
  constexpr int FAR = D / (SPLIT * LANES) * SPLIT, LANE = D / SPLIT % LANES, NEAR = D % SPLIT;
#pragma GCC unroll 8
  for (int s = 0; s < SPAN; ++s) {
    const int rival = s ^ FAR ^ NEAR;
    const Keys lower = LANE && !FAR ? lower_lanes<LANE, Keys>(LANE_NUMBERS<LANES>)
                                    : fill<Keys>(Key(rival < s));
    losses[s] += exchange<LANE>(keys[rival], LANE_NUMBERS<LANES>) > keys[s] - lower;
  }
}

template <int SPLIT, class Keys, int SPAN, int... D>
INLINE void meet_all(const Keys (&keys)[SPAN], Keys (&losses)[SPAN],
                     std::integer_sequence<int, D...>) {
  (meet<D + 1, SPLIT>(keys, losses), ...);
}

// ---- selection ----------------------------------------------------------------------------------

constexpr int WHOLE = 32;  // channels: whole groups and whole registers

// Select among channels that are a multiple of WHOLE.
template <class Score, int M>
void select_whole(const typename Score::Bits* x, const float* factor, typename Score::Bits* y,
                  int64_t channels, int n) {
  using Key = typename Score::Key;
  using Bits = typename Score::Bits;
  constexpr int SPLIT = Score::SPLIT;
  constexpr int LANES = REGISTER / sizeof(Bits);
  constexpr int SPAN = M > LANES ? M / LANES : 1;  // registers of values that hold a group
  using Values = Vector<Bits, LANES>;
  using Keys = Vector<Key, REGISTER / sizeof(Key)>;
  for (int64_t i = 0; i < channels; i += SPAN * LANES) {
    Values values[SPAN];
    Keys keys[SPAN * SPLIT], losses[SPAN * SPLIT] = {};
#pragma GCC unroll 8
    for (int s = 0; s < SPAN * SPLIT; ++s) {
      const int64_t channel = i + s / SPLIT * LANES;
      if (s % SPLIT == 0) values[s / SPLIT] = load<Values>(x + channel);
      keys[s] = Score::template keys<Keys>(values[s / SPLIT], factor, channel, s % SPLIT);
    }
    meet_all<SPLIT>(keys, losses, std::make_integer_sequence<int, M - 1>{});
#pragma GCC unroll 8
    for (int s = 0; s < SPAN; ++s) {
      Keys best = losses[s * SPLIT] > Key(-n);  // all bits set, or none
      if constexpr (SPLIT == 2) best = (best & 0xFFFF) | (losses[s * SPLIT + 1] > -n) << 16;
      store(y + i + s * LANES, values[s] & (Values)best);
    }
  }
}

template <class Score>
using SelectWhole = decltype(&select_whole<Score, 2>);

template <class Score>
SelectWhole<Score> select_whole_of(int m) {
  switch (m) {
    case 2: return select_whole<Score, 2>;
    case 4: return select_whole<Score, 4>;
    case 8: return select_whole<Score, 8>;
    case 16: return select_whole<Score, 16>;
    default: return select_whole<Score, 32>;
  }
}

// Compiled once, in nm_select.cpp, for it takes long.
extern template SelectWhole<Magnitude<Float32>> select_whole_of<Magnitude<Float32>>(int);
extern template SelectWhole<Magnitude<BFloat16>> select_whole_of<Magnitude<BFloat16>>(int);
extern template SelectWhole<Magnitude<Float16>> select_whole_of<Magnitude<Float16>>(int);
extern template SelectWhole<Weighted<Float32>> select_whole_of<Weighted<Float32>>(int);
extern template SelectWhole<Weighted<BFloat16>> select_whole_of<Weighted<BFloat16>>(int);
extern template SelectWhole<Weighted<Float16>> select_whole_of<Weighted<Float16>>(int);

// Select among all channels of a token; those past the last WHOLE pass through a padded copy.
template <class Score>
void select_token(SelectWhole<Score> select, const typename Score::Bits* x, const float* factor,
                  typename Score::Bits* y, int64_t channels, int n) {
  const int64_t rest = channels % WHOLE, whole = channels - rest;
  select(x, factor, y, whole, n);
  if (rest == 0) return;
  typename Score::Bits x_rest[WHOLE] = {}, y_rest[WHOLE];
  float factor_rest[WHOLE] = {};
  std::copy_n(x + whole, rest, x_rest);
  if (factor) std::copy_n(factor + whole, rest, factor_rest);
  select(x_rest, factor_rest, y_rest, WHOLE, n);
  std::copy_n(y_rest, rest, y + whole);
}
