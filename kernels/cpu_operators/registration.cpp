// The operators for processes without Python: schemas and CPU kernels, registered on loading.
//
//     dlopen("libamber_ops.so")          torch.ops.load_library("libamber_ops.so")
//
// Answers are those of nm_select.py, nm_quantize.py, quantize_rows.py and quantized_linear.py, bit
// for bit. Not here, and an error: float64 and fp8, which have no C++ kernel, and weights that were
// not packed. PyTorch's stable interface is used, of version 2.11, so that one library serves that
// version and those after it.
//
// A process that has these operators already, from amber_compile or from another copy of this
// library, keeps them: one line on stderr says so.

#include <torch/csrc/stable/library.h>

#include <cstdio>

#include "operators.h"

namespace {

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

struct Operator {
  const char *name, *schema;
  Boxed run;
};

const Operator OPERATORS[] = {
    {"nm_select",
     "nm_select(Tensor x, Tensor? factor, int n, int m, str? correction=None, int dense_prefix=0, "
     "int min_tokens=0, Tensor? offsets=None) -> Tensor",
     TORCH_BOX(&nm_select)},
    {"nm_quantize",
     "nm_quantize(Tensor x, Tensor? factor, Tensor? smooth, int n, int m, str dtype='int8', "
     "str? correction=None, int dense_prefix=0, int min_tokens=0, Tensor? offsets=None) "
     "-> (Tensor codes, Tensor row_scale)",
     TORCH_BOX(&nm_quantize)},
    {"quantize_rows",
     "quantize_rows(Tensor x, Tensor? smooth, str dtype='int8') "
     "-> (Tensor codes, Tensor row_scale)",
     TORCH_BOX(&quantize_rows)},
    {"quantized_linear",
     "quantized_linear(Tensor codes, Tensor row_scale, Tensor weight, Tensor weight_scale, "
     "Tensor? bias, ScalarType dtype) -> Tensor",
     TORCH_BOX(&quantized_linear)},
};

// The operators while this library is loaded.
class Registration {
 public:
  Registration() {
    aoti_torch_library_init_fragment("amber", __FILE__, __LINE__, &schemas_);
    aoti_torch_library_init_impl("amber", "CPU", __FILE__, __LINE__, &kernels_);
    for (const Operator& one : OPERATORS) {
      if (aoti_torch_library_def(schemas_, one.schema) != AOTI_TORCH_SUCCESS) {
        std::fprintf(stderr, "amber: this process has amber::%s already, and keeps it\n", one.name);
        return;
      }
      torch_library_impl(kernels_, one.name, one.run, TORCH_ABI_VERSION);
    }
  }
  ~Registration() {
    aoti_torch_delete_library_object(kernels_);
    aoti_torch_delete_library_object(schemas_);
  }
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;

 private:
  TorchLibraryHandle schemas_, kernels_;
};

const Registration REGISTRATION;

}  // namespace
