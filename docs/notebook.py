"""Runs examples/quickstart.ipynb in an empty folder and stores its outputs in it: `make notebook`.

The page of a report is left out: it has 6 MB, and viewers of repositories do not run its scripts.
"""

import os
import tempfile
from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"
MAX_OUTPUT = 200_000


def main() -> None:
    """Writes the notebook anew."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"XDG_CACHE_HOME": f"{folder}/cache", "IPYTHONDIR": f"{folder}/ipython"}
        options = {"timeout": 900, "kernel_name": "python3", "resources": {"metadata": {"path": folder}}}
        nbclient.NotebookClient(notebook, record_timing=False, **options).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if len(data.get("text/html", "")) > MAX_OUTPUT:
                del data["text/html"]
            if "text/plain" in data:
                data["text/plain"] = data["text/plain"].replace(f"{folder}/", "")
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
