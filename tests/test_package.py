"""What a user meets first: the import, the command line, the public names."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import deepalign
from deepalign.cli import main


def test_import_needs_nothing_but_torch_and_is_quick_to_say_so():
    code = (
        "import sys, importlib.abc\n"
        "class NoTriton(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'triton': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoTriton())\n"
        "import deepalign; deepalign.fused_completion_loss; deepalign.position_divergence\n"
        "heavy = {'transformers', 'deepspeed', 'accelerate', 'triton', 'yaml', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_alone_takes_less_than_a_second_and_loads_not_even_torch():
    code = (
        "import sys, time; started = time.perf_counter(); import deepalign\n"
        "assert 'torch' not in sys.modules\n"
        "assert time.perf_counter() - started < 1"  # ten milliseconds
    )
    subprocess.run([sys.executable, "-c", code], check=True)


LAYERS = ({"kernels", "models", "data"}, {"sampling", "train"}, {"diagnose", "defenses"}, {"evaluate"}, {"microworld"})


def test_imports_flow_one_way():
    """A part imports from those before it; beside each other are only the three at the bottom."""
    rank = {part: i for i, layer in enumerate(LAYERS) for part in layer}
    package = Path(deepalign.__file__).parent
    against = []
    for path in package.rglob("*.py"):
        part = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                root, _, rest = module.partition(".")
                other = rest.split(".")[0]
                if root == "deepalign" and other != part and rank.get(other, -1) >= rank.get(part, len(LAYERS)):
                    against.append(f"{path.relative_to(package)}:{node.lineno} imports {module}")
    assert against == []
    assert set(rank) <= {path.stem for path in package.iterdir()}


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


def test_it_installs_without_a_compiler_and_says_what_serves(tmp_path):
    root = Path(deepalign.__file__).resolve().parent.parent
    if not (root / "setup.py").is_file():
        pytest.skip("an installed package has no sources to build")
    build = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path), "--build-lib", str(tmp_path / "lib")]
    left_out = subprocess.run(
        build, cwd=root, env=os.environ | {"DEEPALIGN_NO_NATIVE": "1"}, capture_output=True, text=True
    )
    assert "left out, as DEEPALIGN_NO_NATIVE asks" in left_out.stdout
    assert not list(tmp_path.rglob("*.so")) + list(tmp_path.rglob("*.o"))
    no_compiler = os.environ | dict.fromkeys(("CC", "CXX", "LDSHARED"), "no-such-compiler")
    built = subprocess.run(build, cwd=root, env=no_compiler, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "the native CPU kernels were not built; the eager reference implementation will serve" in built.stdout
    code = (
        "import torch, warnings, deepalign\n"
        "logits = torch.zeros(2, 9)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2): deepalign.base_favored_tokens(logits, logits, top_k=2)\n"
        "assert ['eager reference implementation' in str(w.message) for w in caught] == [True], caught\n"
        "try: deepalign.base_favored_tokens(logits, logits, top_k=2, implementation='cpu')\n"
        "except RuntimeError as error: print(error)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "lib")}
    ran = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "implementation 'cpu' cannot run: the native kernels were not built" in ran.stdout


def test_the_native_kernels_refuse_an_instruction_set_that_does_not_exist():
    code = "from deepalign.kernels.library import WHY_NO_NATIVE; print(WHY_NO_NATIVE)"
    environment = os.environ | {"DEEPALIGN_CPU_ISA": "sse9"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if "were not built" not in ran.stdout:
        assert "DEEPALIGN_CPU_ISA is sse9; expected one of" in ran.stdout
