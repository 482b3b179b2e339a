"""Where each family's chat template puts the answer: verified by decoding what carries a weight and what does not."""

import pytest

from deepalign.data import show_batch
from deepalign.data.chat import encode_example, prompt_token_ids, with_thinking
from deepalign.data.contexts import build_contexts, first_ids
from deepalign.data.show import example_spans
from deepalign.data.steps import RowWeights, StepDataset
from deepalign.defenses.safety_augmentation import SafetyTriplet, spliced_examples
from deepalign.evaluate.gcg_prompt import SuffixPrompt
from tests.families import FAMILIES

QUESTION, ANSWER = "mix 2 parts, ok?", "First: stir\n\nthen wait."
# what the model is given, and what it has to write
EXPECTED = {
    "llama2_7b_chat": (f"<s>[INST] {QUESTION} [/INST]", f" {ANSWER} </s>"),
    "llama31_8b": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        f"{ANSWER}<|eot_id|>",
    ),
    "qwen25_7b": (
        "<|im_start|>system\nYou are a test.<|im_end|>\n"
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        f"{ANSWER}<|im_end|>",
    ),
    "qwen3_8b": (
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        f"{ANSWER}<|im_end|>",
    ),
}


def conversation(question: str = QUESTION, answer: str = ANSWER) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("packing", [False, True])
def test_the_weights_lie_on_the_rows_that_predict_the_answer_and_nothing_else(name, packing):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    rows = [conversation(), conversation("hm", "yes"), conversation("what else", "a longer answer, after all")]
    examples = [encode_example(tokenizer, row, template_options=family.options) for row in rows]
    dataset = StepDataset(
        examples[:1],
        examples[1:],
        harmful_batch_size=1,
        utility_batch_size=2,
        max_steps=1,
        weights=RowWeights.from_options("both"),
        pad_token_id=0,
        seed=0,
        packing=packing,
    )
    batch = dataset[0]
    ids = batch["input_ids"].flatten()
    predicted = decode(tokenizer, ids[batch["row_index"] + 1].tolist())
    prompt, answer = EXPECTED[name]
    assert predicted.startswith(answer)
    # the example of which we know every character
    first, last = example_spans(batch)[0]
    harmful = [int(i) + 1 for i in batch["row_index"] if first <= i < last - 1]
    assert decode(tokenizer, ids[first : harmful[0]].tolist()) == prompt
    assert decode(tokenizer, ids[harmful].tolist()) == answer
    assert len(example_spans(batch)) == 3


@pytest.mark.parametrize("name", EXPECTED)
def test_training_and_generation_see_the_same_prompt(name):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    example = encode_example(tokenizer, conversation(), template_options=family.options)
    prompt = prompt_token_ids(tokenizer, QUESTION, family.options)
    assert prompt == example.input_ids[: example.response_start]
    assert prompt.count(tokenizer.bos_token_id) == (1 if tokenizer.bos_token_id is not None else 0)


def test_what_happens_without_the_options():
    """Why the recipes set them: Qwen3 would learn to write an empty thought, Llama 3.2's ids would change every day."""
    qwen = FAMILIES["qwen3_8b"].tokenizer()
    example = encode_example(qwen, conversation())
    assert decode(qwen, example.input_ids[example.response_start :]) == f"<think>\n\n</think>\n\n{ANSWER}<|im_end|>"
    llama = FAMILIES["llama31_8b"].tokenizer()
    days = [prompt_token_ids(llama, QUESTION, {"date_string": day}) for day in ("26 Jul 2024", "27 Jul 2024")]
    assert days[0] != days[1]
    assert prompt_token_ids(llama, QUESTION) not in days


def test_a_thinking_switch_is_settled_before_answers_are_attacked_or_measured():
    """Left open, the "first ids of the answer" would be those of an empty thought, and so would the first positions."""
    qwen, llama = FAMILIES["qwen3_8b"].tokenizer(), FAMILIES["llama2_7b_chat"].tokenizer()
    for refused in (
        lambda: build_contexts(qwen, [conversation()], first_ids(5)),
        lambda: SuffixPrompt(qwen, QUESTION, "! !"),
    ):
        with pytest.raises(ValueError, match="has the switch enable_thinking, and thinking is not set"):
            refused()
    with pytest.raises(ValueError, match="has no enable_thinking"):
        with_thinking(llama, False)
    assert with_thinking(llama, None) is llama
    (context,) = build_contexts(with_thinking(qwen, False), [conversation()], first_ids(5))
    assert decode(qwen, context.prompt_ids) == EXPECTED["qwen3_8b"][0]
    assert decode(qwen, context.prefix_ids + context.answer_ids) == EXPECTED["qwen3_8b"][1]
    assert prompt_token_ids(with_thinking(qwen, True), QUESTION) == prompt_token_ids(qwen, QUESTION)
    assert qwen.chat_template == FAMILIES["qwen3_8b"].template  # the tokenizer itself stays as it is


def test_no_thought_stands_between_a_harmful_beginning_and_its_refusal():
    qwen = FAMILIES["qwen3_8b"].tokenizer()
    (example,) = spliced_examples(qwen, [SafetyTriplet(QUESTION, "Sure", "No.")], splice_probability=1.0, seed=1)
    before, answer = example.input_ids[: example.response_start], example.input_ids[example.response_start :]
    nothing, prompt, harmful = decode(qwen, before).partition(EXPECTED["qwen3_8b"][0])
    assert (bool(nothing), bool(prompt), bool(harmful)) == (False, True, True)
    assert "Sure".startswith(harmful)
    assert decode(qwen, answer) == "No.<|im_end|>"


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_can_be_read(packing):
    family = FAMILIES["qwen25_7b"]
    tokenizer = family.tokenizer()
    examples = [encode_example(tokenizer, conversation(f"q{i}", f"a{i}")) for i in range(4)]
    dataset = StepDataset(
        examples[:2],
        examples[2:],
        harmful_batch_size=2,
        utility_batch_size=2,
        max_steps=1,
        weights=RowWeights.from_options("utility"),
        pad_token_id=0,
        seed=0,
        packing=packing,
    )
    shown = show_batch(tokenizer, dataset[0])
    blocks = shown.split("\n\n")
    assert len(blocks) == 4
    assert sum("answer, 3 tokens:" in block for block in blocks) == 4
    # three answer tokens in each of the two harmful rows carry the penalty alone, utility rows distillation alone
    assert shown.count("kl 0.000e+00  completion 1.667e-01") == 6
    assert shown.count("kl 1.667e-01  completion 0.000e+00") == 6
    assert shown.count("'<|im_end|>'") == 4
    assert show_batch(tokenizer, dataset[0], examples=1) == blocks[0]
