// Which kernel multiplies int8 codes, as int8_kernel.py chooses: the fastest that this CPU has, AMX
// only if it gets a small product right; AMBER_INT8_KERNEL asks for another. All give the same
// bits, and read one layout of the weight.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "../cpu/interface.h"
#include "tensors.h"

constexpr int64_t PANEL = 32, CODE_STEP = 64, SPARE_TOKENS = 31;
enum Int8Kernel : int32_t { PLAIN_CPP, VNNI_512, AMX_TILES };
constexpr const char* INT8_NAMES[] = {"cpp", "vnni", "amx"};

constexpr int64_t rounded_up(int64_t count, int64_t step) {
  return (count + step - 1) / step * step;
}

// Return the shape of a packed weight of [outputs, channels] codes.
inline Sizes packed_sizes(int64_t outputs, int64_t channels) {
  return {rounded_up(outputs, PANEL) / PANEL, PANEL * (rounded_up(channels, CODE_STEP) + 4)};
}

// Return how many bytes the codes of whole tiles of tokens take.
constexpr int64_t scratch_bytes(int64_t tokens, int64_t channels) {
  return (tokens + SPARE_TOKENS) * rounded_up(channels, CODE_STEP);
}

// A small product with ragged edges, made of codes of all sizes.
struct SmallProduct {
  static constexpr int64_t TOKENS = 45, OUTPUTS = 75, CHANNELS = 203;
  std::vector<int8_t> codes = numbered(TOKENS), weight = numbered(OUTPUTS);
  std::vector<int8_t> packed = std::vector<int8_t>(product(packed_sizes(OUTPUTS, CHANNELS)));
  std::vector<uint8_t> scratch = std::vector<uint8_t>(scratch_bytes(TOKENS, CHANNELS));
  std::vector<float> ones = std::vector<float>(OUTPUTS, 1);

  SmallProduct() {
    const Weight whole{weight.data(), packed.data(), OUTPUTS, CHANNELS, 1};
    int8_pack(&whole, nullptr);
  }

  std::vector<float> by(Int8Kernel kernel) {
    std::vector<float> y(TOKENS * OUTPUTS);
    const Problem problem{codes.data(), ones.data(),    packed.data(), ones.data(), nullptr,
                          y.data(),     scratch.data(), TOKENS,        CHANNELS,    OUTPUTS,
                          CHANNELS,     0,              kernel,        1};
    int8_linear(&problem, nullptr);
    return y;
  }

  static std::vector<int8_t> numbered(int64_t rows) {
    std::vector<int8_t> codes(rows * CHANNELS);
    for (int64_t i = 0; i < rows * CHANNELS; ++i)
      codes[i] = int8_t((i * 7919 + i / 255) % 255 - 127);
    return codes;
  }
};

inline bool is_able(Int8Kernel kernel) {
  if (!int8_has(kernel)) return false;
  if (kernel != AMX_TILES) return true;
  SmallProduct small;
  return small.by(AMX_TILES) == small.by(PLAIN_CPP);
}

inline Int8Kernel choose_int8_kernel() {
  const char* wanted = std::getenv("AMBER_INT8_KERNEL");
  const std::string name = wanted ? wanted : "";
  std::string valid;
  for (const Int8Kernel kernel : {AMX_TILES, VNNI_512, PLAIN_CPP}) {
    if (!is_able(kernel)) continue;
    if (name.empty() || name == INT8_NAMES[kernel]) return kernel;
    valid += (valid.empty() ? "" : ", ") + std::string(INT8_NAMES[kernel]);
  }
  fail("AMBER_INT8_KERNEL='", name, "' is not in this library, or not on this CPU; valid here: ",
       valid);
}

inline Int8Kernel int8_kernel() {
  static const Int8Kernel chosen = choose_int8_kernel();
  return chosen;
}
