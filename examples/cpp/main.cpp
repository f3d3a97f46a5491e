// Run a packaged program without Python: which token comes next?
//
//     next_token libamber_ops.so model.pt2 1 17 42 ...
//
// The package is what examples/export.py writes: token ids [1, S] in, logits [1, S, vocabulary] out.
// The library holds the operators that the program calls, and must be loaded before the program is.

#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <exception>
#include <string>
#include <vector>

int run(const std::vector<std::string>& words) {
  if (words.size() < 4) {
    std::fprintf(stderr, "usage: next_token LIBRARY PACKAGE TOKEN TOKEN ...\n");
    return 2;
  }
  if (!dlopen(words[0].c_str(), RTLD_NOW)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  std::vector<int64_t> ids;
  for (size_t i = 2; i < words.size(); ++i) ids.push_back(std::stoll(words[i]));

  const c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader program(words[1]);
  const at::Tensor tokens = at::tensor(ids).unsqueeze(0);
  const at::Tensor logits = program.run({tokens})[0][0][-1].to(at::kFloat);
  const int64_t next = logits.argmax().item<int64_t>();
  std::printf("token %ld, logit %.9g\n", long(next), double(logits[next].item<float>()));
  return 0;
}

int main(int count, char** words) {
  try {
    return run({words + 1, words + count});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
