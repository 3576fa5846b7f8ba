"""From what `pitools sample` is given to a pipeline with a student: a run, or an adapter and the base it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console

from pitools.training.flow_maps import MapMember
from pitools.training.random import keyed_generator
from pitools.training.students import build_student
from scale.adapted import AdaptedPolicy, Base, computes_in
from scale.backbone import TextToImage, section_of
from scale.classes import PiDiTPipeline, strength_for
from scale.dit import DiT, DiTFlowMap, DiTPolicy
from scale.encoders import IMAGENET_VAE, image_encoder_for
from scale.export import found_student, student_weights, whole_student
from scale.pipelines import PiPipeline, pipeline_for
from scale.published import WEIGHTS, load_weights, purpose_of, trained_parameters
from scale.quantise import Quantisation
from scale.served import COMMAND, guidance_of, steps_of
from scale.whole import load_whole


def pipeline_with(
    target: str | Path,
    *,
    subfolder: str | None = None,
    base: str | None = None,
    quantise: Quantisation | None = None,
    dtype: Literal["bf16", "float32"] | None = None,
    device: torch.device | str = "cpu",
    offload: bool = False,
    nfe: int | None = None,
    guidance: float | None = None,
    force: bool = False,
    console: Console | None = None,
) -> PiPipeline:
    """The pipeline of the base, with the student of a run (its averaged weights) or of an adapter.

    target: a run's folder or a student's in it; else an adapter's folder, file or hub id, with `subfolder`.
    base: hub id or folder of the base's pipeline, or "tiny"; None for the run's own, or the adapter's usual one.
    quantise, dtype: of the base; None for the run's own, or none and bf16.  offload: see `pipeline_for`.
    nfe, guidance, force: what will be asked of it, which is refused before the base is loaded.
    Raises what `found_student`, `pipeline_for` and `load_adapter` raise, and `ValueError` for what is refused.
    """
    path = Path(target)
    if is_of_run(path):
        if subfolder is not None:
            raise ValueError(f"subfolder {subfolder!r} is of an adapter, and {path} is a run; name RUN/STUDENT instead")
        return _of_run(path, base, quantise, dtype, device, offload, nfe, guidance, force, console)
    purpose = purpose_of(target, subfolder)
    section = section_of(purpose.base)
    steps_of(purpose.schedule.nfe, nfe, force, elastic=section.elastic, words=COMMAND)
    guidance_of(purpose.guidance, guidance, force, words=COMMAND)
    tiny = base == "tiny"
    seeded = keyed_generator(0, "teacher weights")  # as `--tiny` draws them
    own = dtype or ("float32" if tiny else "bf16")
    pipe = pipeline_for(section.kind, base, own, device, quantise or "none", seeded, offload=offload)
    if tiny and console is not None:
        _tell_tiny(console)
    pipe.load_pi_adapter(target, subfolder)
    return pipe


def classes_with(
    target: str | Path,
    *,
    subfolder: str | None = None,
    vae: str = IMAGENET_VAE,
    device: torch.device | str = "cpu",
    nfe: int | None = None,
    guidance: float | None = None,
    force: bool = False,
    console: Console | None = None,
) -> PiDiTPipeline:
    """A student of the DiT and the VAE: of a run (its averaged weights), or as `scale.whole` and the hub have it.

    target, subfolder: as of `pipeline_with`.  vae: hub id or folder of an `AutoencoderKL`, or "tiny" for a stub.
    nfe, guidance, force: what will be asked of it, which is refused before the VAE is loaded.
    Raises what `found_student`, `load_whole` and `image_encoder_for` raise.
    """
    path = Path(target)
    if is_of_run(path):
        planned, member = found_student(path)
        if not isinstance(planned.backbone, DiT):
            raise ValueError(f"{path} is a run of a {type(planned.backbone).__name__}, which takes prompts, not labels")
        student = whole_student(planned, member, planned.backbone)
    else:
        student = load_whole(target, subfolder)
    steps_of(student.schedule.nfe, nfe, force, elastic=PiDiTPipeline.elastic, words=COMMAND)
    strength_for(student, guidance, force, words=COMMAND)
    network = cast(DiTPolicy | DiTFlowMap, student.network)
    network.eval().to(device)
    if vae != "tiny":
        return PiDiTPipeline(student, image_encoder_for(vae, device).vae)
    from scale.stubs import StubVAE

    if console is not None:
        console.print("A stub of a VAE: the images show nothing.")
    return PiDiTPipeline(student, StubVAE(network.transformer.config.in_channels).to(device))


def is_of_run(path: Path) -> bool:
    """Whether a path is a run's folder, or that of one of its students, and not an exported one."""
    of_student = (path.parent / "recipe.toml").is_file() and path.is_dir() and not (path / WEIGHTS).is_file()
    return (path / "recipe.toml").is_file() or of_student


def _of_run(
    path: Path,
    base: str | None,
    quantise: Quantisation | None,
    dtype: Literal["bf16", "float32"] | None,
    device: torch.device | str,
    offload: bool,
    nfe: int | None,
    guidance: float | None,
    force: bool,
    console: Console | None,
) -> PiPipeline:
    planned, member = found_student(path)
    backbone = planned.backbone
    if not isinstance(backbone, TextToImage) or isinstance(member, MapMember):
        raise ValueError(f"{path} is a run of a {type(backbone).__name__}, which takes no prompts")
    trained = planned.recipe.teacher.guidance.embedded
    steps_of(member.nfe, nfe, force, elastic=backbone.elastic, words=COMMAND)
    guidance_of(backbone.usual_guidance if trained is None else trained, guidance, force, words=COMMAND)
    weights = student_weights(member)
    seeded = keyed_generator(planned.recipe.teacher.seed, "teacher weights")
    pipe = pipeline_for(
        backbone.kind,
        base or backbone.weights,
        dtype or backbone.dtype,
        device,
        quantise or backbone.quantise,
        seeded,
        backbone.revision if base is None else None,
        offload,
    )
    if backbone.weights == "tiny" and console is not None:
        _tell_tiny(console)
    student = build_student(planned, member, Base(cast(Any, pipe).transformer, backbone.form))
    load_weights(student, weights)
    network = cast(AdaptedPolicy, student.network)
    for value in trained_parameters(network).values():  # as an adapter is loaded
        value.data = value.data.to(computes_in(network.transformer))
    pipe.student = student
    return pipe


def _tell_tiny(console: Console) -> None:
    console.print("A tiny random network between stubs of a text encoder and a VAE: the images show nothing.")
