"""What is evaluated: a model, an adapter on one, or a contrastive pair."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from deepalign.evaluate.subjects import Subject, load_subject
from tests.tiny import make_model, make_tokenizer, save_pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_pair(tmp_path_factory.mktemp("models"))
    adapted = get_peft_model(make_model(0, make_tokenizer()), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter.add_(0.5 * ("lora_B" in name))
    adapted.save_pretrained(folder / "adapter")
    other = make_tokenizer(["w1", "w0"])
    make_model(1, other).save_pretrained(folder / "other")
    other.save_pretrained(folder / "other")
    return folder


def logits(subject: Subject) -> torch.Tensor:
    with load_subject(subject) as loaded, torch.no_grad():
        assert not loaded.model.training
        return loaded.model(torch.tensor([[7, 8, 9]])).logits


def test_an_adapter_is_merged(folder):
    plain = Subject("plain", str(folder / "aligned"), device="cpu")
    adapted = Subject("adapted", str(folder / "aligned"), adapter=str(folder / "adapter"), device="cpu")
    tokenizer = make_tokenizer()
    assert torch.equal(logits(plain), make_model(0, tokenizer).eval()(torch.tensor([[7, 8, 9]])).logits)
    assert (logits(adapted) - logits(plain)).abs().max() > 0.1
    assert adapted.fingerprint() != plain.fingerprint()


def test_a_fingerprint_is_of_contents_not_of_names(folder):
    first, second = (Subject(name, str(folder / "aligned"), device="cpu") for name in ("first", "second"))
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != Subject("first", str(folder / "base")).fingerprint()
    assert first.fingerprint() == Subject("first", str(folder / "aligned"), dtype="float32", device="cpu").fingerprint()
    assert first.fingerprint() != Subject("first", str(folder / "aligned"), dtype="bfloat16").fingerprint()
    pair = [Subject("pair", str(folder / "aligned"), str(folder / "base"), alpha) for alpha in (0.0, 1.0, 2.0)]
    assert pair[0].fingerprint() == first.fingerprint(), "at alpha 0 the base model decides nothing"
    assert pair[1].fingerprint() != pair[2].fingerprint()


def test_a_pair_is_loaded_together(folder):
    with load_subject(Subject("pair", str(folder / "aligned"), str(folder / "base"), 1.5)) as loaded:
        assert loaded.contrast is not None
        assert loaded.contrast.alpha == 1.5
        assert not loaded.contrast.base.training


def test_bad_subjects_are_refused(folder):
    with pytest.raises(ValueError, match="no base model"):
        Subject("pair", str(folder / "aligned"), alpha=1.0)
    with pytest.raises(ValueError, match="expected one of float32"):
        Subject("half", str(folder / "aligned"), dtype="half")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        logits(Subject("lost", str(folder / "nowhere")))
    with pytest.raises(ValueError, match="the tokenizers of pair and its base model differ"):
        logits(Subject("pair", str(folder / "aligned"), str(folder / "other"), 1.0))
