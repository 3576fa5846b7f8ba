"""Checkpoints: folders that are either whole or refused by name.

    checkpoints/step-00000500/manifest.json       step, meta, and the size and sha256 of every other file
    checkpoints/step-00000500/model.safetensors   one file for each name that the caller gives; or, sharded,
                              model-rank0of2.safetensors, ...   one from each process, with its rows of each tensor

A checkpoint is written under a temporary name, every file synced to the disk and the manifest last, and only
then renamed; so a kill at any moment leaves the checkpoints before it, and at most something hidden that the
next `save` clears away. Nothing is pickled. Both forms go on on any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pitools.training.errors import CheckpointError
from pitools.training.optimiser import SMALLEST_8BIT, LocalShards, is_sharded, local

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

JSON: TypeAlias = Mapping[str, "JSON"] | Sequence["JSON"] | str | int | float | bool | None
"""What a manifest can hold; tuples come back as lists."""

T = TypeVar("T")

Form = Literal["consolidated", "sharded"]
"""Who writes sharded weights: the main process, all of them; or each process, its rows."""

FORMAT = 1
MANIFEST = "manifest.json"
CONTENTS = "sha256"
# Hidden names: what is being written, what is being deleted, and a good checkpoint that is about to be replaced.
WRITING, DELETING, REPLACED = ".tmp-", ".tmp-removed-", ".replaced-"


class Processes(Protocol):
    """Those that save together; `pitools.training.engine.Engine` is one."""

    @property
    def main(self) -> bool:
        """Whether this is the one that writes what is not sharded."""
        ...

    def on_each(self, action: Callable[[], T]) -> list[T]:
        """Do `action` on each; what each returned, by rank. An error on one is raised on all."""
        ...


class Alone:
    """One process."""

    main = True

    def on_each(self, action: Callable[[], T]) -> list[T]:
        """As `Processes` has it."""
        return [action()]


@dataclass(frozen=True)
class Checkpoint:
    """What `save` was given, read back bit for bit: file name -> tensor name -> tensor, on the CPU.

    Tensors that several processes wrote their rows of are whole.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    meta: Mapping[str, Any]
    path: Path


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, JSON],
    keep: int = 2,
    form: Form = "consolidated",
    processes: Processes | None = None,
) -> Path:
    """Write the checkpoint of `step` into `folder`, and return its path; one of the same step is replaced.

    tensors: file name, of letters, digits, "-" and "_", -> tensor name -> tensor; of any dtype of safetensors,
        on any device, not DTensors (`taken` makes them plain); tensors that share memory are stored each on its own.
    keep: how many checkpoints to keep, this one and those of the steps before it; later ones are left alone.
    form: "sharded", where each process gives its own part of the tensors; else the main one gives them all.
    processes: those that all call this, in a folder that they share; None for this one alone.
    Raises `ValueError` for arguments that cannot be saved, and `CheckpointError` where the disk refuses; then
    nothing has changed, and the message names the last good checkpoint.
    """
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be a whole number of at least 0, got {step}")
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    for name in tensors:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"a file of tensors must be named with letters, digits, - and _, got {name!r}")
    facts = json.loads(json.dumps({"format": FORMAT, "step": step, "meta": meta}))  # as it will be read back
    processes = processes or Alone()
    part = f"-{_place()}" if form == "sharded" else ""
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{WRITING}{final.name}"

    def begin() -> None:
        if processes.main:
            folder.mkdir(parents=True, exist_ok=True)
            _clear(folder)
            temporary.mkdir()

    def write() -> dict[str, JSON]:
        files: dict[str, JSON] = {}
        for name, group in tensors.items() if processes.main or part else ():
            path = temporary / f"{name}{part}.safetensors"
            save_file(_storable(group), path)
            _sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _digest_of(path)}
        return files

    def finish() -> None:
        if processes.main:
            manifest: dict[str, JSON] = {**facts, "files": files}
            _write_text(temporary / MANIFEST, {**manifest, "sha256": _digest(manifest)})
            _sync(temporary)
            if final.exists():
                os.replace(final, folder / f"{REPLACED}{final.name}")
            os.replace(temporary, final)
            _sync(folder)

    def undo() -> None:
        if processes.main:
            with suppress(OSError):
                _clear(folder)

    def tidy() -> None:
        if processes.main:
            _clear(folder)
            for old in [path for number, path in _numbered(folder) if number <= step][keep:]:
                _delete(old)

    try:
        processes.on_each(begin)
        files = {name: told for written in processes.on_each(write) for name, told in written.items()}
        processes.on_each(finish)
    except (OSError, SafetensorError) as error:
        processes.on_each(undo)  # on all of them before any looks for what is left
        raise CheckpointError(
            f"step {step} could not be saved in {folder}: {error}. "
            f"The last good checkpoint is {newest(folder) or 'none: there is no good one'}"
        ) from error
    except BaseException:
        undo()
        raise
    try:
        processes.on_each(tidy)
    except OSError as error:
        raise CheckpointError(f"step {step} is saved, but older checkpoints could not be removed: {error}") from error
    return final


def load(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`, verified. `CheckpointError` names the file that is bad, and why."""
    manifest = _verified(path)
    parts: dict[str, dict[int, Mapping[str, Tensor]]] = defaultdict(dict)
    for file in manifest["files"]:
        name, rank = re.sub(r"-rank\d+of\d+$", "", file.removesuffix(".safetensors")), RANK.search(file)
        try:
            parts[name][int(rank[1]) if rank else 0] = load_file(path / file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path / file} cannot be read: {error}") from error
    tensors = {name: Joined([found[rank] for rank in sorted(found)]) for name, found in parts.items()}
    return Checkpoint(manifest["step"], tensors, manifest["meta"], path)


class Joined(Mapping[str, Tensor]):
    """Tensors of which each part has some rows, or one part all of them. Each is made whole as it is asked for."""

    def __init__(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        self.parts = parts

    def __getitem__(self, name: str) -> Tensor:
        rows = [part[name] for part in self.parts if name in part]
        if not rows:
            raise KeyError(name)
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(chain(*self.parts)))

    def __len__(self) -> int:
        return len(dict.fromkeys(chain(*self.parts)))


def latest(folder: Path, on_refused: Callable[[CheckpointError], None]) -> Checkpoint | None:
    """The newest good checkpoint in `folder`; None where there is none at all.

    on_refused: told of each newer one that is bad.  Raises `CheckpointError` where all are bad.
    """
    refused: list[CheckpointError] = []
    for _, path in _numbered(folder):
        try:
            return load(path)
        except CheckpointError as error:
            refused.append(error)
            on_refused(error)
    if refused:
        reasons = "; ".join(map(str, refused))
        raise CheckpointError(f"none of the checkpoints in {folder} is good; move them away to start anew. {reasons}")
    return None


def newest(folder: Path) -> Path | None:
    """The path of the newest good checkpoint in `folder`, verified but not loaded; None where there is none."""
    for _, path in _numbered(folder):
        with suppress(CheckpointError):
            _verified(path)
            return path
    return None


def write_json(path: Path, value: JSON) -> None:
    """Write a JSON file so that it is there as a whole or, if this fails, as it was. `CheckpointError` on failure."""
    _atomically(path, lambda temporary: _write_text(temporary, value))


def write_bytes(path: Path, contents: bytes) -> None:
    """Write a file, all or nothing, as `write_json`."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(contents)
        _sync(temporary)

    _atomically(path, write)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, all or nothing, as `write_json`; tensors as in `save`.

    Its metadata has a hash of the tensors beside what the caller gives, by which `read_tensors` verifies them.
    """
    ready = _storable(tensors)

    def write(temporary: Path) -> None:
        save_file(ready, temporary, {**(metadata or {}), CONTENTS: _contents(ready)})
        _sync(temporary)

    _atomically(path, write)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What `write_tensors` wrote, bit for bit. `CheckpointError` for a file that is missing, damaged or altered."""
    try:
        with safe_open(path, framework="pt") as file:
            told = (file.metadata() or {}).get(CONTENTS)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    if told != _contents(tensors):
        raise CheckpointError(f"{path} is damaged (its tensors are not those that were written)")
    return tensors


def _contents(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def taken(tensors: Mapping[str, Tensor], form: Form = "consolidated") -> dict[str, Tensor]:
    """What this process is to write of them, as copies on the CPU: all, whole, on the main one and nothing on others.

    form: if "sharded", of each DTensor its own rows, and what is not sharded on the main process only.
    Every process must call it, with the same names in one order.
    """
    copies = ((name, _taken(tensor, form)) for name, tensor in tensors.items())
    return {name: copy for name, copy in copies if copy is not None}


def placed(value: Tensor, like: Tensor, name: str) -> Tensor:
    """A whole tensor on the device of `like`, and sharded as `like` is; dtypes stay.

    `CheckpointError` with the tensor's `name` where the shapes differ.
    """
    if value.shape != like.shape:
        raise CheckpointError(f"{name} has the shape {tuple(value.shape)}, and {tuple(like.shape)} is needed")
    if not is_sharded(like) or is_sharded(value):
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    sharded = cast("DTensor", like)
    # Every process has the whole: no need to send it around.
    return distribute_tensor(value.to(like.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


def check_keys(owner: str, needed: Iterable[str], found: Iterable[str]) -> None:
    """`CheckpointError` unless both are the same names; it gives the first few that are missing or surplus."""
    needed, found = set(needed), set(found)
    complaints = [
        f"{len(names)} {kind} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", needed - found), ("surplus", found - needed))
        if names
    ]
    if complaints:
        raise CheckpointError(f"{owner} does not fit: {' and '.join(complaints)}")


# The state of an optimiser. A parameter that has none yet is written down as such, so that a lost state is noticed.

STATELESS = "none"
RANK = re.compile(r"[/-]rank(\d+)of(\d+)(\.safetensors)?$")
MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")
QUANTISED = ("qmap1", "qmap2", "absmax1", "absmax2")


def optimiser_tensors(
    optimiser: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    form: Form = "consolidated",
) -> dict[str, Tensor]:
    """What this process is to write of the optimiser's state, "NAME/STATE KEY" -> tensor, as `taken` has it.

    Whole numbers become 0-d int64. The states of `LocalShards` are those of each process on its own, and kept as
    they are, under "NAME/STATE KEY/rank0of2".  named_parameters: `module.named_parameters()`; those that the
    optimiser does not have are passed over. Every process must call this. Raises `ValueError` for one of the
    optimiser's without a name, or a state that is neither a tensor nor a whole number.
    """
    optimiser = _bare(optimiser)
    shared: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for name, parameter in _named(optimiser, named_parameters).items():
        state = {key: _as_tensor(f"{name}/{key}", value) for key, value in optimiser.state.get(parameter, {}).items()}
        state = state or {STATELESS: torch.empty(0)}
        if isinstance(optimiser, LocalShards):
            parts = {f"{name}/{key}/{_place()}": value.detach().to("cpu", copy=True) for key, value in state.items()}
            own |= parts if form == "sharded" else _from_all(parts)  # one by one: they may pass through a GPU
        else:
            shared |= {f"{name}/{key}": value for key, value in state.items()}
    return taken(shared, form) | own


def restore_optimiser(
    optimiser: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Give the optimiser the state that `optimiser_tensors` wrote; learning rates are not part of it.

    Bit for bit, but for 8-bit states of shards that go on on another number of processes: those are dequantised,
    cut anew and quantised in other blocks.
    Raises `CheckpointError`, before anything is changed, for keys that are missing or surplus, shapes that differ,
    and another kind of optimiser.
    """
    optimiser = _bare(optimiser)
    named = _named(optimiser, named_parameters)
    saved = _shards_of(tensors)
    check_keys("the optimiser's state", named, saved)
    restored: dict[Tensor, dict[str, Any]] = {}
    for name, parameter in named.items():
        state = _state_of_this_process(optimiser, parameter, name, saved[name], tensors)
        if set(state) == {STATELESS}:
            continue
        if (needed := _state_keys(optimiser, parameter)) is not None:
            check_keys(f"the optimiser's state of {name}", needed, state)
        restored[parameter] = {
            key: _as_state(optimiser, parameter, key, value, f"{name}/{key}") for key, value in state.items()
        }
    optimiser.state.clear()
    optimiser.state.update(restored)


def _bare(optimiser: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Without accelerate's wrapper, in which `LocalShards` would pass for an optimiser of whole tensors."""
    return getattr(optimiser, "optimizer", optimiser)


def _named(
    optimiser: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, nn.Parameter]:
    own = {parameter for group in optimiser.param_groups for parameter in group["params"]}
    named = {name: parameter for name, parameter in named_parameters if parameter in own}
    if len(set(named.values())) != len(own):
        raise ValueError(
            f"named_parameters names {len(set(named.values()))} of the optimiser's {len(own)} parameters; "
            "pass those of the module that it was made for"
        )
    return named


def _as_tensor(name: str, value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, int):
        return torch.tensor(value)
    raise ValueError(f"the optimiser's {name} must be a tensor or a whole number to be saved, got {value!r}")


def _as_state(
    optimiser: torch.optim.Optimizer, parameter: nn.Parameter, key: str, value: Tensor, name: str
) -> Tensor | int:
    if value.ndim == 0 and value.dtype == torch.int64:
        return int(value)
    if key in MOMENTS:
        like = local(parameter) if isinstance(optimiser, LocalShards) else parameter
        return placed(value, like, name).clone()
    if key == "step":
        # Where torch keeps it: on the CPU, unless the whole step runs on the device.
        group = next(group for group in optimiser.param_groups if any(parameter is other for other in group["params"]))
        device = parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
        return value.to(device, copy=True)
    return value.to(parameter.device, copy=True)


def _state_keys(optimiser: torch.optim.Optimizer, parameter: nn.Parameter) -> set[str] | None:
    """The state of a parameter that has stepped; None for an optimiser that is not known here."""
    if isinstance(optimiser, (torch.optim.Adam, torch.optim.AdamW)):
        amsgrad = any(group["amsgrad"] for group in optimiser.param_groups)
        return {"step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])}
    if _is_8bit(optimiser):
        quantised = local(parameter).numel() >= SMALLEST_8BIT
        return {"step", "state1", "state2", *(QUANTISED if quantised else ())}
    return None


def _is_8bit(optimiser: torch.optim.Optimizer) -> bool:
    inner = optimiser.inner if isinstance(optimiser, LocalShards) else optimiser
    return type(inner).__name__ == "AdamW8bit"


Shards: TypeAlias = Mapping[str, Mapping[str, str]]
"""Of one parameter: "rank0of2", or "" for what is not of one process alone -> state key -> name among the tensors."""


def _shards_of(tensors: Iterable[str]) -> Mapping[str, Shards]:
    """Each parameter's, by its name."""
    found: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for full in tensors:
        place = match[0][1:] if (match := RANK.search(full)) else ""
        name, _, key = full.removesuffix(f"/{place}").rpartition("/")
        found[name][place][key] = full
    return found


def _state_of_this_process(
    optimiser: torch.optim.Optimizer,
    parameter: nn.Parameter,
    name: str,
    saved: Shards,
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """A parameter's state as this process left it, or cut anew for it where shards were cut in another way."""
    place = _place() if isinstance(optimiser, LocalShards) else ""
    by_rank = sorted(saved, key=lambda place: int(match[1]) if (match := RANK.search(f"/{place}")) else 0)
    parts = {place: {key: tensors[full] for key, full in saved[place].items()} for place in by_rank}
    if place in parts:
        return parts[place]
    first = next(iter(parts.values()))
    return _cut_anew(list(parts.values()), parameter, name) if _is_8bit(optimiser) else first


def _cut_anew(shards: Sequence[Mapping[str, Tensor]], parameter: nn.Parameter, name: str) -> dict[str, Tensor]:
    """AdamW8bit's state of this process's shard, or of the whole parameter, from that of shards cut in another way."""
    stepped = [shard for shard in shards if STATELESS not in shard]
    if not stepped or not local(parameter).numel():
        return {STATELESS: torch.empty(0)}
    functional: Any = import_module("bitsandbytes.functional")
    blocks = 256
    own = {"step": stepped[0]["step"]}
    for moment, scales, code, signed in (("state1", "absmax1", "qmap1", True), ("state2", "absmax2", "qmap2", False)):
        check_keys(f"the optimiser's state of {name}", [moment], set(stepped[0]) & {moment})
        rows = [
            functional.dequantize_blockwise(shard[moment], absmax=shard[scales], code=shard[code], blocksize=blocks)
            if code in shard
            else shard[moment]
            for shard in stepped
        ]
        value = local(placed(torch.cat(rows), parameter, f"{name}/{moment}"))
        own[moment] = value
        if value.numel() >= SMALLEST_8BIT:
            own[code] = functional.create_dynamic_map(signed).to(value.device)
            own[moment], quantised = functional.quantize_blockwise(value, own[code], blocksize=blocks)
            own[scales] = quantised.absmax
    return own


def _rank_and_world() -> tuple[int, int]:
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _place() -> str:
    rank, world = _rank_and_world()
    return f"rank{rank}of{world}"


def _from_all(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the main process what every one has, whose names differ; nothing on the others."""
    rank, world = _rank_and_world()
    if world == 1 or not own:
        return own
    from torch import distributed

    everyone: list[Any] | None = [None] * world if rank == 0 else None
    distributed.gather_object(own, everyone)
    return {name: value for each in everyone or () for name, value in each.items()}


def _taken(tensor: Tensor, form: Form) -> Tensor | None:
    """A copy on the CPU: what training goes on to change in place stays as it was at this step."""
    tensor, mine = tensor.detach(), _rank_and_world()[0] == 0
    if is_sharded(tensor) and form == "sharded":
        tensor, mine = local(tensor), True
    elif is_sharded(tensor):
        tensor = cast("DTensor", tensor).full_tensor()
    return tensor.to("cpu", copy=True) if mine else None


# Files.


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory, as safetensors wants them."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            raise ValueError(f"{name} is a DTensor, of which this process has a part; take it first (`taken`)")
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        ready[name] = plain
    return ready


def check_writable(folder: Path) -> None:
    """A `ValueError` where no folder can be, or none can be written; nothing is made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{folder} cannot be written: {there} is no folder; name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be written: {there} allows no writing; name another")


def _atomically(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f"{WRITING}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        raise CheckpointError(f"{path} could not be written: {error}") from error


def _write_text(path: Path, value: JSON) -> None:
    text = json.dumps(value, indent=2) + "\n"
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(manifest: Mapping[str, JSON]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as they were written, or a `CheckpointError`."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files, written = manifest["files"], manifest.pop("sha256")
        known = manifest["format"] == FORMAT
    except FileNotFoundError as error:
        raise CheckpointError(f"{path / MANIFEST} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is malformed: {error!r}") from error
    if not known:
        raise CheckpointError(f"{path / MANIFEST} has format {manifest['format']}; this version reads {FORMAT}")
    if _digest(manifest) != written:
        raise CheckpointError(f"{path / MANIFEST} is altered: it does not match its own sha256")
    for name, facts in files.items():
        try:
            size = (path / name).stat().st_size
            digest = _digest_of(path / name) if size == facts["bytes"] else None
        except FileNotFoundError as error:
            raise CheckpointError(f"{path / name} is missing") from error
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error}") from error
        if digest is None:
            kind = "truncated" if size < facts["bytes"] else "altered"
            raise CheckpointError(f"{path / name} is {kind}: {size} bytes instead of {facts['bytes']}")
        if digest != facts["sha256"]:
            raise CheckpointError(f"{path / name} is altered: its sha256 is not the one of the manifest")
    return cast("dict[str, Any]", manifest)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the finished checkpoints, good or bad, newest first.

    One that was moved aside, and whose replacement never came, still counts.
    """
    found: dict[int, Path] = {}
    for path in _entries(folder):
        if match := re.fullmatch(rf"({re.escape(REPLACED)})?step-(\d{{8,}})", path.name):
            step = int(match[2])
            if not (match[1] and step in found):
                found[step] = path
    return sorted(found.items(), reverse=True)


def _entries(folder: Path) -> Iterator[Path]:
    """What lies in `folder`, hidden names last; nothing where there is no such folder."""
    if folder.is_dir():
        yield from sorted(folder.iterdir(), key=lambda path: (path.name.startswith("."), path.name))


def _clear(folder: Path) -> None:
    """Undo or finish what a `save` left half-way, after a kill or an error."""
    for path in list(_entries(folder)):
        final = folder / path.name.removeprefix(REPLACED)
        if path.name.startswith(REPLACED) and not final.exists():
            os.replace(path, final)
        elif path.name.startswith(REPLACED):
            _delete(path)
        elif path.name.startswith(WRITING):
            shutil.rmtree(path)


def _delete(path: Path) -> None:
    """Hide, then delete: a kill half-way leaves no folder that looks like a checkpoint."""
    hidden = path.with_name(f"{DELETING}{path.name.removeprefix('.')}")
    os.replace(path, hidden)
    shutil.rmtree(hidden)
