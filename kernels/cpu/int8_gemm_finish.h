// From int32 sums to results: sum · row scale · output's scale + bias in float32, rounded once.

#pragma once

#include <algorithm>
#include <cstdint>

#include "floats.h"

constexpr int LANES = 32;  // outputs of a panel

// What the outputs of one panel are scaled by and have added. Without a bias that is -0, which even
// leaves -0 as it is.
struct Columns {
  alignas(64) float scale[LANES] = {}, bias[LANES];
  int live;

  Columns(const float* scales, const float* biases, int count) : live(count) {
    std::copy_n(scales, count, scale);
    std::fill_n(bias, LANES, -0.0f);
    if (biases) std::copy_n(biases, count, bias);
  }
};

template <class T>
typename T::Bits round_result(float value) {
  constexpr auto NOT_A_NUMBER = typename T::Bits(T::INFINITE | T::INFINITE >> 1);
  return value != value ? NOT_A_NUMBER : T::narrow(value);
}

// Write the results of `rows` tokens, y_stride apart.
template <class T>
void finish(const int32_t* sums, int rows, const float* row_scale, const Columns& columns, void* to,
            int64_t y_stride) {
  using Bits = typename T::Bits;
  const float *scale = columns.scale, *bias = columns.bias;
  for (int i = 0; i < rows; ++i, sums += LANES) {
    alignas(64) Bits results[LANES];
#pragma omp simd
    for (int j = 0; j < LANES; ++j)
      results[j] = round_result<T>(float(sums[j]) * row_scale[i] * scale[j] + bias[j]);
    Bits* y = static_cast<Bits*>(to) + i * y_stride;
    if (columns.live == LANES)  // the usual case, a copy of known size
      std::copy_n(results, LANES, y);
    else
      std::copy_n(results, columns.live, y);
  }
}
