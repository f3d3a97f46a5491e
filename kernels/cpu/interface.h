// The C interface of the library: what int8_kernel.py, nm_select.py and nm_quantize.py call by way
// of ctypes, and cpu_operators/ directly.

#pragma once

#include <cstdint>

#include "parallel.h"
#include "tokens.h"

struct RowCodes {
  const float* smooth;  // [channels] or null
  int8_t* codes;        // [tokens, channels], contiguous
  float* row_scale;     // [tokens]
};

struct Weight {
  const int8_t* codes;  // [outputs, channels]
  int8_t* packed;       // [panels, panel_bytes]
  int64_t outputs, channels;
  int32_t threads;
};

struct Problem {
  const int8_t* codes;        // [tokens, channels], rows codes_stride apart
  const float* row_scale;     // [tokens]
  const int8_t* weight;       // packed
  const float* weight_scale;  // [outputs]
  const float* bias;          // [outputs] or null
  void* y;                    // [tokens, outputs], contiguous
  uint8_t* scratch;           // for the codes of whole tiles of tokens
  int64_t tokens, channels, outputs, codes_stride;
  int32_t type, kernel, threads;
};

extern "C" {
void nm_select_float32(const Tokens* p, void* y, Parallel parallel);
void nm_select_bfloat16(const Tokens* p, void* y, Parallel parallel);
void nm_select_float16(const Tokens* p, void* y, Parallel parallel);

void nm_quantize_float32(const Tokens* p, const RowCodes* to, Parallel parallel);
void nm_quantize_bfloat16(const Tokens* p, const RowCodes* to, Parallel parallel);
void nm_quantize_float16(const Tokens* p, const RowCodes* to, Parallel parallel);

int32_t int8_has(int32_t kernel);
void int8_pack(const Weight* weight, Parallel parallel);
void int8_linear(const Problem* p, Parallel parallel);
}
