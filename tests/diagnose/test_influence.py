import pytest
import torch

from deepalign.data.chat import EncodedExample
from deepalign.diagnose import alignment_deviation, influence
from deepalign.diagnose.token_gradients import ROWS_IN_FLIGHT, spans
from tests.diagnose.gradient_oracle import EXAMPLE, VOCAB, InFloat64, make_model, relative_error

PROMPT = EXAMPLE.response_start
ANSWER = len(EXAMPLE.input_ids) - PROMPT


def plain_norms(model, layer, example=EXAMPLE):
    """(T, L - 1) norms of d log P(y_t) / d h_i, by one backward per answer token."""
    ids = torch.tensor([example.input_ids])
    embedded = model.get_input_embeddings()(ids[:, :-1]).detach().requires_grad_()
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: embedded)
    output = model(input_ids=ids[:, :-1], use_cache=False, output_hidden_states=True)
    hook.remove()
    logprobs = output.logits[0].log_softmax(-1)
    rows = []
    for position in range(example.response_start, ids.shape[1]):
        state = output.hidden_states[layer]
        (gradient,) = torch.autograd.grad(logprobs[position - 1, ids[0, position]], state, retain_graph=True)
        rows.append(gradient[0].norm(dim=-1))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["llama", "qwen2 tied", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_equals_one_backward_per_token(name, layer):
    model = make_model(name).double()
    with InFloat64():
        (result,) = influence(model, [EXAMPLE], layer=layer, progress=False)
        expected = plain_norms(model, layer)
    assert relative_error(result.norms_TL, expected) < 1e-9
    assert result.layer == layer
    assert result.norms_TL.shape == (ANSWER, PROMPT + ANSWER - 1)


def test_float32():
    model = make_model("llama")
    (result,) = influence(model, [EXAMPLE], progress=False)
    with InFloat64():
        expected = plain_norms(model.double(), 0)
    assert relative_error(result.norms_TL, expected) < 1e-4


def test_only_positions_before_the_token_have_influence_and_after_the_last_layer_only_the_last_of_them():
    model = make_model("llama")
    (first,) = influence(model, [EXAMPLE], progress=False)
    assert torch.equal(first.answer > 0, torch.ones(ANSWER, ANSWER).tril(-1).bool())
    assert (first.prompt > 0).all()
    (last,) = influence(model, [EXAMPLE], layer=2, progress=False)
    assert torch.equal(last.answer > 0, torch.eye(ANSWER).roll(1, 0).tril(-1).bool())
    assert torch.equal(last.prompt.nonzero(), torch.tensor([[0, PROMPT - 1]]))


@pytest.mark.parametrize("chunk_tokens", [1, 5])
def test_chunks_and_spans_do_not_change_anything(chunk_tokens):
    model = make_model("qwen3").double()
    ids = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    example = EncodedExample(ids, 2, False)
    with InFloat64():
        (result,) = influence(model, [example], chunk_tokens=chunk_tokens, progress=False)
        assert relative_error(result.norms_TL, plain_norms(model, 0, example)) < 1e-9


def test_error_is_the_sum_over_the_positions_before():
    (result,) = influence(make_model("llama"), [EXAMPLE], max_positions=5, progress=False)
    eps = [0.5, 2.0, 0.25, 7.0, 3.0]
    expected = [sum(eps[i] * float(result.answer[t, i]) for i in range(t)) for t in range(5)]
    assert result.error(eps).tolist() == pytest.approx(expected)
    assert result.error(torch.tensor(eps))[0] == 0
    with pytest.raises(ValueError, match=r"\(4,\); expected \(5,\)"):
        result.error(eps[:4])


@pytest.mark.parametrize("vocab_size", [None, VOCAB - 1])
def test_alignment_deviation_is_the_kl_at_each_answer_token(vocab_size):
    aligned, base = make_model("llama", 0), make_model("llama", 1)
    eps = alignment_deviation(aligned, base, EXAMPLE, max_positions=6, vocab_size=vocab_size)
    ids = torch.tensor([EXAMPLE.input_ids])
    with torch.no_grad():
        p, q = (
            model(input_ids=ids).logits[0, PROMPT - 1 : PROMPT + 5, :vocab_size].double().log_softmax(-1)
            for model in (aligned, base)
        )
    assert eps.tolist() == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-4)


def test_the_model_is_left_as_it_was():
    model = make_model("llama")
    model(input_ids=torch.tensor([[1]]), output_hidden_states=True)  # transformers leaves hooks of its own
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    with torch.no_grad():
        influence(model, [EXAMPLE], progress=False)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([], {}, "list of examples is empty"),
        ([EXAMPLE], {"layer": 3}, r"layer is 3; expected 0 .* to 2"),
        ([EXAMPLE], {"layer": -1}, "layer is -1"),
        ([EXAMPLE], {"max_positions": 0}, "max_positions"),
        ([EncodedExample([1, 2], 2, False)], {}, "0 answer tokens"),
    ],
)
def test_bad_input_is_refused(examples, options, message):
    with pytest.raises(ValueError, match=message):
        influence(make_model("llama"), examples, progress=False, **options)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        influence(make_model("llama").train(), [EXAMPLE], progress=False)


@pytest.mark.parametrize(("start", "stop"), [(1, 2), (1, 60), (7, 19), (300, 900)])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 7])
def test_spans_cover_every_token_once_and_bound_the_rows_in_flight(start, stop, chunk_tokens):
    tokens = []
    for span, chunks in spans(start, stop, chunk_tokens, torch.device("cpu")):
        assert [s for chunk in chunks for s in chunk] == list(range(len(span)))
        tokens += list(span)
        for chunk in chunks:
            if chunk_tokens is None:
                assert len(chunk) == 1 or len(chunk) * (span.stop - 1) <= ROWS_IN_FLIGHT["cpu"]
            else:
                assert len(chunk) <= chunk_tokens
    assert tokens == list(range(start, stop))
