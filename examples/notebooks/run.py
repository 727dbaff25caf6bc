"""Runs the notebooks of this folder and stores them with their outputs.

python examples/notebooks/run.py
"""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient


FOLDER = Path(__file__).parent
# One thread rounds alike wherever there are more. Progress bars, and the advice to install widgets for them, are of no use to
# a reader.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
SECONDS_A_CELL = 300


def run(path: Path) -> nbformat.NotebookNode:
    """
    The notebook with the outputs of a run from the top, in a kernel of this Python.

    Args:
        path (`Path`):
            The notebook.

    Returns:
        `nbformat.NotebookNode`: without times and other traces of the run.

    Raises:
        `nbclient.exceptions.CellExecutionError`: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        notebook,
        timeout=SECONDS_A_CELL,
        kernel_name="python3",
        resources=resources,
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env={**os.environ, **ENVIRONMENT})
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main():
    for path in sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(run(path), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
