"""The documentation: what its pages say of the tree, and that the README's command builds it without a warning."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("griffe", reason='the documentation needs pip install -e ".[docs]"')

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import pages  # type: ignore[import-not-found]  # noqa: E402


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return dict(pages.pages(ROOT))


def test_every_module_recipe_and_result_has_its_place(made: dict[str, str]) -> None:
    reference = "\n".join(text for name, text in made.items() if name.startswith("reference/"))
    for package in ("pitools", "toys", "scale"):
        for path in (ROOT / package).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if module != "pitools" and not module.endswith("__main__"):
                assert f"{{py:module}} {module}\n" in reference
        for path in (ROOT / package).glob("*.toml"):
            assert f"{package}/{path.name}\n" in made[f"recipes/{package}.md"]
        assert (f"results/{package}.md" in made) == (ROOT / package / "RESULTS.md").exists()
    assert {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")} <= set(made)


def test_a_class_has_its_arguments_and_its_members(made: dict[str, str]) -> None:
    text = made["reference/mixture.md"]
    assert "{py:class} GaussianMixture(means: Tensor, log_weights: Tensor, variance: Tensor | float)\n" in text
    assert "{py:method} tempered(temperature: float) -> ~pitools.mixture.GaussianMixture\n" in text
    assert "_check_state" not in text
    assert "lambda" not in "".join(re.findall(r"\{py:.*", made["reference/objectives.md"]))


def test_formulas_stay_as_they_were_written() -> None:
    text = "A title.\n\n    a = b\n      + c    (Eq. 1)\n\n    d\n\nwhere"
    assert pages.markdown(text) == "A title.\n\n```{code-block} none\n\na = b\n  + c    (Eq. 1)\n\nd\n```\n\nwhere"


def test_each_argument_has_a_line() -> None:
    text = "x: one\n    and more.  t, t_src: times.\nthat: is prose.\nRaises `ValueError`."
    lines = pages.markdown(text, {"x", "t", "t_src"}).split("\\\n")
    assert lines == ["`x`: one and more.", "`t`, `t_src`: times. that: is prose.", "Raises `ValueError`."]


def test_prose_is_no_markup_and_names_are_links() -> None:
    assert pages.markdown("a * b * c_t < [x] $1$, a *prior*") == r"a \* b \* c\_t \< \[x] \$1\$, a *prior*"
    assert pages.markdown("see `A`, `B`", links={"A": "m.A"}) == "see {py:obj}`A <m.A>`, `B`"


def test_pages_are_touched_where_they_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "pages", lambda root: [("a/b.md", "1"), ("c.md", "2")])
    pages.write(ROOT, tmp_path)
    (tmp_path / "stale.md").write_text("")
    (tmp_path / "c.md").write_text("other")
    before = (tmp_path / "a/b.md").stat().st_mtime_ns
    pages.write(ROOT, tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*.md")) == ["b.md", "c.md"]
    assert (tmp_path / "a/b.md").stat().st_mtime_ns == before
    assert (tmp_path / "c.md").read_text() == "2"


@pytest.mark.parametrize("name", ["start", "extending"])
def test_python_of_the_written_pages_runs(name: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{name}.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        scope: dict[str, Any] = {}
        exec(block, scope)
        assert bool(scope["samples"].isfinite().all())


@pytest.mark.slow
def test_the_readmes_command_builds_a_site_that_needs_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason='the documentation needs pip install -e ".[docs]"')
    block = re.search(r"<!-- docs -->\n```sh\n.* && python (.*?) site\n```", (ROOT / "README.md").read_text())
    assert block is not None
    arguments = shlex.split(block[1])
    assert "-W" in arguments
    # A tree of its own, whose generated pages are not in the way of another build.
    for path in ROOT.iterdir():
        if path.name in ("pitools", "toys", "scale", "notebooks", "README.md", "CHANGELOG.md"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "docs").mkdir()
    for path in (ROOT / "docs").iterdir():
        if path.is_file():
            (tmp_path / "docs" / path.name).write_bytes(path.read_bytes())
    run = subprocess.run(
        [sys.executable, *arguments, "site"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr

    built = {path.relative_to(tmp_path / "site").as_posix(): path for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "start.html", "generated/reference/mixture.html", "generated/recipes/scale.html"} <= set(
        built
    )
    for name, path in built.items():
        text = path.read_text()
        assert not re.search(r'(?:src="|<link[^>]* href="|url\()(?:https?:)?//', text), f"{name} asks for something"
        names, linked = (len(re.findall(f'{link}<code class="xref py py-obj', text)) for link in ("", "<a [^>]*>"))
        assert names == linked, f"{name} has a name that leads nowhere"
    assert 'id="pitools.mixture.GaussianMixture.condition"' in built["generated/reference/mixture.html"].read_text()
