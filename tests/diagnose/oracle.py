"""What is measured at a row, in float64, one row at a time, the obvious way."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.sampling.stepwise import eq7


def top(values_V: Tensor, n: int) -> list[int]:
    """Indices of the n largest, ties to the lowest index."""
    return values_V.sort(descending=True, stable=True).indices[:n].tolist()


def statistics(a_V: Tensor, b_V: Tensor, top_n: int) -> dict[str, float]:
    log_a_V, log_b_V = a_V.double().log_softmax(-1), b_V.double().log_softmax(-1)
    p_a_V, p_b_V = log_a_V.exp(), log_b_V.exp()
    log_m_V = ((p_a_V + p_b_V) / 2).log()
    favored = set(torch.nonzero(log_b_V > log_a_V).flatten().tolist())
    top_a, top_b = set(top(a_V, top_n)), set(top(b_V, top_n))
    return {
        "kl": float((p_a_V * (log_a_V - log_b_V)).sum()),
        "reverse_kl": float((p_b_V * (log_b_V - log_a_V)).sum()),
        "jsd": float((p_a_V * (log_a_V - log_m_V)).sum() + (p_b_V * (log_b_V - log_m_V)).sum()) / 2,
        "top_overlap": len(top_a & top_b) / top_n,
        "favored_count": len(favored),
        "favored_in_top": len(favored & top_a),
        "favored_in_base_top": len(favored & top_b),
    }


def favored_tokens(a_V: Tensor, b_V: Tensor, k: int) -> list[int]:
    return top(b_V - a_V, k)


@torch.no_grad()
def next_logits(model: PreTrainedModel, ids: list[int], size: int) -> Tensor:
    """(size,) of the token after `ids`."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :size]


def compared(
    aligned: PreTrainedModel, base: PreTrainedModel, ids: list[int], size: int, contrast: tuple[float, str] | None
) -> tuple[Tensor, Tensor]:
    """Both models' logits after `ids`; the aligned one's through Eq. 7 where there is a contrast."""
    a_V, b_V = (next_logits(model, ids, size) for model in (aligned, base))
    return (a_V if contrast is None else eq7(a_V, b_V, *contrast)), b_V
