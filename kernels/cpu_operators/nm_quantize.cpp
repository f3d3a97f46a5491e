// nm_quantize.py and quantize_rows.py for processes without Python.

#include "arguments.h"
#include "operators.h"
#include "selection.h"

namespace {

Codes quantize(const Tensor& x, const MaybeTensor& factor, const MaybeTensor& smooth, int64_t n,
               int64_t m, int32_t correction, int64_t dense_prefix, const MaybeTensor& offsets) {
  const Tensor codes = torch::stable::new_empty(x, sizes_of(x), ScalarType::Char);
  const Tensor row_scale = torch::stable::new_empty(x, rows_of(x), ScalarType::Float);
  if (!x.numel()) return {codes, row_scale};
  const Selection selection(x, factor, offsets, n, m, correction, dense_prefix);
  const MaybeTensor smooths = contiguous_or_none(smooth);
  const RowCodes to{data_of<float>(smooths), data_to_write<int8_t>(codes),
                    data_to_write<float>(row_scale)};
  const auto run = x.scalar_type() == ScalarType::Float      ? nm_quantize_float32
                   : x.scalar_type() == ScalarType::BFloat16 ? nm_quantize_bfloat16
                                                             : nm_quantize_float16;
  run(&selection.asked, &to, openmp_parallel());
  return {codes, row_scale};
}

}  // namespace

Codes nm_quantize(Tensor x, MaybeTensor factor, MaybeTensor smooth, int64_t n, int64_t m,
                  StringHandle dtype, MaybeText correction, int64_t dense_prefix,
                  int64_t min_tokens, MaybeTensor offsets) {
  const int32_t corrected = correction_number(correction);
  check_codes(x, smooth, dtype);
  check_selection(x, factor, n, m, dense_prefix, min_tokens, offsets);
  if (product(rows_of(x)) < min_tokens) n = m;
  return quantize(x, factor, smooth, n, m, corrected, dense_prefix, offsets);
}

Codes quantize_rows(Tensor x, MaybeTensor smooth, StringHandle dtype) {
  check_codes(x, smooth, dtype);
  return quantize(x, std::nullopt, smooth, 1, 1, 0, 0, std::nullopt);
}
