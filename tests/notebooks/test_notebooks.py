"""The notebooks run from nothing, write the figures that they promise, and use public names alone."""

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 600 / len(NOTEBOOKS)
"""For each, so that together they take under 10 minutes: of the processor's time, which is the wall time of one thread
whatever else runs."""

FIGURE_BYTES, ALL_BYTES = 150_000, 2_000_000

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str = "code") -> list[NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def seconds_of_children() -> float:
    """The processor's time of all processes that this one has started and waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def promised(path: Path) -> set[str]:
    """The files that a notebook's calls of `save(figure, "name")` are to write."""
    calls = (node for cell in cells(path) for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call))
    named = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "save"]
    return {f"{ast.literal_eval(call.args[1])}.png" for call in named}


def hidden_names(code: str) -> list[str]:
    """The names in `code` that begin with one underscore and are of a module or of an object."""
    found: list[str] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute):
            found.append(node.attr)
        elif isinstance(node, ast.Import):
            found += [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            found += [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    return [name for name in found if re.match(r"_(?!_)", name)]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[] if path.stem[0] == "1" else pytest.mark.slow) for path in NOTEBOOKS],
)
def test_a_notebook_runs_and_writes_its_figures(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    out = tmp_path / "out"
    command = [sys.executable, str(FOLDER / "execute.py"), path.stem, "--out", str(out)]
    begun = seconds_of_children()
    run = subprocess.run(command, capture_output=True, text=True, timeout=10 * SECONDS, check=False)
    assert run.returncode == 0, run.stderr
    assert seconds_of_children() - begun < SECONDS
    figures = {figure.name: figure.stat().st_size for figure in (out / "figures").iterdir()}
    assert set(figures) == promised(path)
    assert max(figures.values()) < FIGURE_BYTES


@every_notebook
def test_a_notebook_is_kept_with_the_outputs_of_one_run(path: Path) -> None:
    code = cells(path)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == len(promised(path)) > 0
    assert not any("execution" in cell.metadata for cell in code), "timings change with every run"


def test_the_figures_beside_the_notebooks_are_theirs_and_small() -> None:
    kept = list((FOLDER / "figures").iterdir())
    assert {figure.name for figure in kept} == set().union(*map(promised, NOTEBOOKS))
    assert sum(path.stat().st_size for path in (*kept, *NOTEBOOKS)) < ALL_BYTES


@every_notebook
def test_a_notebook_uses_public_names_alone(path: Path) -> None:
    assert not hidden_names("\n".join(cell.source for cell in cells(path)))


def test_hidden_names_are_found() -> None:
    code = "import toys._a\nfrom scale import _b\npi.integrate(x)\nx._c\nsuper().__init__()\nfrom pitools._d.e import f"
    assert sorted(hidden_names(code)) == ["_a", "_b", "_c", "_d"]


@every_notebook
def test_links_between_notebooks_and_into_the_repository_lead_somewhere(path: Path) -> None:
    prose = "\n".join(cell.source for cell in cells(path, "markdown"))
    for link in re.findall(r"\]\(([^)#]+)\)", prose):
        assert link.startswith("https://") or (FOLDER / link).exists(), link


def test_the_readme_names_every_notebook() -> None:
    readme = (FOLDER.parent / "README.md").read_text()
    assert all(f"](notebooks/{path.name})" in readme for path in NOTEBOOKS)
