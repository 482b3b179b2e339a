import importlib
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from deepalign.data.chat import EncodedExample
from deepalign.diagnose import gradient_magnitude
from tests.diagnose.gradient_oracle import EXAMPLE, MODELS, VOCAB, InFloat64, make_model, plain_squares, relative_error

implementation = importlib.import_module("deepalign.diagnose.gradient_magnitude")
ANSWER = len(EXAMPLE.input_ids) - EXAMPLE.response_start


def measure(model, example=EXAMPLE, **options):
    return gradient_magnitude(model, [example], progress=False, **options)[0]


def errors(model, example=EXAMPLE, **options):
    """In float64: the result, and its largest relative error against one backward per token, parameter by parameter."""
    model = model.double()
    with InFloat64():
        result = measure(model, example, **options)
        expected = plain_squares(model, example, result.parameters)
    totals = relative_error(result.total, expected.sum(-1).sqrt())
    return result, max(totals, relative_error(result.squares_TP.sqrt(), expected.sqrt()))


@pytest.mark.parametrize("name", MODELS)
def test_equals_one_backward_per_token(name):
    model = make_model(name)
    result, error = errors(model)
    assert error < 1e-9
    assert result.parameters == tuple(name for name, _ in model.named_parameters())
    assert result.formed == (("lm_head.bias",) if name == "phi" else ())
    assert (result.total > 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_what_has_no_shortcut_is_formed_and_named(name, monkeypatch):
    monkeypatch.setattr(implementation, "SMALL", 0)
    model = make_model(name)
    result, error = errors(model)
    assert error < 1e-9
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert set(result.parameters) - set(result.formed) == matrices


@pytest.mark.parametrize("name", ["llama", "qwen2 tied", "gemma2"])
def test_float32(name):
    model = make_model(name)
    result = measure(model)
    with InFloat64():
        expected = plain_squares(model.double(), EXAMPLE, result.parameters)
    assert relative_error(result.total, expected.sum(-1).sqrt()) < 1e-4
    assert relative_error(result.squares_TP.sqrt(), expected.sqrt()) < 1e-4


def test_float32_where_all_inputs_share_a_large_direction():
    """What a Gram matrix in float32 loses: sums of products of inputs that are nearly the same."""
    model = make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight += 300 * torch.randn(1, 32)
    result = measure(model)
    with InFloat64():
        expected = plain_squares(model.double(), EXAMPLE, result.parameters)
    assert relative_error(result.total, expected.sum(-1).sqrt()) < 1e-4


def test_bfloat16_is_as_exact_as_the_plain_way_in_bfloat16():
    model = make_model("llama tied").bfloat16()
    result = measure(model)
    plain = plain_squares(model, EXAMPLE, result.parameters).sum(-1).sqrt()
    expected = plain_squares(model.float(), EXAMPLE, result.parameters).sum(-1).sqrt()
    assert (result.total / expected).log().norm() <= 1.2 * (plain / expected).log().norm()


@pytest.mark.parametrize("chunk_tokens", [1, 2, 5])
def test_chunks_do_not_change_anything(chunk_tokens):
    _, error = errors(make_model("qwen3"), chunk_tokens=chunk_tokens)
    assert error < 1e-9


def test_several_spans_prompts_of_one_token_and_inputs_longer_than_wide():
    """47 positions, 32 inputs: there the inputs serve as they are, before by their triangular factor."""
    ids = torch.randint(0, VOCAB, (48,), generator=torch.Generator().manual_seed(3)).tolist()
    result, error = errors(make_model("llama tied"), EncodedExample(ids, 1, False))
    assert error < 1e-9
    assert result.total.shape == (47,)


def test_examples_are_measured_one_by_one_and_positions_cut():
    model = make_model("llama").double()
    other = EncodedExample([3, 4, 5, 6], 2, False)
    both = gradient_magnitude(model, [other, EXAMPLE], max_positions=3, progress=False)
    assert [len(result.total) for result in both] == [2, 3]
    assert torch.allclose(both[1].squares_TP, measure(model).squares_TP[:3], rtol=1e-6)
    logits = model(input_ids=torch.tensor([other.input_ids])).logits[0].log_softmax(-1).detach()
    assert both[0].logprobs_T.tolist() == pytest.approx([float(logits[1, 5]), float(logits[2, 6])], rel=1e-6)


def test_padding_entries_of_the_vocabulary_have_no_mass():
    model = make_model("llama", vocab_size=VOCAB + 3).double()
    result = measure(model, vocab_size=VOCAB)
    model.resize_token_embeddings(VOCAB)
    assert torch.allclose(result.total, measure(model).total, rtol=1e-6)


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (["q_proj", "down_proj", "lm_head"], {}),
        (["embed_tokens", "v_proj"], {}),
        (["q_proj"], {"use_dora": True}),
        (["q_proj"], {"modules_to_save": ["lm_head"]}),
    ],
)
def test_adapters(targets, options):
    config = LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    model = get_peft_model(make_model("llama"), config).eval()
    required = [parameter.requires_grad for parameter in model.parameters()]
    trainable, error = errors(model, parameters="trainable")
    assert error < 1e-9
    assert [name in trainable.parameters for name, _ in model.named_parameters()] == required
    everything, error = errors(model)
    assert error < 1e-9
    assert len(everything.parameters) == len(required)
    assert [parameter.requires_grad for parameter in model.parameters()] == required


def test_a_layer_used_twice_is_formed():
    """Its gradient is a sum over both uses, which no norm of one of them gives."""
    model = make_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    result, error = errors(model)
    assert error < 1e-9
    assert result.formed == ()  # small enough to be formed for all tokens of a chunk together
    _, error = errors(model, chunk_tokens=1)
    assert error < 1e-9


def test_a_matrix_used_outside_its_module_is_formed(monkeypatch):
    monkeypatch.setattr(implementation, "SMALL", 0)
    model = make_model("llama")
    weight = model.model.layers[0].self_attn.o_proj.weight
    model.model.norm.register_forward_hook(lambda module, args, output: output + output @ weight)
    result, error = errors(model)
    assert error < 1e-9
    assert "model.layers.0.self_attn.o_proj.weight" in result.formed
    assert "model.layers.1.self_attn.o_proj.weight" not in result.formed


def test_a_tied_matrix_with_a_third_use_is_formed_from_both_sides(monkeypatch):
    monkeypatch.setattr(implementation, "SMALL", 0)
    model = make_model("llama tied")
    weight = model.lm_head.weight
    model.model.norm.register_forward_hook(lambda module, args, output: output + output @ weight[:32])
    result, error = errors(model)
    assert error < 1e-9
    assert "model.embed_tokens.weight" in result.formed


class _Unbatchable(torch.autograd.Function):
    """Identity whose backward needs plain memory, as foreign kernels do."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.from_numpy(gradient.numpy().copy())


def test_a_model_that_cannot_be_batched_is_measured_token_by_token():
    model = make_model("qwen2 tied")
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: _Unbatchable.apply(output))
    with pytest.warns(UserWarning, match="one backward pass per token") as caught:
        result, error = errors(model)
    assert len([w for w in caught if "one backward pass" in str(w.message)]) == 1
    assert error < 1e-9
    assert len(result.total) == ANSWER


def test_a_model_that_can_be_batched_is_and_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(make_model("llama"))


def test_groups_of_parameters():
    model = make_model("llama")
    result = measure(model)
    parameters = result.by("parameter")
    assert list(parameters) == list(result.parameters)
    assert list(result.by("layer")) == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
        "lm_head",
    ]
    kinds = result.by("kind")
    expected = sum(parameters[f"model.layers.{n}.self_attn.q_proj.weight"] ** 2 for n in range(2)).sqrt()
    assert torch.allclose(kinds["self_attn.q_proj"], expected)
    assert torch.allclose(result.by(lambda name: "all")["all"], result.total)
    assert "model.layers.1.mlp.up_proj" in result.by("module")
    with pytest.raises(ValueError, match="layers"):
        result.by("layers")


def test_only_chosen_parameters_are_measured():
    model = make_model("llama").double()
    chosen = measure(model, parameters=lambda name: "layers.1" in name)
    everything = measure(model)
    columns = [everything.parameters.index(name) for name in chosen.parameters]
    assert len(columns) == 9
    assert torch.allclose(chosen.squares_TP, everything.squares_TP[:, columns])


def test_the_model_is_left_as_it_was():
    model = make_model("llama")
    model.model.layers[0].requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():  # the caller's business: gradients are needed all the same
        measure(model)
    with pytest.raises(ValueError, match="chooses no parameter"):
        measure(model, parameters=lambda name: False)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        (EncodedExample([1, 2], 2, False), {}, "example 0 has 2 prompt tokens and 0 answer tokens"),
        (EncodedExample([1, 2], 0, False), {}, "0 prompt tokens"),
        (EncodedExample([1] * 70, 60, False), {}, "69 positions but the model's context has 64"),
        (EncodedExample([1, 99], 1, False), {}, r"outside \[0, 37\)"),
        (EXAMPLE, {"max_positions": 0}, "max_positions"),
        (EXAMPLE, {"chunk_tokens": 0}, "chunk_tokens"),
        (EXAMPLE, {"parameters": "some"}, "'some'"),
        (EXAMPLE, {"parameters": "trainable"}, "chooses no parameter"),
    ],
)
def test_bad_input_is_refused(example, options, message):
    model = make_model("llama").requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        measure(model, example, **options)


def test_no_examples_training_mode_and_quantised_parameters_are_refused():
    model = make_model("llama")
    with pytest.raises(ValueError, match="list of examples is empty"):
        gradient_magnitude(model, [], progress=False)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        measure(make_model("llama").train())
    model.model.norm.weight = torch.nn.Parameter(torch.ones(32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is torch\.int8"):
        measure(model)
    long = EncodedExample([1] * 70, 60, False)
    assert len(measure(make_model("llama"), long, max_positions=5).total) == 5  # only what is read has to fit


@pytest.mark.gpu
def test_on_a_gpu():
    model = make_model("qwen2 tied")
    expected = measure(model).total
    assert relative_error(measure(model.cuda()).total, expected) < 1e-3
