"""The wheel and the source distribution hold what they should, and the wheel works outside the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="an installed package has no sources to build"
)
LARGEST_WHEEL_MB = 5


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # the kernels as they are here, not compiled again: `make package` builds from nothing
    for native in (ROOT / "deepalign").glob("_native*.so"):
        (folder / "lib" / "deepalign").mkdir(parents=True)
        shutil.copyfile(native, folder / "lib" / "deepalign" / native.name)
    build = ["build", "--build-base", str(folder / "base"), "--build-lib", str(folder / "lib")]
    pack = ["bdist_wheel", "--bdist-dir", str(folder / "packed"), "--dist-dir", str(folder)]
    source = ["sdist", "--dist-dir", str(folder)]
    command = [sys.executable, "setup.py", "-q", *build, *pack, *source]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("deepalign-*.whl")
    return built


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"deepalign"}
    for expected in (
        "py.typed",
        "train/presets/zero3.json",
        "microworld/demo.yaml",
        "kernels/completion_loss/triton.py",
    ):
        assert f"deepalign/{expected}" in names
    missing = {str(path.relative_to(ROOT)) for path in (ROOT / "deepalign").rglob("*.py")} - set(names)
    assert not missing
    assert wheel.stat().st_size < LARGEST_WHEEL_MB * 1e6


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    code = (
        "import pathlib, sys, torch, deepalign\n"
        "assert pathlib.Path(deepalign.__file__).is_relative_to(sys.argv[1]), deepalign.__file__\n"
        "logits = torch.randn(3, 4, 999).bfloat16().unbind()\n"
        "student = logits[0].clone().requires_grad_()\n"
        "loss = deepalign.fused_completion_loss(student, *logits[1:], implementation=sys.argv[2]).loss\n"
        "loss.backward()\n"
        "expected = deepalign.fused_completion_loss(*logits, implementation='reference').loss\n"
        "torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)\n"
    )
    native = any(name.startswith("deepalign/_native") for name in zipfile.ZipFile(wheel).namelist())
    arguments = [str(target), "cpu" if native else "reference"]
    environment = os.environ | {"PYTHONPATH": str(target)}
    subprocess.run([sys.executable, "-P", "-c", code, *arguments], cwd=tmp_path, env=environment, check=True)
    script = target / "bin" / "deepalign"
    said = subprocess.run([sys.executable, "-P", script, "--help"], env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "usage: deepalign" in said.stdout


def test_the_source_distribution_can_be_built_from(wheel: Path) -> None:
    (built,) = wheel.parent.glob("deepalign-*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "deepalign/py.typed"} <= names
