"""Encoded samples on disk: what a transformer is conditioned on, and latents where there are images.

    index.json                   identity, counts, and the size of every other file; the sizes are written last
    shard-00000.safetensors      "00007/NAME" of each sample, and the "sha256" [n, 32] by which a sample is verified
    null.safetensors             what stands for no prompt, or no class
    sizes.safetensors            "sizes" [N, 2], height and width of each latent, where there are latents

A sample is a mapping of tensors without a batch axis: encoder_hidden_states `[T, D]`, for FLUX.1 pooled_projections
`[D]`, or for a DiT class_labels `[]`; and latents `[C, H, W]`. A shard is there as a whole or not at all, and a cache
that was interrupted goes on at the first one that is not; its bytes depend on its arguments alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pitools.training.checkpoint import JSON, read_tensors, write_json, write_tensors
from pitools.training.errors import CheckpointError
from pitools.training.lock import locked
from pitools.training.recipe import changed_keys

Sample: TypeAlias = Mapping[str, Tensor]
"""One sample's tensors, by the names of the conditions, and "latents"."""

R = TypeVar("R")

FORMAT = 1
INDEX, NULL, SIZES = "index.json", "null.safetensors", "sizes.safetensors"
TEXT, MASK, LATENTS = "encoder_hidden_states", "encoder_hidden_states_mask", "latents"
LABELS = "class_labels"
OPEN_SHARDS = 64


def write_cache(
    folder: Path,
    records: Sequence[R],
    encode: Callable[[Sequence[R]], Sequence[Sample]],
    *,
    null: R,
    identity: Mapping[str, JSON],
    masked: bool,
    shard_size: int = 128,
    batch_size: int = 8,
    on_samples: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Encode `records` into `folder`, or go on where it was interrupted; nothing is encoded where it is complete.

    encode: gets up to `batch_size` records, and answers with a sample for each; first of all `null` alone, before
    anything is written.  null: the record that stands for no prompt or class; latents of it are left out.
    identity: plain values that say what the samples depend on.  masked: whether texts are trimmed, so that batches
    have a mask.  shard_size: samples in one file, which are held in memory together.  on_samples: told how many
    samples are there, and of how many.
    Raises `ValueError` for sizes below 1, no records, and an encoder that answers with something else than it
    should; `CheckpointError` for a folder that holds another cache, naming the keys in which the two differ, that
    another process is writing, or on a disk that refuses.
    """
    for name, value in (("shard_size", shard_size), ("batch_size", batch_size), ("len(records)", len(records))):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    told = {**identity, "masked": masked, "samples": len(records), "shard_size": shard_size}
    facts: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, "identity": told}))  # as it will be read back

    def refuse() -> None:
        raise CheckpointError(f"another process is writing the cache {folder}")

    with locked(folder, refuse):
        if (folder / INDEX).exists():
            found = _read_index(folder)
            if changed := changed_keys(found["identity"], facts["identity"]):
                raise CheckpointError(
                    f"{folder} holds another cache: it differs in {', '.join(changed)}; choose another folder"
                )
        elif any(folder.glob("*.safetensors")):
            raise CheckpointError(f"{folder} holds files of something else, and no {INDEX}; choose another folder")
        if not _is_whole(folder / NULL):
            (encoded,) = _checked(encode([null]), 1)
            if not (folder / INDEX).exists():
                write_json(folder / INDEX, {**facts, "files": {}})
            write_tensors(folder / NULL, {name: value for name, value in encoded.items() if name != LATENTS})
        names = _shards(len(records), shard_size)
        for number, name in enumerate(names):
            rows = records[number * shard_size : (number + 1) * shard_size]
            if not _is_whole(folder / name):
                samples: list[Sample] = []
                for start in range(0, len(rows), batch_size):
                    part = rows[start : start + batch_size]
                    samples += _checked(encode(part), len(part))
                    on_samples(number * shard_size + len(samples), len(records))
                write_tensors(folder / name, _shard(samples))
            on_samples(number * shard_size + len(rows), len(records))
        sizes = _gather_sizes([folder / name for name in names])
        if sizes is not None and not _is_whole(folder / SIZES):
            write_tensors(folder / SIZES, {"sizes": sizes})
        files = [*names, NULL, *([SIZES] if sizes is not None else [])]
        write_json(folder / INDEX, {**facts, "files": {name: (folder / name).stat().st_size for name in files}})


class Cache:
    """A complete cache, read one sample at a time; every sample is verified as it is read.

    identity: as it was written, with "masked", "samples" and "shard_size".  sizes: `[N, 2]`, int64, the height and
    width of each latent; None where there are no latents.  null: what stands for no prompt or class.
    Raises `CheckpointError`, naming the file, for what is missing, incomplete, truncated or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _read_index(folder)
        self.identity: Mapping[str, Any] = index["identity"]
        files: Mapping[str, int] = index["files"]
        if not files:
            names = _shards(self.identity["samples"], self.identity["shard_size"])
            there = sum((folder / name).exists() for name in names)
            raise CheckpointError(
                f"the cache {folder} is incomplete, {there} of {len(names)} shards; run `pitools cache` again to go on"
            )
        for name, size in files.items():
            try:
                found = (folder / name).stat().st_size
            except OSError as error:
                raise CheckpointError(f"{folder / name} is missing or cannot be read: {error.strerror}") from error
            if found != size:
                kind = "truncated" if found < size else "altered"
                raise CheckpointError(f"{folder / name} is {kind}: {found} bytes instead of {size}")
        self.masked: bool = self.identity["masked"]
        self.sizes = read_tensors(folder / SIZES)["sizes"] if SIZES in files else None
        self._opened = lru_cache(maxsize=OPEN_SHARDS)(_Shard)

    def __len__(self) -> int:
        """The number of samples, without the null one."""
        return int(self.identity["samples"])

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`; `IndexError` outside 0..len - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"a sample's index must lie in 0..{len(self) - 1}, got {index}")
        number, place = divmod(index, self.identity["shard_size"])
        path = self.folder / _shard_name(number)
        try:
            shard = self._opened(path)
            sample, told = shard.sample(place), shard.digests[place]
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged ({error})") from error
        if not torch.equal(_digest(sample), told):
            raise CheckpointError(f"{path} is damaged (sample {index} is not what was written); write the cache again")
        return sample

    @cached_property
    def null(self) -> Sample:
        """What stands for no prompt, or no class."""
        return read_tensors(self.folder / NULL)


def collate(samples: Sequence[Sample], masked: bool) -> dict[str, Tensor]:
    """The conditions of a batch: texts padded with zeros to the longest `[B, T, D]`, all else stacked; no latents.

    masked: whether texts may differ in length; then "encoder_hidden_states_mask" `[B, T]`, bool, says what is text.
    Raises `ValueError` for no samples, samples that have other names, and lengths that differ without a mask.
    """
    if not samples:
        raise ValueError("samples must not be empty")
    names = [name for name in samples[0] if name != LATENTS]
    if any(set(sample) - {LATENTS} != set(names) for sample in samples):
        raise ValueError(f"samples must have the same names, got {sorted({tuple(sorted(each)) for each in samples})}")
    conditions: dict[str, Tensor] = {}
    for name in names:
        values = [sample[name] for sample in samples]
        lengths = torch.tensor([value.shape[0] if value.ndim else 0 for value in values])
        if name == TEXT and masked:
            conditions[name] = pad_sequence(values, batch_first=True)
            conditions[MASK] = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        elif len({value.shape for value in values}) > 1:
            shapes = sorted({tuple(value.shape) for value in values})
            raise ValueError(f"{name} must be of one shape where there is no mask, got {shapes}")
        else:
            conditions[name] = torch.stack(values)
    return conditions


class _Shard:
    """An open shard: its tensors are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.file = cast(Any, safe_open(path, framework="pt"))
        keys: list[str] = self.file.keys()
        self.digests: Tensor = self.file.get_tensor("sha256")
        self.sizes: Tensor | None = self.file.get_tensor("sizes") if "sizes" in keys else None
        self.names: dict[int, list[str]] = {}
        for key in keys:
            place, slash, name = key.partition("/")
            if slash:
                self.names.setdefault(int(place), []).append(name)

    def sample(self, place: int) -> dict[str, Tensor]:
        return {name: self.file.get_tensor(f"{place:05d}/{name}") for name in self.names[place]}


def _shard(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The tensors of a shard. No metadata: safetensors would write several of its entries in any order."""
    tensors = {f"{place:05d}/{name}": value for place, each in enumerate(samples) for name, value in each.items()}
    tensors["sha256"] = torch.stack([_digest(sample) for sample in samples])
    if LATENTS in samples[0]:
        tensors["sizes"] = torch.tensor([sample[LATENTS].shape[-2:] for sample in samples])
    return tensors


def _gather_sizes(paths: Sequence[Path]) -> Tensor | None:
    """The sizes of all latents, from all shards; None where there are no latents."""
    sizes: list[Tensor] = []
    for path in paths:
        shard = _Shard(path)
        if shard.sizes is not None:
            sizes.append(shard.sizes)
    if sizes and len(sizes) != len(paths):
        raise ValueError(f"encode answered with latents for {len(sizes)} of {len(paths)} shards; for all, or for none")
    return torch.cat(sizes) if sizes else None


def _checked(samples: Sequence[Sample], count: int) -> Sequence[Sample]:
    """An encoder's answer, on the CPU."""
    if len(samples) != count:
        raise ValueError(f"encode must answer with a sample for each of {count} records, got {len(samples)}")
    for sample in samples:
        if set(sample) != set(samples[0]):
            raise ValueError(f"encode must answer with the same names, got {sorted(sample)} and {sorted(samples[0])}")
        if LATENTS in sample and sample[LATENTS].ndim != 3:
            raise ValueError(f"latents must be [C, H, W], got {tuple(sample[LATENTS].shape)}")
    return [{name: value.detach().cpu() for name, value in sample.items()} for sample in samples]


def _digest(sample: Sample) -> Tensor:
    """sha256 `[32]`, uint8, over names, dtypes, shapes and bytes, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(sample):
        value = sample[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _shards(samples: int, shard_size: int) -> list[str]:
    return [_shard_name(number) for number in range(-(-samples // shard_size))]


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is there, and as long as it says; one that is not is written again."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        known = index["format"] == FORMAT
        _ = index["identity"]["samples"], index["identity"]["shard_size"], index["identity"]["masked"], index["files"]
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no cache in {str(folder)!r}; write one with `pitools cache`") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is malformed: {error!r}") from error
    if not known:
        raise CheckpointError(f"{path} has format {index['format']}; this version reads {FORMAT}")
    return dict(index)
