"""Vaccine against finite differences and a model whose attention is replaced by hand."""

import types

import pytest
import torch

from deepalign.data.steps import RowWeights, StepDataset
from deepalign.defenses.training import AnswerTrainer, SftSettings, _training_arguments
from deepalign.defenses.vaccine import (
    VaccineSettings,
    VaccineTrainer,
    align_with_vaccine,
    attention_modules,
    attention_perturbation,
)
from tests.defenses.conftest import make_conversations

RHO = 1.7


def step_dataset(examples, batch_size=3):
    return StepDataset(
        examples,
        [],
        harmful_batch_size=batch_size,
        utility_batch_size=0,
        max_steps=1,
        weights=RowWeights(1.0, 0.0, 0.0, 0.0),
        pad_token_id=0,
        seed=0,
    )


def loss_of(model, batch):
    """Mean cross entropy of the answer tokens, written out."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows = batch["row_index"]
    log_p = logits.flatten(0, 1)[rows].log_softmax(-1)
    return -log_p.gather(1, batch["input_ids"].flatten()[rows + 1][:, None]).mean()


def add_to_attention(model, offsets):
    """Replace each attention's forward by one that adds an offset: not the hooks that are tested."""
    for layer, offset in zip(model.model.layers, offsets, strict=True):
        forward = type(layer.self_attn).forward

        def shifted(self, *args, forward=forward, offset=offset, **kwargs):
            output, weights = forward(self, *args, **kwargs)
            return output + offset, weights

        layer.self_attn.forward = types.MethodType(shifted, layer.self_attn)


def test_the_perturbation_is_the_normalised_gradient(model, examples):
    batch = step_dataset(examples)[0]
    perturbation = attention_perturbation(model, lambda: loss_of(model, batch), RHO)
    assert list(perturbation) == [layer.self_attn for layer in model.model.layers]
    together = torch.cat([e.flatten() for e in perturbation.values()])
    assert float(together.norm()) == pytest.approx(RHO, rel=1e-5)

    generator, step, slopes = torch.Generator().manual_seed(0), 3e-3, []  # norms of the models round to fp32
    entries = torch.randint(together.numel(), (12,), generator=generator)
    shapes = [e.shape for e in perturbation.values()]
    with torch.no_grad():
        for entry in entries:
            losses = []
            for sign in (1, -1):
                flat = torch.zeros_like(together)
                flat[entry] = sign * step
                parts = flat.split([shape.numel() for shape in shapes])
                add_to_attention(model, [part.view(shape) for part, shape in zip(parts, shapes, strict=True)])
                losses.append(loss_of(model, batch))
            slopes.append((losses[0] - losses[1]) / (2 * step))
    slopes = torch.stack(slopes)
    assert slopes.abs().max() > 1e-3
    scale = together[entries].norm() / slopes.norm()  # one factor for all: rho / ||g||
    torch.testing.assert_close(together[entries], slopes * scale, rtol=5e-3, atol=5e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_takes_the_gradient_of_the_perturbed_loss(llama, examples, tmp_path, checkpointing):
    dataset = step_dataset(examples)
    batch = dataset[0]
    args = _training_arguments(SftSettings(batch_size=3, max_steps=1), dataset, tmp_path, progress=False)
    trainer = VaccineTrainer(model=llama, args=args, train_dataset=dataset, rho=RHO)
    if checkpointing:
        llama.gradient_checkpointing_enable({"use_reentrant": False})
    loss = trainer.training_step(llama, batch)
    taken = {name: p.grad.clone() for name, p in llama.named_parameters()}
    llama.zero_grad()
    llama.gradient_checkpointing_disable()

    perturbation = attention_perturbation(llama, lambda: loss_of(llama, batch), RHO)
    plain = float(loss_of(llama, batch).detach())
    add_to_attention(llama, list(perturbation.values()))
    perturbed = loss_of(llama, batch)
    perturbed.backward()
    assert perturbed.item() > plain + 0.01
    assert loss.item() == pytest.approx(perturbed.item(), rel=1e-5)  # the weights are fp32
    for name, p in llama.named_parameters():
        torch.testing.assert_close(taken[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_without_perturbation_it_is_plain_training(llama, examples, tmp_path):
    dataset = step_dataset(examples)
    args = _training_arguments(SftSettings(batch_size=3, max_steps=1), dataset, tmp_path, progress=False)
    gradients = []
    for trainer_class, options in ((VaccineTrainer, {"rho": 0.0}), (AnswerTrainer, {})):
        trainer = trainer_class(model=llama, args=args, train_dataset=dataset, **options)
        trainer.training_step(llama, dataset[0])
        gradients.append(llama.model.layers[0].mlp.up_proj.weight.grad.clone())
        llama.zero_grad()
    torch.testing.assert_close(*gradients)


def test_alignment_writes_a_model_and_is_done_once(llama, tokenizer, tmp_path, capsys):
    start = tmp_path / "start"
    llama.float().save_pretrained(start)
    tokenizer.save_pretrained(start)
    settings = VaccineSettings(sft=SftSettings(max_steps=3, batch_size=2, learning_rate=1e-2))
    rows = make_conversations(5, seed=3)
    out = align_with_vaccine(str(start), rows, tmp_path / "out", settings, progress=False)
    weights = (out / "model.safetensors").read_bytes()
    assert weights != (start / "model.safetensors").read_bytes()
    align_with_vaccine(str(start), rows, tmp_path / "out", settings)
    assert "made from the same things" in capsys.readouterr().out
    assert (out / "model.safetensors").read_bytes() == weights
    with pytest.raises(ValueError, match="made from other things"):
        align_with_vaccine(str(start), rows[:4], tmp_path / "out", settings)
    again = align_with_vaccine(str(start), rows, tmp_path / "again", settings, progress=False)
    assert (again / "model.safetensors").read_bytes() == weights, "the same seed gives the same weights"


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="no module named self_attn"):
        attention_modules(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="rho is -1"):
        VaccineSettings(rho=-1)
