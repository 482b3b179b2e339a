"""What a user meets first: the import, the command line, the public names."""

import subprocess
import sys

import pytest

import deepalign
from deepalign.cli import main


def test_import_needs_nothing_but_torch_and_is_quick_to_say_so():
    code = (
        "import sys, deepalign; deepalign.fused_completion_loss; deepalign.position_divergence\n"
        "heavy = {'transformers', 'deepspeed', 'accelerate', 'triton', 'yaml', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_alone_loads_not_even_torch():
    subprocess.run([sys.executable, "-c", "import sys, deepalign; assert 'torch' not in sys.modules"], check=True)


def test_public_names_exist():
    for name in deepalign.__all__:
        assert getattr(deepalign, name) is not None
    assert set(deepalign.__all__) <= set(dir(deepalign))
    with pytest.raises(AttributeError, match="has no attribute 'fused'"):
        _ = deepalign.fused


def test_the_command_line_refuses_in_one_message(capsys, tmp_path):
    assert main(["demo", "--seeds", "0", "--out", str(tmp_path / "demo")]) == 2
    assert capsys.readouterr().err == "error: seeds must be at least 1, got 0\n"
    assert main(["demo", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
