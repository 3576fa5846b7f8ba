"""The command line. Commands come from entry points, so that nothing heavy loads before it is needed."""

from __future__ import annotations

from importlib.metadata import entry_points, version
from typing import Annotated

import typer

app = typer.Typer(
    name="pitools",
    help="Few-step flow models: policies, distillation and toy experiments with exact teachers.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pitools {version('pitools')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Few-step flow models: policies, distillation and toy experiments with exact teachers."""


for _command in entry_points(group="pitools.toys"):
    app.command(_command.name)(_command.load())


def main() -> None:
    """Entry point of the `pitools` script."""
    app()
