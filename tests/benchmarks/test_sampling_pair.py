"""Both sides of the sampling benchmark decode the same answers."""

import torch

from benchmarks.cases import Case
from benchmarks.sampling_pair import DRAWS, PROMPT_TOKENS, GenerateContestants, StepContestants
from deepalign.sampling import ContrastiveSampler

CASE = Case(2, 300, "float32")


def test_greedy_answers_are_the_same() -> None:
    contestants = GenerateContestants(CASE, DRAWS["greedy"])
    answers = [answer.token_ids for answer in contestants.library("reference").call()]
    for tuned in (False, True):
        ids = contestants.generate(tuned).call()[:, PROMPT_TOKENS:].tolist()
        assert ids == answers
    aligned_alone = ContrastiveSampler(contestants.models[0], alpha=0, temperature=0)
    alone = aligned_alone.generate(contestants.prompts, max_new_tokens=len(answers[0]))
    assert [answer.token_ids for answer in alone] != answers  # or Eq. 7 would not be seen


def test_a_step_starts_from_the_same_cache_every_round() -> None:
    contestants = StepContestants(CASE, DRAWS["top_p"])
    draw, forwards = contestants.library("reference"), contestants.two_forwards()
    first = draw.call().token_ids
    for _ in range(3):
        draw.prepare()
        for logits, again in zip(contestants.logits, forwards.call(), strict=True):
            torch.testing.assert_close(again, logits)
        assert torch.equal(draw.call().token_ids, first)
