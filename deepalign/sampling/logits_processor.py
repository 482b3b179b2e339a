"""Contrastive decoding (Eq. 7) inside `transformers`' own `generate`.

The defence needs the base model's logits beside the aligned model's at every step. `generate` hands a logits
processor the ids so far and the aligned model's scores, so the processor carries the base model along with a KV cache
of its own: the whole prompt on the first call, one token on each later one. Nothing of `generate` is rewritten, and
stopping criteria and streamers work as ever.

One processor serves ONE call of `generate`, because its cache belongs to that call's ids: build a fresh one for the
next. A processor used twice is refused, never silently wrong. Rows may be repeated (`num_return_sequences`), reordered,
dropped or multiplied between steps, as long as each continues a row of the step before: the cache follows. Beams are
refused: their scores are log-probabilities already, and what Eq. 7 leaves of those are none. For answers alone,
`ContrastiveSampler` is the faster way.

    processor = ContrastiveLogitsProcessor(base, alpha=2.0, attention_mask=batch["attention_mask"])
    aligned.generate(**batch, do_sample=False, logits_processor=LogitsProcessorList([processor]))

Eq. 7 is about raw logits. What `generate` builds itself falls on both sides: its temperature, top-k, top-p and the
other warpers come AFTER the processors it is given, as they should; its repetition penalty, minimum length and token
bans come BEFORE. Scores that such a ban has set to -inf are refused; a repetition penalty cannot be seen, so turn it
off (Qwen2.5's generation config has 1.05).
"""

import math
from typing import cast, get_args

import torch
from transformers import LogitsProcessor, PreTrainedModel

from deepalign.kernels.checks import check_choice, check_number
from deepalign.kernels.contrastive_sample import Space, contrastive_logits
from deepalign.sampling.decoder import CachedDecoder
from deepalign.sampling.modes import check_evaluation_mode

# Beam search hands over log-probabilities, whose logsumexp is 0 up to fp32 rounding; raw logits do not land there.
NORMALISED_TOLERANCE = 1e-4


class ContrastiveLogitsProcessor(LogitsProcessor):
    """Subtract alpha * (base - aligned) from the scores of base-favored tokens (Eq. 7), at every step of `generate`.

    Args:
        base: the base model, in evaluation mode, on any device, with the aligned model's vocabulary.
        alpha: strength, finite and >= 0; 0 leaves the scores untouched and never runs `base`.
        space: "logits" (as printed: raw logits are differenced) or "logprobs".
        attention_mask: (B, T) of the prompt batch given to `generate`, 1 for real tokens, left padded; with
            `num_return_sequences` its rows are repeated here as `generate` repeats them. None: no row is padded.

    Raises:
        ValueError: alpha is negative or not finite, `space` is unknown, or `base` is in training mode.
        TypeError: alpha is not a number.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        alpha: float,
        space: Space = "logits",
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        check_number("alpha", alpha, minimum=0.0)
        check_choice("space", space, get_args(Space))
        check_evaluation_mode(base, "base")
        self.base = base
        self.alpha = float(alpha)
        self.space = space
        self._prompt_mask_BT = attention_mask
        self._decoder = CachedDecoder(base)
        self._seen_ids_BT: torch.Tensor | None = None
        self._mask_BT: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Contrastive scores for the next token.

        Args:
            input_ids: (B, T) the ids so far, prompt and padding included.
            scores: (B, V) the aligned model's raw logits for the next token.

        Returns:
            (B, V) the scores after Eq. 7, on the scores' device; `scores` itself when alpha is 0.

        Raises:
            ValueError: a row does not continue one of the previous call by one token, the attention mask does not fit
                the first ids, the vocabularies differ, or the scores are no longer raw logits.
        """
        if self.alpha == 0:
            return scores
        if self._seen_ids_BT is None:
            self._start(input_ids, scores)
        else:
            self._follow(input_ids)
        base_logits_BV = self._advance_base(input_ids).to(device=scores.device, dtype=scores.dtype)
        _check_scores(scores, base_logits_BV)
        contrasted_BV = contrastive_logits(scores, base_logits_BV, alpha=self.alpha, space=self.space)
        return cast(torch.FloatTensor, contrasted_BV)

    def _start(self, input_ids_BT: torch.Tensor, scores_BV: torch.Tensor) -> None:
        mask_BT = self._prompt_mask_BT
        if mask_BT is None:
            self._check_no_padding(input_ids_BT)
            mask_BT = torch.ones_like(input_ids_BT)
        rows, width = input_ids_BT.shape
        if mask_BT.shape[1] != width or rows % mask_BT.shape[0]:
            raise ValueError(
                f"attention_mask has shape {tuple(mask_BT.shape)} but generate's ids have {(rows, width)}; pass the "
                "mask of the same batch"
            )
        mask_BT = mask_BT.repeat_interleave(rows // mask_BT.shape[0], dim=0)
        if not bool((mask_BT[:, -1] != 0).all()):
            raise ValueError(
                "attention_mask ends in padding; pad prompts on the left (tokenizer.padding_side = 'left')"
            )
        normalised = bool((scores_BV.float().logsumexp(dim=-1).abs() < NORMALISED_TOLERANCE).all())
        if normalised:
            raise ValueError(
                "the scores are log-probabilities, not raw logits: beam search is not supported; use num_beams=1"
            )
        self._mask_BT = mask_BT.to(device=self.base.device, dtype=torch.long)

    def _check_no_padding(self, input_ids_BT: torch.Tensor) -> None:
        """A row that starts with the pad token beside rows that do not is a padded batch whose mask was forgotten."""
        pad = self.base.config.pad_token_id
        padded_B = input_ids_BT[:, 0] == (-1 if pad is None else pad)
        if bool(padded_B.any()) and not bool(padded_B.all()):
            raise ValueError(
                f"{int(padded_B.sum())} of {len(padded_B)} rows start with the pad token {pad} but no attention_mask "
                "was given; pass the batch's attention_mask"
            )

    def _follow(self, input_ids_BT: torch.Tensor) -> None:
        """Bring the cache into the order of rows whose ids, but for the new column, are those of the last call."""
        seen_BT = self._seen_ids_BT
        assert seen_BT is not None
        assert self._mask_BT is not None
        if torch.equal(input_ids_BT[:, :-1], seen_BT):
            return
        places = {tuple(ids): place for place, ids in enumerate(seen_BT.tolist())}
        order = [places.get(tuple(ids)) for ids in input_ids_BT[:, :-1].tolist()]
        if None in order:
            raise ValueError(
                f"expected rows of the previous ids {tuple(seen_BT.shape)} with one new token each, got ids of shape "
                f"{tuple(input_ids_BT.shape)} of which row {order.index(None)} continues none of them: each call of "
                "generate needs a fresh ContrastiveLogitsProcessor"
            )
        order_B = torch.tensor(order, device=self._mask_BT.device)
        self._decoder.select_rows(order_B)
        self._mask_BT = self._mask_BT[order_B]

    def _advance_base(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """Run the base model over the columns it has not seen; (B, V) logits for the next token."""
        assert self._mask_BT is not None
        new_columns = 1 if self._seen_ids_BT is not None else input_ids_BT.shape[1]
        if self._seen_ids_BT is not None:
            # Rows that have finished go on with pad tokens; their scores are ignored, so a 1 for them is harmless.
            self._mask_BT = torch.cat([self._mask_BT, self._mask_BT.new_ones(len(self._mask_BT), 1)], dim=1)
        # A padded position must not count, or the base model would see a shifted sentence.
        position_ids_BT = (self._mask_BT.cumsum(dim=-1) - 1).clamp(min=0)
        self._seen_ids_BT = input_ids_BT.clone()
        return self._decoder.advance(input_ids_BT[:, -new_columns:], self._mask_BT, position_ids_BT[:, -new_columns:])


def _check_scores(scores_BV: torch.Tensor, base_logits_BV: torch.Tensor) -> None:
    if scores_BV.shape[-1] != base_logits_BV.shape[-1]:
        raise ValueError(
            f"the aligned model scores {scores_BV.shape[-1]} tokens and the base model {base_logits_BV.shape[-1]}; "
            "both must have the same vocabulary, padding included (resize the smaller embedding)"
        )
    if bool(((scores_BV == -math.inf) & (base_logits_BV != -math.inf)).any()):
        raise ValueError(
            "another processor has already set scores to -inf, but Eq. 7 needs the raw logits; turn minimum lengths "
            "and banned tokens off in generate and list your own processors after ContrastiveLogitsProcessor"
        )
