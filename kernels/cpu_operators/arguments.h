// What the operators accept, and the errors for what they do not: arguments.py in C++.

#pragma once

#include "tensors.h"

inline void check_tensor(const char* name, const Tensor& tensor, ScalarType dtype,
                         const Sizes& sizes) {
  if (!tensor.is_cpu()) fail(name, " is on another device; valid: the CPU, as x is");
  if (tensor.scalar_type() != dtype)
    fail(name, " has dtype ", text(tensor.scalar_type()), "; valid: ", text(dtype));
  if (sizes_of(tensor) != sizes)
    fail(name, " has shape ", text(sizes_of(tensor)), "; valid: ", text(sizes));
}

inline bool is_activation(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

constexpr const char* ACTIVATIONS = "torch.float32, torch.bfloat16, torch.float16";

inline void check_rows(const Tensor& x) {
  if (x.dim() == 0) fail("x is a scalar; valid: at least one dimension, the last one channels");
  if (!is_activation(x.scalar_type()))
    fail("x has dtype ", text(x.scalar_type()), "; valid in this library: ", ACTIVATIONS);
}

inline void check_factor(const Tensor& x, const MaybeTensor& factor, const MaybeTensor& offsets) {
  if (!factor) {
    if (offsets) fail("offsets tell the rows of each expert's factor; valid: None without one");
    return;
  }
  if (!offsets) return check_tensor("factor", *factor, ScalarType::Float, {channels_of(x)});
  if (x.dim() != 2)
    fail("x has shape ", text(sizes_of(x)), "; valid with offsets: [rows, channels]");
  if (offsets->dim() != 1)
    fail("offsets have shape ", text(sizes_of(*offsets)), "; valid: [experts]");
  const int64_t experts = offsets->size(0);
  check_tensor("offsets", *offsets, ScalarType::Int, {experts});
  check_tensor("factor", *factor, ScalarType::Float, {experts, channels_of(x)});
}

inline void check_pattern(const Tensor& x, int64_t n, int64_t m) {
  if (n < 1 || n > m || m > 32 || (m & (m - 1)))
    fail("pattern=", n, ":", m, " is not an N:M pattern; valid: 1 <= N <= M <= 32 with M a power "
         "of two, such as 2:4, 4:8, 8:16");
  if (channels_of(x) % m)
    fail("x has ", channels_of(x), " channels; valid: a multiple of m=", m);
}

inline void check_not_negative(const char* name, int64_t value) {
  if (value < 0) fail(name, "=", value, " is negative; valid: 0 and up");
}

// Return the number of a correction, as nm_select.py has it.
inline int32_t correction_number(const std::optional<StringHandle>& handle) {
  if (!handle) return 0;
  const std::string name = Text(*handle).value;
  if (name == "norm") return 1;
  if (name == "variance") return 2;
  fail("unknown correction '", name, "'; valid: norm, variance");
}

inline void check_selection(const Tensor& x, const MaybeTensor& factor, int64_t n, int64_t m,
                            int64_t dense_prefix, int64_t min_tokens, const MaybeTensor& offsets) {
  check_rows(x);
  check_pattern(x, n, m);
  check_not_negative("dense_prefix", dense_prefix);
  check_not_negative("min_tokens", min_tokens);
  check_factor(x, factor, offsets);
}

inline void check_codes(const Tensor& x, const MaybeTensor& smooth, StringHandle dtype) {
  const std::string name = Text(dtype).value;
  if (name != "int8") fail("dtype '", name, "' has no codes in this library; valid: int8");
  check_rows(x);
  if (!channels_of(x)) fail("x has 0 channels; valid: at least one");
  if (smooth) check_tensor("smooth", *smooth, ScalarType::Float, {channels_of(x)});
}
