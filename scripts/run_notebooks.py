"""Run the notebooks of docs/notebooks on the real all-MiniLM-L6-v2, and keep what they print; some minutes.

    pip install nbclient ipykernel; python scripts/run_notebooks.py [NAME ...]

Needs the checkpoint that ``scripts/demo.sh`` installs, and openvino. In the folder in which they run it lies under its
name on the Hub, so that nothing is downloaded. A cell that fails stops it, and the file stays as it was. What a cell
prints to standard error, such as progress, is left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from qdq_surgery.cli.demo.files import checkpoint
from qdq_surgery.onnx_file.writer import replace_text

try:
    import nbformat
    from nbclient import NotebookClient
except ImportError as error:
    sys.exit(f"{error.name} is not installed; pip install nbclient ipykernel")

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
NAME = "sentence-transformers/all-MiniLM-L6-v2"


def run(path: Path) -> None:
    """Run a notebook in an empty folder with the checkpoint, and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, NAME)
        model.parent.mkdir()
        model.symlink_to(checkpoint().resolve(), target_is_directory=True)
        # The kernel's own: widths of tables, and no bars for loading.
        os.environ.update(COLUMNS="100", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
        NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    notebook.metadata.language_info = {"name": "python"}
    replace_text(path, nbformat.writes(notebook) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="all if left out")
    names = parser.parse_args().names or sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    for name in names:
        print(name)
        run(FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
