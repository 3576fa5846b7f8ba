"""A trained student, taken out of its run: as a published adapter, or merged into its base.

    OUT/config.json, OUT/diffusion_pytorch_model.safetensors    the adapter: scale.load_adapter(base, OUT)

    the same two files                                          a student on a DiT: scale.whole.load_whole(OUT)

    OUT/transformer/    merged: the base with LoRA in its weights, a folder of diffusers
    OUT/adapter/        and the rest of the adapter, norm and heads: scale.load_adapter(transformer, OUT, "adapter")

An adapter needs no weights of the base, so that one of 20B parameters is exported in the memory of the adapter.
Merging reads the base as it was before any quantisation, and adds in its dtype: bf16 rounds what LoRA adds.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from pitools.guidance import Guidance
from pitools.policies import NetworkStudent
from pitools.training.checkpoint import latest, read_tensors
from pitools.training.distillation import all_members
from pitools.training.errors import CheckpointError
from pitools.training.flow_maps import MapMember, build_map, map_student
from pitools.training.random import keyed_generator
from pitools.training.recipe import Plan, plan_of
from pitools.training.students import Member, build_student
from scale.adapted import ADAPTER, AdaptedPolicy
from scale.backbone import TextToImage
from scale.dit import DiT, DiTFlowMap, DiTPolicy
from scale.published import load_weights, save_adapter
from scale.whole import DiTFlowMapStudent, WholeStudent, give, save_whole

AVERAGES = "student.safetensors"


def export(
    student_folder_or_run: str | Path,
    out: str | Path,
    *,
    average: bool = True,
    merge: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a student of `pitools distill` into the folder `out`, as the head of this module says.

    student_folder_or_run: RUN/NAME-4nfe, or RUN where there is one.  average: the averaged weights, of a finished
    student; otherwise those of its newest checkpoint.  merge: LoRA into the base.  dtype: of the adapter's tensors,
    None for that of the weights.
    Raises `ValueError` for a folder that is none of a run, a run with several students, a backbone that has no
    adapters, and what `save_adapter` and `merge_adapter` do; `RecipeError` for a recipe that cannot be had;
    `CheckpointError` for weights that are not there or damaged, and where the disk refuses.
    """
    planned, member = found_student(Path(student_folder_or_run))
    backbone = planned.backbone
    if isinstance(backbone, DiT):
        if merge:
            raise ValueError(f"{member.folder} is a student on a DiT, trained whole: there is nothing to merge")
        weights = student_weights(member, average)
        save_whole(whole_outline(planned, member, backbone), out, weights=weights, dtype=dtype)
        return
    if not isinstance(backbone, TextToImage) or isinstance(member, MapMember):
        raise ValueError(
            f"{member.folder} is a student on a {type(backbone).__name__}, which has no published form; "
            f"its weights are {member.folder / AVERAGES}"
        )
    weights, guidance = student_weights(member, average), planned.recipe.teacher.guidance
    if not merge:
        student = build_student(planned, member, backbone.outline())
        save_adapter(student, out, weights=weights, dtype=dtype, teacher_guidance=guidance)
        return
    whole = replace(backbone, quantise="none")
    teacher = whole.teacher(keyed_generator(planned.recipe.teacher.seed, "teacher weights"))
    student = build_student(replace(planned, backbone=whole), member, teacher)
    load_weights(student, weights)
    merge_adapter(student, out, dtype=dtype, teacher_guidance=guidance)


def whole_outline(planned: Plan, member: Member | MapMember, backbone: DiT) -> WholeStudent:
    """A student on a DiT without weights in memory."""
    if isinstance(member, Member):
        return build_student(planned, member, backbone.outline())
    student = map_student(planned, member, build_map(planned, member, backbone.outline()))
    strengths = member.section.objective.guidance
    return DiTFlowMapStudent(student.flow_map, student.factorisation, student.guidance, strengths)


def whole_student(planned: Plan, member: Member | MapMember, backbone: DiT) -> WholeStudent:
    """A student on a DiT with its averaged weights. Raises as `student_weights` does."""
    student = whole_outline(planned, member, backbone)
    give(cast(DiTPolicy | DiTFlowMap, student.network), student_weights(member))
    return student


def merge_adapter(
    student: NetworkStudent,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    teacher_guidance: Guidance | None = None,
) -> None:
    """Merge a student's LoRA into its transformer, for good, and write both into the folder `out`.

    Style LoRAs on the transformer are taken off, unmerged.  dtype: of norm and heads, None for their own.
    teacher_guidance: as for `save_adapter`.
    Raises `ValueError` for a student without LoRA of its own in its transformer, or on a quantised one, and where
    `out` has a transformer already; `CheckpointError` where the disk refuses.
    """
    network = student.network
    if not isinstance(network, AdaptedPolicy):
        raise ValueError(f"a student's network must be an AdaptedPolicy to be merged, got {type(network).__name__}")
    transformer, out = network.transformer, Path(out)
    if ADAPTER not in (getattr(transformer, "peft_config", None) or {}):
        raise ValueError("the student has no LoRA in its transformer: it is merged already")
    quantised = next((name for name, value in transformer.named_parameters() if value.element_size() == 1), None)
    if quantised is not None:
        raise ValueError(f"a quantised transformer cannot be merged into ({quantised}); load it in bf16 or float32")
    final, temporary = out / "transformer", out / ".tmp-transformer"
    if final.exists():
        raise ValueError(f"{final} exists; name another folder")
    transformer.fuse_lora(adapter_names=[ADAPTER])
    transformer.unload_lora()
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        transformer.save_pretrained(temporary)
        save_adapter(student, out / "adapter", dtype=dtype, teacher_guidance=teacher_guidance)
        os.replace(temporary, final)  # last, so that a folder with a transformer is complete
    except OSError as error:
        raise CheckpointError(f"{final} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def found_student(path: Path) -> tuple[Plan, Member | MapMember]:
    """The plan of a run as it was, and the student that `path` means: its folder, or that of a run with one.

    `ValueError` for a folder that is neither, `RecipeError` for a recipe that cannot be had.
    """
    run = path if (path / "recipe.toml").is_file() else path.parent
    if not (run / "recipe.toml").is_file():
        raise ValueError(f"{path} is neither the folder of a run nor of one of its students: it has no recipe.toml")
    planned = plan_of(run)
    there = all_members(planned)
    if run != path:
        there = [member for member in there if member.label == path.name]
    if len(there) != 1:
        names = ", ".join(str(member.folder) for member in all_members(planned))
        raise ValueError(f"{path} must name one student; those of this run are {names}")
    return planned, there[0]


def student_weights(member: Member | MapMember, average: bool = True) -> Mapping[str, Tensor]:
    """A student's averaged weights, or those of its newest checkpoint. `CheckpointError` where they are not good."""
    if average:
        path = member.folder / AVERAGES
        if not path.is_file():
            raise CheckpointError(f"{path} is not there yet; finish the training, or export without averaging (--last)")
        return read_tensors(path)
    folder = member.folder / "checkpoints"
    refused: list[CheckpointError] = []
    checkpoint = latest(folder, refused.append)
    if refused or checkpoint is None:
        raise CheckpointError(f"{folder} has no good newest checkpoint" + (f": {refused[0]}" if refused else ""))
    return checkpoint.tensors["model"]
