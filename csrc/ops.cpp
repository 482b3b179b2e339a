// The CPU kernels of the ops in namespace deepalign. Their schemas, fake kernels and autograd are in Python
// (deepalign/kernels/*/op.py), where the kernels of other devices join them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"

namespace deepalign {
namespace {

Parallel parallel() {
  return {int(torch::stable::get_num_threads()), [](int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) { body(context, first, last); });
          }};
}

// Straight from the allocator: torch::stable::new_empty finds its op by name every time and goes through the dispatcher.
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(1, sizes.begin()[1]);
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle created;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, type,
                                                         aoti_torch_device_type_cpu(), 0, &created));
  return Tensor(created);
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// ---- completion loss

struct LossOutputs {
  Tensor loss, kl, completion, alpha, count, indices;
};

// A weight per row: what was given, 1 where nothing was.
class RowWeight {
 public:
  RowWeight(const char* name, const std::optional<Tensor>& given, int64_t rows) : rows_(rows) {
    if (given) {
      data_ = check_per_row<float>(name, *given, ScalarType::Float, rows);
    } else {
      own_.assign(size_t(rows), 1.0f), data_ = own_.data();
    }
  }
  void check_values(const char* name) const {
    for (int64_t row = 0; row < rows_; ++row) {
      STD_TORCH_CHECK(data_[row] >= 0 && std::isfinite(data_[row]), "deepalign: ", name, " must be finite and not negative");
    }
  }
  void divide_by_sum() {
    double sum = 0.0;
    for (int64_t row = 0; row < rows_; ++row) sum += data_[row];
    if (sum == 0.0) return;
    own_.assign(data_, data_ + rows_), data_ = own_.data();
    for (float& weight : own_) weight = float(weight / sum);
  }
  const float* data() const { return data_; }

 private:
  int64_t rows_;
  const float* data_;
  std::vector<float> own_;
};

LossOutputs completion_loss(const Tensor& student, const Tensor& aligned, const Tensor& base, const RowWeight& kl_weight,
                            const RowWeight& completion_weight, const std::optional<Tensor>& given, CompletionLossArgs args,
                            Tensor* gradient) {
  args.dtype = check_dtype(student);
  args.rows = student.size(0), args.width = student.size(1);
  check_vocab_size(args.vocab_size, student);
  args.student = check_logits("student", student, student);
  args.aligned = check_logits("aligned", aligned, student);
  args.base = check_logits("base", base, student);
  args.kl_weight = kl_weight.data(), args.completion_weight = completion_weight.data();
  if (given) {
    args.top_k = given->size(1);
    args.given = check_per_row<int64_t>("top_k_indices", *given, ScalarType::Long, args.rows, args.top_k);
    static const int64_t kNone = -1;
    if (args.given == nullptr) args.given = &kNone;  // without a column they have no memory, and are given all the same
  } else {
    check_top("top_k", args.top_k, args.vocab_size);
  }
  if (gradient) {
    const Logits out = check_logits("gradient", *gradient, student);
    args.gradient = const_cast<void*>(out.data), args.gradient_stride = out.row_stride;
  }
  LossOutputs out{empty({args.rows}, ScalarType::Float), empty({args.rows}, ScalarType::Float),
                  empty({args.rows}, ScalarType::Float), empty({args.rows}, ScalarType::Float),
                  empty({args.rows}, ScalarType::Long), empty({args.rows, args.top_k}, ScalarType::Long)};
  args.loss = data<float>(out.loss), args.kl = data<float>(out.kl), args.completion = data<float>(out.completion);
  args.alpha = data<float>(out.alpha), args.count = data<int64_t>(out.count), args.indices = data<int64_t>(out.indices);
  kernels().completion_loss(args, parallel());
  return out;
}

CompletionLossArgs loss_options(int64_t top_k, double teacher_mix, double temperature, double alpha_base, double gamma,
                                double lambda_reg, bool teacher_student, bool favored_from_student, bool centered_square,
                                int64_t vocab_size) {
  CompletionLossArgs args{};
  args.top_k = top_k, args.teacher_mix = teacher_mix, args.temperature = temperature, args.alpha_base = alpha_base;
  args.gamma = gamma, args.lambda_reg = lambda_reg, args.teacher_student = teacher_student;
  args.favored_from_student = favored_from_student, args.centered_square = centered_square, args.vocab_size = vocab_size;
  return args;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> completion_loss_new(
    Tensor student, Tensor aligned, Tensor base, std::optional<Tensor> kl_weight, std::optional<Tensor> completion_weight,
    std::optional<Tensor> given, int64_t top_k, double teacher_mix, double temperature, double alpha_base, double gamma,
    double lambda_reg, bool teacher_student, bool favored_from_student, bool centered_square, int64_t vocab_size,
    bool with_gradient) {
  STD_TORCH_CHECK(student.dim() == 2, "deepalign: student must be (rows, vocabulary)");
  const CompletionLossArgs args = loss_options(top_k, teacher_mix, temperature, alpha_base, gamma, lambda_reg, teacher_student,
                                               favored_from_student, centered_square, vocab_size);
  Tensor gradient = empty({with_gradient ? student.size(0) : 0, student.size(1)}, student.scalar_type());
  const RowWeight wd("kl_weight", kl_weight, student.size(0)), wc("completion_weight", completion_weight, student.size(0));
  const LossOutputs out = completion_loss(student, aligned, base, wd, wc, given, args, with_gradient ? &gradient : nullptr);
  return {out.loss, out.kl, out.completion, out.alpha, out.count, out.indices, gradient};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> completion_loss_into(
    Tensor student, Tensor aligned, Tensor base, std::optional<Tensor> kl_weight, std::optional<Tensor> completion_weight,
    std::optional<Tensor> given, int64_t top_k, double teacher_mix, double temperature, double alpha_base, double gamma,
    double lambda_reg, bool teacher_student, bool favored_from_student, bool centered_square, int64_t vocab_size,
    std::optional<Tensor> gradient, bool mean, bool total) {
  STD_TORCH_CHECK(student.dim() == 2, "deepalign: student must be (rows, vocabulary)");
  const CompletionLossArgs args = loss_options(top_k, teacher_mix, temperature, alpha_base, gamma, lambda_reg, teacher_student,
                                               favored_from_student, centered_square, vocab_size);
  RowWeight wd("kl_weight", kl_weight, student.size(0)), wc("completion_weight", completion_weight, student.size(0));
  wd.check_values("kl_weight"), wc.check_values("completion_weight");
  if (mean) wd.divide_by_sum(), wc.divide_by_sum();
  LossOutputs out = completion_loss(student, aligned, base, wd, wc, given, args, gradient ? &*gradient : nullptr);
  if (total) {
    double sum = 0.0;
    for (int64_t row = 0; row < student.size(0); ++row) sum += data<float>(out.loss)[row];
    out.loss = empty({}, ScalarType::Float), *data<float>(out.loss) = float(sum);
  }
  return {out.loss, out.kl, out.completion, out.alpha, out.count, out.indices};
}

// ---- position statistics

template <class Args>
Args pair_of_models(const Tensor& aligned, const Tensor& base, int64_t vocab_size) {
  STD_TORCH_CHECK(aligned.dim() == 2, "deepalign: aligned must be (rows, vocabulary)");
  check_vocab_size(vocab_size, aligned);
  Args args{};
  args.dtype = check_dtype(aligned);
  args.rows = aligned.size(0), args.vocab_size = vocab_size;
  args.aligned = check_logits("aligned", aligned, aligned);
  args.base = check_logits("base", base, aligned);
  return args;
}

struct DivergenceOutputs {
  Tensor kl, reverse_kl, jsd, overlap, count, in_top;
};

DivergenceOutputs divergence_outputs(PositionDivergenceArgs& args, int64_t top_n) {
  check_top("top_n", top_n, args.vocab_size);
  args.top_n = top_n;
  DivergenceOutputs out{empty({args.rows}, ScalarType::Float), empty({args.rows}, ScalarType::Float),
                        empty({args.rows}, ScalarType::Float), empty({args.rows}, ScalarType::Float),
                        empty({args.rows}, ScalarType::Long),  empty({args.rows}, ScalarType::Long)};
  args.kl = data<float>(out.kl), args.reverse_kl = data<float>(out.reverse_kl), args.jsd = data<float>(out.jsd);
  args.top_overlap = data<float>(out.overlap), args.favored_count = data<int64_t>(out.count);
  args.favored_in_top = data<int64_t>(out.in_top);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> position_divergence(Tensor aligned, Tensor base, int64_t top_n,
                                                                               int64_t vocab_size) {
  auto args = pair_of_models<PositionDivergenceArgs>(aligned, base, vocab_size);
  const DivergenceOutputs out = divergence_outputs(args, top_n);
  kernels().position_divergence(args, parallel());
  return {out.kl, out.reverse_kl, out.jsd, out.overlap, out.count, out.in_top};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> position_statistics(
    Tensor aligned, Tensor base, int64_t top_n, int64_t top_k, int64_t vocab_size) {
  auto args = pair_of_models<PositionDivergenceArgs>(aligned, base, vocab_size);
  const DivergenceOutputs out = divergence_outputs(args, top_n);
  check_top("top_k", top_k, vocab_size);
  args.top_k = top_k;
  Tensor in_base_top = empty({args.rows}, ScalarType::Long);
  Tensor tokens = empty({args.rows, top_k}, ScalarType::Long);
  args.favored_in_base_top = data<int64_t>(in_base_top), args.favored_tokens = data<int64_t>(tokens);
  kernels().position_statistics(args, parallel());
  return {out.kl, out.reverse_kl, out.jsd, out.overlap, out.count, out.in_top, in_base_top, tokens};
}

std::tuple<Tensor, Tensor, Tensor> base_favored_tokens(Tensor aligned, Tensor base, int64_t top_k, int64_t vocab_size) {
  auto args = pair_of_models<BaseFavoredTokensArgs>(aligned, base, vocab_size);
  check_top("top_k", top_k, vocab_size);
  args.top_k = top_k;
  Tensor indices = empty({args.rows, top_k}, ScalarType::Long);
  Tensor differences = empty({args.rows, top_k}, ScalarType::Float);
  Tensor count = empty({args.rows}, ScalarType::Long);
  args.indices = data<int64_t>(indices), args.differences = data<float>(differences), args.count = data<int64_t>(count);
  kernels().base_favored_tokens(args, parallel());
  return {indices, differences, count};
}

// ---- sampler

std::tuple<Tensor, Tensor> contrastive_sample(Tensor aligned, Tensor base, Tensor uniforms, double alpha, double temperature,
                                              int64_t top_k, double top_p, double min_p, bool log_space,
                                              std::optional<int64_t> vocab_size) {
  STD_TORCH_CHECK(alpha >= 0 && temperature >= 0 && std::isfinite(alpha) && std::isfinite(temperature),
                  "deepalign: alpha and temperature must be finite and not negative");
  STD_TORCH_CHECK(top_p > 0 && top_p <= 1, "deepalign: top_p must be in (0, 1]");
  STD_TORCH_CHECK(min_p >= 0 && min_p <= 1, "deepalign: min_p must be in [0, 1]");
  STD_TORCH_CHECK(aligned.dim() == 2, "deepalign: aligned must be (rows, vocabulary)");
  auto args = pair_of_models<ContrastiveSampleArgs>(aligned, base, vocab_size.value_or(aligned.size(1)));
  if (top_k != 0) check_top("top_k", top_k, args.vocab_size);
  STD_TORCH_CHECK(uniforms.dim() == 1, "deepalign: uniforms must be (rows,)");
  std::vector<double> converted;
  if (uniforms.scalar_type() == ScalarType::Float) {
    const float* given = check_per_row<float>("uniforms", uniforms, ScalarType::Float, args.rows);
    converted.assign(given, given + args.rows), args.uniforms = converted.data();
  } else {
    args.uniforms = check_per_row<double>("uniforms", uniforms, ScalarType::Double, args.rows);
  }
  for (int64_t row = 0; row < args.rows; ++row) {
    STD_TORCH_CHECK(args.uniforms[row] >= 0 && args.uniforms[row] < 1, "deepalign: uniforms must be in [0, 1)");
  }
  args.alpha = alpha, args.temperature = temperature, args.log_space = log_space;
  args.top_k = top_k, args.top_p = top_p, args.min_p = min_p;
  Tensor token_ids = empty({args.rows}, ScalarType::Long);
  Tensor logprobs = empty({args.rows}, ScalarType::Float);
  args.token_ids = data<int64_t>(token_ids), args.logprobs = data<float>(logprobs);
  kernels().contrastive_sample(args, parallel());
  return {token_ids, logprobs};
}

// ---- products of bfloat16 matrices with a fp32 result

bool has_gemm_bf16() { return kernels().gemm_bf16 != nullptr; }

void gemm_bf16_into(Tensor left, Tensor right, Tensor out, bool accumulate, std::optional<Tensor> levels) {
  STD_TORCH_CHECK(has_gemm_bf16(), "deepalign: the instruction set that serves cannot multiply bfloat16");
  for (const Tensor* matrix : {&left, &right, &out}) {
    STD_TORCH_CHECK(matrix->is_cpu() && matrix->dim() == 2, "deepalign: left, right and out must be CPU matrices");
    STD_TORCH_CHECK(matrix->stride(0) == 1 || matrix->stride(1) == 1 || matrix->numel() == 0,
                    "deepalign: left, right and out must be contiguous in one dimension");
  }
  STD_TORCH_CHECK(left.scalar_type() == ScalarType::Float || left.scalar_type() == ScalarType::BFloat16,
                  "deepalign: left must be float32 or bfloat16");
  STD_TORCH_CHECK(right.scalar_type() == ScalarType::BFloat16, "deepalign: right must be bfloat16");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float, "deepalign: out must be float32");
  GemmArgs args{};
  args.rows = out.size(0), args.columns = out.size(1), args.depth = left.size(1);
  STD_TORCH_CHECK(left.size(0) == args.rows && right.size(0) == args.depth && right.size(1) == args.columns,
                  "deepalign: left (rows, depth), right (depth, columns) and out (rows, columns) do not fit");
  STD_TORCH_CHECK(args.columns <= 1 || out.stride(1) == 1, "deepalign: out must be contiguous in its columns");
  args.left = left.data_ptr(), args.left_is_float = left.scalar_type() == ScalarType::Float;
  args.left_stride_row = left.stride(0), args.left_stride_depth = left.stride(1);
  args.right = right.data_ptr();
  args.right_stride_depth = right.stride(0), args.right_stride_column = right.stride(1);
  args.out = data<float>(out), args.out_stride = out.stride(0), args.accumulate = accumulate;
  if (levels) {
    STD_TORCH_CHECK(args.left_is_float, "deepalign: levels are of a float32 left matrix");
    const int64_t lines = args.left_stride_depth == 1 ? args.rows : args.depth;
    args.levels = check_per_row<float>("levels", *levels, ScalarType::Float, lines);
  }
  kernels().gemm_bf16(args, parallel());
}

Tensor row_levels(Tensor matrix) {
  STD_TORCH_CHECK(has_gemm_bf16(), "deepalign: the instruction set that serves cannot multiply bfloat16");
  STD_TORCH_CHECK(matrix.is_cpu() && matrix.dim() == 2 && matrix.scalar_type() == ScalarType::Float,
                  "deepalign: matrix must be a float32 CPU matrix");
  STD_TORCH_CHECK(matrix.size(1) <= 1 || matrix.stride(1) == 1, "deepalign: matrix must be contiguous in its columns");
  Tensor levels = empty({matrix.size(0)}, ScalarType::Float);
  kernels().row_levels(data<float>(matrix), matrix.stride(0), matrix.size(0), matrix.size(1), data<float>(levels), parallel());
  return levels;
}

// ---- which instruction set serves

std::string cpu_isa() { return instruction_set(); }

}  // namespace
}  // namespace deepalign

STABLE_TORCH_LIBRARY_IMPL(deepalign, CPU, m) {
  m.impl("completion_loss", TORCH_BOX(&deepalign::completion_loss_new));
  m.impl("completion_loss_", TORCH_BOX(&deepalign::completion_loss_into));
  m.impl("position_divergence", TORCH_BOX(&deepalign::position_divergence));
  m.impl("position_statistics", TORCH_BOX(&deepalign::position_statistics));
  m.impl("base_favored_tokens", TORCH_BOX(&deepalign::base_favored_tokens));
  m.impl("contrastive_sample", TORCH_BOX(&deepalign::contrastive_sample));
  m.impl("gemm_bf16_", TORCH_BOX(&deepalign::gemm_bf16_into));
  m.impl("row_levels", TORCH_BOX(&deepalign::row_levels));
}

STABLE_TORCH_LIBRARY_IMPL(deepalign, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&deepalign::cpu_isa));
  m.impl("has_gemm_bf16", TORCH_BOX(&deepalign::has_gemm_bf16));
}
