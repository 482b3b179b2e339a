"""Times the library on a GPU: `python -m benchmarks.gpu loss|sampler|linear --out benchmarks/results/gpu-loss.json`.

Every figure stands beside the copy bandwidth measured in the same run. Contestants take turns, a round after the other,
and a time is the median over rounds between two events on the stream. The peers are those of `peers.py`, and, where
installed, Liger's KL and JSD, the nearest relatives: they read two models instead of three, select and count nothing,
and get log-probabilities ready made where they want them.

`--device cpu --tiny` runs everything end to end without a GPU, on whatever implementation serves there: a test of the
script, not a measurement.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.contestants import LossContestants, SamplerContestants
from benchmarks.environment import machine
from benchmarks.gpu_linear import linear_rows
from benchmarks.interleaved import Contestant
from benchmarks.peers import compiled_statically, loss_peers, sample_eager
from deepalign.data.files import write_text_atomic

LOSS_SHAPES = ((8192, 128256), (4096, 151936), (16384, 32000))
SAMPLER_BATCHES = (1, 8, 64, 512)
SAMPLER_OPTIONS: tuple[dict[str, Any], ...] = ({"top_k": 50}, {"top_k": 50, "top_p": 0.9}, {}, {"top_p": 0.9})
GRAPH_CALLS = 20
SLEEP_CYCLES = 4_000_000  # two milliseconds


class Clock:
    """Milliseconds on the device's stream, or on the wall where there is none."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def time(self, call: Callable[[], object]) -> float:
        if not self.on_gpu:
            started = time.perf_counter()
            call()
            return (time.perf_counter() - started) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)  # meanwhile the call is launched: it is not the host that is timed
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def take_turns(
    contestants: dict[str, Contestant], clock: Clock, rounds: int, failures: list[str]
) -> dict[str, dict[str, float]]:
    """Median, least and largest time of each in ms; two rounds before are not counted.

    One that raises (a peer that is out of memory, say) plays no further, and `failures` says why.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 2):
        for name in list(times):
            try:
                contestants[name].prepare()
                elapsed = clock.time(contestants[name].call)
            except Exception as error:
                del times[name]
                failures.append(f"{name}: {type(error).__name__}: {error}")
                print(f"failed, the others go on: {failures[-1]}", file=sys.stderr, flush=True)
            else:
                if turn >= 2:
                    times[name].append(elapsed)
    return {name: {"ms": statistics.median(t), "least_ms": min(t), "most_ms": max(t)} for name, t in times.items()}


def copy_gb_per_s(device: str, mib: int, rounds: int) -> float:
    """Bytes read and written per second by a copy larger than the caches."""
    source = torch.zeros(mib << 18, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    times = [clock.time(lambda: target.copy_(source)) for _ in range(rounds)]
    return 2 * source.nbytes / statistics.median(times) / 1e6


def liger_losses(contestants: LossContestants) -> dict[str, Contestant]:
    """Liger's KL and JSD of student and aligned; nothing if it is not installed."""
    if not find_spec("liger_kernel"):
        return {}
    kl = import_module("liger_kernel.transformers.kl_div").LigerKLDIVLoss(reduction="batchmean", log_target=True)
    jsd = import_module("liger_kernel.transformers.jsd").LigerJSD()
    log_p = contestants.student.float().log_softmax(-1).to(contestants.student.dtype).requires_grad_()
    log_q = contestants.aligned.float().log_softmax(-1).to(contestants.student.dtype)

    def forget() -> None:
        log_p.grad = None

    return {
        "liger_kl (does less)": Contestant(lambda: kl(log_p, log_q).backward(), forget),
        "liger_jsd (does less)": Contestant(lambda: jsd(log_p, log_q).backward(), forget),
    }


def other_upstream(contestants: LossContestants, implementation: str) -> Contestant:
    """Forward and backward with upstream gradient 2 instead of 1."""
    from deepalign import fused_completion_loss

    leaf = contestants.student.detach().requires_grad_()
    kl_weight, completion_weight = contestants.weights

    def forget() -> None:
        leaf.grad = None

    def call() -> None:
        output = fused_completion_loss(
            leaf, contestants.aligned, contestants.base, kl_weight=kl_weight, completion_weight=completion_weight,
            reduction="sum", implementation=implementation,
        )  # fmt: skip
        (2.0 * output.loss).backward()

    return Contestant(call, forget)


def loss_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per shape, mode and contestant."""
    implementation = "triton" if options.device == "cuda" else "reference"
    shapes = [(4, 512)] if options.tiny else [LOSS_SHAPES[n] for n in options.shapes]
    copy = copy_gb_per_s(options.device, 1 if options.tiny else 1024, 3 if options.tiny else 20)
    for count, vocab in shapes:
        made = LossContestants(Case(count, vocab, device=options.device), waits=False)
        for mode, tensors in (("forward_backward", 4), ("forward", 3), ("forward_backward_inplace", 4)):
            entered = {implementation: made.library(implementation, mode)}
            if mode == "forward_backward":
                entered["upstream 2"] = other_upstream(made, implementation)
                entered |= liger_losses(made)
            if mode != "forward_backward_inplace":
                peers = {name: loss for name, loss in loss_peers().items() if name in options.peers}
                entered |= {name: made.peer(loss, mode) for name, loss in peers.items()}
            useful = tensors * count * vocab * 2
            for name, times in take_turns(entered, Clock(options.device), options.rounds, options.failures).items():
                gb_per_s = useful / times["ms"] / 1e6
                row = {
                    "operation": "completion_loss",
                    "shape": [count, vocab],
                    "mode": mode,
                    "contestant": name,
                    **times,
                }
                yield row | {"useful_gb_per_s": gb_per_s, "share_of_copy": gb_per_s / copy, "copy_gb_per_s": copy}
            torch._dynamo.reset()


def captured(call: Callable[[], object], device: str) -> tuple[Callable[[], object], int]:
    """The call many times in a CUDA graph, and how many; the call itself without a GPU, or if it cannot be captured."""
    if device != "cuda":
        return call, 1
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_CALLS):
                call()
    except RuntimeError as error:
        print(f"not captured, timed call by call: {error}", file=sys.stderr)
        return call, 1
    return graph.replay, GRAPH_CALLS


def sampler_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Microseconds per call in a CUDA graph, where the call can be captured."""
    from deepalign import contrastive_sample

    implementation = "triton" if options.device == "cuda" else "reference"
    vocab, batches = (512, (1, 2)) if options.tiny else (128256, SAMPLER_BATCHES)
    for batch in batches:
        for chosen in SAMPLER_OPTIONS:
            made = SamplerContestants(Case(batch, vocab, device=options.device), alpha=0.5, **chosen)
            arguments: dict[str, Any] = {**made.options, "uniforms": made.uniforms.double()}
            calls: dict[str, Callable[[], object]] = {
                implementation: partial(
                    contrastive_sample, made.aligned, made.base, implementation=implementation, **arguments
                )
            }
            models = (made.aligned, made.base, made.uniforms)
            if "eager" in options.peers:
                peer: Callable[..., object] = torch.no_grad()(sample_eager)
                calls["eager"] = partial(peer, *models, **made.options)
            if "compile" in options.peers:
                fast = torch.no_grad()(compiled_statically(sample_eager))
                calls["compile"] = partial(fast, *models, **made.options)
            for call in calls.values():
                call()  # compiles
            graphs = {name: captured(call, options.device) for name, call in calls.items()}
            entered = {name: Contestant(call) for name, (call, _) in graphs.items()}
            for name, times in take_turns(entered, Clock(options.device), options.rounds, options.failures).items():
                us = 1e3 * times["ms"] / graphs[name][1]
                row = {
                    "operation": "contrastive_sample",
                    "shape": [batch, vocab],
                    "options": chosen,
                    "contestant": name,
                }
                yield row | {"us": us, "calls_in_a_graph": graphs[name][1]}
            torch._dynamo.reset()


def main(arguments: list[str] | None = None) -> int:
    """Measure; every row is printed and saved as soon as it is there. 1 if somebody failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("loss", "sampler", "linear"))
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a test of the script, on any device")
    parser.add_argument("--shapes", type=int, nargs="+", default=[0, 1, 2], help=f"which of {LOSS_SHAPES}")
    parser.add_argument("--peers", nargs="*", default=["eager", "compile"])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args(arguments)
    options.failures = []  # who could not be timed, and why
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: no GPU here; --device cpu --tiny tests the script", file=sys.stderr)
        return 2
    if options.what == "linear":
        rows = linear_rows(
            options, lambda entered: take_turns(entered, Clock(options.device), options.rounds, options.failures)
        )
    else:
        rows = loss_rows(options) if options.what == "loss" else sampler_rows(options)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"device": device, "tiny": options.tiny, "machine": machine(), "rows": []}
    for row in rows:
        result["rows"].append(row)
        write_text_atomic(options.out, json.dumps(result, indent=1) + "\n")  # a part that is stopped keeps it
        figures = {name: round(value, 4) for name, value in row.items() if isinstance(value, float)}
        what = row.get("shape", row.get("case")), row.get("mode", row.get("options"))
        print(*what, row["contestant"], figures, flush=True)
    if options.failures:
        write_text_atomic(options.out, json.dumps(result | {"failures": options.failures}, indent=1) + "\n")
    return 1 if options.failures else 0


if __name__ == "__main__":
    sys.exit(main())
