"""Training on a GPU: bf16, gradient checkpointing and Triton as they are chosen there; quantised teachers."""

import pytest

from deepalign.train.run import main
from tests.train.tiny_run import TinyRun, read_metrics

pytestmark = pytest.mark.gpu


def first_loss(tiny_run: TinyRun, out, **changes):
    assert main(["--config", str(tiny_run.config(out, max_steps=2, **changes))]) == 0
    return read_metrics(out)[0]["loss"]


@pytest.mark.parametrize("form", ["linear", "logits"])
def test_the_first_loss_is_that_of_the_cpu(tiny_run: TinyRun, tmp_path, form):
    on_cpu = first_loss(tiny_run, tmp_path / "cpu", use_cpu=True)
    exact = first_loss(tiny_run, tmp_path / "fp32", loss_form=form, implementation="triton", bf16=False)
    assert exact == pytest.approx(on_cpu, rel=1e-3)
    assert first_loss(tiny_run, tmp_path / "bf16", loss_form=form) == pytest.approx(on_cpu, rel=0.05)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_teachers_give_a_similar_loss(tiny_run: TinyRun, tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    whole = first_loss(tiny_run, tmp_path / "whole")
    assert first_loss(tiny_run, tmp_path / kind, teacher_quantization=kind) == pytest.approx(whole, rel=0.5)
