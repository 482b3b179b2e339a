"""Parameters and result of the completion loss, apart from any implementation of it."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from deepalign.kernels.checks import check_choice, check_int, check_number

KlDirection = Literal["student_teacher", "teacher_student"]
FavoredFrom = Literal["aligned", "student"]
Penalty = Literal["square", "centered_square"]


@dataclass(frozen=True)
class CompletionLossConfig:
    """Parameters of the loss. Defaults are the paper's where it names a value; alpha_base, gamma, lambda_reg are ours.

    Attributes:
        top_k: size of the selected set M (Alg. 1).
        teacher_mix: lambda of the teacher t = lambda a + (1 - lambda) b; above 1 it extrapolates away from the base
            model (Eq. 12).
        temperature: tau > 0 of the distillation term (Eq. 14).
        alpha_base: >= 0, weight of the completion term at zero risk (Eq. 11).
        gamma: >= 0, how much the risk raises that weight (Eq. 11).
        lambda_reg: >= 0, scale of the penalty (Eq. 9).
        kl_direction: "student_teacher" is KL(student‖teacher) as printed, "teacher_student" the reverse.
        favored_from: the model whose difference from the base model selects and counts: the frozen "aligned" one, or
            the "student" as it stands (detached).
        penalty: "square" is s^2 as printed; "centered_square" is (s - mean s)^2, which a shift of all logits cannot
            escape.

    Raises:
        TypeError: a value of the wrong type (`top_k` must be an int, and True is none).
        ValueError: a value out of range.
    """

    top_k: int = 100
    teacher_mix: float = 1.2
    temperature: float = 2.0
    alpha_base: float = 1.0
    gamma: float = 1.0
    lambda_reg: float = 1e-3
    kl_direction: KlDirection = "student_teacher"
    favored_from: FavoredFrom = "aligned"
    penalty: Penalty = "square"

    def __post_init__(self) -> None:
        check_int("top_k", self.top_k)
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; expected at least 1: for no completion term set alpha_base to 0")
        check_number("teacher_mix", self.teacher_mix)
        check_number("temperature", self.temperature, above=0.0)
        for name in ("alpha_base", "gamma", "lambda_reg"):
            check_number(name, getattr(self, name), minimum=0.0)
        check_choice("kl_direction", self.kl_direction, get_args(KlDirection))
        check_choice("favored_from", self.favored_from, get_args(FavoredFrom))
        check_choice("penalty", self.penalty, get_args(Penalty))


class CompletionLossInputs(NamedTuple):
    """What an implementation is given beside the student's logits: validated, weights normalised."""

    aligned_NV: Tensor  # (..., V), never differentiated
    base_NV: Tensor  # (..., V), never differentiated
    kl_weight_N: Tensor  # (...,) wD, float32 (float64 for float64 logits)
    completion_weight_N: Tensor  # (...,) wC, likewise
    top_k_indices_NK: Tensor | None  # (..., K) int64 the set M, or None to select the config.top_k largest d
    config: CompletionLossConfig
    vocab_size: int  # nothing beyond these first entries is read


class CompletionLossOutput(NamedTuple):
    """The loss and, per row and detached, what it is made of.

    `loss` and the floating statistics are float32 (float64 for float64 logits). A row that is not read (both weights 0)
    has statistics 0 and indices -1; a bad row has statistics NaN, count 0 and indices -1.
    """

    loss: Tensor  # scalar, or (...,) with reduction="none"; carries the gradient
    kl: Tensor  # (...,) D, unweighted
    completion: Tensor  # (...,) C, unweighted and without alpha
    alpha: Tensor  # (...,)
    base_favored_count: Tensor  # (...,) int64
    top_k_indices: Tensor  # (..., k) int64, descending by d, -1 for none
