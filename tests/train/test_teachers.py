"""The kinds of teachers give the same hidden states at the same rows."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from deepalign.models import logits_width
from deepalign.output_head import hidden_states, output_head
from deepalign.train.teachers import AdapterTeachers, OnlineTeachers, model_inputs, rows_of
from tests.tiny import make_model, make_tokenizer


@pytest.fixture
def models():
    tokenizer = make_tokenizer()
    return [make_model(seed, tokenizer).requires_grad_(False).eval() for seed in (0, 1)]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 40, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "row_index": torch.tensor([2, 3, 9, 20])}


def adapted(seed: int, **options):
    """A student whose adapters change its hidden states, and its head if the options say so."""
    torch.manual_seed(2)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **options)
    return get_peft_model(make_model(seed, make_tokenizer()), lora)


def test_online_teachers_give_hidden_states_and_logits_at_the_rows(models, batch):
    teachers = OnlineTeachers(*models)
    for hidden, logits, head, model in zip(
        teachers.hidden(batch),
        teachers.logits(batch),
        (teachers.aligned_head, teachers.base_head),
        models,
        strict=True,
    ):
        whole = hidden_states(model, batch["input_ids"], batch["attention_mask"]).flatten(0, 1)
        torch.testing.assert_close(hidden, whole[batch["row_index"]])
        torch.testing.assert_close(head.logits(hidden), logits)
        assert not hidden.requires_grad
        assert not logits.requires_grad


def test_a_student_with_its_adapters_off_is_the_aligned_model(models, batch):
    student = adapted(0, lora_dropout=0.5)
    student.train()
    teachers = AdapterTeachers(student, models[1])
    expected = OnlineTeachers(*models)
    for ours, theirs in zip(teachers.hidden(batch), expected.hidden(batch), strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad
    for ours, theirs in zip(teachers.logits(batch), expected.logits(batch), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert student.training, "the student is left as it was"
    with_adapters = hidden_states(student.eval(), batch["input_ids"], batch["attention_mask"]).flatten(0, 1)
    assert not torch.allclose(with_adapters[batch["row_index"]], teachers.hidden(batch)[0])


def test_the_logits_are_the_models_own_where_their_heads_have_a_bias(models, batch):
    student = adapted(0)
    width = logits_width(models[0])
    for model in (*models, student.get_base_model()):
        model.get_output_embeddings().bias = torch.nn.Parameter(torch.linspace(-3, 3, width))
    student.forward = None  # in training it is the loss
    expected = [rows_of(model(**model_inputs(batch)).logits, batch["row_index"]) for model in models]
    for teachers in (OnlineTeachers(*models), AdapterTeachers(student, models[1])):
        assert teachers.width == width
        torch.testing.assert_close(list(teachers.logits(batch)), expected)


def test_the_aligned_head_is_the_students_without_its_adapter(models, batch):
    torch.manual_seed(2)
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    student = get_peft_model(make_model(0, make_tokenizer()), lora)
    teachers = AdapterTeachers(student, models[1])
    assert torch.equal(teachers.aligned_head.lm_head, output_head(models[0]).lm_head)
    assert not torch.equal(output_head(student).lm_head, teachers.aligned_head.lm_head)
    assert output_head(student).lm_head.requires_grad, "adapters are on again"
    assert not teachers.aligned_head.lm_head.requires_grad
