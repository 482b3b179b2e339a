"""GradMag(t) against one backward per token and the ways in between, on a CPU.

`python -m benchmarks.gradient_magnitude --prompt 32 --answer 64 --out FILE` times every contestant in turn, for as many
rounds as asked, in one process, and writes one row per case into FILE (JSON; a row of the same case is replaced).

The model is a Llama of random weights: 6 layers, hidden 512, vocabulary 32000, 50 million parameters, float32.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.environment import machine, row_environment
from benchmarks.interleaved import spread
from deepalign.data.chat import EncodedExample
from deepalign.data.files import write_text_atomic
from deepalign.diagnose import gradient_magnitude
from deepalign.diagnose.parameter_uses import EmbeddingUse, embedding_squares

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
}
VOCAB = 32000
SUBJECT = "deepalign"
REPLICAS = 8


def make_model(vocab_size: int = VOCAB, **shape: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**SHAPE, **shape},
        vocab_size=vocab_size,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def library(model: LlamaForCausalLM, example: EncodedExample, chunk_tokens: int | None = None) -> Tensor:
    """The library's."""
    return gradient_magnitude(model, [example], chunk_tokens=chunk_tokens, progress=False)[0].total


def one_backward_per_token(model: LlamaForCausalLM, example: EncodedExample) -> Tensor:
    """The plain way: one forward, then a backward to all parameters for each answer token."""
    ids, start = torch.tensor([example.input_ids]), example.response_start
    logits_TV = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=ids.shape[1] - start).logits[0]
    logprobs_T = logits_TV.log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0]
    return torch.stack([_norm(logprob, model) for logprob in logprobs_T])


def own_prefix(model: LlamaForCausalLM, example: EncodedExample) -> Tensor:
    """A forward and a backward for each answer token, over its own prefix: half the answer's positions less."""
    norms = []
    for position in range(example.response_start, len(example.input_ids)):
        ids = torch.tensor([example.input_ids[: position + 1]])
        logits_V = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=1).logits[0, 0]
        norms.append(_norm(logits_V.log_softmax(-1)[ids[0, -1]], model))
    return torch.stack(norms)


def _norm(logprob: Tensor, model: nn.Module) -> Tensor:
    gradients = torch.autograd.grad(logprob, list(model.parameters()), retain_graph=True)
    return torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()


def replicated(model: LlamaForCausalLM, example: EncodedExample) -> Tensor:
    """The prefix `REPLICAS` times in a batch, one backward for as many tokens, norms from inputs and output gradients.

    What a batch of vector-Jacobian products saves beside this is all forwards but one; and here the gradients of all
    layers' outputs are held at once.
    """
    start, stop = example.response_start, len(example.input_ids)
    chunks = [range(first, min(stop, first + REPLICAS)) for first in range(start, stop, REPLICAS)]
    return torch.cat([_replicated_chunk(model, example, chunk) for chunk in chunks])


def _replicated_chunk(model: LlamaForCausalLM, example: EncodedExample, chunk: range) -> Tensor:
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    watched = [m for m in model.modules() if hasattr(m, "weight") and m is not model.lm_head]
    hooks = [m.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out))) for m in watched]
    ids_Cn = torch.tensor([example.input_ids[: chunk.stop - 1]]).expand(len(chunk), -1)
    rows = torch.arange(len(chunk))
    hidden_CH = model.model(input_ids=ids_Cn, use_cache=False).last_hidden_state[rows, torch.tensor(chunk) - 1]
    for hook in hooks:
        hook.remove()
    logits_CV = model.lm_head(hidden_CH)
    logprobs = logits_CV.log_softmax(-1)[rows, torch.tensor([example.input_ids[position] for position in chunk])]
    dlogits, *gradients = torch.autograd.grad(logprobs.sum(), [logits_CV, *(out for _, _, out in seen)])
    squares = dlogits.square().sum(-1) * hidden_CH.detach().square().sum(-1)
    factors: dict[int, Tensor] = {}
    for (module, inputs, output), gradient in zip(seen, gradients, strict=True):
        if isinstance(module, nn.Linear):
            if id(inputs) not in factors:
                x_nI = inputs[0].detach()
                factors[id(inputs)] = torch.linalg.qr(x_nI.mT, mode="r").R if len(x_nI) < x_nI.shape[1] else x_nI.mT
            squares += (factors[id(inputs)] @ gradient).square().sum((1, 2))
        elif isinstance(module, nn.Embedding):
            squares += embedding_squares(EmbeddingUse(ids_Cn[0], output, None), gradient)
        else:  # a norm's gain
            squares += (gradient * output.detach() / module.get_parameter("weight").detach()).sum(1).square().sum(-1)
    return squares.sqrt()


CONTESTANTS: dict[str, Callable[[LlamaForCausalLM, EncodedExample], Tensor]] = {
    SUBJECT: library,
    "deepalign, a token at a time": lambda model, example: library(model, example, chunk_tokens=1),
    "replicated": replicated,
    "own_prefix": own_prefix,
    "one_backward_per_token": one_backward_per_token,
}


def make_example(prompt: int, answer: int, vocab_size: int = VOCAB) -> EncodedExample:
    ids = torch.randint(1, vocab_size, (prompt + answer,), generator=torch.Generator().manual_seed(1)).tolist()
    return EncodedExample(ids, prompt, False)


def measure(prompt: int, answer: int, rounds: int) -> dict[str, Any]:
    """One row: medians over rounds, and ratios within a round to the library's time."""
    model, example = make_model(), make_example(prompt, answer)
    warm_up = make_example(prompt, 1)
    norms = {name: contestant(model, warm_up) for name, contestant in CONTESTANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in tqdm(range(rounds), desc="rounds"):
        for name, contestant in CONTESTANTS.items():
            start = time.perf_counter()
            norms[name] = contestant(model, example)
            seconds[name].append(time.perf_counter() - start)
    plain = norms["one_backward_per_token"].double()
    contestants = {}
    for name, taken in seconds.items():
        low, middle, high = spread([own / library_s for own, library_s in zip(taken, seconds[SUBJECT], strict=True)])
        contestants[name] = {
            "ms_per_token": statistics.median(taken) / answer * 1e3,
            "ratio": middle,
            "ratio_p10": low,
            "ratio_p90": high,
            "largest_relative_difference": float(((norms[name] - plain).abs() / plain).max()),
        }
    row = {"prompt": prompt, "answer": answer, "rounds": rounds, **row_environment("autograd", "cpu")}
    return row | {"parameters": sum(p.numel() for p in model.parameters()), "contestants": contestants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    row = measure(arguments.prompt, arguments.answer, arguments.rounds)
    print(json.dumps(row, indent=2))
    if arguments.out is not None:
        known = json.loads(arguments.out.read_text(encoding="utf-8"))["rows"] if arguments.out.exists() else []
        case = ("prompt", "answer", "threads")
        rows = [other for other in known if any(other[key] != row[key] for key in case)]
        write_text_atomic(arguments.out, json.dumps({"machine": machine(), "rows": [*rows, row]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
