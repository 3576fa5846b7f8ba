"""A saved transformer, read only once it is sharded: no process ever holds all of it.

    outlined    the transformer without values, but for what students' norm and heads start from
    ...         LoRA, norm and heads are added, and `fully_shard` splits what has values and what has none alike
    fill        each process reads the rows that are its own, weight by weight, straight to its device

It reads what diffusers' `save_pretrained` writes: config.json, and safetensors files with an index where there are
several. Dtypes are as after `from_pretrained(torch_dtype=...)`.
"""

from __future__ import annotations

import json
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from scale.quantise import WHOLE

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Files: TypeAlias = Mapping[str, Path]
"""A weight's name in the transformer, and the safetensors file that it lies in."""


def pretrained(cls: Any, weights: str, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """`cls.from_pretrained` of diffusers, made strict: it takes weights of another class, or too few, with a warning.

    options: its own.  Raises `ValueError` for those, and `OSError` for weights that cannot be had.
    """
    where = {name: options[name] for name in ("subfolder", "revision") if name in options}
    found = cls.load_config(weights, **where).get("_class_name", cls.__name__)
    if found != cls.__name__:
        raise ValueError(f"they are those of a {found}, not of a {cls.__name__}")
    model, told = cls.from_pretrained(weights, torch_dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"{len(missing)} weights of a {cls.__name__} are missing, {missing[0]} first")
    return model


def is_file(weights: str) -> bool:
    """Whether `weights` means one file of weights, local or OWNER/NAME/PATH on the hub, and not a folder."""
    return weights.endswith((".safetensors", ".pth", ".pt"))


def tensors_of(weights: str) -> dict[str, Tensor]:
    """The tensors of one file; see `is_file`. Pickles are read as weights alone, within "state_dict" if there is one.

    Raises `OSError` for a file that cannot be had, `ValueError` for one that is damaged or holds something else.
    """
    path = Path(weights)
    if not path.is_file():
        parts = weights.split("/")
        if len(parts) < 3:
            raise FileNotFoundError(f"there is no file {weights}")
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged or holds no weights: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no weights")
    return state


def folder_of(weights: str, revision: str | None = None) -> Path:
    """The folder of the transformer: within `weights` if that is a folder, else downloaded from the hub.

    One process of each machine downloads; the others find it done. `OSError` or `ValueError` where that fails.
    """
    if Path(weights).is_dir():
        return Path(weights) / "transformer"
    from accelerate import PartialState
    from huggingface_hub import snapshot_download

    error: Exception | None = None
    with PartialState().local_main_process_first():
        try:
            found = snapshot_download(weights, revision=revision, allow_patterns=["transformer/*"])
        except (OSError, ValueError) as raised:
            error = raised  # not from here: the other processes wait for the end of this block
    if error is not None:
        raise error
    return Path(found) / "transformer"


def files_of(folder: Path) -> Files:
    """Where each weight in `folder` lies. `OSError` if there are none, or none as safetensors."""
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in names.items()}
    path = folder / "diffusion_pytorch_model.safetensors"
    with safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), path)


def outlined(cls: Any, folder: Path, files: Files, dtype: torch.dtype) -> Any:
    """A transformer of a diffusers class `cls` on the meta device, in `dtype`; its last norm and projection, which
    students' own start from, and its buffers are on the CPU with their values.

    Raises `ValueError` for a weight that is missing from `files` or of another shape than config.json tells,
    `OSError` for a config.json or a file that cannot be read.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        transformer = cls.from_config(cls.load_config(folder)).to(dtype)
    needed: Mapping[str, Tensor] = transformer.state_dict()
    if missing := sorted(needed.keys() - files.keys()):
        raise ValueError(f"{folder} lacks {len(missing)} weights of a {cls.__name__}, {missing[0]} first")
    read: dict[str, Tensor] = {}
    for path, names in _by_file(files, needed).items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                stored = file.get_slice(name)
                if (shape := tuple(stored.get_shape())) != tuple(needed[name].shape):
                    raise ValueError(f"{path}: {name} has the shape {shape}, not {tuple(needed[name].shape)}")
                if name.split(".")[0] in WHOLE or not needed[name].is_meta:
                    read[name] = stored[:].to(needed[name].dtype)
    transformer.load_state_dict(read, strict=False, assign=True)
    return transformer


def fill(transformer: nn.Module, files: Files, device: torch.device) -> None:
    """Give those parameters on the meta device their values that are in `files`, as `share` does.

    LoRA may lie around them; what is not in `files`, as LoRA's own, stays as it is.
    """
    empty = {name: value for name, value in transformer.named_parameters() if value.is_meta}
    plain = {name.replace(".base_layer.", "."): name for name in empty}  # peft's name for what it wraps
    filled: dict[str, Tensor] = {}
    for path, names in _by_file(files, plain.keys() & files.keys()).items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                filled[plain[name]] = share(file.get_slice(name), empty[plain[name]], device)
    transformer.load_state_dict(filled, strict=False, assign=True)


def share(whole: Any, like: Tensor, device: torch.device) -> Tensor:
    """The values that this process has of a parameter `like`, which has none: all, or its rows under FSDP2.

    whole: a tensor, or a slice of a safetensors file, of which no more is read than that.
    """
    if not hasattr(like, "full_tensor"):
        return cast(Tensor, whole[:]).to(device, like.dtype)
    from torch.distributed.tensor import DTensor, Shard

    sharded = cast("DTensor", like)
    mesh, rows, own = sharded.device_mesh, sharded.shape[0], sharded.to_local().shape
    if mesh.ndim != 1 or sharded.placements != (Shard(0),):
        raise ValueError(f"weights must be sharded by rows over one mesh dimension, got {sharded.placements}")
    first = mesh.get_local_rank() * -(-rows // mesh.size())  # as torch.chunk, where the last may get fewer
    part = whole[first : first + own[0]] if own[0] else torch.empty(own)
    return DTensor.from_local(
        part.to(device, like.dtype), mesh, (Shard(0),), run_check=False, shape=like.shape, stride=like.stride()
    )


def _by_file(files: Files, names: Iterable[str]) -> Mapping[Path, list[str]]:
    """The names of each file, so that each is opened once."""
    groups: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        groups[files[name]].append(name)
    return groups
