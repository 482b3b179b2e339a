"""The two models of the sampling benchmarks, and who decodes with them.

Random weights, but logits like a language model's: aligned's final norm is scaled so that the next token has about 2.5
nats of entropy, and the base is aligned with noise on its head, which moves logits by about 1.3. On a CPU the pair is
small: hidden size 512, four layers, and the vocabulary of Llama 3 over tied embeddings, 80 million parameters, bf16. A
larger hidden size makes forwards slower, and so the share of the draw smaller and end-to-end ratios too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from benchmarks.cases import QUICK, Case
from benchmarks.contestants import finished
from benchmarks.interleaved import Contestant
from benchmarks.peers import contrastive_logits_eager
from deepalign import contrastive_sample
from deepalign.sampling import ContrastiveSampler
from deepalign.sampling.decoder import CachedDecoder, dense_last_column

PROMPT_TOKENS, NEW_TOKENS = (4, 3) if QUICK else (32, 24)
ALPHA = 1.0
Shape = dict[str, Any]  # of LlamaConfig
SMALL: Shape = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
LLAMA_8B: Shape = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
LOGITS_STD, BASE_NOISE = 4.3, 0.3
# Llama 3's own generation config is temperature 0.6 and top_p 0.9; transformers long added top_k 50 where none is set.
DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top_k+top_p": {"temperature": 0.6, "top_k": 50, "top_p": 0.9},
    "top_p": {"temperature": 0.6, "top_p": 0.9},
}


@lru_cache(maxsize=1)
def model_pair(vocab: int, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Aligned and base, the same every time."""
    shape = SMALL if device == "cpu" else LLAMA_8B
    if QUICK:
        shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(
        **shape,
        vocab_size=vocab,
        intermediate_size=int(3.5 * shape["hidden_size"]),
        max_position_embeddings=2048,
        tie_word_embeddings=device == "cpu",
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    models = []
    for noise in (0.0, BASE_NOISE):
        torch.manual_seed(0)
        with torch.device(device):
            model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval().requires_grad_(False)
            head = model.lm_head.weight
            head.add_(torch.randn_like(head).mul_(noise * config.initializer_range))
        model.model.norm.weight.fill_(LOGITS_STD / (config.initializer_range * config.hidden_size**0.5))
        models.append(model)
    return models[0], models[1]


class EagerContrastive(LogitsProcessor):
    """Eq. 7 in straightforward PyTorch inside `generate`: the base model with a KV cache of its own."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.base, self.cache = base, DynamicCache(config=base.config)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new_ids = input_ids[:, self.cache.get_seq_length() :]
        output = self.base(input_ids=new_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return contrastive_logits_eager(scores.float(), output.logits[:, -1].float(), ALPHA)


@dataclass(frozen=True)
class GenerateContestants:
    """Whole answers, `NEW_TOKENS` per row to prompts of `PROMPT_TOKENS`."""

    case: Case
    draw: Mapping[str, Any]

    @property
    def models(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        return model_pair(self.case.vocab, self.case.dtype, self.case.device)

    @property
    def prompts(self) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.randint(1, self.case.vocab, (self.case.rows, PROMPT_TOKENS), generator=generator)

    def library(self, implementation: str) -> Contestant:
        """The sampler."""
        sampler = ContrastiveSampler(*self.models, alpha=ALPHA, implementation=implementation, **self.draw)
        prompts = self.prompts
        return Contestant(finished(self.case.device, lambda: sampler.generate(prompts, max_new_tokens=NEW_TOKENS)))

    def generate(self, tuned: bool = False) -> Contestant:
        """`transformers`' own loop with `EagerContrastive`, its dynamic cache and its filters. Tuned, its lm_heads get
        dense hidden states from the prompt too, as the sampler's do."""
        aligned, base = self.models
        prompts = self.prompts.to(self.case.device)
        options = {"top_k": 0, **self.draw, "do_sample": self.draw["temperature"] > 0}
        if not options["do_sample"]:
            options = {"do_sample": False}

        def call() -> Tensor:
            return aligned.generate(  # type: ignore[operator]  # generate is a mixin's
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=NEW_TOKENS,
                logits_processor=LogitsProcessorList([EagerContrastive(base)]),
                **options,
            )

        def tuned_call() -> Tensor:
            with dense_last_column(aligned), dense_last_column(base):
                return call()

        return Contestant(finished(self.case.device, tuned_call if tuned else call))


class StepContestants:
    """One decoding step after the prompt: the draw, and the two forwards it comes on top of."""

    def __init__(self, case: Case, draw: Mapping[str, Any]) -> None:
        self.case, self.draw = case, draw
        whole = GenerateContestants(case, draw)
        prompts = whole.prompts.to(case.device)
        self.decoders = [CachedDecoder(model, PROMPT_TOKENS + 2) for model in whole.models]
        self.positions = torch.arange(PROMPT_TOKENS + 1, device=case.device).expand(case.rows, -1)
        self.next_ids = prompts[:, -1:]
        with torch.inference_mode():
            for decoder in self.decoders:
                decoder.advance(prompts, None, self.positions[:, :-1])
            self.logits = self._forwards()
        self.uniforms = torch.rand(case.rows, generator=torch.Generator().manual_seed(2)).double().to(case.device)

    def library(self, implementation: str) -> Contestant:
        """Penalty, filters and draw on the logits as the models left them."""
        options = {"alpha": ALPHA, "uniforms": self.uniforms, "implementation": implementation, **self.draw}
        draw = torch.inference_mode()(lambda: contrastive_sample(*self.logits, **options))
        return Contestant(finished(self.case.device, draw), self._rewind)

    def two_forwards(self) -> Contestant:
        """Aligned and base over one new token per row."""
        return Contestant(finished(self.case.device, torch.inference_mode()(self._forwards)))

    def _forwards(self) -> list[Tensor]:
        return [decoder.advance(self.next_ids, None, self.positions[:, -1:]) for decoder in self.decoders]

    def _rewind(self) -> None:
        for decoder in self.decoders:
            decoder.forget(1)
