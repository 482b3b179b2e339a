// The kernels of one instruction set, and the table through which they are called.
#include "completion_loss.h"
#include "contrastive_sample.h"
#include "position_divergence.h"
#ifdef DEEPALIGN_AVX512_BF16
#include "gemm_bf16.h"
#endif

namespace deepalign {
namespace DEEPALIGN_ISA {

extern const Kernels kTable;
#ifdef DEEPALIGN_AVX512_BF16
const Kernels kTable = {completion_loss,    position_divergence, position_statistics, base_favored_tokens,
                        contrastive_sample, gemm_bf16,           row_levels};
#else
const Kernels kTable = {completion_loss,    position_divergence, position_statistics, base_favored_tokens,
                        contrastive_sample, nullptr,             nullptr};
#endif

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign
