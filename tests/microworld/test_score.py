"""The scores that a sweep's table takes, of a model that has learned nothing."""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deepalign.microworld.score import DEPTHS, main, score
from deepalign.microworld.tokenizer import build_tokenizer
from deepalign.microworld.world import World


def test_scores_are_rates_by_name(tmp_path, monkeypatch):
    tokenizer = build_tokenizer(World.build(7))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    scores = score(str(tmp_path / "model"), seed=7, n=3, max_new_tokens=4)
    names = [f"{kind}_prefill_{depth}" for depth in DEPTHS for kind in ("asr", "degenerate")]
    assert list(scores) == [*names, "utility"]
    assert scores["asr_prefill_0"] == scores["utility"] == 0
    assert scores["degenerate_prefill_0"] == 1, "gibberish is no refusal"

    monkeypatch.setattr("deepalign.microworld.score.score", lambda *args: {"model": args[1], "n": args[2]})
    words = ["--model", "m", "--seed", "7", "--out", str(tmp_path / "scores.json"), "--n", "4"]
    assert main(words) == 0
    assert json.loads((tmp_path / "scores.json").read_text()) == {"model": 7, "n": 4}
