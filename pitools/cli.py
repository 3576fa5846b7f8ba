"""The command line. Commands come from entry points, so that nothing heavy loads before it is needed."""

from __future__ import annotations

import os
import sys
import time
from importlib.metadata import entry_points, version
from typing import Annotated, Any

import typer

PATIENCE = 10.0
"""Seconds for which another process than the first keeps an error to itself."""

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


for _command in (*entry_points(group="pitools.toys"), *entry_points(group="pitools.commands")):
    app.command(_command.name)(_command.load())


@app.command()
def distill(
    recipe: Annotated[
        str, typer.Argument(help="A TOML file, or one that is shipped, such as toys/digits.toml.", show_default=False)
    ],
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change a key of the recipe: section.key=value; may be repeated.", metavar="KEY=VALUE"
        ),
    ] = None,
    tiny: Annotated[
        bool,
        typer.Option("--tiny", help="The same job with a tiny random network and stub data, in seconds on a CPU."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the whole recipe, parameter counts and an estimate of memory.")
    ] = False,
) -> None:
    """Distil a teacher into few-step students, as a recipe says.

    Ctrl-C or SIGTERM saves first; the same command then goes on where it was. On several processes, start it with
    torchrun.

    Examples:

        pitools distill toys/digits.toml

        pitools distill toys/digits.toml --set training.steps=200 --set run.out=runs/short

        pitools distill toys/digits.toml --dry-run

        pitools distill scale/qwen.toml --tiny

        torchrun --nproc_per_node 2 -m pitools distill toys/digits.toml --set engine.parallel=fsdp2
    """
    import logging
    from pathlib import Path

    from rich.console import Console

    from pitools.training.config import RecipeError, find_recipe, override, read_recipe
    from pitools.training.distillation import describe
    from pitools.training.distillation import distill as run
    from pitools.training.errors import CheckpointError, DivergenceError, Stopped
    from pitools.training.recipe import plan

    # On import it warns of a kernel that nothing but 4-bit inference on a CPU would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    console = Console(quiet=not _first())
    try:
        path = find_recipe(recipe, ["toys", "scale"])
        planned = plan(override(read_recipe(path), assign or []), Path(recipe).stem, tiny)
        if tiny:
            console.print("A tiny random network and stub data: nothing here is a result.", highlight=False)
        if dry_run:
            console.print(describe(planned), markup=False, highlight=False, soft_wrap=True)
        else:
            run(planned, console)
    except RecipeError as error:
        raise _failed(error, 2) from None
    except (CheckpointError, DivergenceError, ImportError, OSError) as error:
        raise _failed(error, 1) from None
    except Stopped as stop:
        console.print(f"{stop}, and saved. Run the same command again to go on.", highlight=False)
        raise typer.Exit(128 + stop.signal) from None
    except Exception:
        _wait_for_the_first()
        raise


def _first() -> bool:
    """Whether this is the one process, or of those that torchrun started the first, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _wait_for_the_first() -> None:
    """Give the first process time to tell of an error, upon which torchrun ends the others.

    It ends all as soon as any has failed, and so another one must not be faster. Who is still here afterwards has an
    error of its own.
    """
    if not _first():
        time.sleep(PATIENCE)


def _failed(error: Exception, code: int) -> typer.Exit:
    _wait_for_the_first()
    typer.secho(f"Error: {error}", fg="red", err=True)
    return typer.Exit(code)


def main() -> None:
    """Entry point of the `pitools` script."""
    try:
        app()
    except SystemExit as stop:
        if not stop.code:
            leave()
        raise


def leave() -> None:
    """Leave a group of processes together, if there is one: who goes first takes its connections from the others.

    Only after a success: where one has failed, the others may never come.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
