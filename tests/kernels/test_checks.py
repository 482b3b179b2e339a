"""What the operations refuse, and how an implementation is chosen."""

import math
import subprocess
import sys
import warnings

import pytest
import torch

from deepalign.kernels import checks
from deepalign.kernels.checks import choose_implementation
from deepalign.kernels.completion_loss import IMPLEMENTATIONS, CompletionLossConfig, fused_completion_loss
from deepalign.kernels.position_divergence import base_favored_tokens, position_divergence
from tests.kernels.loss_helpers import needs_native

LOGITS = torch.zeros(2, 3, 8)
CONFIG = CompletionLossConfig(top_k=4)
CPU = torch.device("cpu")


class Spread(torch.Tensor):
    """As a DTensor looks."""

    device_mesh, placements = "two ranks", ("Shard(dim=-1)",)


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        ([[0.0]], TypeError, "base_logits is a list; expected a torch.Tensor"),
        (LOGITS.long(), TypeError, "base_logits has dtype torch.int64; expected one of torch.bfloat16"),
        (LOGITS.bfloat16(), TypeError, "base_logits is torch.bfloat16 and .* is torch.float32; expected one dtype"),
        (LOGITS.to_sparse(), TypeError, "base_logits is torch.sparse_coo; expected a dense tensor"),
        (LOGITS.as_subclass(Spread), ValueError, r"base_logits is a DTensor \(.Shard.*; expected a plain tensor"),
        (torch.tensor(0.0), ValueError, r"base_logits has shape \(\); expected \(..., V\)"),
        (torch.zeros(2, 3, 0), ValueError, r"base_logits has shape \(2, 3, 0\); expected \(..., V\)"),
        (torch.zeros(2, 3, 9), ValueError, r"base_logits has shape \(2, 3, 9\) and .* \(2, 3, 8\)"),
        (torch.zeros(6, 8), ValueError, r"base_logits has shape \(6, 8\)"),
        (LOGITS.to("meta"), ValueError, "base_logits is on meta and .* is on cpu"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_logits(base: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_completion_loss(LOGITS, LOGITS, base, config=CONFIG)
    with pytest.raises(error, match=message):
        position_divergence(LOGITS, base, top_n=4)
    with pytest.raises(error, match=message):
        base_favored_tokens(LOGITS, base, top_k=4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size is 0 but the logits are 8 wide"),
        ({"vocab_size": 9}, ValueError, "vocab_size is 9 but the logits are 8 wide"),
        ({"vocab_size": 8.0}, TypeError, "vocab_size is 8.0, a float"),
        ({"vocab_size": 3}, ValueError, "top_k is 4 but 3 vocabulary entries exist"),
        ({"config": CompletionLossConfig()}, ValueError, "top_k is 100 but 8 vocabulary entries exist"),
        ({"config": {"top_k": 4}}, TypeError, "config is a dict"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'; expected one of 'mean', 'sum', 'none'"),
        ({"reduction": None}, TypeError, "reduction is None"),
        ({"inplace": 1}, TypeError, "inplace is 1"),
        ({"kl_weight": [1.0]}, TypeError, "kl_weight is a list"),
        ({"kl_weight": torch.ones(2, 3, dtype=torch.complex64)}, TypeError, "kl_weight has dtype torch.complex64"),
        ({"kl_weight": torch.ones(6)}, ValueError, r"kl_weight has shape \(6,\); expected \(2, 3\)"),
        ({"completion_weight": torch.ones(2, 3, 1)}, ValueError, r"completion_weight has shape \(2, 3, 1\)"),
        ({"kl_weight": torch.ones(2, 3, device="meta")}, ValueError, "kl_weight is on meta"),
        ({"kl_weight": torch.full((2, 3), -1)}, ValueError, "kl_weight has a negative, NaN or infinite entry"),
        ({"kl_weight": torch.full((2, 3), math.nan)}, ValueError, "kl_weight has a negative"),
        ({"completion_weight": torch.full((2, 3), math.inf)}, ValueError, "completion_weight has a negative"),
        ({"top_k_indices": [[0]]}, TypeError, "top_k_indices is list"),
        ({"top_k_indices": torch.zeros(2, 3, 1, dtype=torch.int32)}, TypeError, "top_k_indices is torch.int32"),
        ({"top_k_indices": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "top_k_indices has shape"),
        ({"top_k_indices": torch.zeros(3, 2, 1, dtype=torch.int64)}, ValueError, "top_k_indices has shape"),
        ({"top_k_indices": torch.zeros(2, 3, 1, dtype=torch.int64, device="meta")}, ValueError, "is on meta"),
        ({"top_k_indices": torch.full((2, 3, 1), 8)}, ValueError, r"an entry outside \[-1, 8\)"),
        ({"top_k_indices": torch.full((2, 3, 1), 6), "vocab_size": 6}, ValueError, r"an entry outside \[-1, 6\)"),
        ({"top_k_indices": torch.full((2, 3, 1), -2)}, ValueError, r"an entry outside \[-1, 8\)"),
        ({"implementation": "cuda"}, ValueError, "implementation is 'cuda'; expected one of 'reference', 'cpu'"),
        ({"implementation": 3}, TypeError, "implementation is 3"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_completion_loss_arguments(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_completion_loss(LOGITS, LOGITS, LOGITS, **{"config": CONFIG, **options})


def test_given_indices_need_no_top_k() -> None:
    """config.top_k, larger than this vocabulary, is not used when the selection is given."""
    given = torch.zeros(2, 3, 1, dtype=torch.int64)
    output = fused_completion_loss(LOGITS, LOGITS, LOGITS, top_k_indices=given, implementation="reference")
    assert torch.equal(output.top_k_indices, given)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k is 0"),
        ({"top_k": True}, TypeError, "top_k is True, a bool"),
        ({"top_k": 5.0}, TypeError, "top_k is 5.0, a float"),
        ({"teacher_mix": math.inf}, ValueError, "teacher_mix is inf; expected a finite number"),
        ({"teacher_mix": "1.2"}, TypeError, "teacher_mix is '1.2'"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0; expected a finite number > 0"),
        ({"temperature": math.nan}, ValueError, "temperature is nan"),
        ({"alpha_base": -0.1}, ValueError, "alpha_base is -0.1; expected a finite number >= 0"),
        ({"gamma": -1}, ValueError, "gamma is -1"),
        ({"lambda_reg": math.inf}, ValueError, "lambda_reg is inf"),
        ({"lambda_reg": False}, TypeError, "lambda_reg is False"),
        ({"kl_direction": "reverse"}, ValueError, "kl_direction is 'reverse'; expected one of 'student_teacher'"),
        ({"favored_from": "base"}, ValueError, "favored_from is 'base'"),
        ({"penalty": None}, TypeError, "penalty is None"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_config(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CompletionLossConfig(**changes)


def test_config_takes_the_edges_and_is_frozen() -> None:
    config = CompletionLossConfig(top_k=1, teacher_mix=-3, temperature=1e-3, alpha_base=0, gamma=0, lambda_reg=0)
    with pytest.raises(AttributeError):
        config.top_k = 2


def test_an_implementation_that_cannot_run_says_why() -> None:
    for name, found in IMPLEMENTATIONS.items():
        if isinstance(found, str):
            with pytest.raises(RuntimeError, match=f"implementation '{name}' cannot run: {found}; use one of"):
                fused_completion_loss(LOGITS, LOGITS, LOGITS, config=CONFIG, implementation=name)


def test_compiled_kernels_refuse_float64_and_the_reference_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_reference_announced", True)
    table = {"reference": 1, "cpu": 2, "triton": 3}
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run: it takes .*, and these are torch.float64"):
        choose_implementation(table, "cpu", CPU, torch.float64)
    assert choose_implementation(table, None, CPU, torch.float64) == 1
    assert [choose_implementation(table, None, CPU, dtype) for dtype in checks.COMPILED_DTYPES] == [2, 2, 2]
    assert choose_implementation(table, None, torch.device("cuda", 0), torch.float64) == 1
    with pytest.raises(RuntimeError, match="'cpu' cannot run: it takes cpu tensors, and these are on meta"):
        choose_implementation(table, "cpu", torch.device("meta"))


@needs_native
def test_the_cpu_kernels_refuse_float64() -> None:
    logits = LOGITS.double()
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run: .* these are torch.float64; use one of 'reference'"):
        fused_completion_loss(logits, logits, logits, config=CONFIG, implementation="cpu")


def test_the_fastest_that_can_run_on_the_device_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_reference_announced", True)
    table = {"reference": 1, "cpu": 2, "triton": 3}
    assert choose_implementation(table, None, CPU) == 2
    assert choose_implementation(table, None, torch.device("cuda", 0)) == 3
    assert choose_implementation(table, None, torch.device("meta")) == 1
    assert choose_implementation(table | {"cpu": "not built"}, None, CPU) == 1
    assert choose_implementation(table, "reference", CPU) == 1


def test_the_reference_says_once_that_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_reference_announced", False)
    table = {"reference": 1, "cpu": "not built"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_implementation(table, "reference", CPU)  # asked for by name: nothing to say
    with pytest.warns(UserWarning, match="eager reference implementation on cpu"):
        choose_implementation(table, None, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_implementation(table, None, CPU)


def test_the_kernels_import_torch_alone() -> None:
    """`deepalign.kernels` stands below everything else of the library and needs neither transformers nor triton."""
    program = (
        "import sys, torch; before = set(sys.modules)\n"
        "import deepalign.kernels.completion_loss, deepalign.kernels.position_divergence\n"
        "import deepalign.kernels.contrastive_sample\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'transformers', 'triton', 'peft', 'deepspeed'}, new\n"
        "inside = {n for n in set(sys.modules) - before if n.startswith('deepalign.')}\n"
        "assert all(n.startswith('deepalign.kernels') for n in inside), inside\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
