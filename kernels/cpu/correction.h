// Give what is kept of a token the energy of the whole token: the corrections of nm_select.py.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

enum Correction { NONE, NORM, VARIANCE };

constexpr float EPSILON = 1e-30f;
constexpr int BLOCK = 1024;  // channels summed in float32, before float64 takes over

struct Pair {
  float x, y;
};

// Return the means over a token of term(x - center.x) and term(y - center.y).
template <class T, class Term>
Pair means(const typename T::Bits* x, const typename T::Bits* y, int64_t channels, Pair center,
           Term term) {
  double x_sum = 0, y_sum = 0;
  for (int64_t start = 0; start < channels; start += BLOCK) {
    const int64_t end = std::min<int64_t>(start + BLOCK, channels);
    float x_part = 0, y_part = 0;
#pragma omp simd reduction(+ : x_part, y_part)
    for (int64_t i = start; i < end; ++i) {
      x_part += term(T::template widen<float>(uint32_t(x[i])) - center.x);
      y_part += term(T::template widen<float>(uint32_t(y[i])) - center.y);
    }
    x_sum += x_part;
    y_sum += y_part;
  }
  return {float(x_sum / channels), float(y_sum / channels)};
}

// Return the root of the ratio of two energies, maybe not finite.
inline float scale_between(Pair energy) {
  return std::sqrt((energy.x + EPSILON) / (energy.y + EPSILON));
}

// Return what scales the kept values y to the mean square or the variance of x, maybe not finite.
template <class T>
float correction_scale(const typename T::Bits* x, const typename T::Bits* y, int64_t channels,
                       Correction correction) {
  Pair center{0, 0};
  if (correction == VARIANCE)
    center = means<T>(x, y, channels, center, [](float value) { return value; });
  const Pair energy =
      means<T>(x, y, channels, center, [](float deviation) { return deviation * deviation; });
  return scale_between(energy);
}

// Scale the kept values y to the mean square or the variance of x.
template <class T>
void correct_token(const typename T::Bits* x, typename T::Bits* y, int64_t channels,
                   Correction correction) {
  const float scale = correction_scale<T>(x, y, channels, correction);
  if (!std::isfinite(scale)) return;
#pragma omp simd
  for (int64_t i = 0; i < channels; ++i)
    y[i] = T::narrow(T::template widen<float>(uint32_t(y[i])) * scale);
}
