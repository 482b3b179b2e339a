"""What a diagnosis holds does not grow with the number of contexts."""

import os
import subprocess
import sys
from pathlib import Path

# Peak resident memory of a whole analysis and its summary, in KiB, over what the process had when it was warm.
CODE = """
import resource, sys
from pathlib import Path
from deepalign.data.contexts import Context
from deepalign.diagnose.bootstrap import BootstrapOptions
from deepalign.diagnose.positions import PositionOptions, analyse_positions
from deepalign.diagnose.report import group_report
from deepalign.diagnose.tokens import TokenNames
from tests.tiny import make_model, make_tokenizer

tokenizer = make_tokenizer([f"w{i}" for i in range(250)])
models = [make_model(seed, tokenizer, context=200).eval() for seed in (0, 1)]
options = PositionOptions(positions=128, top_n=10, top_k=200, batch_size=16)

def run(n, name):
    contexts = [Context([4, 7 + i % 9, 5], [], [8 + (i + t) % 30 for t in range(128)], i) for i in range(n)]
    path = Path(sys.argv[1]) / name
    record = analyse_positions(*models, tokenizer, contexts, path, options, progress=False)
    group_report(path, record, n, BootstrapOptions(resamples=20), TokenNames(tokenizer))
    return path.stat().st_size

run(64, "warm")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = run(int(sys.argv[2]), "many")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, size // 1024)
"""


def test_peak_memory_does_not_grow_with_the_number_of_contexts(tmp_path):
    """256 contexts write 27 MiB of records, 64 of which are read at a time; holding more of them would show."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, str(tmp_path), "256"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=200).stdout
    grown_kib, records_kib = map(int, printed.split())
    assert records_kib > 26 * 1024
    assert grown_kib < 8 * 1024
