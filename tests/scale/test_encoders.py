"""Encoders against the pipelines' own: text as they pad it, latents as they normalise them, on tiny random models."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import ExifTags, Image
from torch import Tensor, nn
from transformers import BatchEncoding

from pitools.training.errors import CheckpointError
from scale.cache import Cache, collate
from scale.data import CachedSamples
from scale.dit import DiT
from scale.encoders import Encoder, bucket_of, build_cache, build_class_cache, encoder_for, family_of, image_size

KINDS = ["qwen", "flux", "flux2"]
PROMPTS = ["a fox", "", "a much longer prompt about two cats"]
CPU = torch.device("cpu")
PYRAMID = {
    "block_out_channels": (4, 4, 4, 4),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}


class Tokenizer:
    """The bytes of a text as its tokens, after its kind of padding."""

    model_max_length = 77
    added_tokens_encoder: Mapping[str, int] = {}

    def __call__(self, texts: Sequence[str], padding: Any = True, max_length: int = 999, **_: Any) -> BatchEncoding:
        rows = [list(text.encode())[:max_length] for text in texts]
        width = max_length if padding == "max_length" else max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})

    def tokenize(self, text: str) -> list[str]:
        return text.split()

    def apply_chat_template(self, messages: Any, padding: Any, max_length: int, **_: Any) -> BatchEncoding:
        return self([talk[-1]["content"][0]["text"] for talk in messages], padding, max_length)


class TextEncoder(nn.Module):
    """Every token's embedding, mixed with those before it; padding is no zero."""

    dtype, device = torch.float32, CPU

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(256, 12), layers

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        hidden = self.embed(input_ids).cumsum(1)
        states = [hidden * (1 + layer) for layer in range(self.layers)]
        return Output(hidden_states=states, pooler_output=hidden[:, -1], last_hidden_state=hidden)


class Output(SimpleNamespace):
    def __getitem__(self, index: int) -> Tensor:
        return [self.last_hidden_state][index]


def vae_of(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "qwen":
        vae: Any = AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    elif kind == "flux":
        vae = AutoencoderKL(latent_channels=16, shift_factor=0.1159, scaling_factor=0.3611, **PYRAMID)
    else:
        vae = AutoencoderKLFlux2(**PYRAMID)
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.eval()


def encoder_of(kind: str, vae: Any = None) -> Encoder:
    torch.manual_seed(1)
    parts: dict[str, Any] = {"text_encoder": TextEncoder(layers=31), "tokenizer": Tokenizer(), "vae": vae}
    if kind == "flux":
        parts |= {"text_encoder_2": TextEncoder(), "tokenizer_2": Tokenizer()}
    family = family_of(kind)
    return Encoder(getattr(diffusers, family.pipeline)(scheduler=None, transformer=None, **parts), family, CPU)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_collated_samples_are_the_pipelines_own_batch(kind: str) -> None:
    encoder = encoder_of(kind)
    own = encoder.pipeline.encode_prompt(PROMPTS, device=CPU)
    samples = encoder.encode(PROMPTS)
    conditions = collate(samples, encoder.family.masked)
    assert torch.equal(conditions.pop("encoder_hidden_states"), own[0])
    if kind == "qwen":
        assert torch.equal(conditions.pop("encoder_hidden_states_mask"), own[1].bool())
        assert len({len(sample["encoder_hidden_states"]) for sample in samples}) == 3
    elif kind == "flux":
        assert torch.equal(conditions.pop("pooled_projections"), own[1])
        assert own[0].shape[1] == 512
    else:
        assert own[0].shape == (3, 512, 36)
    assert not conditions


@torch.no_grad()
def test_a_batch_that_has_no_padding_has_no_mask_to_trim_by() -> None:
    encoder = encoder_of("qwen")
    for prompt in PROMPTS:  # alone, the pipeline gives no mask
        (alone,) = encoder.encode([prompt])
        together = encoder.encode(PROMPTS)[PROMPTS.index(prompt)]
        torch.testing.assert_close(alone, together)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_latents_are_normalised_as_the_pipelines_do(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(kind, vae_of(kind))
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 64, 96, 3), generator=generator, dtype=torch.uint8)
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image.numpy()).save(path)
    latents = encoder.encode_images(paths, 64, 96)
    assert latents.shape == (2, 32 if kind == "flux2" else 16, 8, 12)
    # Diffusers encodes images in other pipelines of the family, by a sample of the posterior.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    vae, given = SimpleNamespace(vae=encoder.pipeline.vae), pixels.movedim(-1, 1).float() / 127.5 - 1
    if kind == "qwen":
        own = diffusers.QwenImageImg2ImgPipeline._encode_vae_image(vae, given.unsqueeze(2), None).squeeze(2)
    elif kind == "flux":
        own = diffusers.FluxImg2ImgPipeline._encode_vae_image(vae, given, None)
    else:
        own = encoder.pipeline._unpatchify_latents(encoder.pipeline._encode_vae_image(given, None))
    torch.testing.assert_close(latents, own, atol=1e-5, rtol=1e-5)
    # Other sizes are scaled to cover and cropped around the centre, not squeezed.
    Image.new("RGB", (128, 64)).save(paths[0])
    assert encoder.encode_images(paths[:1], 96, 64).shape[-2:] == (12, 8)


def test_an_image_is_turned_as_it_says(tmp_path: Path) -> None:
    path, exif = tmp_path / "turned.jpg", Image.Exif()
    Image.new("RGB", (30, 20)).save(path)
    assert image_size(path) == (30, 20)
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    assert image_size(path) == (20, 30)


@pytest.mark.parametrize(
    ("size", "area", "bucket"),
    [
        ((1024, 1024), 1024**2, (1024, 1024)),
        ((512, 512), 1024**2, (1024, 1024)),
        ((1920, 1080), 1024**2, (1344, 768)),
        ((1080, 1920), 1024**2, (768, 1344)),
        ((4000, 3000), 1024**2, (1152, 896)),
        ((9000, 300), 1024**2, (2048, 512)),
        ((640, 480), 64 * 96, (80, 64)),
    ],
)
def test_buckets(size: tuple[int, int], area: int, bucket: tuple[int, int]) -> None:
    assert bucket_of(*size, area) == bucket


def test_buckets_keep_shape_and_area() -> None:
    found = set()
    for width in range(300, 1200, 7):
        w, h = bucket_of(width, 600, 1024**2)
        assert w % 64 == h % 64 == 0
        assert 0.8 * 1024**2 < w * h <= 1024**2
        assert 0.85 < w / h * 600 / width < 1 / 0.85
        found.add((w, h))
    assert len(found) < 20
    with pytest.raises(ValueError, match="area must be at least 256 pixels"):
        bucket_of(10, 10, 255)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        bucket_of(0, 10, 1024)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.1 pipeline of tiny random models in a folder as diffusers saves them."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = {word: place for place, word in enumerate(["[PAD]", "[UNK]", "a", "fox", "cat", "two", "and"])}
    split = Fast(models.WordLevel(words, unk_token="[UNK]"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="[PAD]", unk_token="[UNK]", model_max_length=77
    )
    torch.manual_seed(0)
    sizes = {"vocab_size": len(words), "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1}
    special = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    clip = CLIPTextModel(CLIPTextConfig(**sizes, **special, num_attention_heads=2))
    t5 = T5EncoderModel(T5Config(vocab_size=len(words), d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2))
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae_of("flux"),
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer,
        transformer=None,
    )
    folder = tmp_path_factory.mktemp("flux")
    pipeline.save_pretrained(folder)
    return folder


def test_a_cache_is_built_from_weights_on_disk(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "list.jsonl"
    sizes = [(96, 64), (64, 96), (192, 128)]
    for place, size in enumerate(sizes):
        Image.new("RGB", size, (90 * place, 40, 200)).save(tmp_path / f"{place}.png")
    rows = [{"prompt": f"a {word}", "image": f"{place}.png"} for place, word in enumerate(["fox", "cat", "two"])]
    source.write_text("\n".join(map(json.dumps, rows)))

    def build(folder: str = "cache", **changes: Any) -> Cache:
        options: dict[str, Any] = {"images": True, "height": 64, "width": 96, "batch_size": 2, "dtype": torch.float32}
        return build_cache(str(saved), "flux", source, tmp_path / folder, **{**options, **changes})

    cache = build()
    assert cache.sizes is not None
    assert cache.sizes.tolist() == [[8, 12], [12, 8], [8, 12]]
    assert len(build("less", limit=2)) == 2
    assert not cache.masked
    encoder = encoder_for(str(saved), "flux", "cpu", torch.float32, images=True)
    for index, sample in enumerate(encoder.encode(["a fox", "a cat", "a two"])):
        torch.testing.assert_close(cache[index]["encoder_hidden_states"], sample["encoder_hidden_states"])
        torch.testing.assert_close(cache[index]["pooled_projections"], sample["pooled_projections"])
    torch.testing.assert_close(cache[1]["latents"], encoder.encode_images([tmp_path / "1.png"], 96, 64)[0])
    torch.testing.assert_close(cache.null["encoder_hidden_states"], encoder.encode([""])[0]["encoder_hidden_states"])

    data = CachedSamples(tmp_path / "cache", height=64, width=96)
    assert data.has_latents
    assert data.backbone == "flux"
    latents, conditions = data.batch(data.indices(0, 0, 2, range(2)))
    assert latents.shape == (2, 16, 8, 12)
    assert conditions["encoder_hidden_states"].shape == (2, 512, 12)

    # A complete cache needs no encoder; another prompt list is another cache.
    monkeypatch.setattr("scale.encoders.encoder_for", None)
    assert len(build()) == 3
    source.write_text("\n".join(map(json.dumps, reversed(rows))))
    with pytest.raises(CheckpointError, match="holds another cache: it differs in records; choose another folder"):
        build()
    monkeypatch.undo()
    prompts_only = build("prompts", images=False, dtype=torch.bfloat16)
    assert prompts_only.sizes is None
    assert prompts_only[0]["encoder_hidden_states"].dtype == torch.bfloat16


def test_weights_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights '.*nothing' cannot be loaded"):
        encoder_for(str(tmp_path / "nothing"), "flux", "cpu", torch.float32)
    with pytest.raises(ValueError, match="kind must be one of qwen, flux, flux2, got 'dit'"):
        encoder_for(str(tmp_path), "dit", "cpu", torch.float32)


# Images of classes.


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """A folder with three images of noise in each of three classes, and what else lies in such folders."""
    generator = torch.Generator().manual_seed(0)
    for place, name in enumerate(["n01", "n02", "n03"]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            pixels = torch.randint(256, (70 + place, 90 + number, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / ".cache").mkdir()
    (tmp_path / "images" / "n01" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


@pytest.fixture(scope="module")
def saved_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random VAE as Stable Diffusion's, in a folder as diffusers saves them."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(latent_channels=4, **PYRAMID).save_pretrained(folder)
    return folder


def test_images_of_classes_are_cached_with_their_labels(
    classes: Path, saved_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(folder: str = "cache", **changes: Any) -> Cache:
        options: dict[str, Any] = {"images": classes, "height": 64, "width": 64, "vae": str(saved_vae)}
        return build_class_cache(3, tmp_path / folder, **{**options, "batch_size": 4, **changes})

    cache = build()
    assert [int(cache[index]["class_labels"]) for index in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert cache.sizes is not None
    assert cache.sizes.tolist() == [[8, 8]] * 9
    # The middle of the image, scaled to 64 pixels of its shorter side, by the VAE itself.
    vae: Any = AutoencoderKL.from_pretrained(saved_vae)
    with Image.open(classes / "n02" / "1.png") as image, torch.no_grad():
        width = image.width * 64 // image.height
        left = width // 2 - 32
        square = image.resize((width, 64), Image.Resampling.LANCZOS).crop((left, 0, left + 64, 64))
        pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(1, 64, 64, 3).movedim(-1, 1)
        expected = 0.18215 * vae.encode(pixels / 127.5 - 1).latent_dist.mean[0]
    torch.testing.assert_close(cache[4]["latents"], expected, atol=1e-5, rtol=1e-5)

    data = CachedSamples(tmp_path / "cache", height=64, width=64, channels=4)
    assert (data.backbone, data.classes, data.has_latents) == ("dit", 3, True)
    latents, conditions = data.batch([8, 0])
    assert latents.shape == (2, 4, 8, 8)
    assert conditions.keys() == {"class_labels"}
    assert conditions["class_labels"].tolist() == [2, 0]
    assert conditions["class_labels"].dtype == torch.int64
    assert data.null_conditions["class_labels"].tolist() == [3]
    with pytest.raises(ValueError, match="height x width is 128 x 128, and the cache has images of 64 x 64"):
        CachedSamples(tmp_path / "cache", height=128, width=128, channels=4).indices(0, 0, 4, [0])

    monkeypatch.setattr("scale.encoders.image_encoder_for", None)  # a complete cache needs none
    assert len(build()) == 9
    with pytest.raises(CheckpointError, match="holds another cache: it differs in size; choose another folder"):
        build(height=32, width=32)


def test_labels_alone_need_neither_images_nor_a_vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scale.encoders.image_encoder_for", None)
    cache = build_class_cache(5, tmp_path)
    assert [int(cache[index]["class_labels"]) for index in range(len(cache))] == [0, 1, 2, 3, 4]
    data = CachedSamples(tmp_path, height=256, width=256, channels=4)
    latents, conditions = data.batch([4, 1])
    assert torch.equal(latents, torch.zeros(2, 4, 32, 32))
    assert conditions["class_labels"].tolist() == [4, 1]
    assert not data.has_latents


def test_a_vae_that_does_not_fit_leaves_nothing_behind(classes: Path, saved_vae: Path, tmp_path: Path) -> None:
    other = tmp_path / "transformer"
    DiT(size=8, layers=1, heads=1, head_width=4, weights="random").teacher(
        torch.Generator()
    ).transformer.save_pretrained(other)
    cases = {
        r"vae '.*transformer' cannot be loaded: it is a DiTTransformer2DModel, not an AutoencoderKL": (other, 4),
        r"vae '.*nothing' cannot be loaded": (tmp_path / "nothing", 4),
        r"makes latents \(4, 8, 8\) of 64 x 64 pixels, and \(16, 8, 8\) are needed": (saved_vae, 16),
    }
    for number, (message, (vae, channels)) in enumerate(cases.items()):
        folder = tmp_path / f"cache-{number}"
        options: dict[str, Any] = {"height": 64, "width": 64, "vae": str(vae), "channels": channels}
        with pytest.raises(ValueError, match=message):
            build_class_cache(3, folder, images=classes, **options)
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_an_image_that_cannot_be_read_is_named_and_replaced(
    classes: Path, saved_vae: Path, tmp_path: Path, damage: str
) -> None:
    broken = classes / "n03" / "1.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"no image at all")
    options: dict[str, Any] = {"images": classes, "height": 64, "width": 64, "vae": str(saved_vae)}
    with pytest.raises(ValueError, match=r"the image .*n03/1\.png cannot be read \(.*; replace it or leave it out"):
        build_class_cache(3, tmp_path / "cache", **options)
    broken.write_bytes(whole)
    assert len(build_class_cache(3, tmp_path / "cache", **options)) == 9
    other = shutil.copytree(classes, tmp_path / "other")
    with pytest.raises(CheckpointError, match="holds another cache: it differs in records"):
        build_class_cache(3, tmp_path / "cache", **{**options, "images": other})


def test_encoders_of_another_family_are_refused(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "qwen"
    shutil.copytree(saved, other)
    index = json.loads((other / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "QwenImageTransformer2DModel"]
    (other / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="they are those of a QwenImageTransformer2DModel, not of a FluxTransformer2D"):
        encoder_for(str(other), "flux", "cpu", torch.float32)
