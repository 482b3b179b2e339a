"""From conversations to token ids: chat templates applied once, answers located exactly.

The answer's tokens are found by position, never by searching: the ids of the prompt with the generation prompt must
be a prefix of the ids of the whole conversation, which is checked.
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from deepalign.data.files import Message

TemplateOptions = Mapping[str, Any]


@dataclass(frozen=True)
class EncodedExample:
    """One conversation as token ids.

    `input_ids[response_start:]` is the answer with its end-of-turn token; `truncated` says that tokens were cut off
    its end to fit `max_length`.
    """

    input_ids: list[int]
    response_start: int
    truncated: bool

    @property
    def response_length(self) -> int:
        """Number of answer tokens, the end-of-turn token included."""
        return len(self.input_ids) - self.response_start


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message], template_options: TemplateOptions | None = None
) -> list[int]:
    """Ids of a prompt with the generation prompt: what an answer's ids are appended to.

    Args:
        tokenizer: a tokenizer with a chat template.
        prompt: the user's text, or the messages so far.
        template_options: variables of the template, for example Qwen3's `enable_thinking` or Llama 3's `date_string`
            (left out, that one is today's date in some releases: ids that differ from day to day).

    Raises:
        ValueError: the tokenizer has no chat template, or one that refuses the messages.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return _apply_template(tokenizer, messages, template_options, add_generation_prompt=True)


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    max_length: int | None = None,
    template_options: TemplateOptions | None = None,
) -> EncodedExample:
    """Token ids of a conversation, with its last answer located. `template_options`: see `prompt_token_ids`.

    Tokens that the template puts after the answer's end-of-turn token (often a newline) are dropped: a model never
    generates them. That token is the last one that is no text (`control_ids`): the eos token, but not in Gemma's case.
    An example longer than `max_length` loses the end of its answer; one whose prompt alone fills `max_length` is
    refused.

    Raises:
        ValueError: no chat template; the template refuses the conversation, or does not keep the prompt as a prefix;
            or nothing of the answer fits into `max_length`.
    """
    prompt_ids = prompt_token_ids(tokenizer, messages[:-1], template_options)
    input_ids = _apply_template(tokenizer, list(messages), template_options, add_generation_prompt=False)
    if input_ids[: len(prompt_ids)] != prompt_ids:
        raise ValueError(_why_no_prefix(tokenizer, messages, template_options))
    input_ids = _cut_after_end_of_turn(input_ids, len(prompt_ids), control_ids(tokenizer))
    truncated = max_length is not None and len(input_ids) > max_length
    if max_length is not None:
        input_ids = input_ids[:max_length]
    if len(input_ids) <= len(prompt_ids):
        raise ValueError(
            f"no answer token is left: the prompt has {len(prompt_ids)} tokens and max_length is {max_length}; "
            "shorten the prompt or raise max_length"
        )
    return EncodedExample(input_ids, len(prompt_ids), truncated)


def examples_digest(examples: Iterable[EncodedExample]) -> str:
    """SHA-256 over token ids and answer starts of encoded examples, in order."""
    rows = json.dumps([(example.input_ids, example.response_start) for example in examples])
    return hashlib.sha256(rows.encode()).hexdigest()


def with_thinking(tokenizer: PreTrainedTokenizerBase, thinking: bool | None) -> PreTrainedTokenizerBase:
    """The tokenizer with the thinking mode of its chat template settled, for all that is encoded with it.

    A template with the switch `enable_thinking` (Qwen3's) writes an empty thought into the prompt where it is off. Left
    to the default, that thought is the beginning of the answer: what is forced or measured there is no answer.

    Args:
        tokenizer: with a chat template; not changed.
        thinking: True or False where the template has the switch, None where it has none.

    Raises:
        ValueError: the template has the switch and `thinking` is None, or the other way round; or no chat template.
    """
    name, switch = repr(tokenizer.name_or_path), has_thinking_switch(tokenizer)
    if switch and thinking is None:
        raise ValueError(
            f"the chat template of {name} has the switch enable_thinking, and thinking is not set; set it: --thinking "
            "off (or on); answers: {thinking: false} in a suite; deepalign.data.with_thinking(tokenizer, False)"
        )
    if not switch and thinking is not None:
        raise ValueError(
            f"thinking is {thinking} but the chat template of {name} has no enable_thinking: both settings give the "
            "same prompt; leave thinking unset"
        )
    if thinking is None:
        return tokenizer
    settled = copy.copy(tokenizer)
    settled.chat_template = f"{{%- set enable_thinking = {str(thinking).lower()} %}}{tokenizer.chat_template}"
    return settled


def has_thinking_switch(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the prompts of a chat template depend on `enable_thinking`."""
    on, off = (prompt_token_ids(tokenizer, "?", {"enable_thinking": switch}) for switch in (True, False))
    return on != off


def dated_prompt(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """For fingerprints of runs: the prompt "?" where the chat template may write today's date.

    A run that goes on another day would mix two prompts; empty where the template asks for no date.
    """
    if "strftime_now" not in str(tokenizer.chat_template):
        return {}
    return {"prompt_with_its_date": str(_templated(tokenizer, [{"role": "user", "content": "?"}], None, True, False))}


def _apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    template_options: TemplateOptions | None,
    *,
    add_generation_prompt: bool,
) -> list[int]:
    return list(cast(list[int], _templated(tokenizer, messages, template_options, add_generation_prompt, True)))


def _templated(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    template_options: TemplateOptions | None,
    add_generation_prompt: bool,
    tokenize: bool,
) -> Any:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use the aligned model's tokenizer or set "
            "tokenizer.chat_template"
        )
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=tokenize,
            add_generation_prompt=add_generation_prompt,
            return_dict=False,
            **(template_options or {}),
        )
    except TemplateError as error:  # Gemma's has no system prompt, Llama 2's wants the roles in turn
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refuses messages of {roles or 'nobody'}: {error}") from error


def _why_no_prefix(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template_options: TemplateOptions | None
) -> str:
    """Why the ids of a prompt do not begin those of its conversation: the template's text, or tokens across the border.

    A token of both would be a prompt that no request has.
    """
    prompt = _templated(tokenizer, list(messages[:-1]), template_options, True, False)
    whole = _templated(tokenizer, list(messages), template_options, False, False)
    if whole.startswith(prompt):
        before, after = prompt[-10:], whole[len(prompt) :][:10]
        return (
            f"the tokenizer joins the end of the prompt and the beginning of the answer in one token ({before!r} and "
            f"{after!r}), so the answer's tokens are not its own; remove white space at the beginning of the answer"
        )
    return (
        "the tokenizer's chat template does not keep the prompt as a prefix of the conversation, so the answer "
        "cannot be located; use a template whose generation prompt starts the assistant's turn"
    )


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that are no text: eos, and all that were added as special, an end of turn among them.

    The unknown token stands for text.
    """
    added = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}
    return added if tokenizer.eos_token_id is None else added | {tokenizer.eos_token_id}


def _cut_after_end_of_turn(input_ids: list[int], response_start: int, ends: set[int]) -> list[int]:
    for position in range(len(input_ids) - 1, response_start - 1, -1):
        if input_ids[position] in ends:
            return input_ids[: position + 1]
    return input_ids
