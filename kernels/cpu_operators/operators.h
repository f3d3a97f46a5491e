// The operators, as their schemas in registration.cpp have them.

#pragma once

#include <optional>
#include <tuple>

#include "tensors.h"

using MaybeText = std::optional<StringHandle>;  // whoever reads it frees it, as Text does
using Codes = std::tuple<Tensor, Tensor>;       // and their row_scale

Tensor nm_select(Tensor x, MaybeTensor factor, int64_t n, int64_t m, MaybeText correction,
                 int64_t dense_prefix, int64_t min_tokens, MaybeTensor offsets);

Codes nm_quantize(Tensor x, MaybeTensor factor, MaybeTensor smooth, int64_t n, int64_t m,
                  StringHandle dtype, MaybeText correction, int64_t dense_prefix,
                  int64_t min_tokens, MaybeTensor offsets);

Codes quantize_rows(Tensor x, MaybeTensor smooth, StringHandle dtype);

Tensor quantized_linear(Tensor codes, Tensor row_scale, Tensor weight, Tensor weight_scale,
                        MaybeTensor bias, ScalarType dtype);
