"""The commands of the backbones of `scale`: `pitools cache`, `pitools export` and `pitools sample`.

Loaded with every `pitools`: what is heavy is imported within a command.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help='Where to compute: "auto", "cpu" or "cuda".')]


class Dtype(StrEnum):
    """Of what is written or computed in."""

    float32 = "float32"
    bf16 = "bf16"


class Quantisation(StrEnum):
    """Of a base's linear layers."""

    none = "none"
    nf4 = "nf4"
    int8 = "int8"
    fp8 = "fp8"


def cache(
    recipe: Annotated[
        str, typer.Argument(help="A recipe whose [backbone] and [data] say what to encode, and into which folder.")
    ],
    prompts: Annotated[
        str | None,
        typer.Option(help="A file (text, JSON, JSON lines, CSV, parquet) or a Hugging Face dataset of prompts."),
    ] = None,
    images: Annotated[bool, typer.Option("--images", help="Also encode the images that the list names.")] = False,
    images_from: Annotated[
        Path | None,
        typer.Option(help="For a DiT, in the place of prompts: a folder with a subfolder of images for each class."),
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="For a DiT: hub id or folder of its VAE; by default stabilityai/sd-vae-ft-ema.")
    ] = None,
    column: Annotated[str, typer.Option(help="The prompts' column or key.")] = "prompt",
    image_column: Annotated[str, typer.Option(help="The images' column or key.")] = "image",
    null_prompt: Annotated[str, typer.Option(help="What stands for no prompt in a teacher's guidance.")] = "",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many prompts.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts, or images of classes, encoded at once.")] = 8,
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key of the recipe.", metavar="KEY=VALUE")
    ] = None,
    device: Device = "auto",
) -> None:
    """Encode prompts or classes, and images for data-dependent distillation, once for all runs.

    Interrupted, the same command goes on where it was. Data-free recipes need no images: prompts alone, or for a DiT
    nothing but the recipe.

    Examples:

        pitools cache scale/qwen-datafree.toml --prompts prompts.txt

        pitools cache scale/qwen.toml --prompts captions.jsonl --images

        pitools cache scale/flux-gm-4nfe.toml --prompts captions.parquet --column caption --images

        pitools cache scale/dit-gm-fm-k32.toml --images-from imagenet/train --batch 64
    """
    with _told("Stopped. Run the same command again to go on."):
        from rich.console import Console

        from pitools.training.checkpoint import check_writable
        from pitools.training.config import find_recipe, override, read_recipe
        from pitools.training.recipe import plan
        from scale.backbone import DTYPES, TextToImage
        from scale.data import CachedSamples
        from scale.dit import DiT
        from scale.encoders import IMAGENET_VAE, build_cache, build_class_cache

        planned = plan(override(read_recipe(find_recipe(recipe, ["toys", "scale"])), assign or []), Path(recipe).stem)
        backbone, data = planned.backbone, planned.data
        if not isinstance(data, CachedSamples):
            raise ValueError(f'{recipe} trains on no cache; it must have [data] with name = "cache"')
        if isinstance(backbone, DiT):
            _refuse(recipe, "is for classes", {"--prompts": prompts, "--images": images}, "--images-from FOLDER")
        elif isinstance(backbone, TextToImage):
            _refuse(recipe, "is for prompts", {"--images-from": images_from, "--vae": vae}, "--prompts and --images")
        else:
            raise ValueError(f"{recipe} has a {type(backbone).__name__}, for which nothing can be encoded here")
        students = planned.recipe.students
        bound = [name for name, section in students.items() if not section.objective.data_free]
        if bound and not images and images_from is None:
            missing = "--images-from FOLDER" if isinstance(backbone, DiT) else "--images, and images in the list"
            raise ValueError(
                f"{recipe} trains from images: add {missing}; or train without, "
                f"with --set students.{bound[0]}.objective.data_free=true"
            )
        check_writable(data.folder)
        console, computing = Console(), _device(device)
        if isinstance(backbone, DiT):
            built = build_class_cache(
                backbone.classes,
                data.folder,
                images=images_from,
                height=data.height,
                width=data.width,
                channels=data.channels,
                vae=vae or IMAGENET_VAE,
                batch_size=batch,
                device=computing,
                console=console,
            )
        else:
            if prompts is None:
                raise ValueError(f"{recipe} is for prompts; name a list of them with --prompts")
            built = build_cache(
                backbone.weights,
                backbone.kind,
                prompts,
                data.folder,
                images=images,
                height=data.height,
                width=data.width,
                batch_size=batch,
                device=computing,
                dtype=DTYPES[backbone.dtype],
                null_prompt=null_prompt,
                column=column,
                image_column=image_column,
                revision=backbone.revision,
                limit=limit,
                console=console,
            )
        console.print(f"Wrote {len(built):,} samples to {data.folder}/", markup=False, highlight=False, soft_wrap=True)


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, or that of one of its students.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write; by default RUN/export.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge LoRA into the base, and write that, too.")] = False,
    last: Annotated[
        bool, typer.Option("--last", help="The newest checkpoint's own weights, not the averaged ones.")
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights that are written.")] = Dtype.bf16,
) -> None:
    """Write a trained student as an adapter in the published format.

    Examples:

        pitools export runs/qwen

        pitools export runs/qwen/gm-4nfe --out my-adapter --dtype float32

        pitools export runs/qwen --merge --out my-model
    """
    with _told():
        from rich.console import Console

        from pitools.training.checkpoint import check_writable
        from scale.backbone import DTYPES
        from scale.export import export as write
        from scale.export import found_student

        folder = run / "export" if out is None else out
        check_writable(folder)
        write(run, folder, average=not last, merge=merge, dtype=DTYPES[dtype.value])
        Console().print(f"Wrote {folder}/", markup=False, highlight=False)
        trained = found_student(run)[0].recipe.backbone
        if trained.get("weights") == "tiny":
            option = "--vae tiny" if trained["name"] == "dit" else "--base tiny"
            Console().print(f"Of a tiny random network: `pitools sample` takes it with {option}.", highlight=False)


def sample(
    target: Annotated[str, typer.Argument(help="A run, an adapter's folder or file, or its hub id.")],
    prompt: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    label: Annotated[list[int] | None, typer.Option(help="Of a DiT, a class; may be repeated.")] = None,
    nfe: Annotated[int | None, typer.Option(min=1, help="Network evaluations; by default the trained ones.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Of the adapter.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of the base's pipeline, or tiny; by default the usual one."),
    ] = None,
    vae: Annotated[str | None, typer.Option(help="Of a DiT: hub id or folder of an AutoencoderKL, or tiny.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.")] = None,
    per_prompt: Annotated[int, typer.Option(min=1, help="Images for each prompt or label.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the first image; each has its own.")] = 0,
    renoise: Annotated[float, typer.Option(min=0, help="Strength of fresh noise between steps; 0 is the ODE.")] = 0.0,
    best_of: Annotated[
        int | None, typer.Option(min=1, help="Draw so many for each image, and write the one that --scorer likes best.")
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            help="A function (images, prompts or labels) -> a score for each, or clip:MODEL.", metavar="MODULE:FUNCTION"
        ),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Embedded scale, or a flow map's strength; by default the trained one.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Allow guidance and steps that it was not trained for.")
    ] = False,
    quantise: Annotated[
        Quantisation | None, typer.Option(help="The base's linear layers; by default the run's, or none.")
    ] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep on the GPU only what computes: slower, in less memory.")
    ] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the base; by default bf16, or the run's.")] = None,
    device: Device = "auto",
    out: Annotated[
        Path, typer.Option(help="The folder to write, over images that it may have of an earlier time.")
    ] = Path("samples"),
) -> None:
    """Sample images with a distilled student.

    Examples:

        pitools sample runs/qwen --prompt "a red fox in the snow" --nfe 4

        pitools sample Lakonik/pi-Qwen-Image --subfolder gmqwen_k8_piid_4step --prompt "a red fox" --prompt "an owl"

        pitools sample runs/dit-gm-repa-k32 --label 207 --label 88 --per-prompt 4

        pitools sample my-adapter --prompt "a red fox" --width 1536 --height 1024 --per-prompt 4 --quantise nf4

        pitools sample runs/qwen --prompt "a red fox" --best-of 16 --scorer taste:score

    where taste.py, in the current folder, says what is better, of PIL images and the prompt or label of each:

        def score(images, asked): return [image.convert("L").resize((1, 1)).getpixel((0, 0)) for image in images]
    """
    with _told():
        from rich.console import Console

        from pitools.evaluation.scorers import load_scorer
        from pitools.training.checkpoint import check_writable
        from scale.best import Search
        from scale.classes import sample_classes
        from scale.data import check_size
        from scale.encoders import IMAGENET_VAE
        from scale.pipelines import sample_images
        from scale.sampling import classes_with, pipeline_with

        # Before a large base is loaded.
        check_writable(out)
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None:
                check_size(name, pixels)
        console = Console()
        if (prompt is None) == (label is None):
            raise ValueError("give --prompt, or --label for a DiT, and not both")
        if (best_of is None) != (scorer is None):
            raise ValueError("--best-of N needs --scorer MODULE:FUNCTION to choose by, and the other way round")
        search = None
        if best_of is not None and scorer is not None:
            search = Search(best_of, load_scorer(scorer, _device(device)), scorer)
        if label is not None:
            if any(value is not None for value in (height, width, base)):
                raise ValueError("--height, --width and --base are for prompts; a DiT has its own size")
            classes = classes_with(
                target,
                subfolder=subfolder,
                vae=vae or IMAGENET_VAE,
                device=_device(device),
                nfe=nfe,
                guidance=guidance,
                force=force,
                console=console,
            )
            sample_classes(
                classes,
                label,
                nfe=nfe,
                seed=seed,
                per_label=per_prompt,
                renoise=renoise,
                guidance=guidance,
                force=force,
                out=out,
                console=console,
                search=search,
            )
            return
        pipe = pipeline_with(
            target,
            subfolder=subfolder,
            base=base,
            quantise=None if quantise is None else quantise.value,
            offload=offload,
            dtype=None if dtype is None else dtype.value,
            device=_device(device),
            nfe=nfe,
            guidance=guidance,
            force=force,
            console=console,
        )
        sample_images(
            pipe,
            prompt or [],
            nfe=nfe,
            seed=seed,
            height=height,
            width=width,
            per_prompt=per_prompt,
            renoise=renoise,
            guidance=guidance,
            force=force,
            out=out,
            console=console,
            search=search,
        )


@contextmanager
def _told(stopped: str = "Stopped.") -> Iterator[None]:
    """Within it, what a user can mend is told in one line: exit code 2 for a bad request, 1 for what went wrong.

    stopped: what Ctrl-C is answered with.
    """
    import logging
    import warnings

    # On import it warns of a kernel that nothing but 4-bit inference on a CPU would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # What libraries tell each other's programmers.
    warnings.filterwarnings("ignore", module=r"(diffusers|huggingface_hub|transformers)\.")
    try:
        from pitools.training.errors import CheckpointError

        yield
    except ValueError as error:  # a RecipeError, too
        raise _failed(error, 2) from None
    except (CheckpointError, ImportError, OSError) as error:
        raise _failed(error, 1) from None
    except KeyboardInterrupt:
        typer.echo(stopped, err=True)
        raise typer.Exit(128 + signal.SIGINT) from None


def _failed(error: Exception, code: int) -> typer.Exit:
    typer.secho(f"Error: {' '.join(str(error).split())}", fg="red", err=True)  # the hub's are of several lines
    return typer.Exit(code)


def _refuse(recipe: str, kind: str, options: Mapping[str, object], instead: str) -> None:
    """A `ValueError` for options that another kind of recipe has."""
    for name, value in options.items():
        if value:
            raise ValueError(f"{recipe} {kind}, and takes no {name}; use {instead}")


def _device(name: str) -> str:
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu" or "cuda", got {name!r}')
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError('device is "cuda", and torch sees no GPU; use "auto" or "cpu"')
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
