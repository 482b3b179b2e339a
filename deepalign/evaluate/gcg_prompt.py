"""Where an adversarial suffix sits in a chat prompt, and whether a suffix of ids is what its text is tokenised to.

An attacker types text. A candidate made of ids counts only if the whole rendered conversation with the candidate's text
in it is tokenised to exactly the ids that were evaluated; others merge differently and attack with other ids than were
meant.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deepalign.data.chat import prompt_token_ids, with_thinking
from deepalign.data.files import Message

SEPARATOR = " "  # between request and suffix, where the suffix's text does not begin with one


class SuffixPrompt:
    """A request with a suffix behind it, in the chat template: `before_ids`, the suffix's ids, `after_ids`.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        prompt: the request.
        initial_suffix: a text that survives tokenisation; its ids are `initial_ids`.

    Raises:
        ValueError: no chat template, one that does not show the request as it is or whose thinking switch is left open
            (`chat.with_thinking`), or an initial suffix that merges with its neighbours.
        TypeError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str, initial_suffix: str) -> None:
        if not tokenizer.is_fast:
            raise TypeError(f"{type(tokenizer).__name__} gives no offsets; load the fast tokenizer (use_fast=True)")
        self.tokenizer = with_thinking(tokenizer, None)
        content = with_suffix(prompt, initial_suffix)
        rendered = self._render(content)
        place = rendered.rfind(content)
        if place < 0:
            raise ValueError(f"the chat template changes the request {content!r:.80}; a suffix cannot be located in it")
        start, end = place + len(prompt.rstrip()), place + len(content)
        self._head, self._tail = rendered[:start], rendered[end:]
        encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = [int(id_) for id_ in encoded["input_ids"]], encoded["offset_mapping"]
        inside = [index for index, (first, last) in enumerate(spans) if first >= start and first < last <= end]
        if not inside or inside != list(range(inside[0], inside[-1] + 1)):
            raise ValueError(f"the initial suffix {initial_suffix!r} has no tokens of its own in the chat template")
        self.before_ids, self.after_ids = ids[: inside[0]], ids[inside[-1] + 1 :]
        self.initial_ids = ids[inside[0] : inside[-1] + 1]
        if not self.surviving([self.initial_ids])[0]:
            raise ValueError(
                f"the initial suffix {initial_suffix!r} is not tokenised to the same ids again inside the chat "
                "template; give another one"
            )

    def surviving(self, candidates: Sequence[Sequence[int]]) -> list[bool]:
        """Which candidates' texts are tokenised to the candidates' ids again, in place."""
        texts = self.tokenizer.batch_decode(
            [list(ids) for ids in candidates], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        contents = [with_suffix(self._head, text) for text in texts]
        encoded = self.tokenizer(
            [content + self._tail for content in contents],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return [
            # templates strip messages, so a text that ends in a space is not what the model would see
            content == content.rstrip() and ids == [*self.before_ids, *candidate, *self.after_ids]
            for content, ids, candidate in zip(contents, encoded, candidates, strict=True)
        ]

    def _render(self, content: str) -> str:
        messages: list[Message] = [{"role": "user", "content": content}]
        if self.tokenizer.chat_template is None:
            prompt_token_ids(self.tokenizer, messages)  # raises: no chat template
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def with_suffix(prompt: str, suffix: str) -> str:
    """A request with a suffix's text typed behind it."""
    return prompt.rstrip() + (suffix if suffix[:1].isspace() else SEPARATOR + suffix)


def suffix_text(tokenizer: PreTrainedTokenizerBase, suffix_ids: Sequence[int]) -> str:
    """The text of a suffix."""
    return str(tokenizer.decode(list(suffix_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def allowed_tokens(tokenizer: PreTrainedTokenizerBase, width: int, *, ascii_only: bool) -> Tensor:
    """(width,) bool: tokens a suffix may be made of: with a text, not special, not beyond the tokenizer's vocabulary.

    Args:
        tokenizer: whose vocabulary.
        width: of the model's logits.
        ascii_only: printable ASCII only.

    Raises:
        ValueError: no token is left.
    """
    count = min(len(tokenizer), width)
    special = set(tokenizer.all_special_ids)
    special |= {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts = tokenizer.batch_decode([[id_] for id_ in range(count)], clean_up_tokenization_spaces=False)
    allowed = [
        id_ not in special and text.strip() != "" and (not ascii_only or (text.isascii() and text.isprintable()))
        for id_, text in enumerate(texts)
    ]
    if not any(allowed):
        raise ValueError("no token of the tokenizer may be used in a suffix; set ascii_only to false")
    return torch.tensor(allowed + [False] * (width - count))
