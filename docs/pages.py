"""The pages that are made from the tree: reference, recipes, results and notebooks.

Sources are read, not imported: a new module, recipe or notebook is on the site as soon as it exists, and no torch is
needed. A docstring is prose, and stays it: formulas are set as they were written, and what it says of an argument,
`name: ...`, stands on a line of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import groupby
from pathlib import Path
from textwrap import dedent
from types import MappingProxyType

import griffe

ROOMS = ["types", "path", "mixture", "solvers", "policies", "kernels", "rollout", "guidance", "objectives", "sampling"]
ROOMS += ["metrics", "training"]
"""The rooms of `pitools` as they build on each other; what else there is follows by name."""


def write(root: Path, folder: Path) -> None:
    """`pages` into `folder`. Only what changed is touched, and what is no page any more goes."""
    made = dict(pages(root))
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in made:
            path.unlink()
    for name, text in made.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def pages(root: Path) -> Iterator[tuple[str, str]]:
    """(name of a file, its text) for the tree at `root`."""
    loader = griffe.GriffeLoader(search_paths=[root], allow_inspection=False)
    packages = {name: loaded(loader, name) for name in ("pitools", "toys", "scale")}
    links = targets(packages.values())
    core = packages["pitools"]
    rooms = [name for name in ROOMS if name in core.modules]
    rooms += sorted(name for name in core.modules if name not in rooms and not name.startswith("_"))
    for name in rooms:
        yield f"reference/{name}.md", reference(core.modules[name], links)
    for name in ("toys", "scale"):
        yield f"reference/{name}.md", reference(packages[name], links)
        yield f"recipes/{name}.md", recipes(root / name)
        if (root / name / "RESULTS.md").exists():
            yield f"results/{name}.md", included(f"{name}/RESULTS.md")
    yield "reference/index.md", contents(core, rooms, links)
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    yield "notebooks/index.md", "# Notebooks\n\n" + toctree(path.name for path in notebooks)
    for path in notebooks:
        yield f"notebooks/{path.name}", on_the_site(path.read_text())


def loaded(loader: griffe.GriffeLoader, name: str) -> griffe.Module:
    package = loader.load(name)
    assert isinstance(package, griffe.Module)
    return package


def on_the_site(notebook: str) -> str:
    """A notebook whose links to files of the tree lead to their pages."""
    notebook = re.sub(r"\]\(\.\./(\w+)/RESULTS\.md", r"](../results/\1.md", notebook)
    notebook = re.sub(r"\]\(\.\./(\w+)/([\w-]+)\.toml", r"](../recipes/\1.md#\2", notebook)
    return notebook.replace("](../README.md", "](../../start.md")


def included(name: str) -> str:
    return f"```{{include}} ../../../{name}\n:relative-images:\n```\n"


def recipes(folder: Path) -> str:
    """Each TOML file of a package, as it is shipped."""
    files = sorted(folder.glob("*.toml"))
    shown = "\n\n".join(
        f"## {path.stem}\n\n```{{literalinclude}} ../../../{folder.name}/{path.name}\n:language: toml\n```"
        for path in files
    )
    return f"# {folder.name}\n\n{shown}\n"


def contents(core: griffe.Module, rooms: list[str], links: Mapping[str, str]) -> str:
    """The reference's first page: the names that `import pitools` has, and the rooms."""
    names = [core[links[member.path][8:]] for member in core.members.values() if member.path in links]
    rows = [f"| {{py:obj}}`~{member.path}` | {first_sentence(member, links)} |" for member in names]
    return "\n".join(
        [
            "# Reference",
            "",
            "After `import pitools as pi`, these are `pi.GaussianMixture`, `pi.sample` and so on. Everything else is",
            "imported from its room.",
            "",
            "| | |",
            "| --- | --- |",
            *rows,
            "",
            toctree([*rooms, "toys", "scale"]),
        ]
    )


def toctree(names: Iterable[str]) -> str:
    return "\n".join(["```{toctree}", ":maxdepth: 1", "", *names, "```", ""])


def reference(module: griffe.Module, links: Mapping[str, str]) -> str:
    """A room's page: what it says of itself, then each of its files in the order in which the room imports them."""
    parts = [f"# {module.path}", "", *described(module, links)]
    if module.is_init_module:
        exported = dict.fromkeys(a.target_path.rsplit(".", 1)[0] for a in module.members.values() if a.is_alias)
        own = [name for name in module.modules if not name.startswith("_")]
        order = [path.rsplit(".", 1)[-1] for path in exported]
        for name in sorted(own, key=lambda name: (order.index(name) if name in order else len(order), name)):
            inner = module.modules[name]
            parts += ["", f"## {inner.name}", "", *described(inner, links)]
    return "\n".join(parts) + "\n"


def described(module: griffe.Module, links: Mapping[str, str]) -> Iterator[str]:
    yield from [f":::{{py:module}} {module.path}", ":::", "", prose(module, links)]
    for member in module.members.values():
        if shown(member) and not member.is_module:
            yield from ["", *entry(member, links, colons=5)]


def entry(item: griffe.Object, links: Mapping[str, str], colons: int) -> Iterator[str]:
    """A class with its members, a function or a value, as a directive of Sphinx's."""
    fence = ":" * colons
    inside = isinstance(item.parent, griffe.Class)
    options = []
    if isinstance(item, griffe.Class):
        kind, signature = "class", called(item.name, item.parameters, None, links) if item.parameters else item.name
    elif isinstance(item, griffe.Function):
        kind, signature = "method" if inside else "function", called(item.name, item.parameters, item.returns, links)
        options = [f":{name}:" for name in ("classmethod", "staticmethod") if name in item.labels]
    else:
        kind, signature = "attribute" if inside else "data", item.name
        if "property" in item.labels:
            kind = "property"
        if item.annotation is not None and str(item.annotation) != "TypeAlias":
            options = [f":type: {linked(item.annotation, links)}"]
    yield from [f"{fence}{{py:{kind}}} {signature}", *options, "", prose(item, links)]
    if isinstance(item, griffe.Class):
        for member in item.members.values():
            if shown(member):
                yield from ["", *entry(member, links, colons - 1)]
    yield fence


def shown(item: griffe.Object | griffe.Alias) -> bool:
    """Whether it is defined here, public, and has something to say."""
    return not item.is_alias and item.has_docstring and (not item.name.startswith("_") or item.name == "__call__")


def called(
    name: str, parameters: griffe.Parameters, returns: griffe.Expr | str | None, links: Mapping[str, str]
) -> str:
    """`name(a: int, *, b: float = 1.0) -> Tensor`."""
    kinds, texts = griffe.ParameterKind, []
    starred = False
    for parameter in parameters:
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is kinds.keyword_only and not starred:
            texts.append("*")
        starred |= parameter.kind in (kinds.keyword_only, kinds.var_positional)
        star = {kinds.var_positional: "*", kinds.var_keyword: "**"}.get(parameter.kind, "")
        annotation = f": {linked(parameter.annotation, links)}" if parameter.annotation is not None else ""
        default = f" = {parameter.default}" if parameter.default is not None and not star else ""
        default = " = ..." if "lambda" in default else default
        texts.append(star + parameter.name + annotation + default)
    return re.sub(
        r"\s+", " ", f"{name}({', '.join(texts)})" + (f" -> {linked(returns, links)}" if returns is not None else "")
    )


def linked(annotation: griffe.Expr | str, links: Mapping[str, str]) -> str:
    """An annotation whose names of this tree are whole paths, which Sphinx shows by their last part alone."""
    if isinstance(annotation, str):
        return annotation

    def text(part: griffe.Expr | str) -> str:
        path = links.get(part.canonical_path) if isinstance(part, griffe.ExprName) else None
        return str(part) if path is None else f"~{path}"

    return "".join(map(text, annotation.iterate(flat=True)))


def targets(packages: Iterable[griffe.Module]) -> dict[str, str]:
    """Where names lead: paths, also those of re-exports, `pi.name`, and classes that share their name with no other."""
    links: dict[str, str] = {}
    imported: dict[str, str] = {}
    classes: dict[str, list[str]] = {}
    queue = list(packages)
    while queue:
        module = queue.pop()
        for member in module.members.values():
            if member.is_alias:
                imported[member.path] = member.target_path
            elif member.is_module:
                queue.append(member)
            elif shown(member):
                links[member.path] = member.path
                if member.is_class:
                    classes.setdefault(member.name, []).append(member.path)
    links |= {name: paths[0] for name, paths in classes.items() if len(paths) == 1}
    for path, target in imported.items():
        while target in imported:
            target = imported[target]
        if target in links:
            links[path] = target
            if re.fullmatch(r"pitools\.\w+", path):
                links[f"pi{path[7:]}"] = target
    return links


def first_sentence(item: griffe.Object, links: Mapping[str, str]) -> str:
    text = item.docstring.value.split("\n\n")[0] if item.docstring else ""
    return inline(" ".join(re.split(r"(?<=\.)\s+(?=[A-Z])", text)[0].split()), links).replace("|", "\\|")


def prose(item: griffe.Object, links: Mapping[str, str]) -> str:
    """An object's docstring as Markdown."""
    names = {parameter.name for parameter in getattr(item, "parameters", ())} | set(item.members)
    return markdown(item.docstring.value if item.docstring else "", names, links)


def markdown(text: str, names: Set[str] = frozenset(), links: Mapping[str, str] = MappingProxyType({})) -> str:
    """A docstring as Markdown: paragraphs, a line for each of `names` that one describes, and blocks as written."""
    parts = []
    for as_written, blocks in groupby(re.split(r"\n\s*\n", text), key=lambda block: block.startswith((" ", ">>>"))):
        if as_written:
            block = dedent("\n\n".join(blocks))
            parts.append(f"```{{code-block}} {'pycon' if block.startswith('>>>') else 'none'}\n\n{block}\n```")
        else:
            parts += [paragraph(block, names, links) for block in blocks]
    return "\n\n".join(parts)


def paragraph(text: str, names: Set[str], links: Mapping[str, str]) -> str:
    def item(found: re.Match[str]) -> str:
        listed = found[1].split(", ")
        return "\0" + ", ".join(f"`{name}`" for name in listed) + ": " if names.issuperset(listed) else found[0]

    text = re.sub(r"\n(?=Raises )", "\0", re.sub(r"(?:^|\n|  )(\w+(?:, \w+)*): ", item, text))
    return "\\\n".join(inline(" ".join(line.split()), links) for line in text.split("\0") if line)


def inline(text: str, links: Mapping[str, str]) -> str:
    """Words with `code` and *stress* in them: nothing else is Markdown, and a name that has a page is a link."""

    def code(quoted: str) -> str:
        name = quoted.strip("`")
        return f"{{py:obj}}`{name} <{links[name]}>`" if name in links else quoted

    def word(plain: str) -> str:
        escaped = re.sub(r"([\\*_<$\[{#|~^])", r"\\\1", plain)
        return re.sub(r"(?<!\S)\\\*(\w[^*]*\w)\\\*(?!\w)", r"*\1*", escaped)

    parts = re.split(r"(`[^`]+`)", text)
    return "".join(code(part) if part[:1] == "`" else word(part) for part in parts)
