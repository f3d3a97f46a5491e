// Micro-kernels of int8_gemm.cpp: a few tokens times the 32 outputs of a panel, in int32.
//
//     sums[i][j] = start[i][j] + sum over k of rows[i][k] * panel[k][j]
//
//     rows     [steps][ROWS][64]      64 channels of ROWS tokens side by side, then the next 64
//     panel    [steps][16][32][4]     four channels of each output side by side, then the next four
//     sums     [ROWS][32]
//
// Instructions for 8-bit products sum four channels into 32 bits, so all kernels read this layout.
// That arithmetic is modulo 2^32: whatever happens on the way, a sum that fits int32 is exact.

#pragma once

#include <cstdint>
#include <cstring>

#include "int8_gemm_amx.h"
#include "vectors.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

constexpr int OUTPUTS = 32;  // of a panel
constexpr int STEP = 64;     // channels: a row of an AMX tile, a cache line

struct Start {
  const int32_t* sums;  // [ROWS][32]
  int64_t stride;       // from row to row: 0 where all rows start alike
};

struct Kernel {
  int rows;      // of a tile, all of it
  uint8_t flip;  // is XORed to the codes: 0x80 makes int8 code c the uint8 code c + 128
  void (*begin)();
  void (*multiply)(int live, const uint8_t* rows, const int8_t* panel, int64_t steps, Start start,
                   int32_t* sums);
  void (*end)();
};

inline void nothing() {}

// ---- plain C++ ----------------------------------------------------------------------------------
//
// A register has four codes of each of some outputs. Widened to 16 bits the first and the third lie
// in one register, the others in another, and a lane of 32 bits sums the products of two.

constexpr int PLAIN_ROWS = 2, PARTS = 4;  // registers of sums: PARTS for each row
constexpr int WIDTH = REGISTER / 4;       // outputs of a register
using Sums = Vector<int32_t, WIDTH>;
using Codes = Vector<int16_t, 2 * WIDTH>;

struct Halves {
  Codes even, odd;

  explicit Halves(Codes codes) : even(codes << 8 >> 8), odd(codes >> 8) {}
};

INLINE Sums sum_pairs(Codes left, Codes right) {
#if defined(__AVX2__)
  return (Sums)_mm256_madd_epi16((__m256i)left, (__m256i)right);
#elif defined(__SSE2__)
  return (Sums)_mm_madd_epi16((__m128i)left, (__m128i)right);
#else
  const Sums both = (Sums)(left * right);  // whichever half comes first: they are added
  return (both << 16 >> 16) + (both >> 16);
#endif
}

template <int LIVE>
void multiply_plain(const uint8_t* rows, const int8_t* panel, int64_t steps, Start start,
                    int32_t* sums) {
  for (int first = 0; first < OUTPUTS; first += PARTS * WIDTH) {
    Sums total[LIVE][PARTS] = {};
    for (int64_t step = 0; step < steps; ++step)
      for (int k = 0; k < STEP; k += 4) {
        const uint8_t* codes = rows + step * PLAIN_ROWS * STEP + k;
        const int8_t* weight = panel + (step * STEP + k) * OUTPUTS + first * 4;
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part) {
          const Halves right(load<Codes>(weight + part * REGISTER));
#pragma GCC unroll 2
          for (int i = 0; i < LIVE; ++i) {
            const Halves left((Codes)fill<Sums>(load<int32_t>(codes + i * STEP)));
            total[i][part] += sum_pairs(left.even, right.even) + sum_pairs(left.odd, right.odd);
          }
        }
      }
    for (int i = 0; i < LIVE; ++i)
      for (int part = 0; part < PARTS; ++part) {
        const int output = first + part * WIDTH;
        const Sums from = load<Sums>(start.sums + i * start.stride + output);
        store(sums + i * OUTPUTS + output, from + total[i][part]);
      }
  }
}

inline void multiply_plain_any(int live, const uint8_t* rows, const int8_t* panel, int64_t steps,
                               Start start, int32_t* sums) {
  (live == 1 ? multiply_plain<1> : multiply_plain<2>)(rows, panel, steps, start, sums);
}

constexpr Kernel PLAIN{PLAIN_ROWS, 0, nothing, multiply_plain_any, nothing};

// ---- AVX-512 VNNI -------------------------------------------------------------------------------

#if defined(__AVX512VNNI__)
#define HAS_VNNI

constexpr int VNNI_ROWS = 12;   // 24 registers of sums, 2 of weights
constexpr int AHEAD = 8 << 10;  // bytes of weights on their way: a single token waits for them only

template <int LIVE>
void multiply_vnni(const uint8_t* rows, const int8_t* panel, int64_t steps, Start start,
                   int32_t* sums) {
  __m512i left[LIVE], right[LIVE];
#pragma GCC unroll 12
  for (int i = 0; i < LIVE; ++i) {
    left[i] = _mm512_loadu_si512(start.sums + start.stride * i);
    right[i] = _mm512_loadu_si512(start.sums + start.stride * i + 16);
  }
  for (int64_t step = 0; step < steps; ++step, rows += VNNI_ROWS * STEP)
    for (int k = 0; k < STEP; k += 4, panel += 4 * OUTPUTS) {
      const __m512i low = _mm512_loadu_si512(panel), high = _mm512_loadu_si512(panel + 64);
      _mm_prefetch(panel + AHEAD, _MM_HINT_T0);
      _mm_prefetch(panel + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 12
      for (int i = 0; i < LIVE; ++i) {
        const __m512i codes = _mm512_set1_epi32(load<int32_t>(rows + STEP * i + k));
        left[i] = _mm512_dpbusd_epi32(left[i], codes, low);
        right[i] = _mm512_dpbusd_epi32(right[i], codes, high);
      }
    }
#pragma GCC unroll 12
  for (int i = 0; i < LIVE; ++i) {
    _mm512_storeu_si512(sums + OUTPUTS * i, left[i]);
    _mm512_storeu_si512(sums + OUTPUTS * i + 16, right[i]);
  }
}

template <int... LESS>
void multiply_vnni_live(int live, const uint8_t* rows, const int8_t* panel, int64_t steps,
                        Start start, int32_t* sums, std::integer_sequence<int, LESS...>) {
  constexpr decltype(&multiply_vnni<1>) BY_LIVE[] = {multiply_vnni<LESS + 1>...};
  BY_LIVE[live - 1](rows, panel, steps, start, sums);
}

inline void multiply_vnni_any(int live, const uint8_t* rows, const int8_t* panel, int64_t steps,
                              Start start, int32_t* sums) {
  multiply_vnni_live(live, rows, panel, steps, start, sums, LANE_NUMBERS<VNNI_ROWS>);
}

constexpr Kernel VNNI{VNNI_ROWS, 0x80, nothing, multiply_vnni_any, nothing};

#endif

// ---- AMX ----------------------------------------------------------------------------------------

#if defined(HAS_AMX)

// 2 x 2 tiles of sums. Tokens past the last live one are computed too, from whatever is there.
inline void multiply_amx(int, const uint8_t* rows, const int8_t* panel, int64_t steps,
                         Start start, int32_t* sums) {
  constexpr int64_t SUMS = OUTPUTS * 4, WEIGHTS = OUTPUTS * 4;  // bytes from row to row
  const int32_t *upper = start.sums, *lower = upper + TILE_ROWS * start.stride;
  Tiles::load<0>(upper, start.stride * 4);
  Tiles::load<1>(upper + 16, start.stride * 4);
  Tiles::load<2>(lower, start.stride * 4);
  Tiles::load<3>(lower + 16, start.stride * 4);
  for (int64_t step = 0; step < steps; ++step) {
    Tiles::load<4>(rows, STEP);
    Tiles::load<6>(panel, WEIGHTS);
    Tiles::multiply<0, 4, 6>();
    Tiles::load<7>(panel + 64, WEIGHTS);
    Tiles::multiply<1, 4, 7>();
    Tiles::load<5>(rows + TILE_ROWS * STEP, STEP);
    Tiles::multiply<2, 5, 6>();
    Tiles::multiply<3, 5, 7>();
    rows += 2 * TILE_ROWS * STEP;
    panel += OUTPUTS * STEP;
  }
  Tiles::store<0>(sums, SUMS);
  Tiles::store<1>(sums + 16, SUMS);
  Tiles::store<2>(sums + TILE_ROWS * OUTPUTS, SUMS);
  Tiles::store<3>(sums + TILE_ROWS * OUTPUTS + 16, SUMS);
}

constexpr Kernel AMX{2 * TILE_ROWS, 0, Tiles::configure, multiply_amx, Tiles::release};

#endif
