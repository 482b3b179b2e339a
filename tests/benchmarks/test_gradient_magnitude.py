import pytest
import torch

from benchmarks.gradient_magnitude import CONTESTANTS, make_example, make_model


@pytest.mark.parametrize("answer", [5, 30])
def test_contestants_compute_the_same(answer):
    model = make_model(50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4).double()
    example = make_example(4, answer, 50)
    norms = {name: contestant(model, example) for name, contestant in CONTESTANTS.items()}
    expected = norms.pop("one_backward_per_token")
    for name, found in norms.items():
        assert torch.allclose(found, expected, rtol=1e-6, atol=0), name
