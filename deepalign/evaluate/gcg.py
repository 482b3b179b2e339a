"""GCG, the suffix attack of Zou et al. (2023), to measure a defence (Table 2).

One step, for a suffix of S tokens:

    gradient of the target's loss with respect to the suffix's one-hot tokens            (S, V)
    for each place the `top_k` tokens with the lowest gradient
    `width` candidates: each changes one place (evenly spread over the S) to one of its tokens, at random
    candidates that are not tokenised to the same ids again are dropped (`gcg_prompt`)
    the candidate with the lowest loss is the next suffix, better than the present one or not (their Algorithm 1)

Individual: a suffix for each request. Universal: one suffix for several, by the mean of their losses. The best suffix
seen is kept; then the model answers greedily, and a judge decides as for every other attack.

Everything is a function of the seed, but for `max_seconds`. Rates are reported as mean and standard deviation over
seeds. `gcg_loss` says what makes it quick.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepalign.evaluate.gcg_loss import CandidateLosses, TargetLoss
from deepalign.evaluate.gcg_prompt import SuffixPrompt, allowed_tokens, suffix_text
from deepalign.evaluate.generation import Contrast
from deepalign.evaluate.outcomes import AttackExample
from deepalign.evaluate.prefill import target_ids
from deepalign.kernels.checks import require
from deepalign.kernels.eager_math import top_k_lowest_index
from deepalign.models import context_length, logits_width
from deepalign.sampling.modes import check_evaluation_mode

Stopped = Literal["steps", "matched", "loss", "sequences", "seconds"]


@dataclass(frozen=True)
class GcgSettings:
    """Zou et al.'s settings; what this paper's attack used is not printed.

    Attributes:
        steps: most steps.
        width: candidates per step.
        top_k: tokens considered for each place.
        suffix_tokens: length of the suffix.
        initial_token: the suffix starts as this word, repeated.
        target_tokens: the first ids of each target that are aimed at; None: all.
        batch_size: candidates per forward.
        ascii_only: a suffix is printable ASCII.
        early_stop: stop when every token of every target is the most probable one (and `succeeded` agrees).
        check_every: steps between two calls of `succeeded`.
        stop_loss: stop at this loss; None: never.
        max_sequences: budget of sequences run through the model, a gradient counted as one; None: no limit. A step that
            would exceed it is not begun.
        max_seconds: budget of time, looked at before each step; None: no limit.

    Raises:
        ValueError: a value out of its range.
    """

    steps: int = 500
    width: int = 512
    top_k: int = 256
    suffix_tokens: int = 20
    initial_token: str = "!"
    target_tokens: int | None = None
    batch_size: int = 64
    ascii_only: bool = True
    early_stop: bool = True
    check_every: int = 10
    stop_loss: float | None = None
    max_sequences: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "width", "top_k", "suffix_tokens", "batch_size", "check_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("target_tokens", "max_sequences", "max_seconds"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "positive, or null")
        if not self.initial_token.strip():
            raise ValueError("initial_token is empty; give a word that the suffix starts from")


@dataclass(frozen=True)
class SuffixResult:
    """A suffix and how it was found.

    Attributes:
        suffix, suffix_ids: the one with the lowest loss, or the one that ended the search.
        loss: its loss, mean over prompts and target tokens (nats); inf where the budget allowed no step.
        matched: whether every target is the greedy answer's beginning.
        losses: of the suffix after each step.
        candidates: how many survived tokenisation in each step.
        sequences: run through the model.
        seconds: wall time.
        stopped: what ended it.
    """

    suffix: str
    suffix_ids: list[int]
    loss: float
    matched: bool
    losses: list[float]
    candidates: list[int]
    sequences: int
    seconds: float
    stopped: Stopped


def optimise_suffix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[AttackExample],
    settings: GcgSettings | None = None,
    *,
    seed: int = 0,
    contrast: Contrast | None = None,
    succeeded: Callable[[list[int]], bool] | None = None,
    progress: bool = True,
) -> SuffixResult:
    """Search for a suffix; one example: individual, several: universal.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: a fast tokenizer with a chat template.
        examples: requests and what the model should answer to them.
        settings: None: the defaults.
        seed: of the draws.
        contrast: attack contrastive decoding, through its logits.
        succeeded: called with a suffix's ids when it matches every target; the search goes on where it says False.
        progress: show a bar with the loss.

    Raises:
        RuntimeError: a loss that is not finite.
        ValueError: no examples, a model in training mode, a target without tokens, an initial suffix that does not
            survive tokenisation or has another length than `suffix_tokens`, a prompt beyond the model's context.
        TypeError: the tokenizer is not a fast one.
    """
    search = SuffixSearch(model, tokenizer, examples, settings or GcgSettings(), seed=seed, contrast=contrast)
    return search.run(succeeded, progress=progress)


class SuffixSearch:
    """The search as an object that steps; see `optimise_suffix` for the arguments."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[AttackExample],
        settings: GcgSettings,
        *,
        seed: int,
        contrast: Contrast | None = None,
    ) -> None:
        if not examples:
            raise ValueError("there is nothing to attack: the list of examples is empty")
        check_evaluation_mode(model, "model")
        self.settings, self.tokenizer = settings, tokenizer
        self.generator = torch.Generator().manual_seed(seed)
        initial = " ".join([settings.initial_token] * settings.suffix_tokens)
        self.prompts = [SuffixPrompt(tokenizer, example.prompt, initial) for example in examples]
        if len(self.prompts[0].initial_ids) != settings.suffix_tokens:
            raise ValueError(
                f"{settings.suffix_tokens} times {settings.initial_token!r} are {len(self.prompts[0].initial_ids)} "
                "tokens; give an initial_token that is one token"
            )
        self.allowed_V = allowed_tokens(tokenizer, logits_width(model), ascii_only=settings.ascii_only)
        if not bool(self.allowed_V[self.prompts[0].initial_ids].all()):
            raise ValueError(
                f"initial_token {settings.initial_token!r} is no token that a suffix may be made of (special, unknown, "
                "or not printable ASCII); give another word"
            )
        self.losses = [
            self._target_loss(model, tokenizer, prompt, example, contrast)
            for prompt, example in zip(self.prompts, examples, strict=True)
        ]
        self.suffix_S = torch.tensor(self.prompts[0].initial_ids)
        self.sequences = 0

    def _target_loss(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: SuffixPrompt,
        example: AttackExample,
        contrast: Contrast | None,
    ) -> TargetLoss:
        target = target_ids(tokenizer, example)[: self.settings.target_tokens]
        length = len(prompt.before_ids) + self.settings.suffix_tokens + len(prompt.after_ids) + len(target)
        context = context_length(model)
        if context is not None and length > context:
            raise ValueError(
                f"request, suffix and target have {length} tokens together, beyond the model's context of {context}; "
                "lower target_tokens or shorten the request"
            )
        return TargetLoss(
            model,
            prompt.before_ids,
            prompt.after_ids,
            target,
            suffix_length=self.settings.suffix_tokens,
            rows=self.settings.batch_size,
            contrast=contrast,
        )

    def run(self, succeeded: Callable[[list[int]], bool] | None = None, *, progress: bool = True) -> SuffixResult:
        """Step until something ends the search."""
        started, settings = time.perf_counter(), self.settings
        best_loss, best_S, best_matched = math.inf, self.suffix_S, False
        losses, candidates, last_check = [], [], -settings.check_every
        stopped: Stopped = "steps"
        with tqdm(total=settings.steps, desc="gcg", disable=not progress) as bar:
            for step in range(settings.steps):
                over = self._budget_spent(time.perf_counter() - started)
                if over is not None:
                    stopped = over
                    break
                loss, matched, survivors = self.step()
                losses.append(loss)
                candidates.append(survivors)
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")
                if loss < best_loss:
                    best_loss, best_S, best_matched = loss, self.suffix_S, matched
                if settings.early_stop and matched and step - last_check >= settings.check_every:
                    last_check = step
                    if succeeded is None or succeeded(self.suffix_S.tolist()):
                        best_loss, best_S, best_matched, stopped = loss, self.suffix_S, True, "matched"
                        break
                if settings.stop_loss is not None and loss <= settings.stop_loss:
                    stopped = "loss"
                    break
        return SuffixResult(
            suffix=suffix_text(self.tokenizer, best_S.tolist()),
            suffix_ids=best_S.tolist(),
            loss=best_loss,
            matched=best_matched,
            losses=losses,
            candidates=candidates,
            sequences=self.sequences,
            seconds=round(time.perf_counter() - started, 2),
            stopped=stopped,
        )

    def step(self) -> tuple[float, bool, int]:
        """One step; returns loss and match of the new suffix, and how many candidates survived tokenisation.

        Where none survives, the suffix stays, and its loss is returned.
        """
        present, gradient_SV = self.gradient()
        _check_finite(gradient_SV)
        drawn_NS = self.draw_candidates(gradient_SV)
        candidates_NS = drawn_NS[self.surviving(drawn_NS)]
        if not len(candidates_NS):
            return present, False, 0
        measured = self.candidate_losses(candidates_NS)
        _check_finite(measured.loss)
        best = int((measured.loss == measured.loss.min()).nonzero()[0])  # the first of equals
        self.suffix_S = candidates_NS[best]
        return float(measured.loss[best]), bool(measured.matched[best]), len(candidates_NS)

    def gradient(self) -> tuple[float, Tensor]:
        """Mean loss of the present suffix, and its (S, V) gradient on the CPU."""
        parts = [loss.gradient(self.suffix_S) for loss in self.losses]
        self.sequences += len(parts)
        gradient_SV = torch.stack([gradient for _, gradient in parts]).mean(0)
        return float(torch.stack([loss for loss, _ in parts]).mean()), gradient_SV

    def draw_candidates(self, gradient_SV: Tensor) -> Tensor:
        """(width, S) suffixes on the CPU, each with one place changed."""
        places, width = len(gradient_SV), self.settings.width
        allowed_SV = self.allowed_V.to(gradient_SV.device).expand(places, -1)
        top_k = min(self.settings.top_k, int(self.allowed_V.sum()))
        best_SK = top_k_lowest_index(-gradient_SV, allowed_SV, top_k)[0].cpu()
        place_N = (
            (torch.arange(width) * places) // width
            if width >= places
            else torch.randperm(places, generator=self.generator)[:width]
        )
        choice_N = torch.randint(top_k, (width,), generator=self.generator)
        candidates_NS = self.suffix_S.repeat(width, 1)
        candidates_NS[torch.arange(width), place_N] = best_SK[place_N, choice_N]
        return candidates_NS

    def surviving(self, candidates_NS: Tensor) -> Tensor:
        """(N,) bool: tokenised to the same ids again, behind every request."""
        rows = candidates_NS.tolist()
        return torch.tensor([prompt.surviving(rows) for prompt in self.prompts]).all(0)

    def candidate_losses(self, candidates_NS: Tensor) -> CandidateLosses:
        """Mean loss over the prompts, and whether all targets match, on the CPU."""
        measured = [loss.candidates(candidates_NS, self.suffix_S) for loss in self.losses]
        self.sequences += len(measured) * len(candidates_NS)
        return CandidateLosses(
            torch.stack([part.loss for part in measured]).mean(0).cpu(),
            torch.stack([part.matched for part in measured]).all(0).cpu(),
        )

    def _budget_spent(self, seconds: float) -> Stopped | None:
        settings = self.settings
        step_sequences = len(self.losses) * (settings.width + 1)
        if settings.max_sequences is not None and self.sequences + step_sequences > settings.max_sequences:
            return "sequences"
        return "seconds" if settings.max_seconds is not None and seconds >= settings.max_seconds else None


def _check_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise RuntimeError(
            "the loss of a suffix, or its gradient, is not finite: logits overflow; load the model in bf16 or fp32"
        )


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1), as in the paper's "0.4 +- 0.9"; the deviation of one value is nan.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("there is no mean of no values")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan
