"""The rooms' import order, the light import, and what every public name owes its reader."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import pitools
import toys

ROOT = Path(pitools.__file__).parent
# From the top down: a room imports from the rooms above it, never from below.
ROOMS = ["draws", "types", "path", "mixture", "expressiveness", "solvers", "policies", "kernels", "rollout", "guidance"]
ROOMS += ["objectives", "sampling", "metrics", "training", "evaluation", "bench", "cli"]
FOREIGN = {
    "pitools": {"toys", "scale", "diffusers", "peft", "transformers", "matplotlib"},
    "toys": {"scale", "diffusers", "peft"},
}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "pitools" and len(parts) > 1 else None


def test_every_room_has_its_place() -> None:
    present = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert present - {"__init__", "__main__"} <= set(ROOMS)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_up(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    for module in imported(path):
        other = room_of(module)
        if other is not None and other != room:
            assert ROOMS.index(other) < ROOMS.index(room), f"{path} imports {module}, which lies below it"
        assert module.split(".")[0] not in FOREIGN["pitools"], f"{path} imports {module}"


@pytest.mark.parametrize("path", sorted(Path(toys.__file__).parent.rglob("*.py")), ids=lambda p: p.stem)
def test_toys_stand_on_pitools_alone(path: Path) -> None:
    assert not {module.split(".")[0] for module in imported(path)} & FOREIGN["toys"]


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_import_is_light() -> None:
    heavy = python(
        "import sys, pitools, pitools.metrics; "
        "heavy = 'diffusers peft transformers matplotlib scipy sklearn torchdiffeq torchmetrics'.split(); "
        "print([name for name in heavy if name in sys.modules])"
    )
    assert heavy == "[]"


def test_the_import_adds_under_half_a_second_to_torchs() -> None:
    code = "import time, torch; a = time.perf_counter(); import pitools; print(time.perf_counter() - a)"
    assert min(float(python(code)) for _ in range(3)) < 0.5


def test_public_names_are_documented() -> None:
    for name, value in vars(pitools).items():
        if name.startswith("_") or inspect.ismodule(value):
            continue
        assert inspect.getdoc(value), f"pitools.{name} has no docstring"
        if inspect.isclass(value):
            for member, function in inspect.getmembers(value, inspect.isfunction):
                if not member.startswith("_"):
                    assert inspect.getdoc(function), f"pitools.{name}.{member} has no docstring"
