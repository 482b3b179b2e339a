// What the operations ask of an instruction set: one table of functions per set, chosen once at run time.
//
// Nothing here knows torch. Pointers are to the first entry of row 0; strides count elements; rows are contiguous in
// the vocabulary. Vectors over rows (weights, statistics) are contiguous.
#pragma once

#include <cstdint>

namespace deepalign {

enum class Dtype { kFloat, kBFloat16, kHalf };

// How to run body(context, first, last) over parts of [0, count), and over how many threads.
struct Parallel {
  int threads;
  void (*run)(int64_t count, void (*body)(void* context, int64_t first, int64_t last), void* context);

  template <class Body>
  void operator()(int64_t count, const Body& body) const {
    if (threads == 1 && count > 0) return body(0, count);
    run(count, [](void* context, int64_t first, int64_t last) { (*static_cast<const Body*>(context))(first, last); },
        const_cast<Body*>(&body));
  }
};

struct Logits {
  const void* data;
  int64_t row_stride;
};

// One call of the completion loss; the equations are in deepalign/kernels/completion_loss/reference.py.
struct CompletionLossArgs {
  Dtype dtype;
  int64_t rows, width, vocab_size;  // entries of [vocab_size, width) do not exist: their gradient is 0
  Logits student, aligned, base;
  void* gradient;  // null: forward only; may be the student's own buffer
  int64_t gradient_stride;
  const float *kl_weight, *completion_weight;
  const int64_t* given;  // rows x top_k selected entries, -1 for none; null: select the top_k largest differences
  int64_t top_k;
  double teacher_mix, temperature, alpha_base, gamma, lambda_reg;
  bool teacher_student, favored_from_student, centered_square;
  float *loss, *kl, *completion, *alpha;
  int64_t *count, *indices;
};

struct PositionDivergenceArgs {
  Dtype dtype;
  int64_t rows, vocab_size, top_n;
  Logits aligned, base;
  float *kl, *reverse_kl, *jsd, *top_overlap;
  int64_t *favored_count, *favored_in_top;
  // Of position_statistics only; rows x top_k tokens.
  int64_t top_k;
  int64_t *favored_in_base_top, *favored_tokens;
};

struct BaseFavoredTokensArgs {
  Dtype dtype;
  int64_t rows, vocab_size, top_k;
  Logits aligned, base;
  int64_t* indices;
  float* differences;
  int64_t* count;
};

struct ContrastiveSampleArgs {
  Dtype dtype;
  int64_t rows, vocab_size;
  Logits aligned, base;
  const double* uniforms;
  double alpha, temperature;
  int64_t top_k;  // 0: off
  double top_p, min_p;
  bool log_space;
  int64_t* token_ids;
  float* logprobs;
};

// out (rows, columns) = left (rows, depth) right (depth, columns), added to what it holds if `accumulate`. The right
// matrix is bfloat16, the left one too or fp32; of each one stride is 1.
struct GemmArgs {
  int64_t rows, columns, depth;
  const void* left;
  bool left_is_float;
  int64_t left_stride_row, left_stride_depth;
  const float* levels;  // of a left matrix in fp32, per contiguous line: second terms below are dropped; null: none are
  const void* right;
  int64_t right_stride_depth, right_stride_column;
  float* out;  // contiguous in the columns
  int64_t out_stride;
  bool accumulate;
};

struct Kernels {
  void (*completion_loss)(const CompletionLossArgs&, const Parallel&);
  void (*position_divergence)(const PositionDivergenceArgs&, const Parallel&);
  void (*position_statistics)(const PositionDivergenceArgs&, const Parallel&);
  void (*base_favored_tokens)(const BaseFavoredTokensArgs&, const Parallel&);
  void (*contrastive_sample)(const ContrastiveSampleArgs&, const Parallel&);
  // Both null where no instruction multiplies bfloat16.
  void (*gemm_bf16)(const GemmArgs&, const Parallel&);
  void (*row_levels)(const float* matrix, int64_t stride, int64_t rows, int64_t columns, float* levels, const Parallel&);
};

// The best set that this processor runs, or the one that DEEPALIGN_CPU_ISA names. Throws std::runtime_error if that
// one is unknown or cannot run here.
const Kernels& kernels();
const char* instruction_set();  // its name: avx512, avx2 or portable

}  // namespace deepalign
