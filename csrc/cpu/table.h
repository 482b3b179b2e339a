// The kernels of one instruction set, and the table through which they are called.
#include "completion_loss.h"
#include "contrastive_sample.h"
#include "position_divergence.h"

namespace deepalign {
namespace DEEPALIGN_ISA {

extern const Kernels kTable;
const Kernels kTable = {completion_loss, position_divergence, base_favored_tokens, contrastive_sample};

}  // namespace DEEPALIGN_ISA
}  // namespace deepalign
