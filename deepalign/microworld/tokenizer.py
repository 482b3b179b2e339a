"""A word-level tokenizer for a world: one token per word, with a chat template.

A conversation is `<bos> <user> ... <end> <assistant> ... <end>`; `<end>` closes a turn and is the end-of-sequence
token. Words of no text of the world become `<unk>`.
"""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepalign.microworld.world import World

PAD, BOS, USER, ASSISTANT, END, UNKNOWN = "<pad>", "<bos>", "<user>", "<assistant>", "<end>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, USER, ASSISTANT, END, UNKNOWN)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('the microworld knows the roles user and assistant, got ' + message['role']) }}"
    "{% endif %}"
    " <{{ message['role'] }}> {{ message['content'] }} {{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """The tokenizer of `world`: ids in the order special tokens, then `world.vocabulary()`.

    Texts are words separated by single spaces, so decoding (a join by spaces) and encoding undo each other.
    """
    vocabulary = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *world.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",  # generation in batches; training pads for itself
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
