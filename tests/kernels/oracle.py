"""The equations once more, independently: one row at a time, present entries only, float64, closed-form gradient.

Nothing here is shared with the library. Only d is differenced in float32 for inputs narrower than float64, because that
defines which entries tie and hence which are selected.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deepalign.kernels.completion_loss import CompletionLossConfig


@dataclass
class LossRow:
    loss: float
    kl: float
    completion: float
    alpha: float
    count: int
    count_bounds: tuple[int, int]
    indices: list[int]
    gradient: Tensor


def softmax_logs(values: Tensor) -> Tensor:
    shifted = values - values.max()
    return shifted - math.log(float(shifted.exp().sum()))


def present_entries(models: list[Tensor]) -> list[int] | None:
    """Indices that are finite in every model, or None for a bad row."""
    finite = torch.stack([torch.isfinite(model) for model in models])
    absent = torch.stack([model == -math.inf for model in models]).all(0)
    if not bool((finite.all(0) | absent).all()) or bool(absent.all()):
        return None
    return finite.all(0).nonzero().flatten().tolist()


def favored_bounds(difference: Tensor, reference: Tensor, base: Tensor) -> tuple[int, int]:
    """Smallest and largest base-favored count that rounding near the threshold may yield."""
    threshold = float(base.max() - reference.max())
    threshold += math.log(float((base - base.max()).exp().sum())) - math.log(
        float((reference - reference.max()).exp().sum())
    )
    if torch.equal(reference, base):
        return 0, 0
    slack = 2e-6 * (1.0 + float(torch.maximum(base.abs().max(), reference.abs().max())))
    return int((difference > threshold + slack).sum()), int((difference > threshold - slack).sum())


def difference_in_compute_dtype(base: Tensor, reference: Tensor) -> Tensor:
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    return (base.to(dtype) - reference.to(dtype)).double()


def descending(values: Tensor, present: list[int], k: int) -> list[int]:
    """The k largest of values[present], ties to the lowest index, padded with -1."""
    listed = values.tolist()
    order = sorted(sorted(present), key=listed.__getitem__, reverse=True)[:k]  # stable
    return order + [-1] * (k - len(order))


def divergence_and_gradient(s: Tensor, t: Tensor, config: CompletionLossConfig) -> tuple[float, Tensor]:
    tau = config.temperature
    log_p, log_q = softmax_logs(s / tau), softmax_logs(t / tau)
    p, q = log_p.exp(), log_q.exp()
    if config.kl_direction == "teacher_student":
        return tau**2 * float((q * (log_q - log_p)).sum()), tau * (p - q)
    raw = float((p * (log_p - log_q)).sum())
    return tau**2 * raw, tau * p * ((log_p - log_q) - raw)


def penalty_and_gradient(s: Tensor, members: list[int], config: CompletionLossConfig) -> tuple[float, Tensor]:
    """`members` are positions in s."""
    centre = float(s.mean()) if config.penalty == "centered_square" else 0.0
    gradient, total, offset_sum = torch.zeros_like(s), 0.0, 0.0
    for position in members:
        offset = float(s[position]) - centre
        total += offset**2
        offset_sum += offset
        gradient[position] += 2 * config.lambda_reg * offset
    if config.penalty == "centered_square":
        gradient -= 2 * config.lambda_reg / len(s) * offset_sum
    return config.lambda_reg * total, gradient


def loss_row(
    student: Tensor,
    aligned: Tensor,
    base: Tensor,
    kl_weight: float,
    completion_weight: float,
    given: list[int] | None,
    config: CompletionLossConfig,
    vocab_size: int,
    observed_count: int,
) -> LossRow:
    """One row of (V,) logits. `observed_count` replaces the count in alpha if rounding allows it."""
    width, k = len(student), config.top_k if given is None else len(given)
    gradient = torch.zeros(width, dtype=torch.float64)
    if kl_weight == 0 and completion_weight == 0:
        return LossRow(0.0, 0.0, 0.0, 0.0, 0, (0, 0), [-1] * k, gradient)
    s, a, b = (model[:vocab_size] for model in (student, aligned, base))
    present = present_entries([s, a, b])
    if present is None:
        gradient[:vocab_size] = math.nan
        return LossRow(math.nan, math.nan, math.nan, math.nan, 0, (0, 0), [-1] * k, gradient)
    reference = s if config.favored_from == "student" else a
    difference = difference_in_compute_dtype(b, reference)
    s64, a64, b64, reference64 = (model.double()[present] for model in (s, a, b, reference))
    bounds = favored_bounds(difference[present], reference64, b64)
    count = min(max(observed_count, bounds[0]), bounds[1])
    alpha = config.alpha_base * (1 + config.gamma * count / len(present))
    indices = descending(difference, present, k) if given is None else given
    place = {index: n for n, index in enumerate(present)}
    members = [place[index] for index in sorted(set(indices)) if index in place]
    teacher = config.teacher_mix * a64 + (1 - config.teacher_mix) * b64
    kl, kl_gradient = divergence_and_gradient(s64, teacher, config)
    completion, completion_gradient = penalty_and_gradient(s64, members, config)
    gradient[present] = kl_weight * kl_gradient + completion_weight * alpha * completion_gradient
    loss = kl_weight * kl + completion_weight * alpha * completion
    return LossRow(loss, kl, completion, alpha, count, bounds, indices, gradient)


@dataclass
class DivergenceRow:
    kl: float
    reverse_kl: float
    jsd: float
    top_overlap: float
    count_bounds: tuple[int, int]
    favored_in_top_bounds: tuple[int, int]


def divergence_row(aligned: Tensor, base: Tensor, top_n: int, vocab_size: int) -> DivergenceRow:
    """Position statistics of one row of (V,) logits."""
    aligned, base = aligned[:vocab_size], base[:vocab_size]
    present = present_entries([aligned, base])
    if present is None:
        return DivergenceRow(math.nan, math.nan, math.nan, math.nan, (0, 0), (0, 0))
    difference = difference_in_compute_dtype(base, aligned)
    log_p, log_q = softmax_logs(aligned.double()[present]), softmax_logs(base.double()[present])
    p, q = log_p.exp(), log_q.exp()
    middle = ((p + q) / 2).log()
    # where p underflows, so does its share: 0 * log 0 counts as 0
    jsd = float(
        torch.where(p > 0, p * (log_p - middle), 0.0).sum() + torch.where(q > 0, q * (log_q - middle), 0.0).sum()
    )
    n = min(top_n, len(present))
    top_a, top_b = descending(aligned.double(), present, n), descending(base.double(), present, n)
    place = {index: n for n, index in enumerate(present)}
    in_top = [place[index] for index in top_a]
    bounds = favored_bounds(difference[present], aligned.double()[present], base.double()[present])
    threshold = log_q - log_p
    slack = 2e-6 * (1.0 + float(torch.maximum(aligned[present].abs().max(), base[present].abs().max())))
    low, high = (int((threshold[in_top] > margin).sum()) for margin in (slack, -slack))
    if bounds == (0, 0):
        low = high = 0
    return DivergenceRow(
        float((p * (log_p - log_q)).sum()),
        float((q * (log_q - log_p)).sum()),
        jsd / 2,
        len(set(top_a) & set(top_b)) / n,
        bounds,
        (low, high),
    )
