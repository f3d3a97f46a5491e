// The floating-point types of activations: their bits, and the way to float32 and back.
//
// `Words` is uint32_t and `Floats` is float, or each is a vector of as many. Nothing depends on an
// instruction set.

#pragma once

#include <cstdint>
#include <cstring>

template <class To, class From>
inline To bits_as(const From& value) {
  static_assert(sizeof(To) == sizeof(From), "a change of type, not of size");
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

struct Float32 {
  using Bits = uint32_t;
  using Key = int32_t;                         // holds the bits of a magnitude
  static constexpr Key INFINITE = 0x7F800000;  // that of infinity; NaN lies above

  template <class Floats, class Words>
  static Floats widen(Words bits) { return bits_as<Floats>(bits); }

  static Bits narrow(float value) { return bits_as<Bits>(value); }
};

struct BFloat16 {
  using Bits = uint16_t;
  using Key = int16_t;
  static constexpr Key INFINITE = 0x7F80;

  template <class Floats, class Words>
  static Floats widen(Words bits) { return bits_as<Floats>(bits << 16); }

  // The same of one of two values in a word.
  template <class Floats, class Words>
  static Floats widen_lower(Words pair) { return bits_as<Floats>(pair << 16); }
  template <class Floats, class Words>
  static Floats widen_upper(Words pair) { return bits_as<Floats>(pair & 0xFFFF0000); }

  // Round to nearest, ties to even. No NaN comes here.
  static Bits narrow(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    return Bits((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
};

struct Float16 {
  using Bits = uint16_t;
  using Key = int16_t;
  static constexpr Key INFINITE = 0x7C00;

  // An exact product moves the exponent, denormals included; infinity and NaN get theirs by hand.
  template <class Floats, class Words>
  static Floats widen(Words bits) {
    const Words magnitude = bits & 0x7FFF;
    const Words finite = bits_as<Words>(bits_as<Floats>(magnitude << 13) * 0x1p112f);
    const Words special = -((magnitude + 0x0400) >> 15) & 0x7F800000;
    return bits_as<Floats>(finite | special | (bits & 0x8000) << 16);
  }

  // The same of one of two values in a word.
  template <class Floats, class Words>
  static Floats widen_lower(Words pair) { return widen<Floats>(pair & 0xFFFF); }
  template <class Floats, class Words>
  static Floats widen_upper(Words pair) { return widen<Floats>(pair >> 16); }

  // Round to nearest, ties to even. No NaN comes here. A denormal is rounded by adding 0.5, whose
  // last bit is worth as much as that of a denormal.
  static Bits narrow(float value) {
    const uint32_t bits = bits_as<uint32_t>(value), magnitude = bits & 0x7FFFFFFF;
    const float shifted = bits_as<float>(magnitude) + 0.5f;
    const uint32_t denormal = bits_as<uint32_t>(shifted) - bits_as<uint32_t>(0.5f);
    const uint32_t normal = (magnitude - (112u << 23) + 0x0FFF + (magnitude >> 13 & 1)) >> 13;
    const uint32_t finite = magnitude < bits_as<uint32_t>(0x1p-14f) ? denormal : normal;
    const uint32_t rounded = magnitude < bits_as<uint32_t>(0x1p16f) ? finite : uint32_t(INFINITE);
    return Bits((bits >> 16 & 0x8000) | rounded);
  }
};
