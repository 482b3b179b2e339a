"""Steps from fixed buffers compute what the growing cache does; captured, they do so without waiting for the device."""

import pytest
import torch

from deepalign.sampling import ContrastiveSampler
from deepalign.sampling.decoder import CachedDecoder, PreallocatedLayer
from deepalign.sampling.graphs import StaticDecoder, can_be_static
from tests.sampling.pairs import FAMILIES, PROMPTS, left_padded, make_model, make_pair

STEPS = 10


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("padded", [True, False])
@torch.inference_mode()
def test_fixed_buffers_give_the_logits_of_a_growing_cache(family, padded):
    model = make_model(family, 0)
    batch = left_padded(PROMPTS if padded else [PROMPTS[0], PROMPTS[0][::-1]])
    ids, mask = batch["input_ids"], batch["attention_mask"] if padded else None
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    width = ids.shape[1]
    decoders = [CachedDecoder(model, width + STEPS), StaticDecoder(model, width + STEPS, capture=False)]
    assert can_be_static(model)
    for _ in range(STEPS):
        growing, fixed = (decoder.advance(ids, mask, positions) for decoder in decoders)
        torch.testing.assert_close(fixed, growing, rtol=1e-4, atol=1e-4)
        ids, positions = growing.argmax(-1, keepdim=True), positions[:, -1:] + 1
        mask = None if mask is None else torch.cat([mask, torch.ones_like(ids)], dim=1)


def test_the_whole_loop_on_fixed_buffers(monkeypatch):
    aligned, base = make_pair("llama")
    sampler = ContrastiveSampler(aligned, base, alpha=1.5)
    expected = sampler.generate(PROMPTS, max_new_tokens=STEPS, stop=[7, 9, 21], seed=4)

    def static(width: int, steps: int) -> list[CachedDecoder]:
        return [StaticDecoder(model, width + steps, switch, capture=False) for _, model, switch in sampler.pair.models]

    monkeypatch.setattr(sampler, "_decoders", static)
    answers = sampler.generate(PROMPTS, max_new_tokens=STEPS, stop=[7, 9, 21], seed=4)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]


@torch.inference_mode()
def test_a_preallocated_layer_forgets_and_selects():
    model = make_model("llama", 0)
    prompt = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    positions = torch.arange(prompt.shape[1] + 1).expand(2, -1)
    next_ids = torch.tensor([[5], [6]])
    decoder = CachedDecoder(model, 20)
    decoder.advance(prompt, None, positions[:, :-1])
    assert all(isinstance(layer, PreallocatedLayer) for layer in decoder._cache.layers)
    first = decoder.advance(next_ids, None, positions[:, -1:])
    decoder.forget(1)
    torch.testing.assert_close(decoder.advance(next_ids, None, positions[:, -1:]), first)
    decoder.forget(1)
    decoder.select_rows(torch.tensor([1, 0, 1]))
    selected = decoder.advance(next_ids[[1, 0, 1]], None, positions[:1, -1:].expand(3, -1))
    torch.testing.assert_close(selected, first[[1, 0, 1]], rtol=1e-4, atol=1e-5)
    decoder._cache.reset()
    assert decoder._cache.get_seq_length() == 0


def test_the_head_never_reads_a_strided_hidden_state():
    """For one torch's CPU matmul would transpose the whole head."""
    model, seen = make_model("llama", 0), []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    try:
        for prompts in (PROMPTS, PROMPTS[0]):
            ContrastiveSampler(model, alpha=0).generate(prompts, max_new_tokens=3)
    finally:
        handle.remove()
    assert len(seen) == 6
    assert all(hidden.shape[1] == 1 and hidden.stride() == (32, 32, 1) for hidden in seen)
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.8, "top_k": 9}], ids=str)
def test_graphs_draw_what_the_cpu_draws(family, options):
    aligned, base = (model.double() for model in make_pair(family))
    expected = ContrastiveSampler(aligned, base, alpha=1.5, **options).generate(PROMPTS, max_new_tokens=40, seed=1)
    aligned, base = aligned.cuda(), base.cuda()
    for cuda_graphs in (True, False):
        sampler = ContrastiveSampler(aligned, base, alpha=1.5, cuda_graphs=cuda_graphs, **options)
        answers = sampler.generate(PROMPTS, max_new_tokens=40, seed=1)
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]


@pytest.mark.gpu
def test_a_replayed_step_never_waits_for_the_device():
    model = make_model("llama", 0).cuda()
    decoder = StaticDecoder(model, 40)
    ids, positions = torch.tensor([PROMPTS[0]], device="cuda"), torch.arange(len(PROMPTS[0]), device="cuda")[None]
    with torch.inference_mode():
        ids = decoder.advance(ids, None, positions).argmax(-1, keepdim=True)
        decoder.advance(ids, None, positions[:, -1:] + 1)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(2, 8):
                ids = decoder.advance(ids, None, positions[:, -1:] + step).argmax(-1, keepdim=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
