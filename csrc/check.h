// What the ops check of their tensors. The Python functions in front of them check what a user may get wrong, with
// messages for users; these checks keep a direct call of an op from reading or writing out of bounds.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "cpu/kernels.h"

namespace deepalign {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline Dtype check_dtype(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kHalf;
    default: STD_TORCH_CHECK(false, "deepalign: logits must be float32, bfloat16 or float16"); return Dtype::kFloat;
  }
}

// Logits (rows, width) of the first one's shape and dtype, on the CPU, dense in the vocabulary.
inline Logits check_logits(const char* name, const Tensor& logits, const Tensor& first) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 2, "deepalign: ", name, " must be a CPU tensor (rows, vocabulary)");
  STD_TORCH_CHECK(logits.scalar_type() == first.scalar_type(), "deepalign: ", name, " differs in dtype");
  STD_TORCH_CHECK(logits.size(0) == first.size(0) && logits.size(1) == first.size(1), "deepalign: ", name, " differs in shape");
  STD_TORCH_CHECK(logits.size(1) == 1 || logits.stride(1) == 1, "deepalign: ", name, " must have stride 1 in the vocabulary");
  return {logits.data_ptr(), logits.stride(0)};
}

inline void check_vocab_size(int64_t vocab_size, const Tensor& logits) {
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= logits.size(1), "deepalign: vocab_size must be in [1, width]");
  STD_TORCH_CHECK(vocab_size < (int64_t(1) << 31), "deepalign: vocab_size must be below 2^31");
}

inline void check_top(const char* name, int64_t top, int64_t vocab_size) {
  STD_TORCH_CHECK(top >= 1 && top <= vocab_size, "deepalign: ", name, " must be in [1, vocab_size]");
}

template <class T>
const T* check_per_row(const char* name, const Tensor& values, ScalarType dtype, int64_t rows, int64_t columns = 1) {
  STD_TORCH_CHECK(values.is_cpu() && values.is_contiguous() && values.scalar_type() == dtype && values.numel() == rows * columns,
                  "deepalign: ", name, " must be a contiguous CPU tensor of the op's dtype with one entry per row and column");
  return static_cast<const T*>(values.data_ptr());
}

}  // namespace deepalign
