// Tensors of PyTorch's stable interface, and words about them.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// ---- words --------------------------------------------------------------------------------------

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << "amber: " << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string text(const Sizes& sizes) {
  std::ostringstream all("[", std::ios::ate);
  for (size_t i = 0; i < sizes.size(); ++i) all << (i ? ", " : "") << sizes[i];
  all << ']';
  return all.str();
}

inline std::string text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Float8_e4m3fn: return "torch.float8_e4m3fn";
    default: return "number " + std::to_string(int(dtype)) + " of PyTorch's";
  }
}

// A string argument, whose memory an operator owns.
class Text {
 public:
  explicit Text(StringHandle handle) {
    const char* start;
    size_t length;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &start));
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    value.assign(start, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  }

  std::string value;
};

// ---- tensors ------------------------------------------------------------------------------------

inline Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

// Return the sizes of x [..., channels] without the last, which is `last` if that is given.
inline Sizes rows_of(const Tensor& x, std::optional<int64_t> last = std::nullopt) {
  Sizes sizes = sizes_of(x);
  sizes.pop_back();
  if (last) sizes.push_back(*last);
  return sizes;
}

inline int64_t product(const Sizes& sizes) {
  int64_t all = 1;
  for (const int64_t size : sizes) all *= size;
  return all;
}

inline int64_t channels_of(const Tensor& x) { return x.size(x.dim() - 1); }

// Return x [..., channels] as [tokens, channels], channels side by side; x is not empty.
inline Tensor as_rows(const Tensor& x) {
  const int64_t channels = channels_of(x);
  const Tensor rows = torch::stable::reshape(x, Sizes{x.numel() / channels, channels});
  return rows.stride(1) == 1 ? rows : torch::stable::contiguous(rows);
}

inline MaybeTensor contiguous_or_none(const MaybeTensor& tensor) {
  return tensor ? MaybeTensor(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// Return the address of a tensor's values, null for none.
template <class T>
const T* data_of(const MaybeTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <class T>
T* data_to_write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
