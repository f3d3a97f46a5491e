// What nm_select and nm_quantize ask of a kernel.

#pragma once

#include "../cpu/interface.h"
#include "tensors.h"
#include "threads.h"

// Elements; with fewer, threads cost more than they bring.
constexpr int64_t SELECTED_BY_ONE = 1 << 16;

// The question, and the tensors that must live until it is answered.
struct Selection {
  Tensor rows;
  MaybeTensor factor, ends;
  Tokens asked;

  Selection(const Tensor& x, const MaybeTensor& factors, const MaybeTensor& offsets, int64_t n,
            int64_t m, int32_t correction, int64_t dense_prefix)
      : rows(as_rows(x)), factor(contiguous_or_none(factors)), ends(contiguous_or_none(offsets)) {
    asked.x = rows.const_data_ptr();
    asked.factor = data_of<float>(factor);
    asked.ends = data_of<int32_t>(ends);
    asked.tokens = rows.size(0), asked.channels = rows.size(1), asked.x_stride = rows.stride(0);
    asked.sequence = x.dim() == 1 ? 1 : x.size(x.dim() - 2);
    asked.dense = dense_prefix;
    asked.experts = ends ? ends->size(0) : 1;
    asked.n = int32_t(n), asked.m = int32_t(m), asked.correction = correction;
    asked.threads = threads_for(x.numel(), SELECTED_BY_ONE);
  }
};
