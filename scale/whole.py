"""Students of the class-conditional DiT, which are trained whole, in the layout of the published ImageNet weights;
and its flow maps, in a layout of ours, as none is published.

    FOLDER/config.json, FOLDER/diffusion_pytorch_model.safetensors

    emb.                             the embedding of time and class, where all blocks share one
    transformer_blocks.i.norm1.emb.  the same, where each has its own
    proj_out_means                   of a mixture, (p q k c): velocities, place in the patch slowest
    proj_out_logweights              of a mixture, (p q k): before the softmax over k
    proj_out_logstds.1, .3           of a mixture: from the embedding, one number for each sample
    proj_out_2                       of DX, (p q n c): velocities on the grid; of a flow map, (p q c), as in diffusers
    embeddings.NAME.inner, .outer    of a flow map: of each of its scalars, "delta" and "guidance"

All else is named as in diffusers. The metadata has the schedule, as adapters have it, and what t is multiplied by; of a
flow map its scalars, and the strengths of guidance that it was trained for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from pitools.policies import DXHead, FlowMapStudent, GMHead, Head, NetworkFlowMap, NetworkStudent, PolynomialHead
from pitools.training.checkpoint import write_json, write_tensors
from pitools.types import Schedule
from scale.dit import FIRST, SHARED, DiT, DiTFlowMap, DiTHead, DiTPolicy, assign, share_embedding
from scale.published import CONFIG, FORMAT, WEIGHTS, File, kind_of, read_file

CLASS, MIXTURE_CLASS, MAP_CLASS = "DiTTransformer2DModel", "GMDiTTransformer2DModelV2", "DiTFlowMap"

_MIXTURE = {
    "heads.velocities.": "proj_out_means.",
    "heads.factors.": "proj_out_logweights.",
    "heads.samples.": "proj_out_logstds.",
}
_STATES = {"heads.velocities.": "proj_out_2."}
_SCALARS = {"embeddings.": "embeddings."}
_IDLE = "transformer.proj_out_2."


@dataclass(frozen=True)
class DiTFlowMapStudent(FlowMapStudent):
    """A student whose flow map is a `DiTFlowMap`.

    strengths: the ends of the interval of γ that it was trained for; None for a flow map without.
    """

    strengths: tuple[float, float] | None = None

    @property
    def network(self) -> DiTFlowMap:
        """`ValueError` for another kind of flow map."""
        network = self.flow_map.network if isinstance(self.flow_map, NetworkFlowMap) else self.flow_map
        if not isinstance(network, DiTFlowMap):
            raise ValueError(f"a student's flow map must be a DiTFlowMap, got {type(network).__name__}")
        return network


WholeStudent: TypeAlias = NetworkStudent | DiTFlowMapStudent
"""A student on a DiT."""


def save_whole(
    student: WholeStudent,
    path: str | Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a student into the folder `path`, each file all or nothing.

    weights: to write in the place of the student's own, as averages, by its parameters' names.  dtype: to write; None
    for that of the weights.
    Raises `ValueError` for a student of another kind, weights that are missing, and such as are not finite;
    `CheckpointError` where the disk refuses.
    """
    if isinstance(student, DiTFlowMapStudent):
        _save_flow_map(student, Path(path), weights, dtype)
        return
    network, kind = student.network, kind_of(student.head)
    if not isinstance(network, DiTPolicy):
        raise ValueError(f"a student's network must be a DiTPolicy to be saved whole, got {type(network).__name__}")
    if network.heads.layout.by_patch:
        raise ValueError('a student with factor = "patch" has no published form; those with "pixel" have')
    own = {name: value for name, value in network.named_parameters() if not name.startswith(_IDLE)}
    names = _MIXTURE if kind == "gm" else _STATES
    tensors = _published(own, own if weights is None else weights, names, network.transformer, dtype)
    schedule, config = student.schedule, network.transformer.config
    policy: dict[str, Any] = {"type": "GMFlow"}
    if kind != "gm":
        policy = {"type": "DX", "segment_size": schedule.segment, "shift": schedule.shift}
    if kind == "polynomial":
        policy["mode"] = "polynomial"
    count = student.head.sizes.velocities
    ours = {
        "format": FORMAT,
        "base": CLASS,
        "velocities": count,
        "schedule": asdict(schedule),
        "timesteps": network.timesteps,
        "frequency_shift": config_shift(network.transformer),
    }
    written: dict[str, Any] = json.loads(network.transformer.to_json_string())
    written.pop("_name_or_path", None)
    if kind == "gm":
        width = cast(nn.Linear, cast(nn.Sequential, network.heads.samples)[1]).out_features
        written |= {"_class_name": MIXTURE_CLASS, "num_gaussians": count, "constant_logstd": None}
        written |= {"logstd_inner_dim": width, "gm_num_logstd_layers": 2}
    else:
        written |= {"_class_name": CLASS, "out_channels": count * config.in_channels}
    path = Path(path)
    write_tensors(path / WEIGHTS, tensors, {"policy_config": json.dumps(policy), "pitools": json.dumps(ours)})
    write_json(path / CONFIG, written)


def _save_flow_map(
    student: DiTFlowMapStudent, path: Path, weights: Mapping[str, Tensor] | None, dtype: torch.dtype | None
) -> None:
    network = student.network
    own = dict(network.named_parameters())
    if "delta" not in network.scalars:
        raise ValueError(f'a flow map embeds "delta", and this network {network.scalars}')
    if any(".lora_" in name for name in own):
        raise ValueError("a flow map that was trained by LoRA has no form to be saved whole; merge it first")
    tensors = _published(own, own if weights is None else weights, _SCALARS, network.transformer, dtype)
    ours = {
        "format": FORMAT,
        "base": CLASS,
        "scalars": network.scalars,
        "strengths": student.strengths,
        "guidance": student.guidance,
        "timesteps": network.timesteps,
        "frequency_shift": config_shift(network.transformer),
    }
    written: dict[str, Any] = json.loads(network.transformer.to_json_string())
    written.pop("_name_or_path", None)
    write_tensors(path / WEIGHTS, tensors, {"pitools": json.dumps(ours)})
    write_json(path / CONFIG, {**written, "_class_name": MAP_CLASS})


def _published(
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    names: Mapping[str, str],
    transformer: Any,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Weights by their keys in a file. own: the network's parameters.  names: of what is beside the transformer."""
    if missing := sorted(own.keys() - weights.keys()):
        raise ValueError(f"weights lack {len(missing)} of the student's parameters, {missing[0]} first")
    shared, tensors = _is_shared(transformer), {}
    for name in own:
        value = weights[name].detach().to(dtype or weights[name].dtype)
        if not bool(value.isfinite().all()):
            raise ValueError(f"weights of {name} are not finite")
        tensors[_key(name, names, shared)] = value
    return tensors


def load_whole(
    path_or_hub_id: str | Path, subfolder: str | None = None, *, revision: str | None = None
) -> WholeStudent:
    """A student that `save_whole` or the official exporter wrote, in float32, ready to sample.

    Where the metadata does not say, the schedule is that of the ImageNet students: shift 1, as many steps as the name
    tells, even ones; and t is multiplied by 1 if "repa" is in the name, else by 1000.
    Raises `ValueError` for a file that cannot be had or is damaged, and for keys or sizes that do not fit.
    """
    file = read_file(path_or_hub_id, subfolder, revision)
    if not file.config:
        raise ValueError(f"{file.source} has no {CONFIG} beside it, which tells the transformer's sizes")
    if file.config.get("_class_name") == MAP_CLASS:
        return _flow_map(file)
    kind = _kind(file)
    names = _MIXTURE if kind is GMHead else _STATES
    first = next(iter(names.values()))
    rows = next((len(value) for key, value in file.tensors.items() if key == f"{first}weight"), None)
    if rows is None:
        raise ValueError(f"{file.source} has no {first}weight: it is no student of a DiT")
    section = _section(file)
    head: Head = kind(rows // (section.channels * section.patch**2))
    network = section.student(section.outline(), head, torch.Generator())
    _fill(network, file, names)
    return NetworkStudent(network.eval(), head, _schedule(file), section.factorisation)


def _flow_map(file: File) -> DiTFlowMapStudent:
    ours, section = file.ours, _section(file)
    for key in ("scalars", "strengths", "guidance"):
        if key not in ours:
            raise ValueError(f"{file.source}: its metadata lacks {key}, which a flow map's has")
    network = section.flow_map(section.outline(), ours["scalars"], torch.Generator())
    _fill(network, file, _SCALARS)
    strengths = None if ours["strengths"] is None else (ours["strengths"][0], ours["strengths"][1])
    return DiTFlowMapStudent(NetworkFlowMap(network.eval()), section.factorisation, ours["guidance"], strengths)


def _fill(network: DiTPolicy | DiTFlowMap, file: File, names: Mapping[str, str]) -> None:
    """Give a network on the meta device the weights of a file. names: of what is beside the transformer."""
    if any(key.startswith(SHARED) for key in file.tensors):
        share_embedding(network.transformer)
    try:
        give(network, {_name(key, names): value for key, value in file.tensors.items()})
    except ValueError as error:
        raise ValueError(f"{file.source} does not fit its {CONFIG}: {error}") from error
    for name, value in network.named_parameters():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{file.source}: {name} is not finite")


def give(network: DiTPolicy | DiTFlowMap, weights: Mapping[str, Tensor]) -> None:
    """Give a student's network on the meta device its weights, by its parameters' names, in float32 on the CPU.

    `ValueError` for those that are missing, surplus, or of another shape.
    """
    own = network.named_parameters() if isinstance(network, DiTPolicy) else ()
    idle = {name: torch.zeros(value.shape) for name, value in own if name.startswith(_IDLE)}
    assign(network, {**weights, **idle})  # the output of what is idle goes nowhere


def config_shift(transformer: Any) -> float:
    """The shift of the time embedding's frequencies, which a transformer's config does not have."""
    return float(transformer.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift)


def _is_shared(transformer: Any) -> bool:
    blocks = transformer.transformer_blocks
    return len(blocks) > 1 and blocks[0].norm1.emb is blocks[1].norm1.emb


def _key(name: str, names: Mapping[str, str], shared: bool) -> str:
    for own, published in names.items():
        if name.startswith(own):
            return published + name.removeprefix(own)
    key = name.removeprefix("transformer.")
    return SHARED + key.removeprefix(FIRST) if shared and key.startswith(FIRST) else key


def _name(key: str, names: Mapping[str, str]) -> str:
    for own, published in names.items():
        if key.startswith(published):
            return own + key.removeprefix(published)
    return "transformer." + (FIRST + key.removeprefix(SHARED) if key.startswith(SHARED) else key)


def _kind(file: File) -> type[GMHead] | type[DXHead] | type[PolynomialHead]:
    if any(key.startswith("proj_out_means.") for key in file.tensors):
        return GMHead
    return PolynomialHead if file.policy.get("mode") == "polynomial" else DXHead


def _section(file: File) -> DiT:
    config, ours = file.config, file.ours
    widths = [len(value) for key, value in file.tensors.items() if key == "proj_out_logstds.1.weight"]
    try:
        return DiT(
            channels=config["in_channels"],
            size=config["sample_size"],
            patch=config["patch_size"],
            layers=config["num_layers"],
            heads=config["num_attention_heads"],
            head_width=config["attention_head_dim"],
            classes=config["num_embeds_ada_norm"],
            weights="random",
            timesteps=ours.get("timesteps", 1.0 if "repa" in file.name else 1000.0),
            frequency_shift=ours.get("frequency_shift", 0.0),
            head=DiTHead(log_std_width=widths[0] if widths else 1),
        )
    except KeyError as error:
        raise ValueError(f"{file.source}: its {CONFIG} has no {error.args[0]}") from None


def _schedule(file: File) -> Schedule:
    if "schedule" in file.ours:
        return Schedule(**file.ours["schedule"])
    steps = re.search(r"(?<!\d)(\d{1,2})steps?(?![^\W_])", file.name)
    return Schedule(nfe=int(steps[1]) if steps else 1)
