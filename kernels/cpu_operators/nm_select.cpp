// nm_select.py for processes without Python.

#include "arguments.h"
#include "operators.h"
#include "selection.h"

namespace {

Tensor copy_of(const Tensor& x) {
  Tensor y = torch::stable::new_empty(x, sizes_of(x));
  return torch::stable::copy_(y, x);
}

}  // namespace

Tensor nm_select(Tensor x, MaybeTensor factor, int64_t n, int64_t m,
                 MaybeText correction, int64_t dense_prefix, int64_t min_tokens,
                 MaybeTensor offsets) {
  const int32_t corrected = correction_number(correction);
  check_selection(x, factor, n, m, dense_prefix, min_tokens, offsets);
  if (n == m || product(rows_of(x)) < min_tokens || !x.numel()) return copy_of(x);
  const Selection selection(x, factor, offsets, n, m, corrected, dense_prefix);
  const Tensor y = torch::stable::new_empty(x, sizes_of(x));
  const auto run = x.scalar_type() == ScalarType::Float      ? nm_select_float32
                   : x.scalar_type() == ScalarType::BFloat16 ? nm_select_bfloat16
                                                             : nm_select_float16;
  run(&selection.asked, data_to_write<void>(y), openmp_parallel());
  return y;
}
