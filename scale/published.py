"""The published adapter format: a folder with `config.json` and `diffusion_pytorch_model.safetensors`.

    X.lora_A.weight, X.lora_B.weight      LoRA of the base's module X; alpha is the rank
    norm_out.linear                       the student's last norm
    proj_out_means                        of a mixture, (k c p q): velocities, component slowest
    proj_out_logweights                   of a mixture, (k p q): before the softmax over k
    proj_out_logstds.1, .3                of a mixture: from the time embedding, one number for each sample
    proj_out                              of DX, (n c p q): velocities on the grid; of a polynomial, its coefficients

A file's metadata says which policy it holds (`policy_config`, in the words of the official exporter) and, in a key of
ours (`pitools`), the schedule and the guidance that it is for. Where ours is not there, what all the official adapters
share is assumed, and the number of steps is read from the name. DX and polynomials have the same keys: without
metadata, a name such as "dxqwen_p10_piid_4step" tells them apart.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pitools.guidance import Guidance
from pitools.policies import DXHead, GMHead, Head, NetworkStudent, PolynomialHead
from pitools.training.checkpoint import CONTENTS, check_keys, read_tensors, write_json, write_tensors
from pitools.training.errors import CheckpointError
from pitools.types import Schedule
from scale.adapted import ADAPTER, PATCH, AdaptedPolicy, Base, Heads, LoRA, computes_in, lora_off
from scale.backbone import backbone_of, section_of

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
FORMAT = 1
"""Of the metadata under `pitools`."""

SHIFT, FINAL_STEP_SCALE, NFE = 3.2, 0.5, 4
"""What the official adapters are trained for; some have another NFE, and say so in their names."""

Kind: TypeAlias = Literal["gm", "dx", "polynomial"]

_LAYERS = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim")
_MIXTURE = {
    "heads.velocities.": "proj_out_means.",
    "heads.factors.": "proj_out_logweights.",
    "heads.samples.": "proj_out_logstds.",
    "norm_out.linear.": "norm_out.linear.",
}
_STATES = {"heads.velocities.": "proj_out.", "norm_out.linear.": "norm_out.linear."}

_log = logging.getLogger(__name__)


def published_key(name: str, mixture: bool) -> str:
    """The key under which a parameter of `AdaptedPolicy` is published. `ValueError` for one that is not.

    >>> published_key("transformer.blocks.0.lora_A.pi_flow.weight", mixture=True)
    'blocks.0.lora_A.weight'

    mixture: whether the policy is one.
    """
    if match := re.fullmatch(rf"transformer\.(.+\.lora_[AB])\.{ADAPTER}\.weight", name):
        return f"{match[1]}.weight"
    for own, published in (_MIXTURE if mixture else _STATES).items():
        if name.startswith(own):
            return published + name.removeprefix(own)
    raise ValueError(f"{name} has no place in a published adapter")


def parameter_name(key: str, mixture: bool) -> str:
    """The inverse of `published_key`. `ValueError` for a key that no parameter has."""
    if match := re.fullmatch(r"(.+\.lora_[AB])\.weight", key):
        return f"transformer.{match[1]}.{ADAPTER}.weight"
    for own, published in (_MIXTURE if mixture else _STATES).items():
        if key.startswith(published):
            return own + key.removeprefix(published)
    raise ValueError(f"{key} is no key of a published adapter")


def trained_parameters(network: AdaptedPolicy) -> dict[str, nn.Parameter]:
    """The parameters that an adapter consists of, by name, frozen or not: LoRA, norm and heads."""
    return {
        name: parameter
        for name, parameter in network.named_parameters()
        if not name.startswith("transformer.") or f".{ADAPTER}." in name
    }


def save_adapter(
    student: NetworkStudent,
    path: str | Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    teacher_guidance: Guidance | None = None,
) -> None:
    """Write a student as a published adapter into the folder `path`, each file all or nothing.

    weights: to write in the place of the student's own, as averages; named as `trained_parameters` are.  dtype: to
    write; None for that of the weights.  teacher_guidance: what was distilled in, which its metadata then tells.
    Raises `ValueError` for a student of another kind, and weights that are missing, surplus, of another shape, or not
    finite; `CheckpointError` where the disk refuses.
    """
    network, kind = _adapted(student), kind_of(student.head)
    own = trained_parameters(network)
    weights = own if weights is None else weights
    _check_weights(own, weights)
    tensors: dict[str, Tensor] = {}
    for name, given in weights.items():
        value, key = given.detach().to(dtype or given.dtype), published_key(name, mixture=kind == "gm")
        _check_finite("weights", key, value)
        tensors[key] = value
    schedule = student.schedule
    policy: dict[str, Any] = {"type": "GMFlow"}
    if kind != "gm":
        policy = {"type": "DX", "segment_size": schedule.segment, "shift": schedule.shift}
    if kind == "polynomial":
        policy["mode"] = "polynomial"
    ours = {
        "format": FORMAT,
        "base": type(network.transformer).__name__,
        "velocities": student.head.sizes.velocities,
        "schedule": asdict(schedule),
        "guidance": network.guidance,
        "teacher_guidance": None if teacher_guidance is None else asdict(teacher_guidance),
    }
    path = Path(path)
    write_tensors(path / WEIGHTS, tensors, {"policy_config": json.dumps(policy), "pitools": json.dumps(ours)})
    write_json(path / CONFIG, _config(network, student.head.sizes.velocities, kind))


def load_adapter(
    base_transformer: Any,
    path_or_hub_id: str | Path,
    subfolder: str | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
) -> NetworkStudent:
    """A student on the given transformer, from a published adapter: in evaluation mode, ready to sample.

    base_transformer: of diffusers, in any dtype, quantised or not, or the `Base` of one, which can teach beside the
    student. It takes the adapter's LoRA, and an earlier student's is taken off.
    path_or_hub_id: a folder, one .safetensors file, or a repository of the hub.  subfolder: of either.  revision: of
    the repository.  dtype: of LoRA, norm and heads; None for the one in which the base computes.
    Raises `ValueError` for a file that cannot be had, that is damaged or has values that are not finite; for another
    base, or one with fused LoRA; and for keys or sizes that do not fit. Then the transformer is as it was. Where
    metadata and name leave the schedule or the policy open, one warning is logged of what was assumed.
    """
    try:
        import peft  # noqa: F401 - before anything is changed
    except ImportError as error:
        raise ImportError(f'adapters need peft ({error}): run `pip install "pitools[scale]"`') from error
    given = isinstance(base_transformer, Base)
    transformer: Any = base_transformer.transformer if given else base_transformer
    backbone = backbone_of(transformer)
    with lora_off(transformer):  # a `ValueError` where LoRA is fused into it
        dtype = dtype or computes_in(transformer)
        read = _fitted(read_file(path_or_hub_id, subfolder, revision), transformer, dtype)

    base = base_transformer if given else Base(transformer, backbone.form)
    network = AdaptedPolicy(
        base,
        read.head.sizes,
        LoRA(read.rank),
        Heads(log_std_width=read.log_std_width),
        torch.Generator(),  # what is drawn is replaced
        targets=read.targets,
        dtype=dtype,
        guidance=read.guidance,
    )
    student = NetworkStudent(network.eval(), read.head, read.schedule, backbone.factorisation)
    load_weights(student, read.weights)
    return student


def load_weights(student: NetworkStudent, weights: Mapping[str, Tensor]) -> None:
    """Give a student these weights, named as `trained_parameters` are, in its own dtype.

    `ValueError`, before anything is changed, for those that are missing, surplus or of another shape.
    """
    own = trained_parameters(_adapted(student))
    _check_weights(own, weights)
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(weights[name])


@dataclass(frozen=True)
class Purpose:
    """What an adapter is for. base: the class of its diffusers transformer.  guidance: embedded; None for none."""

    base: str
    schedule: Schedule
    guidance: float | None


def purpose_of(path_or_hub_id: str | Path, subfolder: str | None = None, *, revision: str | None = None) -> Purpose:
    """What an adapter is for, as its config or its metadata says, before there is a base.

    Arguments as of `load_adapter`. `ValueError` for an adapter that cannot be had, that does not say of which
    transformer it is, or of one that has no adapters.
    """
    file = read_file(path_or_hub_id, subfolder, revision, outline=True)
    if "_class_name" in file.config:
        base = str(file.config["_class_name"]).removeprefix("GM").removeprefix("DX")
    elif "base" in file.ours:
        base = str(file.ours["base"])
    else:
        raise ValueError(
            f"{file.source} does not say of which transformer it is an adapter: it has no {CONFIG} beside it"
        )
    usual = section_of(base).usual_guidance if file.config.get("guidance_embeds", True) else None
    return Purpose(base, _schedule(file, _kind(file)[0])[0], _guidance(file, usual))


# Writing.


def _check_weights(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    _check_keys("weights", own, weights)
    for name, like in own.items():
        if weights[name].shape != like.shape:
            raise ValueError(f"weights of {name} must be {tuple(like.shape)}, got {tuple(weights[name].shape)}")


def _adapted(student: NetworkStudent) -> AdaptedPolicy:
    if not isinstance(student.network, AdaptedPolicy):
        raise ValueError(
            f"a student's network must be an AdaptedPolicy to be an adapter, got {type(student.network).__name__}"
        )
    return student.network


def kind_of(head: Head) -> Kind:
    kinds: Mapping[type, Kind] = {GMHead: "gm", DXHead: "dx", PolynomialHead: "polynomial"}
    if type(head) not in kinds:
        raise ValueError(f"a {type(head).__name__} has no published form; those of GM, DX and polynomials have")
    return kinds[type(head)]


def _config(network: AdaptedPolicy, velocities: int, kind: Kind) -> dict[str, Any]:
    """The transformer's own config, changed to that of the class with the policy's outputs."""
    config: dict[str, Any] = json.loads(network.transformer.to_json_string())
    for private in ("quantization_config", "_name_or_path"):
        config.pop(private, None)
    outputs = network.transformer.proj_out.out_features
    if kind != "gm":
        return {**config, "out_channels": velocities * outputs, "patch_size": 1}
    if config.get("out_channels") is not None:
        config["out_channels"] = outputs
    samples = cast(nn.Sequential, network.heads.samples)
    return {
        **config,
        "_class_name": f"GM{config['_class_name']}",
        "num_gaussians": velocities,
        "constant_logstd": None,
        "logstd_inner_dim": cast(nn.Linear, samples[1]).out_features,
        "gm_num_logstd_layers": 2,
        "logweights_channels": PATCH**2,
    }


# Reading: everything is checked before the transformer is touched.


@dataclass(frozen=True)
class File:
    """An adapter as it lies on the disk.

    source: for messages.  name: of its folder, or its own.  tensors: without the prefix "transformer.".  config:
    empty where there is none.  policy, ours: its metadata, empty where there is none.
    """

    source: str
    name: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    policy: Mapping[str, Any]
    ours: Mapping[str, Any]


@dataclass(frozen=True)
class _Fitted:
    """An adapter that fits a transformer. weights: by the names of parameters."""

    head: Head
    schedule: Schedule
    guidance: float | None
    log_std_width: int
    rank: int
    targets: Sequence[str]
    weights: Mapping[str, Tensor]


def read_file(path_or_hub_id: str | Path, subfolder: str | None, revision: str | None, outline: bool = False) -> File:
    """An adapter; as an outline with empty tensors on the meta device in the place of its own."""
    weights, config, name = _located(path_or_hub_id, subfolder, revision)
    with _opened(weights) as file:
        metadata: Mapping[str, str] = file.metadata() or {}
        signed = "pitools" in metadata and CONTENTS in metadata and not outline
        keys = [] if signed else file.keys()
        tensors = {key: torch.empty(0, device="meta") if outline else file.get_tensor(key) for key in keys}
    if signed:
        try:
            tensors = read_tensors(weights)
        except CheckpointError as error:
            raise ValueError(f"{error}; fetch it again") from error
    named = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    if len(named) != len(tensors):
        raise ValueError(f'{weights} has keys both with and without the prefix "transformer."')
    return File(
        str(weights),
        name,
        named,
        {} if config is None else _json(str(config), _text(config)),
        _json(f"{weights}: policy_config", metadata.get("policy_config", "{}")),
        _json(f"{weights}: pitools", metadata.get("pitools", "{}")),
    )


def _located(path_or_hub_id: str | Path, subfolder: str | None, revision: str | None) -> tuple[Path, Path | None, str]:
    """The weights, the config if there is one, and the name that may tell what they are."""
    path = Path(path_or_hub_id)
    if path.is_file():
        if subfolder is not None:
            raise ValueError(f"subfolder {subfolder!r} cannot be of the single file {path}; leave it out")
        return path, None, f"{path.resolve().parent.name}/{path.stem}"
    if path.is_dir():
        folder = path / (subfolder or "")
        if not (folder / WEIGHTS).is_file():
            found = sorted(str(file.parent.relative_to(path)) for file in path.glob(f"*/{WEIGHTS}"))
            hint = f"; subfolders that have one: {', '.join(found)}" if found else ""
            raise ValueError(f"{folder} has no {WEIGHTS}{hint}")
        return folder / WEIGHTS, (folder / CONFIG if (folder / CONFIG).is_file() else None), folder.resolve().name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_hub_id)):
        raise ValueError(f"path_or_hub_id {str(path_or_hub_id)!r} is no file, no folder, and no hub id OWNER/NAME")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetched(file: str) -> Path:
        return Path(hf_hub_download(str(path_or_hub_id), file, subfolder=subfolder, revision=revision))

    where = f"{path_or_hub_id}{f'/{subfolder}' if subfolder else ''}"
    try:
        weights = fetched(WEIGHTS)
        try:
            config = fetched(CONFIG)
        except EntryNotFoundError:
            return weights, None, where
    except (OSError, ValueError, EntryNotFoundError) as error:
        # All of its lines: of a gated repository the first one tells but a status.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{where} is no local file or folder, and {WEIGHTS} cannot be had from the hub: {reason}"
        ) from error
    return weights, config, where


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _json(source: str, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} is damaged: it is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source} must be a JSON object, got {value!r}")
    return value


def _fitted(file: File, transformer: Any, dtype: torch.dtype) -> _Fitted:
    """The adapter if it fits, or a `ValueError` that says why it does not."""
    if file.ours.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{file.source} has format {file.ours['format']}; this version reads {FORMAT}")
    kind, assumed = _kind(file)
    _check_base(file, transformer, kind)
    lora = sorted({match[1] for key in file.tensors if (match := re.fullmatch(r"(.+)\.lora_[AB]\.weight", key))})
    rank = _rank(file, lora)
    velocities, log_std_width = _check_shapes(file, transformer, kind, lora, rank)
    _check_counts(file, kind, velocities)
    for key, value in file.tensors.items():
        _check_finite(file.source, key, value, dtype)
    heads: Mapping[Kind, type[GMHead] | type[DXHead] | type[PolynomialHead]]
    heads = {"gm": GMHead, "dx": DXHead, "polynomial": PolynomialHead}
    schedule, more = _schedule(file, kind)
    if assumed or more:
        _log.warning("%s does not say all that it is for; assumed: %s", file.source, ", ".join([*assumed, *more]))
    embeds = transformer.config.get("guidance_embeds", False)
    guidance = _guidance(file, backbone_of(transformer).usual_guidance if embeds else None)
    return _Fitted(
        heads[kind](velocities),
        schedule,
        guidance,
        log_std_width,
        rank,
        lora,
        {parameter_name(key, kind == "gm"): value for key, value in file.tensors.items()},
    )


def _kind(file: File) -> tuple[Kind, list[str]]:
    """The policy, and what had to be assumed for want of metadata and name."""
    told, mode = file.policy.get("type"), file.policy.get("mode")
    if told is not None and told not in ("GMFlow", "DX"):
        raise ValueError(f'{file.source} holds a policy of type {told!r}; "GMFlow" and "DX" are read')
    if mode is not None and mode not in ("grid", "polynomial"):
        raise ValueError(f'{file.source} holds a policy of mode {mode!r}; "grid" and "polynomial" are read')
    if told == "GMFlow" or (told is None and any(key.startswith("proj_out_means.") for key in file.tensors)):
        return "gm", []
    if mode is not None:
        return ("polynomial" if mode == "polynomial" else "dx"), []
    if match := re.search(r"_([np])\d+(?:_|$)", file.name):
        return ("polynomial" if match[1] == "p" else "dx"), []
    return "dx", [] if told else ["a DX policy, not a polynomial"]


def _check_base(file: File, transformer: Any, kind: Kind) -> None:
    own = type(transformer).__name__
    named = str(file.config.get("_class_name", own))
    prefix = named[:2] if named[:2] in ("GM", "DX") else ""
    for base in (named.removeprefix(prefix), file.ours.get("base", own)):
        if base != own:
            raise ValueError(f"{file.source} is an adapter of a {base}, not of this {own}")
    if (kind == "gm") != (prefix == "GM") and "_class_name" in file.config:
        held = {"gm": "a mixture's", "dx": "a DX policy's", "polynomial": "a polynomial's"}[kind]
        raise ValueError(f"{file.source} has {held} metadata and keys, and its config says _class_name {named!r}")
    for field in _LAYERS:
        if field in file.config and file.config[field] != transformer.config.get(field):
            raise ValueError(
                f"{file.source} is for a base with {field} {file.config[field]}, and this {own} has "
                f"{transformer.config.get(field)}"
            )


def _rank(file: File, lora: Sequence[str]) -> int:
    """Of all the LoRA; 1 where there is none."""
    ranks = {name: _size(file, f"{name}.lora_A.weight")[0] for name in lora if f"{name}.lora_A.weight" in file.tensors}
    if not ranks:
        return 1
    first = next(iter(ranks))
    for name, rank in ranks.items():
        if rank != ranks[first]:
            raise ValueError(
                f"{file.source} has LoRA of rank {rank} in {name} and of rank {ranks[first]} in {first}; one is read"
            )
    if ranks[first] < 1:
        raise ValueError(f"{file.source} has LoRA of rank {ranks[first]} in {first}; it must be at least 1")
    return ranks[first]


def _check_shapes(file: File, transformer: Any, kind: Kind, lora: Sequence[str], rank: int) -> tuple[int, int]:
    """All keys there, none besides, each of its size. The number of velocities, and that head's hidden width."""
    own = type(transformer).__name__
    norm, projection = transformer.norm_out.linear, transformer.proj_out
    width, outputs = projection.in_features, projection.out_features
    first = "proj_out_means" if kind == "gm" else "proj_out"
    heads = {f"{first}.weight"}
    if kind == "gm" or projection.bias is not None:
        heads.add(f"{first}.bias")
    if kind == "gm":
        names = ("proj_out_logweights", "proj_out_logstds.1", "proj_out_logstds.3")
        heads |= {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    norms = {"norm_out.linear.weight"} | ({"norm_out.linear.bias"} if norm.bias is not None else set())
    pairs = {f"{name}.lora_{part}.weight" for name in lora for part in "AB"}
    _check_keys(file.source, heads | norms | pairs, file.tensors)

    rows, found = _size(file, f"{first}.weight")
    if found != width:
        raise ValueError(f"{file.source} is for a base of width {found}, and this {own} has {width}")
    if rows % outputs or rows == 0:
        raise ValueError(f"{file.source}: {first}.weight has {rows} rows, which is no multiple of {outputs}")
    velocities = rows // outputs
    hidden = _size(file, "proj_out_logstds.1.weight")[0] if kind == "gm" else 1
    if kind == "gm" and _size(file, "proj_out_logweights.weight")[0] != velocities * PATCH**2:
        raise ValueError(
            f"{file.source}: proj_out_means has K = {velocities}, and proj_out_logweights has "
            f"{_size(file, 'proj_out_logweights.weight')[0]} rows instead of {velocities * PATCH**2}"
        )

    sizes: dict[str, tuple[int, ...]] = {
        f"{first}.weight": (rows, width),
        f"{first}.bias": (rows,),
        "proj_out_logweights.weight": (velocities * PATCH**2, width),
        "proj_out_logweights.bias": (velocities * PATCH**2,),
        "proj_out_logstds.1.weight": (hidden, width),
        "proj_out_logstds.1.bias": (hidden,),
        "proj_out_logstds.3.weight": (1, hidden),
        "proj_out_logstds.3.bias": (1,),
        "norm_out.linear.weight": (norm.out_features, norm.in_features),
        "norm_out.linear.bias": (norm.out_features,),
    }
    modules = dict(transformer.named_modules())
    for name in lora:
        module: Any = modules.get(name)
        if not hasattr(module, "in_features"):
            raise ValueError(f"{file.source} has LoRA for {name}, and this {own} has no such layer")
        sizes[f"{name}.lora_A.weight"] = (rank, module.in_features)
        sizes[f"{name}.lora_B.weight"] = (module.out_features, rank)
    for key, value in file.tensors.items():
        if tuple(value.shape) != sizes[key]:
            raise ValueError(f"{file.source}: {key} is {tuple(value.shape)}, and this {own} needs {sizes[key]}")
    return velocities, hidden


def _check_counts(file: File, kind: Kind, velocities: int) -> None:
    """What config and metadata say of the policy's sizes is what the tensors have."""
    letter, key = ("K", "proj_out_means") if kind == "gm" else ("N", "proj_out")
    stated: dict[str, object] = {"pitools velocities": file.ours.get("velocities", velocities)}
    if kind == "gm":
        stated["num_gaussians"] = file.config.get("num_gaussians", velocities)
        stated["policy_config num_gaussians"] = file.policy.get("num_gaussians", velocities)
        supported = {"constant_logstd": None, "gm_num_logstd_layers": 2, "logweights_channels": PATCH**2}
        for field, only in supported.items():
            if file.config.get(field, only) != only:
                raise ValueError(f"{file.source} has {field} {file.config[field]}; {only} is read")
    elif file.config.get("patch_size") == 1 and file.config.get("out_channels") is not None:
        rows = len(file.tensors["proj_out.weight"])
        if file.config["out_channels"] != rows:
            raise ValueError(
                f"{file.source}: proj_out has {rows} rows, and its config says out_channels "
                f"{file.config['out_channels']}"
            )
    for name, value in stated.items():
        if value != velocities:
            raise ValueError(f"{file.source}: {key} has {letter} = {velocities}, and its {name} is {value}")


def _schedule(file: File, kind: Kind) -> tuple[Schedule, list[str]]:
    """The schedule, and what had to be assumed."""
    assumed: list[str] = []
    segment = file.policy.get("segment_size")
    if "schedule" in file.ours:
        try:
            schedule = Schedule(**file.ours["schedule"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file.source}: the schedule of its metadata cannot be: {error}") from error
    else:
        if match := re.search(r"(?<!\d)(\d{1,2})steps?(?![^\W_])", file.name):
            nfe = int(match[1])
        elif segment is not None:
            nfe = round(1 / _positive(file, "segment_size") + 1 - FINAL_STEP_SCALE)
        else:
            nfe = NFE
            assumed.append(f"nfe {NFE}")
        shift = SHIFT if file.policy.get("shift") is None else _positive(file, "shift")
        schedule = Schedule(nfe, shift, FINAL_STEP_SCALE, "auto" if kind == "gm" else 1.0)
    for name, own in (("segment_size", schedule.segment), ("shift", schedule.shift)):
        if file.policy.get(name) is not None and not math.isclose(_positive(file, name), own, rel_tol=1e-3):
            raise ValueError(
                f"{file.source}: its policy_config has {name} {file.policy[name]}, and a schedule of nfe "
                f"{schedule.nfe}, shift {schedule.shift} and final_step_scale {schedule.final_step_scale} has {own}"
            )
    return schedule, assumed


def _guidance(file: File, usual: float | None) -> float | None:
    guidance = file.ours.get("guidance", usual)
    if guidance is not None and (isinstance(guidance, bool) or not isinstance(guidance, int | float)):
        raise ValueError(f"{file.source}: the guidance of its metadata must be a number or null, got {guidance!r}")
    return guidance


def _positive(file: File, name: str) -> float:
    value = file.policy[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{file.source}: {name} must be a positive number, got {value!r}")
    return float(value)


def _size(file: File, key: str) -> tuple[int, int]:
    shape = tuple(file.tensors[key].shape)
    if len(shape) != 2:
        raise ValueError(f"{file.source}: {key} must be a matrix, got {shape}")
    return shape


def _check_keys(owner: str, needed: Iterable[str], found: Iterable[str]) -> None:
    try:
        check_keys(owner, needed, found)
    except CheckpointError as error:
        raise ValueError(str(error)) from None


def _check_finite(owner: str, key: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
    if not value.is_floating_point():
        raise ValueError(f"{owner}: {key} must be of floating point, got {value.dtype}")
    if not bool(value.to(dtype or value.dtype).isfinite().all()):
        raise ValueError(f"{owner}: {key} has values that are not finite")
