"""Runs examples/microworld.ipynb and stores what it shows, for who reads it without running it: `make notebook`.

Needs nbclient and ipykernel. Progress bars and warnings (stderr) are left out. The sources' hash is stored with the
outputs; a test compares it, so that what is shown is what these cells showed. A cell that fails leaves the file as it
was.
"""

import hashlib
import os
import tempfile
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "microworld.ipynb"


def sources_sha256(notebook: dict) -> str:
    """Of all code cells; `source` is a string in memory, a list of lines on disk."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\n\n".join(code).encode()).hexdigest()


def main() -> None:
    import nbformat
    from nbclient import NotebookClient

    from deepalign.data.files import write_text_atomic

    os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed prints, into a cell, that it found no accelerator
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": folder}}, record_timing=False).execute()
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    notebook["metadata"]["deepalign"] = {"sources_sha256": sources_sha256(notebook)}
    write_text_atomic(NOTEBOOK, nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    main()
