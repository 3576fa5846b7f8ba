"""`pitools toy`: the command's options; the work is in `toys.experiment`, imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def toy(
    method: Annotated[
        str,
        typer.Option(
            help="pi-id, cloning, freeflow, prediction, dmd, meanflow, consistency, progressive or regression; "
            "several, with commas between, are compared."
        ),
    ] = "pi-id",
    policy: Annotated[
        str, typer.Option(help="gm, dx, polynomial or shortcut, of pi-id and cloning; several are compared.")
    ] = "gm",
    target: Annotated[
        str, typer.Option(help="ring8, grid25, spiral, moons, checkerboard or digits: each has an exact teacher.")
    ] = "grid25",
    nfe: Annotated[str, typer.Option(help="Network evaluations for a sample; several, with commas between.")] = "1,2,4",
    components: Annotated[
        int | None, typer.Option(help="K of the GM policy.  [default: 64; digits 32]", show_default=False)
    ] = None,
    grid_points: Annotated[int, typer.Option(help="N of the DX grid, and coefficients of the polynomial.")] = 10,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Optimiser steps for each student.  [default: 1000; digits 700; flow maps 4000; digits 2000]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the students; the evaluation's noises are always the same.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto: the GPU if there is one.")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write, new or empty.  [default: runs/toy-TARGET-METHOD-POLICY]", show_default=False
        ),
    ] = None,
) -> None:
    """Distil an exact teacher into few-step students, and show what happened.

    The teacher's velocity is known in closed form; a small network learns, by π-ID and without data, to answer
    with a policy; or by FreeFlow, its two halves or a rival, to jump from noise to data at once. The folder then
    holds a table, pictures, metrics and weights. Ctrl-C stops the training early and keeps what is done.

    Examples:

        pitools toy --policy gm

        pitools toy --policy gm,dx,shortcut --nfe 1

        pitools toy --target digits

        pitools toy --method pi-id,freeflow,regression --nfe 1 --target ring8
    """
    from rich.console import Console

    from pitools.training import DivergenceError
    from toys.experiment import Experiment, run

    try:
        experiment = Experiment.resolve(
            methods=[name.strip() for name in method.split(",")],
            policies=[name.strip() for name in policy.split(",")],
            target=target,
            nfes=_integers("--nfe", nfe),
            components=components,
            grid_points=grid_points,
            steps=steps,
            seed=seed,
            device=device,
            out=out,
        )
    except ValueError as error:
        raise _failed(error) from None
    try:
        interrupted = run(experiment, Console())
    except (DivergenceError, OSError) as error:
        raise _failed(error) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if interrupted:
        raise typer.Exit(130)


def _failed(error: Exception, code: int = 2) -> typer.Exit:
    typer.secho(f"Error: {error}", fg="red", err=True)
    return typer.Exit(code)


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes whole numbers with commas between, such as 1,2,4, not {text!r}") from None


def rivals(
    stage: Annotated[
        str, typer.Argument(help="search, report, or why: FreeFlow's best with one thing changed.", show_default=False)
    ],
    target: Annotated[str, typer.Option(help="Targets, with commas between.")] = "grid25,ring8,digits",
    out: Annotated[Path, typer.Option(help="Folder of the ledger, runs.jsonl, and of all that is made of it.")] = Path(
        "runs/rivals"
    ),
    runs: Annotated[int, typer.Option(help="Settings that a search tries for each method and target.", min=1)] = 8,
    calls: Annotated[
        int | None,
        typer.Option(
            help="The most that a method may ask the teacher.  [default: 1,024,000; digits 128,000]",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(help="What a search wrote, best.json.  [default: the one that is shipped]", show_default=False),
    ] = None,
) -> None:
    """Compare FreeFlow with its two halves, π-ID and its rivals, at equal calls of the teacher.

    `search` looks for the settings of FreeFlow, of prediction and of correction alone, on seeds of its own. `report`
    trains every method on three fresh seeds, and writes tables and pictures. Both go on where they were stopped.

    Examples:

        pitools rivals search --target grid25 --runs 8

        pitools rivals report

        pitools rivals report --settings runs/rivals/best.json --target grid25

        pitools rivals why --target grid25
    """
    from rich.console import Console

    from pitools.training import DivergenceError
    from toys.rivals import STAGES, run

    try:
        if stage not in STAGES:
            raise ValueError(f"unknown stage {stage!r}; the stages are {', '.join(STAGES)}")
        run(stage, [name.strip() for name in target.split(",")], out, runs, calls, settings, Console())
    except (DivergenceError, OSError, ValueError) as error:
        raise _failed(error) from None
    except KeyboardInterrupt:
        typer.echo("Stopped. Run the same command again to go on.")
        raise typer.Exit(130) from None


def claims(
    only: Annotated[str | None, typer.Option(help="Names of claims, with commas between.  [default: all]")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Minutes instead of hours, with students that have hardly been trained.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of CLAIMS.md, and of the students behind it.")] = Path(
        "runs/claims"
    ),
    processes: Annotated[int, typer.Option(help="Claims that are measured at the same time.", min=1)] = 2,
) -> None:
    """Measure the papers' claims at laptop scale, and say which hold.

    Each is a few numbers, measured on several seeds, of which the claim says where they should lie. Stopped, the same
    command goes on where it was.

    Examples:

        pitools claims --quick

        pitools claims

        pitools claims --only gm-beats-dx,push
    """
    from rich.console import Console

    from toys.verdicts import run

    console, names = Console(), [] if only is None else [name.strip() for name in only.split(",")]
    out = out / "quick" if quick else out
    try:
        findings = run(names, quick, out, processes, console)
    except (OSError, ValueError) as error:
        raise _failed(error) from None
    except KeyboardInterrupt:
        typer.echo("Stopped. Run the same command again to go on.")
        raise typer.Exit(130) from None
    held = sum(finding.verdict == "holds" for finding in findings)
    console.print(
        f"{held} of {len(findings)} claims hold here. Wrote {out}/ (CLAIMS.md, claims.json).", highlight=False
    )


def factorisations(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Of the teacher, as of `pitools distill`: a TOML file, or one that is shipped.", show_default=False
        ),
    ],
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change a key of the recipe: section.key=value; may be repeated.", metavar="KEY=VALUE"
        ),
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A tiny random network and stub data, in seconds on a CPU.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(help="Steps of Adam; the paper takes 4000.  [default: 1000; with --tiny 4]", show_default=False),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Noises, each with a condition of the data and policies of its own.")
    ] = 8,
    components: Annotated[int, typer.Option(help="K of each mixture.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Adam's, brought to 0 along a cosine.")] = 0.03,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write, new or empty.  [default: the run's, -factorisations]", show_default=False),
    ] = None,
) -> None:
    """Compare what one mixture of a GM policy covers: a pixel, a patch or a single element of a latent.

    With no network: the numbers of the mixtures themselves are fitted by π-ID to a recipe's teacher, from one noise and
    one condition each, over all of t. The teacher is the one that `pitools distill` has trained, and is trained where
    there is none. The folder then holds a table, the loss curves, and what the teacher and each policy draw.
    Ctrl-C stops the fitting early and keeps what is done.

    Examples:

        pitools factorisations toys/digits.toml

        pitools factorisations toys/digits.toml --samples 16 --steps 4000 --set run.seed=1

        pitools factorisations scale/flux-gm-4nfe.toml --samples 1 --steps 4000

        pitools factorisations scale/qwen.toml --tiny
    """
    import logging

    from rich.console import Console

    from pitools.training.config import RecipeError, find_recipe, override, read_recipe
    from pitools.training.errors import CheckpointError, DivergenceError, Stopped
    from pitools.training.recipe import plan
    from toys.experiment import free_folder
    from toys.factorisations import Study, run

    # On import it warns of a kernel that nothing but 4-bit inference on a CPU would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    console = Console()
    try:
        table = override(read_recipe(find_recipe(recipe, ["toys", "scale"])), assign or [])
        planned = plan(table, Path(recipe).stem, tiny)
        folder = free_folder(out, planned.out.with_name(f"{planned.out.name}-factorisations"))
        study = Study(steps if steps is not None else 4 if tiny else 1000, samples, components, learning_rate)
    except ValueError as error:
        raise _failed(error) from None
    if tiny:
        console.print("A tiny random network and stub data: nothing here is a result.", highlight=False)
    try:
        stopped = run(planned, study, folder, console)
    except RecipeError as error:
        raise _failed(error) from None
    except (CheckpointError, DivergenceError, ImportError, OSError) as error:
        raise _failed(error, 1) from None
    except Stopped as stop:  # while the teacher was trained
        console.print(f"{stop}, and saved. Run the same command again to go on.", highlight=False)
        raise typer.Exit(128 + stop.signal) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if stopped is not None:
        raise typer.Exit(128 + stopped)


def accuracy(
    out: Annotated[Path, typer.Option(help="The picture to write; a .json of the same name goes beside it.")] = Path(
        "accuracy.png"
    ),
    factors: Annotated[int, typer.Option(help="Mixtures to average over.", min=1)] = 512,
    spread: Annotated[float, typer.Option(help="Standard deviation of the means, per channel.", min=0)] = 0.5,
    std: Annotated[float, typer.Option(help="Standard deviation of a component.", min=0)] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the mixtures.")] = 0,
) -> None:
    """Plot the error of every method against its evaluations of a policy.

    Mixtures like a trained student's, 8 components in 16 channels, are rolled out by each method with coarse and fine
    grids, or tolerances, and compared with a very fine roll-out.

    Examples:

        pitools accuracy

        pitools accuracy --spread 0.7 --std 0.05 --out narrow.png
    """
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from toys.accuracy import SEGMENTS, curves, fewest, plot

    console = Console()
    if not out.parent.is_dir():
        typer.secho(f"Error: --out {out}: there is no folder {out.parent}", fg="red", err=True)
        raise typer.Exit(2)
    with console.status("rolling out"):
        points = curves(factors, spread, std, seed)
    plot(points, out)
    out.with_suffix(".json").write_text(json.dumps([asdict(point) for point in points], indent=1), encoding="utf-8")
    for segment in SEGMENTS:
        table = Table("method", title=f"Evaluations to an error of, {segment.title}", title_justify="left")
        errors = (1e-2, 1e-3, 1e-4)
        for error in errors:
            table.add_column(f"{error:g}", justify="right")
        for method in dict.fromkeys(point.method for point in points):
            found = [fewest(points, segment.title, method, error) for error in errors]
            table.add_row(method, *("-" if count is None else f"{count:.4g}" for count in found))
        console.print(table)
    console.print(f"Wrote {out} and {out.with_suffix('.json')}.", highlight=False)
