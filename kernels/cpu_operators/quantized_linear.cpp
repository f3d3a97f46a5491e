// quantized_linear.py for processes without Python.

#include "arguments.h"
#include "int8_kernel.h"
#include "operators.h"
#include "threads.h"

namespace {

constexpr int64_t MULTIPLIED_BY_ONE = 1 << 18;  // products; with fewer, threads are not worth it
constexpr int64_t LARGEST_K = 1 << 17;          // channels, whose sums are sure to fit int32

void check_product(const Tensor& codes, const Tensor& row_scale, const Tensor& weight,
                   const Tensor& weight_scale, const MaybeTensor& bias, ScalarType dtype) {
  if (!is_activation(dtype)) fail("dtype=", text(dtype), "; valid: ", ACTIVATIONS);
  if (codes.scalar_type() != ScalarType::Char || !codes.dim())
    fail("codes are ", text(codes.scalar_type()), " ", text(sizes_of(codes)),
         "; valid in this library: torch.int8 [..., K]");
  const int64_t channels = channels_of(codes);
  if (channels < 1 || channels > LARGEST_K)
    fail("codes have ", channels, " channels; valid: 1 to ", LARGEST_K);
  if (weight_scale.dim() != 1)
    fail("weight_scale has shape ", text(sizes_of(weight_scale)), "; valid: [N]");
  const int64_t outputs = weight_scale.size(0);
  check_tensor("row_scale", row_scale, ScalarType::Float, rows_of(codes));
  check_tensor("weight_scale", weight_scale, ScalarType::Float, {outputs});
  if (weight.scalar_type() == ScalarType::Char && sizes_of(weight) == Sizes{outputs, channels})
    fail("weight ", text(sizes_of(weight)), " is not packed; valid: ",
         text(packed_sizes(outputs, channels)), ", as programs that are rewritten where Amber has "
         "its C++ kernels have it");
  check_tensor("weight", weight, ScalarType::Char, packed_sizes(outputs, channels));
  if (bias && !is_activation(bias->scalar_type()) && bias->scalar_type() != ScalarType::Double)
    fail("bias has dtype ", text(bias->scalar_type()), "; valid: ", ACTIVATIONS, ", torch.float64");
  if (bias) check_tensor("bias", *bias, bias->scalar_type(), {outputs});
}

}  // namespace

Tensor quantized_linear(Tensor codes, Tensor row_scale, Tensor weight, Tensor weight_scale,
                        MaybeTensor bias, ScalarType dtype) {
  check_product(codes, row_scale, weight, weight_scale, bias, dtype);
  const int64_t outputs = weight_scale.size(0), channels = channels_of(codes);
  const Tensor y = torch::stable::new_empty(codes, rows_of(codes, outputs), dtype);
  if (!y.numel()) return y;
  const Tensor rows = as_rows(codes), packed = torch::stable::contiguous(weight);
  const Tensor row_scales = torch::stable::contiguous(row_scale);
  const Tensor weight_scales = torch::stable::contiguous(weight_scale);
  if (bias) bias = torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
  const int64_t tokens = rows.size(0);
  const Tensor scratch = torch::stable::new_empty(codes, Sizes{scratch_bytes(tokens, channels)});
  const Problem problem{data_of<int8_t>(rows),
                        data_of<float>(row_scales),
                        data_of<int8_t>(packed),
                        data_of<float>(weight_scales),
                        data_of<float>(bias),
                        data_to_write<void>(y),
                        data_to_write<uint8_t>(scratch),
                        tokens,
                        channels,
                        outputs,
                        rows.stride(0),
                        dtype == ScalarType::Float ? 0 : dtype == ScalarType::BFloat16 ? 1 : 2,
                        int8_kernel(),
                        threads_for(tokens * channels * outputs, MULTIPLIED_BY_ONE)};
  int8_linear(&problem, openmp_parallel());
  return y;
}
