"""Launch sizes: the tables, what was tuned, how rows are split."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from deepalign.kernels import launch, library, tune
from deepalign.kernels.launch import LAUNCH, Launch, launch_of, split_of_rows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DEEPALIGN_CACHE", str(tmp_path))
    launch.reread_tuned()
    yield
    monkeypatch.undo()
    launch.forget_tuned()


def test_every_operation_has_a_default() -> None:
    for operation, table in LAUNCH.items():
        assert launch_of(operation, CPU) == table["default"]
        for sizes in table.values():
            assert sizes.block & (sizes.block - 1) == 0


def test_what_was_tuned_comes_first_and_is_kept() -> None:
    sizes = Launch(block=1024, warps=4, share=999, programs=7)
    tune.save("completion_loss/default", Launch(1, 1, 1, 1), launch.tuned_file())
    tune.save("other/default", sizes, launch.tuned_file())
    tune.save("completion_loss/default", sizes, launch.tuned_file())
    launch.reread_tuned()
    assert launch_of("completion_loss", CPU) == sizes
    assert [path.name for path in launch.tuned_file().parent.iterdir()] == ["launch.json"]
    launch.forget_tuned()
    assert launch_of("completion_loss", CPU) == LAUNCH["completion_loss"]["default"]


def test_a_broken_file_says_what_to_do() -> None:
    launch.tuned_file().write_text('{"completion_loss/default": {"block": 1}}')
    with pytest.raises(RuntimeError, match=r"launch\.json is no table of launch sizes .* remove it"):
        launch.reread_tuned()


def test_the_fastest_that_runs() -> None:
    def milliseconds(sizes: Launch) -> float:
        if sizes.block == 1:
            raise (*tune.compiler_errors(), RuntimeError)[0]("out of resources")  # Triton's is no RuntimeError
        return float(sizes.warps)

    best, times = tune.fastest([Launch(1, 1, 1, 1), Launch(2, 8, 1, 1), Launch(2, 4, 1, 1)], milliseconds)
    assert best == Launch(2, 4, 1, 1)
    assert len(times) == 2
    with pytest.raises(RuntimeError, match="no launch sizes run"):
        tune.fastest([Launch(1, 1, 1, 1)], milliseconds)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "vocab", "split"), [(8192, 128256, 4), (4096, 151936, 8), (16384, 32000, 1), (1, 128256, 32), (1, 100, 1)]
)
def test_how_rows_are_split(rows: int, vocab: int, split: int) -> None:
    assert split_of_rows(LAUNCH["completion_loss"]["90"], rows, vocab, 2048) == split


@pytest.mark.parametrize(("multiprocessors", "most"), [(132, 32), (32, 32), (14, 8), (1, 1)])
def test_no_more_programs_wait_for_each_other_than_run_at_once(
    multiprocessors: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest part of an A100 has 14 multiprocessors: 16 programs of which each fills one would wait for ever."""
    monkeypatch.setattr(launch, "_multiprocessors", lambda index: multiprocessors)
    assert launch.most_together(torch.device("cuda", 0)) == most
    assert split_of_rows(LAUNCH["completion_loss"]["90"], 1, 128256, 2048, most) == most


def test_nothing_is_asked_of_a_device_or_compiled_at_import() -> None:
    code = (
        "import sys, torch\n"
        "torch.cuda.is_available = torch.cuda.device_count = None  # whoever calls them fails\n"
        "import deepalign\n"
        "deepalign.fused_completion_loss; deepalign.contrastive_sample; deepalign.position_divergence\n"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(Path.cwd())})


def test_nothing_is_compiled_again_for_another_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three statistics in one buffer begin at multiples of 16 bytes for every fourth number of rows only."""
    pytest.importorskip("triton")
    from deepalign.kernels.completion_loss import triton as loss
    from deepalign.kernels.contrastive_sample import triton as sampler
    from deepalign.kernels.position_divergence import triton as statistics

    looked_at: dict[str, set[tuple[object, ...]]] = {}

    class Recorder:
        def __init__(self, module: object, name: str) -> None:
            self.kernel, self.name = getattr(module, name), name
            monkeypatch.setattr(module, name, self)

        def __getitem__(self, grid: object):
            def launched(*arguments: object, **options: object) -> None:
                key = [
                    given.data_ptr() % 16 == 0 if isinstance(given, torch.Tensor) else given
                    for given, parameter in zip(arguments, self.kernel.params, strict=False)
                    if not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
                ]
                looked_at.setdefault(self.name, set()).add((*key, *sorted(options.items())))

            return launched

    for module, name in (
        (loss, "rows_kernel"), (loss, "select_kernel"), (statistics, "divergence_kernel"), (sampler, "sample_kernel"),
    ):  # fmt: skip
        Recorder(module, name)
    weights, uniforms = torch.ones(2, 9), torch.zeros(10, dtype=torch.float64)
    for rows in range(1, 9):
        models = [torch.zeros(rows, 64) for _ in range(4)]
        rest = (5, 1.2, 2.0, 1.0, 1.0, 1e-3, False, False, False, 64)
        loss.completion_loss_(*models[:3], weights[0, :rows], weights[1, :rows], None, *rest, models[3])
        statistics.position_divergence(*models[:2], 5, 64)
        sampler.contrastive_sample(*models[:2], uniforms[rows % 2 :][:rows], 0.5, 1.0, 5, 0.9, 0.0, False, 64)
    assert {name: len(keys) for name, keys in looked_at.items()} == dict.fromkeys(looked_at, 1)
    assert len(looked_at) == 4


def test_a_kernel_is_launched_on_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device; tensors on another would be read from there, or not at all."""
    entered: list[object] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        entered.append(tensor)
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    call = library._imported_when_called("tests.kernels.test_launch", "_what_is_entered")
    tensor = torch.zeros(1)
    assert call(tensor, entered) == [tensor]
    assert entered == [tensor, "left"]


def _what_is_entered(tensor: torch.Tensor, entered: list[object]) -> list[object]:
    return list(entered)
