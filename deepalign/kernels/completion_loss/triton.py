"""The completion loss on a GPU. `reference.py` has the equations.

Pass 1 reads the three rows once: sums of four exponentials, of p (s - t), and the largest d per lane
(`triton_math.py`), which yield the divergence, the threshold of the count, and a bound that k differences reach. The
lanes that reach it are looked into again, and their entries above the bound, index and s, are the candidates for M
(`row_select.py`). Pass 2 reads the rows again: gradient and count, one exponential per element. A last, small kernel
chooses M exactly among the candidates and puts its share into the gradient (`triton_select.py`).

S programs share a row and keep so little of it in flight that pass 2 reads cache: 14 bytes per bf16 element would go to
memory otherwise, and 8 do. They exchange 14 numbers once, between the passes, through global memory: 64-bit words that
hold value and flag together, so that no fence is needed. Programs draw their numbers in the order in which they start,
so that only the last row that has begun can lack programs: all others come to their end and make room for these. That
needs room for the S programs of one row at a time, and S is no more than the device has multiprocessors.

Nothing depends on the order of programs: no atomics on floats, sums over the programs of a row in their order.

With penalty="centered_square" every entry's gradient depends on M, so M comes before pass 2, which then reads memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from deepalign.kernels.checks import COMPILED_DTYPES
from deepalign.kernels.completion_loss.triton_math import WORDS
from deepalign.kernels.completion_loss.triton_rows import rows_kernel
from deepalign.kernels.completion_loss.triton_select import select_kernel
from deepalign.kernels.eager_math import divided_by_sum, top_k_lowest_index
from deepalign.kernels.launch import (
    ALL_REGISTERS,
    SHARED_REGISTERS,
    Launch,
    at_most_registers,
    launch_of,
    most_together,
    split_of_rows,
)

MOST_SELECTED = 1024  # in the kernels; more are selected by torch's own sort before
TILE_LIMIT = 4096  # entries that `collect` looks into at once: twice as many do not stay in registers


class Options(NamedTuple):
    """What stays the same for all rows."""

    top_k: int
    teacher_mix: float
    temperature: float
    alpha_base: float
    gamma: float
    lambda_reg: float
    teacher_student: bool
    favored_from_student: bool
    centered_square: bool
    vocab_size: int
    distill: bool = True


class Plan(NamedTuple):
    """How rows are read."""

    split: int
    block: int
    warps: int
    tiles: int
    lanes: int
    capacity: int
    bound_k: int
    align: int
    lead: int
    together: bool


class Selection(NamedTuple):
    """Where M comes from."""

    k: int
    given: Tensor | None  # (N, K) int64: by the user, or by torch's sort; None: the kernels select
    listed: Tensor | None  # the same, repetitions replaced by -1 where there are many
    distinct: bool  # whether `listed` has no repetition to look for


def completion_loss(student: Tensor, aligned: Tensor, base: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The kernel of `deepalign::completion_loss`."""
    *rest, with_gradient = arguments
    gradient = torch.empty(
        (student.shape[0] if with_gradient else 0, student.shape[1]), dtype=student.dtype, device=student.device
    )
    return (*completion_loss_(student, aligned, base, *rest, gradient if with_gradient else None), gradient)


def completion_loss_(
    student: Tensor,
    aligned: Tensor,
    base: Tensor,
    kl_weight: Tensor | None,
    completion_weight: Tensor | None,
    top_k_indices: Tensor | None,
    *arguments: Any,
    together: bool = True,
) -> tuple[Tensor, ...]:
    """The kernel of `deepalign::completion_loss_`.

    `together=False` launches the two passes one after the other, as an interpreter must that runs one program at a
    time.
    """
    given = len(Options._fields) - 1  # all but `distill`
    options, gradient = Options(*arguments[:given]), arguments[given]
    mean, total = (*arguments[given + 1 :], False, False)[:2]  # left out where they are False
    wd, wc = (_row_weight(weight, student, mean) for weight in (kl_weight, completion_weight))
    loss, *statistics, _ = run_rows(student, aligned, base, wd, wc, top_k_indices, options, gradient, together)
    return loss.sum() if total else loss, *statistics


def _row_weight(weight: Tensor | None, rows: Tensor, mean: bool) -> Tensor:
    """What a row counts: what was given, or 1; with `mean` divided by their sum."""
    if weight is None:
        return torch.full(
            rows.shape[:1], 1.0 / max(1, rows.shape[0]) if mean else 1.0, dtype=torch.float32, device=rows.device
        )
    return divided_by_sum(weight) if mean else weight


def run_rows(
    student: Tensor,
    aligned: Tensor,
    base: Tensor,
    kl_weight: Tensor,
    completion_weight: Tensor,
    given: Tensor | None,
    options: Options,
    gradient: Tensor | None,
    together: bool,
) -> tuple[Tensor, ...]:
    """Loss, kl, completion, alpha, count, indices and, for options.distill=False, the differences of the selected."""
    logits = {"student": student, "aligned": aligned, "base": base}
    check_rows(options.vocab_size, **logits, **({} if gradient is None else {"gradient": gradient}))
    check_per_row("kl_weight", kl_weight, student, torch.float32)
    check_per_row("completion_weight", completion_weight, student, torch.float32)
    if given is not None:
        check_per_row("top_k_indices", given, student, torch.int64, given.shape[-1])
    elif not 1 <= options.top_k <= options.vocab_size:
        raise RuntimeError(f"deepalign: top_k must be in [1, vocab_size], is {options.top_k}")
    selection = _selection(student, aligned, base, given, options)
    rows, device = student.shape[0], student.device
    per_row = torch.empty((5, rows), dtype=torch.float32, device=device)
    count = torch.empty(rows, dtype=torch.int64, device=device)
    indices = torch.empty((rows, selection.k), dtype=torch.int64, device=device)
    differences = torch.empty((0 if options.distill else rows, selection.k), dtype=torch.float32, device=device)
    output = (*per_row[:4].unbind(), count, indices, differences)
    if rows == 0:
        return output
    tensors = [student, aligned, base] + ([] if gradient is None else [gradient])
    launch = launch_of("completion_loss", device)
    plan = _plan(launch, tensors, options.vocab_size, selection.k, selection.given is not None, together, options)
    read, select = _launches(tensors, kl_weight, completion_weight, selection, options, plan, output, per_row[4])
    emits = gradient is not None
    if emits and options.centered_square:
        read(True, False, False)
        read(False, True, False)
        select(True, False)
        read(False, True, True)
        select(False, True)
    else:
        if plan.together:
            read(True, True, emits)
        else:
            read(True, False, False)
            read(False, True, emits)
        select(True, emits)
    return output


def _selection(student: Tensor, aligned: Tensor, base: Tensor, given: Tensor | None, options: Options) -> Selection:
    k = options.top_k if given is None else given.shape[1]
    if k <= MOST_SELECTED:
        return Selection(k, given, given, False)
    if given is None:
        found = _select_before(student, aligned, base, options)
        return Selection(k, found, found, True)
    return Selection(k, given, _without_repetition(given), True)


def _launches(
    tensors: list[Tensor],
    kl_weight: Tensor,
    completion_weight: Tensor,
    selection: Selection,
    options: Options,
    plan: Plan,
    output: tuple[Tensor, ...],
    raised: Tensor,
) -> tuple[Callable[[bool, bool, bool], None], Callable[[bool, bool], None]]:
    """The two kernels with their scratch: read(first pass, second, with gradient) and select(statistics, fix).

    `tensors`: student, aligned, base and, if it is wanted, the gradient; `raised` (N,) fp32 carries what
    "centered_square" adds to every entry's gradient from `select` to `read`.
    """
    student, aligned, base = tensors[:3]
    (rows, width), device = student.shape, student.device
    programs = rows * plan.split
    words = _new_words(programs, device)
    index = torch.empty((programs, plan.capacity), dtype=torch.int32, device=device)
    value = torch.empty((programs, plan.capacity), dtype=torch.float32, device=device)
    found, counts = (torch.empty(programs, dtype=torch.int32, device=device) for _ in range(2))
    views = [from_16_bytes(tensor, plan.lead) for tensor in tensors]
    stride_g = tensors[3].stride(0) if len(tensors) > 3 else 0
    mix, scale = 1.0 - options.teacher_mix, 1.4426950408889634 / options.temperature
    flags = {
        "S": plan.split, "CAPACITY": plan.capacity, "DISTILL": options.distill,
        "TEACHER_STUDENT": options.teacher_student, "FROM_STUDENT": options.favored_from_student,
        "CENTERED": options.centered_square, "GIVEN": selection.given is not None, "enable_fp_fusion": True,
    }  # fmt: skip

    def read(first: bool, second: bool, with_gradient: bool) -> None:
        rows_kernel[(programs,)](
            views[0], views[1], views[2], views[-1], kl_weight, completion_weight, selection.listed, words, words[-1:],
            index, value, found, counts, raised, student.stride(0), aligned.stride(0), base.stride(0), stride_g,
            plan.lead, options.vocab_size, width, plan.bound_k, selection.k, mix, scale, options.temperature,
            FIRST=first, SECOND=second, BLOCK=plan.block, TILES=plan.tiles, LANES=plan.lanes, ALIGN=plan.align,
            GRADIENT=with_gradient, num_warps=plan.warps, **flags,
            **at_most_registers(SHARED_REGISTERS if second else ALL_REGISTERS),
        )  # fmt: skip

    def select(statistics: bool, fix: bool) -> None:
        select_kernel[(rows,)](
            aligned, base, tensors[-1], kl_weight, completion_weight, selection.given, selection.listed, words, index,
            value, found, counts, raised, *output, aligned.stride(0), base.stride(0), stride_g, options.vocab_size,
            selection.k, mix, scale, options.temperature, options.alpha_base, options.gamma, options.lambda_reg,
            STATISTICS=statistics, FIX=fix, DISTINCT=selection.distinct, num_warps=1, **flags,
            **at_most_registers(ALL_REGISTERS),
        )  # fmt: skip

    return read, select


def check_rows(vocab_size: int, **logits: Tensor) -> None:
    """Keep a direct call of an op from reading out of bounds; users meet the checks in `api.py` before."""
    first = next(iter(logits.values()))
    for name, tensor in logits.items():
        if tensor.dim() != 2 or tensor.shape != first.shape or tensor.device != first.device:
            raise RuntimeError(f"deepalign: {name} must be (rows, vocabulary), of the others' shape and device")
        if tensor.dtype not in COMPILED_DTYPES or tensor.dtype != first.dtype:
            raise RuntimeError(
                f"deepalign: {name} must be float32, bfloat16 or float16 like the others, is {tensor.dtype}"
            )
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise RuntimeError(f"deepalign: {name} must have stride 1 in the vocabulary")
    if not 1 <= vocab_size <= first.shape[1]:
        raise RuntimeError(f"deepalign: vocab_size must be in [1, {first.shape[1]}], is {vocab_size}")


def check_per_row(name: str, values: Tensor, logits: Tensor, dtype: torch.dtype, columns: int = 1) -> None:
    """The same of what an op takes per row."""
    if values.device != logits.device or values.dtype != dtype or not values.is_contiguous():
        raise RuntimeError(f"deepalign: {name} must be a contiguous {dtype} tensor on the logits' device")
    if values.numel() != logits.shape[0] * columns:
        raise RuntimeError(f"deepalign: {name} must have {columns} entries per row")


def _new_words(programs: int, device: torch.device) -> Tensor:
    """Room for what programs publish, nothing published yet, and the number of the next program to start."""
    return torch.zeros(programs * WORDS.value + 1, dtype=torch.int64, device=device)


def _plan(
    launch: Launch,
    tensors: list[Tensor],
    vocab: int,
    k: int,
    is_given: bool,
    together: bool,
    options: Options,
) -> Plan:
    rows = tensors[0].shape[0]
    align, lead = alignment(tensors, vocab)
    block = launch.block
    most = most_together(tensors[0].device)
    split = split_of_rows(launch, rows, vocab, block, most)
    # The second-level caches of an AMD device's dies do not see each other's plain stores within a launch.
    together = together and not options.centered_square and torch.version.hip is None
    while True:
        bound_k = -(-k // split) if together else k
        tiles = triton.next_power_of_2(-(-(vocab + 7) // (block * split)))
        lanes = min(triton.next_power_of_2(2 * bound_k), block // 2)
        if lanes * 2 * tiles <= TILE_LIMIT or split >= most or is_given:
            break
        split *= 2
    lanes = min(lanes, TILE_LIMIT // (2 * tiles))
    capacity = -(-k // split) if is_given else -(-max(k, lanes) // 8) * 8  # lists begin at multiples of 32 bytes
    return Plan(split, block, launch.warps, tiles, lanes, capacity, bound_k, align, lead, together)


def alignment(tensors: list[Tensor], vocab: int) -> tuple[int, int]:
    """ALIGN of `row_math.py`, and how many entries before each tensor's first its 16 bytes begin."""
    size = tensors[0].element_size()
    leads = {tensor.data_ptr() % (8 * size) // size for tensor in tensors}
    strides = [tensor.stride(0) if tensor.shape[0] > 1 else 0 for tensor in tensors]
    if leads == {0} and vocab % 16 == 0 and all(stride % 16 == 0 for stride in strides):
        return 1, 0
    (lead, *others) = leads
    if others or len({stride % 8 for stride in strides}) > 1 or any(t.storage_offset() < lead for t in tensors):
        return 0, 0
    return 2, lead


def from_16_bytes(tensor: Tensor, lead: int) -> Tensor:
    """A view that begins where the first entry's 16 bytes do."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() - lead) if lead else tensor


def _select_before(student: Tensor, aligned: Tensor, base: Tensor, options: Options) -> Tensor:
    """The k largest d of every row by torch's sort, -1 where fewer are present; for k that no program could list."""
    found = torch.empty((student.shape[0], options.top_k), dtype=torch.int64, device=student.device)
    step = max(1, 2**26 // options.vocab_size)  # rows at a time, for the temporaries' sake
    for first in range(0, student.shape[0], step):
        s, a, b = (x[first : first + step, : options.vocab_size].float() for x in (student, aligned, base))
        present = s.isfinite() & a.isfinite() & b.isfinite()
        d = torch.where(present, b - (s if options.favored_from_student else a), 0.0)
        index, here = top_k_lowest_index(d, present, options.top_k)
        found[first : first + step] = torch.where(here, index, -1)
    return found


def _without_repetition(given: Tensor) -> Tensor:
    """Every index once, -1 for its repetitions, in any order."""
    ordered = given.sort(dim=-1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.where(again, -1, ordered)
