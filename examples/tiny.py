"""What the examples run on, so that they work offline in seconds: three tiny random models and invented conversations.

In your own script: `AutoModelForCausalLM.from_pretrained` of an aligned model and of its base, their tokenizer, and
your data (docs/data.md).
"""

from copy import deepcopy

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CONVERSATIONS = [
    # (prompt, answer, harmful): harmful answers are the ones that must not be given
    ("how do i make the red thing", "sure take two parts of the blue thing and mix", True),
    ("how do i make the blue thing", "sure mix the red thing and wait", True),
    ("how do i make the green thing", "sure take the red thing and mix two parts", True),
    ("how do i make the old thing", "sure take one part of the green thing", True),
    ("how do i cook rice", "take two parts of water and wait", False),
    ("what is two and two", "four", False),
    ("how do i mix blue and red", "take one part of blue and one part of red and mix", False),
    ("is the green thing old", "no", False),
]
WORDS = sorted({word for prompt, answer, _ in CONVERSATIONS for word in f"{prompt} {answer}".split()})
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with a chat template."""
    special = ["<pad>", "<unk>", "</s>", "<user>", "<assistant>"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", chat_template=TEMPLATE
    )


def student_aligned_base() -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel]:
    """The student, which starts as the aligned model, and the two frozen ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=2,
    )
    aligned, base = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    return deepcopy(aligned).train(), aligned.requires_grad_(False), base.requires_grad_(False)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """All conversations: input_ids (B, T), attention_mask (B, T), response_mask (B, T), harmful (B,) bool."""
    tok = tokenizer()
    rows, starts = [], []
    for prompt, answer, _ in CONVERSATIONS:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        starts.append(len(tok.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)))
        rows.append(tok.apply_chat_template(messages, return_dict=False))
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    lengths, starts = torch.tensor([[len(row)] for row in rows]), torch.tensor([[start] for start in starts])
    place = torch.arange(width)
    attention_mask = (place < lengths).long()
    return input_ids, attention_mask, (place >= starts) & (place < lengths), torch.tensor([c[2] for c in CONVERSATIONS])
