"""Execute the notebooks and save them with their outputs, so that a reader sees the pictures before running anything.

    python notebooks/execute.py                                  all of them, in place, and their figures
    python notebooks/execute.py 1-mixtures --out elsewhere       one of them, and its figures, elsewhere

A notebook writes its pictures to `figures/` in the folder that it runs in. What would differ from one run to the next
and says nothing (timings, versions, warnings) is left out of what is saved, and pictures keep 256 colours, which makes
them smaller.
"""

from __future__ import annotations

import argparse
import base64
import io
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

HERE = Path(__file__).parent


def execute(path: Path, folder: Path) -> NotebookNode:
    """The notebook with its outputs, run in `folder`. `CellExecutionError` shows the cell that failed."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=None, record_timing=False, resources=resources).execute()
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                picture = smaller(base64.b64decode(output.data["image/png"]))
                output.data["image/png"] = base64.b64encode(picture).decode()
    for figure in (folder / "figures").glob("*.png"):
        figure.write_bytes(smaller(figure.read_bytes()))
    return notebook


def smaller(png: bytes) -> bytes:
    """The same picture in 256 colours; one that has no more comes back as it is."""
    picture = Image.open(io.BytesIO(png))
    if picture.mode == "P":
        return png
    small = io.BytesIO()
    few = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(small, "png", optimize=True)
    return small.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute the notebooks and save them with their outputs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 1-mixtures; all of them unless told")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to run and save in; notebooks/ unless told")
    chosen = parser.parse_args()
    names = chosen.names or sorted(path.stem for path in HERE.glob("*.ipynb"))
    missing = [name for name in names if not (HERE / f"{name}.ipynb").is_file()]
    if missing:
        parser.error(f"there is no notebook {missing[0]!r} in {HERE}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        start = time.perf_counter()
        notebook = execute(HERE / f"{name}.ipynb", chosen.out)
        nbformat.write(notebook, chosen.out / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
