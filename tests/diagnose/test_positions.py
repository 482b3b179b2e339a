"""Position by position, on given answers and step by step, against float64; files that go on where they were."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deepalign.data.contexts import Context
from deepalign.diagnose import positions as positions_module
from deepalign.diagnose.positions import PositionOptions, analyse_positions
from deepalign.diagnose.records import read_records
from deepalign.diagnose.rows import STATISTICS
from tests.diagnose import oracle
from tests.sampling.pairs import make_model
from tests.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
SIZE = len(TOKENIZER)
CONTEXTS = [
    Context([4, 7, 8, 9, 5], [], [12, 13, 14, 2], 0),
    Context([4, 7, 5], [30, 31], [15, 16, 17, 18, 19, 20, 21], 1),
    Context([4, 10, 11, 5], [], [22, 2], 2),
]
OPTIONS = PositionOptions(positions=6, top_n=9, top_k=5, batch_size=2)


def make_models(family: str):
    """A model, and a noisy copy that is surer of itself, in float64, with two padded entries."""
    aligned, base = (make_model(family, 0, SIZE + 2).double() for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        base.lm_head.weight.mul_(1.5)
    return [aligned, base]


def analyse(models, path: Path, options=OPTIONS, contexts=CONTEXTS) -> np.ndarray:
    record = analyse_positions(*models, TOKENIZER, contexts, path, options, progress=False)
    return np.concatenate(list(read_records(path, record)))


def check(records, models, options, responses):
    """Every number of every record equals float64, one position at a time."""
    for record, context, response in zip(records, CONTEXTS, responses, strict=True):
        assert record["length"] == len(response)
        assert record["ids"].tolist() == response + [-1] * (options.positions - len(response))
        for t in range(len(response)):
            ids = context.prompt_ids + response[:t]
            a_V, b_V = oracle.compared(*models, ids, SIZE, options.contrast)
            for name, expected in oracle.statistics(a_V, b_V, options.top_n).items():
                assert record[name][t] == pytest.approx(expected, rel=1e-8, abs=1e-10), (name, t)
            assert record["favored"][t].tolist() == oracle.favored_tokens(a_V, b_V, options.top_k)
        assert all(np.isnan(record[name][len(response) :]).all() for name in STATISTICS)
        assert (record["favored"][len(response) :] == -1).all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("contrast", [None, (1.5, "logits")])
def test_given_answers_equal_float64(tmp_path, family, contrast):
    models, options = make_models(family), PositionOptions(6, contrast=contrast, top_n=9, top_k=5, batch_size=2)
    records = analyse(models, tmp_path / "r", options)
    assert records["forced"].tolist() == [0, 2, 0]
    check(records, models, options, [context.response_ids[:6] for context in CONTEXTS])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("contrast", [None, (2.0, "logits"), (2.0, "logprobs")])
def test_generated_steps_equal_float64(tmp_path, family, contrast):
    """The ids are those of a loop that reads everything again at each step, and so are the numbers."""
    models = make_models(family)
    options = PositionOptions(6, generate=True, contrast=contrast, top_n=9, top_k=5, batch_size=2)
    responses = []
    for context in CONTEXTS:
        response = list(context.prefix_ids)
        while len(response) < 6 and (len(response) == len(context.prefix_ids) or response[-1] != 2):
            a_V, _ = oracle.compared(*models, context.prompt_ids + response, SIZE, contrast)
            response.append(int(a_V.argmax()))
        responses.append(response)
    records = analyse(models, tmp_path / "r", options)
    check(records, models, options, responses)
    if contrast is not None:
        plain = analyse(models, tmp_path / "plain", PositionOptions(6, generate=True, top_n=9, top_k=5))
        assert plain["ids"].tolist() != records["ids"].tolist(), "contrastive decoding writes something else here"


def test_a_draw_depends_on_its_seed_alone(tmp_path):
    models = make_models("llama")
    drawn = [
        analyse(models, tmp_path / f"{size}-{seed}", PositionOptions(6, True, None, 1.0, seed, 9, 5, None, size))
        for size, seed in ((1, 0), (3, 0), (3, 10))
    ]
    assert drawn[0]["ids"].tolist() == drawn[1]["ids"].tolist() != drawn[2]["ids"].tolist()


def test_a_prefix_beyond_the_positions_is_measured_and_nothing_written(tmp_path):
    models = make_models("llama")
    options = PositionOptions(2, generate=True, top_n=9, top_k=5)
    records = analyse(models, tmp_path / "r", options, [Context([4, 7, 5], [30, 31, 32], [], 0)])
    assert records["ids"].tolist() == [[30, 31]]
    assert records["forced"].tolist() == [2]


@pytest.mark.parametrize("cut", [0, 1, "one record", "two records and a half", "whole"])
def test_a_cut_file_is_completed_to_the_same_bits(tmp_path, cut):
    models = make_models("llama")
    whole = analyse(models, tmp_path / "whole").tobytes()
    path, size = tmp_path / "cut", len(whole) // 3
    analyse(models, path)
    kept = {"one record": size, "two records and a half": 2 * size + size // 2, "whole": len(whole)}.get(cut, cut)
    path.write_bytes(whole[:kept])
    assert analyse(models, path).tobytes() == whole


def test_a_complete_file_is_not_measured_again(tmp_path, monkeypatch):
    models = make_models("llama")
    before = analyse(models, tmp_path / "r")
    monkeypatch.setattr(positions_module, "measure_responses", None)
    assert analyse(models, tmp_path / "r").tobytes() == before.tobytes()


@pytest.mark.parametrize(
    ("options", "contexts", "changed"),
    [
        (PositionOptions(6, top_n=8, top_k=5, batch_size=2), CONTEXTS, "options"),
        (OPTIONS, CONTEXTS[:2] + CONTEXTS[:1], "contexts"),
        (PositionOptions(5, top_n=9, top_k=5, batch_size=2), CONTEXTS, "options, record"),
    ],
)
def test_a_file_of_another_run_is_refused_and_left_alone(tmp_path, options, contexts, changed):
    models, path = make_models("llama"), tmp_path / "r"
    before = analyse(models, path).tobytes()
    with pytest.raises(ValueError, match=rf"other settings \({changed}\)"):
        analyse(models, path, options, contexts)
    assert path.read_bytes() == before
    (tmp_path / "r.settings.json").unlink()
    with pytest.raises(ValueError, match="give another --out"):
        analyse(models, path)


@pytest.mark.parametrize(
    ("contexts", "options", "message"),
    [
        ([], OPTIONS, "list of contexts is empty"),
        ([Context([4, 5], [], [], 3)], OPTIONS, "row 3 has no answer"),
        ([Context([4] * 60, [], [7] * 9, 3)], OPTIONS, "row 3 has 60 prompt tokens"),
    ],
)
def test_bad_contexts_are_refused_before_anything_runs(tmp_path, contexts, options, message):
    with pytest.raises(ValueError, match=message):
        analyse(make_models("llama"), tmp_path / "r", options, contexts)
    assert not (tmp_path / "r").exists()


def test_bad_sizes_and_modes_are_refused(tmp_path):
    for bad in ({"positions": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be at least 1"):
            PositionOptions(**bad)
    models = make_models("llama")
    models[1].train()
    with pytest.raises(ValueError, match="base is in training mode"):
        analyse(models, tmp_path / "r")
