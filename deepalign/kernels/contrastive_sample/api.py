"""The public sampler: validate, draw the uniforms, choose an implementation."""

import sys
from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from deepalign.kernels.checks import (
    COMPILED_DTYPES,
    check_choice,
    check_filters,
    check_logits,
    check_number,
    check_randomness,
    choose_implementation,
)
from deepalign.kernels.contrastive_sample import cpu
from deepalign.kernels.contrastive_sample.reference import (
    ContrastiveSample,
    SampleOptions,
    Space,
    contrastive_sample_rows,
)
from deepalign.kernels.library import WHY_NO_NATIVE, WHY_NO_TRITON

# What a file beside this one provides: (aligned_NV, base_NV, uniforms_N in float64, options) -> one token per row.
Implementation = Callable[[Tensor, Tensor, Tensor, SampleOptions], ContrastiveSample]

NUMBERS = frozenset({float, int})
LARGEST_FLOAT = sys.float_info.max  # an int can be larger
LARGEST_WIDTH = 2**31 - 1
IS_NATIVE = WHY_NO_NATIVE is None
# What calling the op, and a NamedTuple, calls: a frame of Python less each.
CALL, AS_TUPLE = getattr(cpu.OP, "_op", cpu.OP), tuple.__new__

# By name: an implementation, or why it cannot run.
IMPLEMENTATIONS: dict[str, Implementation | str] = {
    "reference": contrastive_sample_rows,
    "cpu": WHY_NO_NATIVE or cpu.contrastive_sample_rows,
    # The same functions: the ops they call have a kernel per device.
    "triton": WHY_NO_TRITON or cpu.contrastive_sample_rows,
}


def contrastive_sample(
    aligned_logits: Tensor,
    base_logits: Tensor,
    *,
    alpha: float,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    space: Space = "logits",
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    implementation: str | None = None,
) -> ContrastiveSample:
    """Draw one token per row from the contrastive distribution (Eq. 7; `reference.py` has the equations).

    The contrastive logits are divided by `temperature`; top-k, then top-p, then min-p filter them, each on what the one
    before kept; what is left is renormalised and one token drawn by inverse CDF in index order. Ties go to the lowest
    index everywhere. Carries no gradient.

    Args:
        aligned_logits, base_logits: (..., V) bf16, fp16, fp32 or fp64; same shape, dtype and device. They are the
            models' own: an entry masked with -inf in one of them only makes the row bad.
        alpha: finite, >= 0: how much of the base model's excess is taken off. 0, or a base model that favors no token,
            leaves aligned's own distribution.
        temperature: finite, >= 0. At 0 the largest contrastive logit is taken, with logprob 0, whatever the filters
            and the uniforms.
        top_k: how many of the largest entries to keep; 0, or at least as many as are present, keeps all.
        top_p: in (0, 1]: keep the fewest of the largest entries whose probability reaches `top_p`, at least one. The
            probabilities are those renormalised over what top-k kept. 1 keeps all.
        min_p: in [0, 1]: keep entries at least `min_p` times as probable as the most probable one. 0 keeps all.
        space: whether the excess is the difference of logits or of log-probabilities.
        vocab_size: only the first `vocab_size` entries exist (padded vocabularies); None for all V.
        generator: source of the uniforms, on the logits' type of device; None is torch's global one. Every accepted
            call without `uniforms` draws float32 `torch.rand(rows, generator=generator)` once, also at temperature 0:
            another temperature or filter never shifts the draws of later calls.
        uniforms: (...,) floating, one per row in [0, 1), on the logits' device; None draws them. A row's token depends
            on nothing but its logits and its uniform. Values outside [0, 1) are refused on CPU tensors and not looked
            at elsewhere; even then the token is one that the filters kept.
        implementation: "reference", "cpu", "triton", or None to choose by device.

    Returns:
        `ContrastiveSample`: token_ids (...,) int64, and logprobs (...,) float32 (float64 for float64 logits), the
        natural log-probability of the token under the filtered and renormalised distribution. An entry that is -inf in
        both models is absent, like padding. A row with NaN, +inf, -inf in one model only, or no entry present has
        token -1 and logprob NaN.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a value, shape or device that does not fit, or both `generator` and `uniforms`.
        RuntimeError: the implementation cannot run.
    """
    # A call as most are: plain CPU tensors (N, V) and plain numbers, of which is asked here only what the op cannot
    # refuse by itself. The checks that say what is wrong touch so much of the interpreter that, when other code had the
    # caches, they take longer than the sample of a row; a function for what is asked here would take a tenth of it.
    if (
        (implementation is None or implementation == "cpu")
        and IS_NATIVE
        and not is_dynamo_compiling()
        and (type(aligned_logits) is Tensor and aligned_logits.is_cpu)
        and (type(base_logits) is Tensor and base_logits.is_cpu)
        and (type(alpha) in NUMBERS and type(temperature) in NUMBERS)
        and (type(top_k) is int and type(top_p) in NUMBERS and type(min_p) in NUMBERS)
        and (space == "logits" or space == "logprobs")
        and (vocab_size is None or type(vocab_size) is int)
    ):
        log_space = space == "logprobs"
        if uniforms is None:
            plain = (alpha, temperature, top_k, top_p, min_p, log_space)
            drawn = _drawn_at_once(aligned_logits, base_logits, generator, plain, vocab_size)
            if drawn is not None:
                return drawn
        elif generator is None and type(uniforms) is Tensor and uniforms.is_cpu:
            try:
                sampled = CALL(
                    aligned_logits,
                    base_logits,
                    uniforms,
                    alpha,
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    log_space,
                    vocab_size,
                )
                return AS_TUPLE(ContrastiveSample, sampled)
            except (OverflowError, RuntimeError, TypeError):
                pass  # what is wrong is found below
    width = check_logits(vocab_size, aligned_logits=aligned_logits, base_logits=base_logits)
    check_number("alpha", alpha, minimum=0.0)
    check_number("temperature", temperature, minimum=0.0)
    check_filters(top_k, top_p, min_p)
    check_choice("space", space, get_args(Space))
    check_randomness(generator, uniforms, aligned_logits)
    chosen = choose_implementation(IMPLEMENTATIONS, implementation, aligned_logits.device, aligned_logits.dtype)
    if uniforms is None:  # only now: a refused call must not advance the generator
        # Named only where there is one: that overload of `rand` takes no symbolic number of rows (torch.compile).
        rand = torch.rand if generator is None else partial(torch.rand, generator=generator)
        uniforms = rand(aligned_logits.shape[:-1], dtype=torch.float32, device=aligned_logits.device)
    options = SampleOptions(
        alpha=float(alpha),
        temperature=float(temperature),
        top_k=min(top_k, width),
        top_p=float(top_p),
        min_p=float(min_p),
        space=space,
        vocab_size=width,
    )
    return chosen(aligned_logits.detach(), base_logits.detach(), uniforms.detach().double(), options)


def _drawn_at_once(
    aligned_NV: Tensor,
    base_NV: Tensor,
    generator: torch.Generator | None,
    options: tuple[float, float, int, float, float, bool],
    vocab_size: int | None,
) -> ContrastiveSample | None:
    """A plain call that draws its uniforms; None, and nothing drawn, where the op might refuse it.

    That is asked first: it would be too late to take a draw back. As strict as the op; what it leaves out of the
    checks' accepted calls (a top_k beyond the vocabulary, logits strided in it) is served the long way.
    """
    alpha, temperature, top_k, top_p, min_p, _ = options
    shape = aligned_NV.shape
    if len(shape) != 2:
        return None
    width = shape[1] if vocab_size is None else vocab_size
    if not (
        (generator is None or (type(generator) is torch.Generator and generator.device.type == "cpu"))
        and aligned_NV.dtype in COMPILED_DTYPES
        and base_NV.dtype == aligned_NV.dtype
        and base_NV.shape == shape
        and (shape[1] == 1 or aligned_NV.stride(1) == base_NV.stride(1) == 1)
        and 1 <= width <= min(shape[1], LARGEST_WIDTH)
        and 0 <= top_k <= width
        and 0 <= alpha <= LARGEST_FLOAT
        and 0 <= temperature <= LARGEST_FLOAT
        and 0 < top_p <= 1
        and 0 <= min_p <= 1
    ):
        return None
    uniforms_N = torch.rand(shape[0], generator=generator, dtype=torch.float32, device="cpu")
    return ContrastiveSample(*CALL(aligned_NV, base_NV, uniforms_N, *options, width))
