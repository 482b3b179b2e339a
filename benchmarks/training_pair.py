"""A pair of random models with data, as folders on disk: what run.py takes, in any size."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@dataclass(frozen=True)
class PairSize:
    """Of both models and of the two streams of data; answers are one token longer, by their end."""

    vocab: int
    hidden: int
    layers: int
    examples: int
    prompt: int
    answer: int
    batch: int  # rows per stream and step


def make_pair(folder: Path, size: PairSize) -> dict[str, object]:
    """Write models, tokenizer and data; returns the configuration for a training without output folder."""
    special = ["<pad>", "<unk>", "</s>", "<user>", "<assistant>"]
    words = [f"w{i}" for i in range(size.vocab - len(special))]
    vocab = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", chat_template=TEMPLATE
    )
    for seed, name in enumerate(("aligned", "base")):
        torch.manual_seed(seed)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size.vocab,
                hidden_size=size.hidden,
                intermediate_size=int(2.75 * size.hidden),
                num_hidden_layers=size.layers,
                num_attention_heads=max(1, size.hidden // 64),
                num_key_value_heads=max(1, size.hidden // 64),
                max_position_embeddings=1024,
                tie_word_embeddings=False,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=2,
            )
        ).save_pretrained(folder / name)
        wrapped.save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(0)
    for name in ("harmful", "utility"):
        drawn = torch.randint(len(words), (size.examples, size.prompt + size.answer), generator=generator).tolist()
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for row in drawn:
                prompt, answer = (" ".join(words[i] for i in part) for part in (row[: size.prompt], row[size.prompt :]))
                file.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")
    return {
        "aligned": str(folder / "aligned"),
        "base": str(folder / "base"),
        "harmful_data": str(folder / "harmful.jsonl"),
        "utility_data": str(folder / "utility.jsonl"),
        "harmful_batch_size": size.batch,
        "utility_batch_size": size.batch,
        "distill_on": "both",
        "use_cpu": True,
        "save_steps": 10**6,
        "loss": {"top_k": 100},
    }


def write_config(path: Path, values: dict[str, object]) -> Path:
    """A YAML file for run.py."""
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
