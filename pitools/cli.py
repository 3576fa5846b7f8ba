"""The command line. Commands come from entry points, so that nothing heavy loads before it is needed."""

from __future__ import annotations

import os
import sys
import time
from importlib.metadata import entry_points, version
from pathlib import Path
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

    from rich.console import Console

    from pitools.training.config import RecipeError, find_recipe, override, read_recipe
    from pitools.training.distillation import distill as run
    from pitools.training.dry_run import describe
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


@app.command()
def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...",
            help="Runs of `pitools distill`, students in them, or folders of images.",
            show_default=False,
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            help="data (held out), teacher, a folder of images, or an .npz file with mu and sigma.  "
            "[default: data, for runs]"
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What looks at the images: digits, inception:FILE, or MODULE:FUNCTION.  [default: the data's own]",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=2, help="Images of each target.  [default: what a run's recipe says, all of a folder]", metavar="N"
        ),
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(help="Also score images by their prompts: clip:MODEL, or MODULE:FUNCTION; may be repeated."),
    ] = None,
    patch: Annotated[
        int | None, typer.Option(min=1, metavar="PIXELS", help="Also compare crops of the middle of this side.")
    ] = None,
    k: Annotated[
        int | None,
        typer.Option(min=1, help="Neighbours; by default 3 for precision and recall, 5 for density and coverage."),
    ] = None,
    subset: Annotated[
        int, typer.Option(min=2, help="Images of each set, at most, for what compares every two of them.")
    ] = 10_000,
    seed: Annotated[int, typer.Option(help="Of what is drawn for that. Samples have noises that no seed changes.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images that are looked at at once.")] = 64,
    save_reference: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Keep mu and sigma of the reference, to be named with --reference."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: the GPU if there is one.")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write.  [default: RUN/evaluation-REFERENCE, runs/evaluation-... for several]"),
    ] = None,
) -> None:
    """Measure samples as publications do: a table, JSON, a picture of samples, and a page that compares them.

    Fréchet and kernel distance (FID, KID), Inception Score, precision, recall, density, coverage and diversity, of
    students drawn anew from fixed noises, or of folders of images.

    Examples:

        pitools evaluate runs/digits

        pitools evaluate runs/digits runs/digits-freeflow --reference teacher

        pitools sample runs/dit-gm-repa-k32 --label 207 --per-prompt 50 --out dogs

        pitools evaluate dogs --reference imagenet/n02099601 --features inception:inception-2015-12-05.pt

        pitools evaluate mine theirs --reference teacher-images --features inception:inception-2015-12-05.pt
        --patch 299 --scorer clip:openai/clip-vit-large-patch14
    """
    import logging

    import torch
    from rich.console import Console

    from pitools.evaluation.evaluate import Request
    from pitools.evaluation.evaluate import evaluate as run
    from pitools.training.errors import CheckpointError, DivergenceError

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as in `distill`
    try:
        if save_reference is not None and save_reference.suffix != ".npz":
            raise ValueError(f"--save-reference {save_reference} must end in .npz")
        request = Request(
            targets,
            torch.device(_device(device)),
            reference=reference,
            features=features,
            samples=samples,
            patch=patch,
            k=k,
            batch=batch,
            subset=subset,
            seed=seed,
            scorers=scorer or [],
            out=out,
            save_reference=save_reference,
        )
        run(request, Console())
    except ValueError as error:  # a RecipeError, too
        raise _failed(error, 2) from None
    except (CheckpointError, DivergenceError, ImportError, OSError) as error:
        raise _failed(error, 1) from None
    except KeyboardInterrupt:
        typer.echo("Stopped.", err=True)
        raise typer.Exit(130) from None


@app.command()
def bench(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto: the GPU if there is one.")] = "auto",
    only: Annotated[
        str | None,
        typer.Option(help="rollouts, velocity, backward, training, sampling; several with commas.  [default: all]"),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write everything to this file.", metavar="FILE")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few repetitions: sooner done, and less exact.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Time nothing; say which path each kind of request takes, and why.")
    ] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="Next to no data, for tests.", hidden=True)] = False,
) -> None:
    """Time policies: fused roll-outs against plain ones, in the same run.

    Roll-outs, velocities, gradients, a training step and sampling, at the shapes of DiT-XL/2, FLUX and Qwen-Image, and
    of points in the plane. Times mean little alone: look at the ratios, and at the machine's ceilings beside them.

    Examples:

        pitools bench

        pitools bench --only rollouts,training --json bench.json

        pitools bench --quick --device cpu

        pitools bench --explain
    """
    import logging

    import torch
    from rich.console import Console

    from pitools.bench import TINY, chosen, run
    from pitools.bench import explain as answers
    from pitools.bench.parts import Settings
    from pitools.bench.report import as_json, as_json_of_answers, show, show_answers, writable
    from pitools.training.errors import Stopped

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as in `distill`
    console = Console()
    try:
        where = torch.device(_device(device))
        parts = chosen(only)
        writable(json)
    except ValueError as error:
        raise _failed(error, 2) from None
    try:
        if explain:
            found = answers(where)
            show_answers(found, console)
            text = as_json_of_answers(found)
        else:
            settings = Settings(where, rounds=3 if quick else 7, steps=2 if quick else 6)
            if tiny:
                settings = Settings(where, TINY, rounds=2, shortest=1e-4, batch=4, steps=1)
            report = run(parts, settings, console)
            show(report, settings.rounds, console)
            text = as_json(report, settings.rounds)
        if json is not None:
            json.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _failed(error, 1) from None
    except Stopped as stop:  # within a training step
        raise typer.Exit(128 + stop.signal) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _device(name: str) -> str:
    """`auto` resolved; `ValueError` for a device that is not the CPU or a GPU that torch has here."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count()
    if name != "cpu" and not (kind == "cuda" and (index.isdigit() and int(index) < count if index else count)):
        raise ValueError(f"--device {name} is not here; use cpu, cuda (with a GPU), cuda:1, ... or auto")
    return name


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
    typer.secho(f"Error: {' '.join(str(error).split())}", fg="red", err=True)  # a library's are of several lines
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
