"""Caches that resume to the same bytes, refuse what is not theirs, and batches that are of one size."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pitools.guidance import Guidance, Teacher
from pitools.training.errors import CheckpointError
from pitools.training.lock import locked
from scale.cache import Cache, Sample, collate, write_cache
from scale.data import CachedSamples, StubPrompts, draw_sheet

SIZES = [(8, 12), (8, 8), (12, 8)]


class Encoder:
    """Samples that are a function of their record; record -1 stands for no prompt. Fails at its call number `stop`."""

    def __init__(self, images: bool = False, stop: int | None = None) -> None:
        self.images, self.stop, self.calls = images, stop, 0

    def __call__(self, records: Sequence[int]) -> list[Sample]:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return [self.sample(record) for record in records]

    def sample(self, record: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(record + 100)
        text = torch.randn(2 + record % 3, 4, generator=generator).bfloat16()
        sample = {"encoder_hidden_states": text, "pooled_projections": torch.randn(5, generator=generator)}
        if self.images:
            sample["latents"] = torch.randn(16, *SIZES[record % len(SIZES)], generator=generator)
        return sample


def write(folder: Path, count: int = 11, encode: Any = None, **changes: Any) -> None:
    options: dict[str, Any] = {"null": -1, "identity": {"weights": "a/b"}, "masked": True, "shard_size": 4}
    write_cache(folder, range(count), encode or Encoder(), **{**options, "batch_size": 3, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("images", [False, True])
def test_every_sample_is_read_back_bit_for_bit(tmp_path: Path, images: bool) -> None:
    encoder = Encoder(images)
    write(tmp_path, encode=encoder)
    cache = Cache(tmp_path)
    assert len(cache) == 11
    assert cache.identity == {"weights": "a/b", "masked": True, "samples": 11, "shard_size": 4}
    for index in [10, 0, 7, 3, 4]:
        expected = encoder.sample(index)
        assert cache[index].keys() == expected.keys()
        assert all(torch.equal(cache[index][name], value) for name, value in expected.items())
        assert cache[index]["encoder_hidden_states"].dtype == torch.bfloat16
    assert cache.null.keys() == {"encoder_hidden_states", "pooled_projections"}
    assert torch.equal(cache.null["encoder_hidden_states"], encoder.sample(-1)["encoder_hidden_states"])
    assert (cache.sizes is not None) == images
    if cache.sizes is not None:
        assert cache.sizes.tolist() == [list(SIZES[index % 3]) for index in range(11)]
    for index in (-1, 11):
        with pytest.raises(IndexError, match=rf"0..10, got {index}"):
            cache[index]


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("stop", range(6))
def test_an_interrupted_cache_ends_in_the_same_bytes(tmp_path: Path, images: bool, stop: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write(whole, encode=Encoder(images))
    with pytest.raises(KeyboardInterrupt):
        write(broken, encode=Encoder(images, stop))
    # Where not even the null prompt could be encoded, nothing is claimed.
    expected = f"broken is incomplete, {(stop - 1) // 2} of 3 shards" if stop else "there is no cache in"
    with pytest.raises(CheckpointError, match=expected):
        Cache(broken)
    assert stop or not list(broken.iterdir())
    resumed = Encoder(images)
    write(broken, encode=resumed)
    # One call for the null prompt, two for each shard of four, one for the last, and none for what was there.
    assert resumed.calls == 6 - (1 + (stop - 1) // 2 * 2 if stop else 0)
    assert contents(broken) == contents(whole)


def test_a_complete_cache_encodes_nothing_and_a_lost_or_cut_shard_alone_again(tmp_path: Path) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    again = Encoder()
    write(tmp_path, encode=again)
    assert again.calls == 0
    (tmp_path / "shard-00001.safetensors").unlink()
    cut = tmp_path / "shard-00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    write(tmp_path, encode=again)
    assert again.calls == 2 + 1
    assert contents(tmp_path) == before


def test_progress_reaches_the_end_whatever_was_there(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    for _ in range(2):
        write(tmp_path, on_samples=lambda done, total: told.append((done, total)))
    done = [count for count, _ in told]
    assert {total for _, total in told} == {11}
    assert done[-1] == 11
    assert done[:6] == sorted(done[:6])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"identity": {"weights": "a/c"}}, "weights"),
        ({"identity": {"weights": "a/b", "revision": "x"}}, "revision"),
        ({"masked": False}, "masked"),
        ({"count": 12}, "samples"),
        ({"shard_size": 5, "masked": False}, "masked, shard_size"),
    ],
)
def test_another_cache_is_refused_by_what_differs(tmp_path: Path, changes: Mapping[str, Any], key: str) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=f"holds another cache: it differs in {key}; choose another folder"):
        write(tmp_path, **changes)
    assert contents(tmp_path) == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="holds files of something else"):
        write(tmp_path)
    with pytest.raises(CheckpointError, match="there is no cache in"):
        Cache(tmp_path / "nowhere")


def test_two_processes_do_not_write_one_cache(tmp_path: Path) -> None:
    def no_matter() -> None:
        raise AssertionError

    with locked(tmp_path, no_matter), pytest.raises(CheckpointError, match="another process is writing"):
        write(tmp_path)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "null.safetensors", "sizes.safetensors"])
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, encode=Encoder(images=True))
    path = tmp_path / name
    good = path.read_bytes()

    def use() -> None:
        cache = Cache(tmp_path)
        for index in range(len(cache)):
            cache[index]
        _ = cache.null

    use()
    path.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match=rf"{name} is truncated: {len(good) - 1} bytes instead of {len(good)}"):
        use()
    path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    with pytest.raises(CheckpointError, match=rf"{name} is damaged"):
        use()
    path.write_bytes(bytes(8) + good[8:])
    with pytest.raises(CheckpointError, match=rf"{name} is damaged"):
        use()
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        use()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([{"a": torch.zeros(1)}] * 2, "a sample for each of 1 records, got 2"),
        ([{"latents": torch.zeros(4, 4)}], r"latents must be \[C, H, W\], got \(4, 4\)"),
    ],
)
def test_an_encoder_that_answers_wrongly(tmp_path: Path, answer: list[Sample], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, count=1, encode=lambda records: answer)


def test_latents_are_for_all_samples_or_none(tmp_path: Path) -> None:
    some = lambda records: [Encoder(images=record >= 4).sample(record) for record in records]  # noqa: E731
    with pytest.raises(ValueError, match="latents for 2 of 3 shards; for all, or for none"):
        write(tmp_path, encode=some)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"shard_size": 0}, "shard_size"), ({"batch_size": 0}, "batch_size"), ({"count": 0}, "records")],
)
def test_sizes_of_nothing_are_refused(tmp_path: Path, changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **changes)


def test_collated_texts_are_padded_and_masked() -> None:
    samples = [Encoder(images=True).sample(index) for index in (0, 2, 1)]
    conditions = collate(samples, masked=True)
    assert set(conditions) == {"encoder_hidden_states", "encoder_hidden_states_mask", "pooled_projections"}
    text, mask = conditions["encoder_hidden_states"], conditions["encoder_hidden_states_mask"]
    assert text.shape == (3, 4, 4)
    assert mask.sum(1).tolist() == [2, 4, 3]
    assert mask.dtype == torch.bool
    for row, kept, sample in zip(text, mask, samples, strict=True):
        assert torch.equal(row[kept], sample["encoder_hidden_states"])
        assert not row[~kept].any()
    assert torch.equal(conditions["pooled_projections"][1], samples[1]["pooled_projections"])


def test_without_a_mask_lengths_must_agree() -> None:
    samples = [Encoder().sample(index) for index in (0, 3)]
    conditions = collate(samples, masked=False)
    assert conditions["encoder_hidden_states"].shape == (2, 2, 4)
    assert "encoder_hidden_states_mask" not in conditions
    with pytest.raises(ValueError, match=r"one shape where there is no mask, got \[\(2, 4\), \(3, 4\)\]"):
        collate([Encoder().sample(index) for index in (0, 1)], masked=False)
    with pytest.raises(ValueError, match="the same names"):
        collate([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}], masked=False)
    with pytest.raises(ValueError, match="must not be empty"):
        collate([], masked=True)


# The plug-ins.


def test_prompts_alone_come_with_latents_of_zeros(tmp_path: Path) -> None:
    write(tmp_path)
    data = CachedSamples(tmp_path, height=64, width=96)
    latents, conditions = data.batch([5, 3])
    assert torch.equal(latents, torch.zeros(2, 16, 8, 12))
    assert not data.has_latents
    assert data.backbone is None
    expected = collate([Encoder().sample(5), Encoder().sample(3)], masked=True)
    assert all(torch.equal(conditions[name], value) for name, value in expected.items())
    seen = [index for step in range(11) for index in data.indices(0, step, 3, range(3))]
    assert Counter(seen) == dict.fromkeys(range(11), 3)


def test_the_null_prompt_replaces_a_batch_of_any_length(tmp_path: Path) -> None:
    write(tmp_path)
    data = CachedSamples(tmp_path, height=64, width=64)
    seen: list[Mapping[str, Tensor]] = []

    def network(x: Tensor, t: Tensor, conditions: Any = None) -> Tensor:
        seen.append(conditions)
        return x

    latents, conditions = data.batch([0, 2, 1])
    Teacher(network, Guidance(scale=4.0), data.null_conditions).velocity(latents, 0.5, conditions)
    null = Encoder().sample(-1)
    assert seen[1]["encoder_hidden_states_mask"].all()
    assert seen[1]["encoder_hidden_states"].shape == (3, 4, 4)
    for row in range(3):
        assert torch.equal(seen[1]["encoder_hidden_states"][row], null["encoder_hidden_states"])
        assert torch.equal(seen[1]["pooled_projections"][row], null["pooled_projections"])


def test_a_step_is_of_one_size_and_an_epoch_has_each_sample_at_most_once(tmp_path: Path) -> None:
    count, batch = 31, 3  # buckets of 11, 10 and 10: three whole batches each
    write(tmp_path, count, Encoder(images=True))
    data = CachedSamples(tmp_path, height=64, width=64)
    epochs = []
    for epoch in range(3):
        steps = [data.indices(1, 9 * epoch + step, batch, range(batch)) for step in range(9)]
        for own in steps:
            latents, _ = data.batch(own)
            assert latents.shape == (batch, 16, *SIZES[own[0] % 3])
        flat = [index for own in steps for index in own]
        assert len(set(flat)) == 27
        epochs.append(steps)
    assert epochs[0] != epochs[1]
    order = [own[0] % 3 for own in epochs[0]]
    assert order != sorted(order)  # sizes are mixed
    left_out = [set(range(count)) - {index for own in steps for index in own} for steps in epochs]
    assert len({frozenset(out) for out in left_out}) > 1
    # A process's rows are those of the whole batch, and a fresh object has the same order.
    fresh = CachedSamples(tmp_path, height=64, width=64)
    assert fresh.indices(1, 4, batch, range(1, 3)) == epochs[0][4][1:]
    assert fresh.indices(2, 4, batch, range(batch)) != epochs[0][4]
    with pytest.raises(ValueError, match="batch 12 is more than there are samples of any one size, at most 11"):
        data.indices(1, 0, 12, range(12))
    with pytest.raises(ValueError, match="samples of one size"):
        data.batch([0, 1])
    with pytest.raises(ValueError, match="channels is 32, and the cache has latents of 16"):
        CachedSamples(tmp_path, channels=32).batch([0])


def test_a_section_has_sizes_that_transformers_take(tmp_path: Path) -> None:
    assert CachedSamples(tmp_path, channels=32).shape == (32, 128, 128)
    for section in (CachedSamples, StubPrompts):
        with pytest.raises(ValueError, match="width must be a multiple of 16 pixels, got 1000"):
            section(**({"folder": tmp_path} if section is CachedSamples else {}), width=1000)
    with pytest.raises(CheckpointError, match="write one with `pitools cache`"):
        len(CachedSamples(tmp_path))


@pytest.mark.parametrize("kind", ["qwen", "flux", "flux2", "dit"])
def test_stubs_suit_their_tiny_backbones(kind: Any) -> None:
    from pitools.policies import GMHead
    from scale.backbone import Flux, Flux2, QwenImage
    from scale.dit import DiT

    data = StubPrompts(kind, width=64)
    section: Any = {"qwen": QwenImage, "flux": Flux, "flux2": Flux2, "dit": DiT}[kind]
    backbone = (section(weights="random") if kind == "dit" else section()).tiny()
    latents, conditions = data.batch([0, 1, 5])
    assert latents.shape == (3, *data.shape)
    alone, own = data.batch([5])
    assert torch.equal(alone[0], latents[2])
    teacher = Teacher(backbone.teacher(torch.Generator().manual_seed(0)), Guidance(scale=2.0), data.null_conditions)
    u = teacher.velocity(latents, 0.5, conditions)
    torch.testing.assert_close(teacher.velocity(alone, 0.5, own)[0], u[2], atol=1e-5, rtol=1e-5)
    student = backbone.student(teacher.network, GMHead(2), torch.Generator().manual_seed(0))
    assert student(latents, torch.full([3], 0.5), conditions).velocities.isfinite().all()
    if kind == "qwen":
        lengths = [int(data.batch([index])[1]["encoder_hidden_states"].shape[1]) for index in range(8)]
        assert len(set(lengths)) > 4
    with pytest.raises(ValueError, match=r"0..7, got 8"):
        data.batch([8])


@pytest.mark.parametrize("channels", [2, 16])
def test_a_sheet_is_drawn_in_the_teachers_colours(tmp_path: Path, channels: int) -> None:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, channels, 8, 12, generator=generator)
    path = tmp_path / "sheet.png"
    draw_sheet(
        path, [("teacher", teacher), ("student, 4 NFE", teacher * torch.nan), ("longer", torch.cat([teacher] * 9))]
    )
    with Image.open(path) as image:
        assert image.width > image.height > 100
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 100
