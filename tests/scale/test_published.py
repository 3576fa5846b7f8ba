"""The published adapter format: bit-identical there and back, files written by hand, and files that are refused."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pitools.policies import DXHead, GMHead, Head, NetworkStudent, PolynomialHead, ShortcutHead
from pitools.sampling import sample
from pitools.training import CheckpointError
from pitools.types import Schedule
from scale.adapted import ADAPTER, AdaptedPolicy, Base, pack
from scale.backbone import TINY_TEXT, Flux, Flux2, QwenImage, TextToImage
from scale.published import (
    CONFIG,
    WEIGHTS,
    load_adapter,
    parameter_name,
    published_key,
    purpose_of,
    save_adapter,
    trained_parameters,
)
from scale.quantise import Quantisation, quantise

BACKBONES: dict[str, TextToImage] = {"qwen": QwenImage().tiny(), "flux": Flux().tiny(), "flux2": Flux2().tiny()}
HEADS: dict[str, Head] = {"gm": GMHead(3), "dx": DXHead(4), "polynomial": PolynomialHead(3)}
SCHEDULES = {"gm": Schedule(4, 3.2, 0.5, "auto"), "dx": Schedule(4, 3.2, 0.5), "polynomial": Schedule(4, 3.2, 0.5)}
WIDTH, RANK, HIDDEN = 32, 4, 16
GUIDANCE = {"qwen": None, "flux": 3.5, "flux2": 4.0}

every_backbone = pytest.mark.parametrize("name", BACKBONES)
every_policy = pytest.mark.parametrize("policy", HEADS)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def transformer_of(name: str) -> Any:
    """The same random weights each time, and none of them zero."""
    transformer = BACKBONES[name].transformer(seeded(0)).eval()
    return shaken(transformer, 1, transformer.named_parameters())


@torch.no_grad()
def shaken(module: Any, seed: int, parameters: Any) -> Any:
    generator = seeded(seed)
    for _, value in parameters:
        value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return module


def student_on(transformer: Any, name: str, policy: str, seed: int = 2) -> NetworkStudent:
    """A trained student, as it were."""
    section, head = BACKBONES[name], HEADS[policy]
    network = section.student(Base(transformer, section.form), head, seeded(seed), GUIDANCE[name])
    shaken(network, seed, trained_parameters(network).items())
    return NetworkStudent(network.eval(), head, SCHEDULES[policy], section.factorisation)


def network_of(student: NetworkStudent) -> AdaptedPolicy:
    assert isinstance(student.network, AdaptedPolicy)
    return student.network


def conditions_of(name: str, batch: int = 2) -> dict[str, Tensor]:
    text = torch.randn(batch, 5, TINY_TEXT, generator=seeded(3))
    pooled = {"pooled_projections": torch.randn(batch, TINY_TEXT, generator=seeded(4))} if name == "flux" else {}
    return {"encoder_hidden_states": text, **pooled}


def noise_of(name: str) -> Tensor:
    return torch.randn(2, BACKBONES[name].channels, 4, 6, generator=seeded(5))


def drawn(student: NetworkStudent, name: str) -> Tensor:
    return sample(student, noise_of(name), conditions=conditions_of(name), step_size=1 / 16)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@dataclass(frozen=True)
class Adapter:
    """The parts of an adapter's folder, to be changed and written again."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Adapter":
        config = json.loads((folder / CONFIG).read_text())
        metadata = {key: value for key, value in metadata_of(folder / WEIGHTS).items() if key != "sha256"}
        return cls(load_file(folder / WEIGHTS), metadata, config)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {key: value.contiguous() for key, value in self.tensors.items()}, folder / WEIGHTS, dict(self.metadata)
        )
        (folder / CONFIG).write_text(json.dumps(self.config))
        return folder

    def without_ours(self) -> "Adapter":
        return replace(self, metadata={key: value for key, value in self.metadata.items() if key != "pitools"})

    def with_metadata(self, key: str, **changes: object) -> "Adapter":
        return replace(self, metadata={**self.metadata, key: json.dumps({**json.loads(self.metadata[key]), **changes})})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The folder of an adapter, written once."""
    root, done = tmp_path_factory.mktemp("saved"), set[Path]()

    def folder(name: str, policy: str) -> Path:
        path = root / f"{name}-{policy}"
        if path not in done:
            save_adapter(student_on(transformer_of(name), name, policy), path)
            done.add(path)
        return path

    return folder


Saved = Callable[[str, str], Path]


@every_backbone
@every_policy
def test_a_saved_student_loads_and_samples_bit_for_bit(name: str, policy: str, saved: Saved) -> None:
    student = student_on(transformer_of(name), name, policy)
    expected = drawn(student, name)
    base = transformer_of(name)
    state = torch.get_rng_state()
    loaded = load_adapter(base, saved(name, policy))
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded == replace(student, network=loaded.network)
    assert network_of(loaded).guidance == GUIDANCE[name]
    assert not any(module.training for module in network_of(loaded).modules())
    assert torch.equal(drawn(loaded, name), expected)


@every_backbone
@every_policy
def test_names_are_those_of_the_format_and_go_back(name: str, policy: str, saved: Saved) -> None:
    mixture = policy == "gm"
    keys = {key: tuple(value.shape) for key, value in load_file(saved(name, policy) / WEIGHTS).items()}
    names = trained_parameters(network_of(student_on(transformer_of(name), name, policy)))
    assert {published_key(own, mixture) for own in names} == keys.keys()
    assert {parameter_name(key, mixture) for key in keys} == names.keys()
    assert all(parameter_name(published_key(own, mixture), mixture) == own for own in names)

    outputs, biased = 4 * BACKBONES[name].channels, name != "flux2"
    expected: dict[str, tuple[int, ...]] = {"norm_out.linear.weight": (2 * WIDTH, WIDTH)}
    expected |= {"norm_out.linear.bias": (2 * WIDTH,)} if biased else {}
    if mixture:
        expected |= {"proj_out_means.weight": (3 * outputs, WIDTH), "proj_out_means.bias": (3 * outputs,)}
        expected |= {"proj_out_logweights.weight": (12, WIDTH), "proj_out_logweights.bias": (12,)}
        expected |= {"proj_out_logstds.1.weight": (HIDDEN, WIDTH), "proj_out_logstds.1.bias": (HIDDEN,)}
        expected |= {"proj_out_logstds.3.weight": (1, HIDDEN), "proj_out_logstds.3.bias": (1,)}
    else:
        rows = HEADS[policy].sizes.velocities * outputs
        expected |= {"proj_out.weight": (rows, WIDTH), **({"proj_out.bias": (rows,)} if biased else {})}
    assert {key: shape for key, shape in keys.items() if "lora" not in key} == expected
    time = {"qwen": "time_text_embed", "flux": "time_text_embed", "flux2": "time_guidance_embed"}[name]
    assert keys[f"{time}.timestep_embedder.linear_2.lora_A.weight"] == (RANK, WIDTH)
    assert keys[f"{time}.timestep_embedder.linear_2.lora_B.weight"] == (WIDTH, RANK)


@pytest.mark.parametrize(
    ("own", "key", "mixture"),
    [
        ("heads.velocities.weight", "proj_out_means.weight", True),
        ("heads.velocities.bias", "proj_out.bias", False),
        ("heads.factors.bias", "proj_out_logweights.bias", True),
        ("heads.samples.1.weight", "proj_out_logstds.1.weight", True),
        ("norm_out.linear.weight", "norm_out.linear.weight", False),
        ("transformer.a.0.proj_out.lora_B.pi_flow.weight", "a.0.proj_out.lora_B.weight", False),
        ("transformer.proj_out.lora_A.pi_flow.weight", "proj_out.lora_A.weight", False),
        ("transformer.norm_out.linear.lora_A.pi_flow.weight", "norm_out.linear.lora_A.weight", True),
    ],
)
def test_the_mapping_of_names_is_its_own_inverse(own: str, key: str, mixture: bool) -> None:
    assert published_key(own, mixture) == key
    assert parameter_name(key, mixture) == own


def test_names_without_a_place_are_refused() -> None:
    for own in ("heads.factors.weight", "transformer.proj_out.weight", "transformer.a.lora_A.style.weight"):
        with pytest.raises(ValueError, match="no place"):
            published_key(own, mixture=False)
    for key in ("proj_out_means.weight", "a.lora_A.pi_flow.weight", "img_in.weight"):
        with pytest.raises(ValueError, match="no key"):
            parameter_name(key, mixture=False)


def by_hand(name: str, policy: str, targets: Mapping[str, tuple[int, int]], count: int, rank: int = 3) -> Adapter:
    """An adapter from the table of the format alone, its values told apart by place.

    targets: module -> (inputs, outputs).
    """
    generator = seeded(11)
    channels, biased = BACKBONES[name].channels, name != "flux2"
    tensors: dict[str, Tensor] = {}

    def linear(key: str, inputs: int, outputs: int, bias: bool) -> None:
        tensors[f"{key}.weight"] = 0.3 * torch.randn(outputs, inputs, generator=generator)
        if bias:
            tensors[f"{key}.bias"] = 0.3 * torch.randn(outputs, generator=generator)

    linear("norm_out.linear", WIDTH, 2 * WIDTH, biased)
    if policy == "gm":
        linear("proj_out_means", WIDTH, count * channels * 4, True)
        linear("proj_out_logweights", WIDTH, count * 4, True)
        linear("proj_out_logstds.1", WIDTH, 5, True)
        linear("proj_out_logstds.3", 5, 1, True)
    else:
        linear("proj_out", WIDTH, count * channels * 4, biased)
    for target, (inputs, outputs) in targets.items():
        tensors[f"{target}.lora_A.weight"] = 0.3 * torch.randn(rank, inputs, generator=generator)
        tensors[f"{target}.lora_B.weight"] = 0.3 * torch.randn(outputs, rank, generator=generator)
    return Adapter(tensors, {}, {})


@every_backbone
@pytest.mark.parametrize("policy", ["gm", "dx"])
def test_each_channel_of_a_file_written_by_hand_is_where_the_table_says(name: str, policy: str, tmp_path: Path) -> None:
    count, channels, (rows, columns) = 3, BACKBONES[name].channels, (2, 3)
    adapter = by_hand(name, policy, {"transformer_blocks.0.attn.to_q": (WIDTH, WIDTH)}, count)
    head = {"gm": "proj_out_means", "dx": "proj_out"}[policy]
    tensors = dict(adapter.tensors)
    # Where there is a bias, it alone tells the channels; where not, tokens of ones do.
    for key in (head, "proj_out_logweights"):
        if f"{key}.weight" in tensors:
            values = torch.arange(len(tensors[f"{key}.weight"]), dtype=torch.float32)
            tensors[f"{key}.weight"] = torch.zeros_like(tensors[f"{key}.weight"])
            if f"{key}.bias" in tensors:
                tensors[f"{key}.bias"] = values
            else:
                tensors[f"{key}.weight"][:, 0] = values
    student = load_adapter(transformer_of(name), replace(adapter, tensors=tensors).write(tmp_path / f"{policy}_4step"))
    network = network_of(student)
    if name == "flux2" and policy == "dx":
        network.norm_out.register_forward_hook(lambda *arguments: torch.ones_like(arguments[-1]))
    latents = torch.randn(1, channels, 2 * rows, 2 * columns, generator=seeded(1))
    conditions = conditions_of(name, 1)
    with torch.no_grad():
        outputs = student.network(latents, torch.ones(1), conditions)
    velocities = outputs.velocities.unflatten(1, (2 * rows, 2 * columns))
    for k in range(count):
        for c in range(channels):
            for ph in range(2):
                for pw in range(2):
                    index = k * 4 * channels + c * 4 + ph * 2 + pw
                    for h in range(rows):
                        for w in range(columns):
                            assert velocities[0, 2 * h + ph, 2 * w + pw, k, c] == index
    if policy == "gm":
        factor = outputs.factor.unflatten(1, (2 * rows, 2 * columns))
        for k in range(count):
            for ph in range(2):
                for pw in range(2):
                    assert bool((factor[0, ph::2, pw::2, k] == k * 4 + ph * 2 + pw).all())


def test_a_file_written_by_hand_is_the_base_with_its_products_added(tmp_path: Path) -> None:
    """LoRA against B A added to the weights, norm and heads against plain products."""
    targets = {
        "transformer_blocks.0.img_mlp.net.2": (4 * WIDTH, WIDTH),
        "transformer_blocks.1.attn.to_q": (WIDTH, WIDTH),
    }
    adapter = by_hand("qwen", "gm", targets, count=3)
    latents, t, conditions = noise_of("qwen"), torch.tensor([0.9, 0.4]), conditions_of("qwen")

    other: nn.Module = transformer_of("qwen")
    seen: list[Any] = []
    other.norm_out.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    with torch.no_grad():
        for target in targets:
            a, b = (adapter.tensors[f"{target}.lora_{part}.weight"] for part in "AB")
            other.get_submodule(target).weight.add_(b @ a)
        Base(other, BACKBONES["qwen"].form)(latents, t, conditions)
    (tokens, embedding), of = seen[0], adapter.tensors
    scale, shift = nn.functional.linear(
        nn.functional.silu(embedding), of["norm_out.linear.weight"], of["norm_out.linear.bias"]
    ).chunk(2, dim=1)
    normal = nn.functional.layer_norm(tokens, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    means = normal @ of["proj_out_means.weight"].T + of["proj_out_means.bias"]
    hidden = nn.functional.silu(embedding) @ of["proj_out_logstds.1.weight"].T + of["proj_out_logstds.1.bias"]
    log_std = nn.functional.silu(hidden) @ of["proj_out_logstds.3.weight"].T + of["proj_out_logstds.3.bias"]

    student = load_adapter(transformer_of("qwen"), adapter.write(tmp_path / "gm_4step"))
    with torch.no_grad():
        outputs = student.network(latents, t, conditions)
    for k, velocity in enumerate(outputs.velocities.unbind(2)):
        tokens = pack(student.factorisation.unpack(velocity, latents.shape))
        torch.testing.assert_close(tokens, means[..., k * 64 : (k + 1) * 64], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.sample, log_std, rtol=1e-4, atol=1e-5)


@every_backbone
@every_policy
def test_the_config_is_the_bases_with_the_policys_outputs(name: str, policy: str, saved: Saved) -> None:
    config = json.loads((saved(name, policy) / CONFIG).read_text())
    transformer = transformer_of(name)
    own, outputs = json.loads(transformer.to_json_string()), transformer.proj_out.out_features
    if policy == "gm":
        assert config.pop("_class_name") == f"GM{own.pop('_class_name')}"
        added = {key: config.pop(key) for key in config.keys() - own.keys()}
        assert added == {
            "num_gaussians": 3,
            "constant_logstd": None,
            "logstd_inner_dim": HIDDEN,
            "gm_num_logstd_layers": 2,
            "logweights_channels": 4,
        }
        assert config["out_channels"] == (64 if name == "qwen" else own["out_channels"])
    else:
        assert config["out_channels"] == HEADS[policy].sizes.velocities * outputs
        assert config["patch_size"] == 1
    kept = own.keys() - {"out_channels", "patch_size"}
    assert {key: config[key] for key in kept} == {key: own[key] for key in kept}


def test_the_metadata_says_policy_schedule_and_guidance(saved: Saved) -> None:
    of = {policy: metadata_of(saved("flux", policy) / WEIGHTS) for policy in HEADS}
    assert json.loads(of["gm"]["policy_config"]) == {"type": "GMFlow"}
    assert json.loads(of["dx"]["policy_config"]) == {"type": "DX", "segment_size": 1 / 3.5, "shift": 3.2}
    assert json.loads(of["polynomial"]["policy_config"])["mode"] == "polynomial"
    assert json.loads(of["gm"]["pitools"]) == {
        "format": 1,
        "base": "FluxTransformer2DModel",
        "velocities": 3,
        "schedule": {"nfe": 4, "shift": 3.2, "final_step_scale": 0.5, "temperature": "auto"},
        "guidance": 3.5,
        "teacher_guidance": None,
    }


# Without our metadata: what the official adapters share.


@pytest.mark.parametrize(
    ("name", "policy", "folder", "head", "nfe"),
    [
        ("flux", "gm", "gmflux_k8_piid_8step", GMHead(3), 8),
        ("flux", "gm", "gmflux_k8_datafree_piid_4step", GMHead(3), 4),
        ("qwen", "gm", "gmqwen_k8_piid_4step", GMHead(3), 4),
        ("qwen", "dx", "dxqwen_n10_piid_4step", DXHead(4), 4),
        ("qwen", "dx", "dxqwen_p10_piid_4step", PolynomialHead(4), 4),
        ("flux2", "gm", "gmflux2_k8_piid_6step", GMHead(3), 6),
    ],
)
def test_an_official_folder_without_metadata_says_by_its_name_what_it_is(
    name: str,
    policy: str,
    folder: str,
    head: Head,
    nfe: int,
    saved: Saved,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = replace(Adapter.read(saved(name, policy)), metadata={}).write(tmp_path / folder)
    student = load_adapter(transformer_of(name), tmp_path, folder)
    assert (student.head, student.schedule) == (head, Schedule(nfe, 3.2, 0.5, "auto" if policy == "gm" else 1.0))
    assert network_of(student).guidance == GUIDANCE[name]
    assert load_adapter(transformer_of(name), path).schedule == student.schedule
    assert not caplog.records


def test_what_neither_metadata_nor_name_say_is_assumed_with_one_warning(
    saved: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = replace(Adapter.read(saved("qwen", "dx")), metadata={}).write(tmp_path / "mine")
    student = load_adapter(transformer_of("qwen"), path)
    assert (student.head, student.schedule) == (DXHead(4), Schedule(4, 3.2, 0.5))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "assumed: a DX policy, not a polynomial, nfe 4" in record.getMessage()


@pytest.mark.parametrize(("mode", "head"), [("polynomial", PolynomialHead(4)), ("grid", DXHead(4))])
def test_official_metadata_tells_policy_steps_and_shift(
    mode: str, head: Head, saved: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = {"type": "DX", "mode": mode, "segment_size": 1 / 7.5, "shift": 3.0}
    adapter = replace(Adapter.read(saved("qwen", "dx")), metadata={"policy_config": json.dumps(policy)})
    student = load_adapter(transformer_of("qwen"), adapter.write(tmp_path / "mine"))
    assert (student.head, student.schedule) == (head, Schedule(8, 3.0, 0.5))
    assert not caplog.records


def test_schnell_which_embeds_no_guidance_is_for_none(saved: Saved, tmp_path: Path) -> None:
    sizes = {**Flux.sizes, "guidance_embeds": False}
    base: Any = type(transformer_of("flux"))(**sizes)
    path = replace(Adapter.read(saved("flux", "gm")), metadata={}).write(tmp_path / "gmflux_k8_piid_4step")
    assert network_of(load_adapter(base, path)).guidance is None


# Forms in which an adapter may come.


@pytest.mark.parametrize("prefix", ["", "DX"])
def test_both_class_names_of_a_dx_adapter_are_read(prefix: str, saved: Saved, tmp_path: Path) -> None:
    adapter = Adapter.read(saved("qwen", "dx"))
    config = {**adapter.config, "_class_name": f"{prefix}QwenImageTransformer2DModel"}
    student = load_adapter(transformer_of("qwen"), replace(adapter, config=config).write(tmp_path))
    assert torch.equal(drawn(student, "qwen"), drawn(load_adapter(transformer_of("qwen"), saved("qwen", "dx")), "qwen"))


def test_a_file_alone_a_subfolder_the_hub_and_a_prefix_are_the_same_student(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("qwen", "gm")
    expected = drawn(load_adapter(transformer_of("qwen"), folder), "qwen")
    asked: list[tuple[object, ...]] = []

    def download(repository: str, file: str, *, subfolder: str | None, revision: str | None) -> str:
        asked.append((repository, file, subfolder, revision))
        if file == CONFIG:
            raise LocalEntryNotFoundError("this repository has none")
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    prefixed = Adapter.read(folder)
    prefixed = replace(prefixed, tensors={f"transformer.{key}": value for key, value in prefixed.tensors.items()})
    prefixed.write(tmp_path / "inner")
    students = {
        "file": load_adapter(transformer_of("qwen"), folder / WEIGHTS),
        "subfolder": load_adapter(transformer_of("qwen"), str(folder.parent), folder.name),
        "hub": load_adapter(transformer_of("qwen"), "owner/name", "sub", revision="v1"),
        "prefix": load_adapter(transformer_of("qwen"), tmp_path, "inner"),
    }
    for form, student in students.items():
        assert torch.equal(drawn(student, "qwen"), expected), form
    assert asked == [("owner/name", WEIGHTS, "sub", "v1"), ("owner/name", CONFIG, "sub", "v1")]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_that_is_quantised_to_the_last_layer_takes_it(
    kind: Quantisation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As diffusers quantises unless told what to leave alone: the last norm and projection, too."""
    student = student_on(transformer_of("qwen"), "qwen", "gm")
    save_adapter(student, tmp_path)
    monkeypatch.setattr("scale.quantise.WHOLE", ())
    base = quantise(transformer_of("qwen").to(torch.bfloat16), kind)
    assert not any(type(module) is nn.Linear for module in base.modules())
    loaded = load_adapter(base, tmp_path)
    parameters = trained_parameters(network_of(loaded))
    assert {value.dtype for value in parameters.values()} == {torch.bfloat16}
    exact, near = (drawn(one, "qwen") for one in (student, loaded))
    assert (near - exact).square().mean().sqrt() < 0.3 * exact.std()


def test_an_adapter_is_of_the_dtype_in_which_its_base_computes(tmp_path: Path) -> None:
    save_adapter(student_on(transformer_of("flux"), "flux", "gm"), tmp_path)
    loaded = trained_parameters(network_of(load_adapter(transformer_of("flux").to(torch.bfloat16), tmp_path)))
    assert {value.dtype for value in loaded.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_into_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    student = student_on(transformer_of("flux"), "flux", "gm")
    save_adapter(student, tmp_path, dtype=dtype)
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    loaded = trained_parameters(network_of(load_adapter(transformer_of("flux"), tmp_path)))
    for name, value in trained_parameters(network_of(student)).items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], value.to(dtype).float())


def test_given_weights_are_written_in_the_place_of_the_students_own(tmp_path: Path) -> None:
    student = student_on(transformer_of("qwen"), "qwen", "dx", seed=2)
    averages = {
        name: value.detach().clone()
        for name, value in trained_parameters(
            network_of(student_on(transformer_of("qwen"), "qwen", "dx", seed=9))
        ).items()
    }
    save_adapter(student, tmp_path, weights=averages)
    loaded = trained_parameters(network_of(load_adapter(transformer_of("qwen"), tmp_path)))
    assert all(torch.equal(loaded[name], value) for name, value in averages.items())


def test_a_frozen_student_is_saved_like_a_trained_one(saved: Saved, tmp_path: Path) -> None:
    student = student_on(transformer_of("qwen"), "qwen", "gm")
    network_of(student).requires_grad_(False)
    save_adapter(student, tmp_path)
    written, expected = load_file(tmp_path / WEIGHTS), load_file(saved("qwen", "gm") / WEIGHTS)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], value) for key, value in expected.items())


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_heads_and_norm_stay_whole_over_a_quantised_base(kind: Any, saved: Saved) -> None:
    base = quantise(transformer_of("flux2"), kind)
    student = load_adapter(base, saved("flux2", "gm"))
    wanted = load_file(saved("flux2", "gm") / WEIGHTS)
    for name, value in trained_parameters(network_of(student)).items():
        assert torch.equal(value, wanted[published_key(name, mixture=True)])
    exact = drawn(load_adapter(transformer_of("flux2"), saved("flux2", "gm")), "flux2")
    error = (drawn(student, "flux2") - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 0.5


def test_a_later_adapter_replaces_an_earlier_one_and_the_teacher_stays(saved: Saved) -> None:
    base = Base(transformer_of("flux"), BACKBONES["flux"].form)
    x, t, conditions = noise_of("flux"), torch.tensor([0.9, 0.3]), conditions_of("flux")
    with torch.no_grad():
        before = base(x, t, conditions)
        load_adapter(base, saved("flux", "dx"))
        student = load_adapter(base, saved("flux", "gm"))
        assert torch.equal(base(x, t, conditions), before)
    alone = load_adapter(transformer_of("flux"), saved("flux", "gm"))
    assert torch.equal(drawn(student, "flux"), drawn(alone, "flux"))


# What is refused, and leaves the transformer as it was.


def without(*keys: str) -> Callable[[Adapter], Adapter]:
    return lambda adapter: replace(adapter, tensors={k: v for k, v in adapter.tensors.items() if k not in keys})


def having(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Adapter], Adapter]:
    return lambda adapter: replace(adapter, tensors={**adapter.tensors, key: change(adapter.tensors[key])})


def adding(**tensors: Tensor) -> Callable[[Adapter], Adapter]:
    return lambda adapter: replace(adapter, tensors={**adapter.tensors, **tensors})


def configured(**changes: object) -> Callable[[Adapter], Adapter]:
    return lambda adapter: replace(adapter, config={**adapter.config, **changes})


def stated(key: str, **changes: object) -> Callable[[Adapter], Adapter]:
    return lambda adapter: adapter.with_metadata(key, **changes)


def poisoned(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[3] = value
        return changed

    return change


def of_policy(**policy: object) -> Callable[[Adapter], Adapter]:
    return lambda adapter: replace(adapter, metadata={"policy_config": json.dumps(policy)})


LORA = "transformer_blocks.0.img_mlp.net.2"
REFUSED: dict[str, tuple[str, Callable[[Adapter], Adapter], str]] = {
    "another class": ("gm", configured(_class_name="GMFluxTransformer2DModel"), "of a FluxTransformer2DModel, not of"),
    "another base": ("gm", stated("pitools", base="Flux2Transformer2DModel"), "of a Flux2Transformer2DModel, not of"),
    "a plain class for a mixture": ("gm", configured(_class_name="QwenImageTransformer2DModel"), "_class_name 'Qwen"),
    "a mixture's class for DX": ("dx", configured(_class_name="GMQwenImageTransformer2DModel"), "_class_name 'GMQwen"),
    "more blocks": ("gm", configured(num_layers=60), "num_layers 60, and this QwenImageTransformer2DModel has 2"),
    "missing head": ("gm", without("proj_out_logweights.bias"), "1 missing .proj_out_logweights.bias"),
    "missing norm": ("dx", without("norm_out.linear.weight"), "1 missing .norm_out.linear.weight"),
    "half a LoRA": ("gm", without(f"{LORA}.lora_B.weight"), f"1 missing .{LORA}.lora_B.weight"),
    "surplus key": ("gm", adding(**{"img_in.weight": torch.zeros(2)}), "1 surplus .img_in.weight"),
    "both heads": ("gm", adding(**{"proj_out.bias": torch.zeros(2)}), "1 surplus .proj_out.bias"),
    "LoRA elsewhere": (
        "gm",
        adding(**{"blocks.9.lora_A.weight": torch.zeros(4, 32), "blocks.9.lora_B.weight": torch.zeros(32, 4)}),
        "LoRA for blocks.9, and this QwenImageTransformer2DModel has no such layer",
    ),
    "two ranks": ("gm", having(f"{LORA}.lora_A.weight", lambda v: v[:3]), f"rank 3 in {LORA} and of rank 4"),
    "another LoRA size": ("gm", having(f"{LORA}.lora_A.weight", lambda v: v[:, :9]), r"lora_A.weight is \(4, 9\)"),
    "another width": ("gm", having("proj_out_means.weight", lambda v: v[:, :16]), "base of width 16, and this .* 32"),
    "another norm": ("gm", having("norm_out.linear.weight", lambda v: v[:9]), r"is \(9, 32\), and .* needs \(64, 32\)"),
    "half a component": (
        "dx",
        having("proj_out.weight", lambda v: v[:100]),
        "100 rows, which is no multiple of 64",
    ),
    "a vector": ("dx", having("proj_out.weight", lambda v: v[0]), "proj_out.weight must be a matrix"),
    "K of log-weights": (
        "gm",
        having("proj_out_logweights.weight", lambda v: v[:8]),
        "K = 3, .* 8 rows instead of 12",
    ),
    "K of the config": ("gm", configured(num_gaussians=8), "K = 3, and its num_gaussians is 8"),
    "K of the metadata": ("gm", stated("policy_config", num_gaussians=8), "K = 3, and its policy_config num_g.* is 8"),
    "N of our metadata": ("dx", stated("pitools", velocities=10), "N = 4, and its pitools velocities is 10"),
    "N of the config": ("dx", configured(out_channels=640), "256 rows, and its config says out_channels 640"),
    "a constant log-std": ("gm", configured(constant_logstd=-1.0), "constant_logstd -1.0; None is read"),
    "NaN": ("gm", having("proj_out_means.bias", poisoned(float("nan"))), "proj_out_means.bias has values that are not"),
    "infinity": (
        "gm",
        having(f"{LORA}.lora_B.weight", poisoned(float("inf"))),
        "lora_B.weight has values that are not",
    ),
    "whole numbers": (
        "gm",
        having("proj_out_means.bias", lambda v: v.to(torch.int8)),
        "floating point, got torch.int8",
    ),
    "beyond float32": (
        "gm",
        having("proj_out_means.bias", lambda v: poisoned(1e300)(v.double())),
        "proj_out_means.bias has values that are not finite",
    ),
    "a later format": ("gm", stated("pitools", format=2), "format 2; this version reads 1"),
    "a schedule that cannot be": ("gm", stated("pitools", schedule={"nfe": 0}), "nfe must be a whole number"),
    "a schedule of other words": ("gm", stated("pitools", schedule={"steps": 4}), "schedule of its metadata cannot be"),
    "guidance in words": ("gm", stated("pitools", guidance="much"), "guidance .* must be a number or null, got 'much'"),
    "another segment": ("dx", stated("policy_config", segment_size=0.5), "segment_size 0.5, and a schedule of nfe 4"),
    "another shift": ("dx", stated("policy_config", shift=1.0), "shift 1.0, and a schedule of nfe 4, shift 3.2"),
    "no segment": (
        "dx",
        of_policy(type="DX", segment_size="long"),
        "segment_size must be a positive .*, got 'long'",
    ),
    "no step at all": ("dx", of_policy(type="DX", segment_size=9.0), "nfe"),
    "an unknown policy": ("gm", of_policy(type="Consistency"), "policy of type 'Consistency'"),
    "an unknown mode": ("dx", of_policy(type="DX", mode="spline"), "policy of mode 'spline'"),
    "no object": ("gm", lambda a: replace(a, metadata={"policy_config": "[1]"}), "must be a JSON object"),
    "no JSON": ("gm", lambda a: replace(a, metadata={"pitools": "{"}), "pitools is damaged: it is no JSON"),
    "two prefixes": (
        "gm",
        lambda a: adding(**{"transformer.proj_out_means.bias": a.tensors["proj_out_means.bias"].clone()})(a),
        'both with and without the prefix "transformer."',
    ),
}


def state_of(transformer: Any) -> dict[str, object]:
    parameters = {name: (value.detach().clone(), value.requires_grad) for name, value in transformer.named_parameters()}
    rates = {name: module.p for name, module in transformer.named_modules() if isinstance(module, nn.Dropout)}
    modes = {name: module.training for name, module in transformer.named_modules()}
    return {"parameters": parameters, "rates": rates, "modes": modes, "adapters": sorted(transformer.peft_config)}


def assert_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    old, new = before["parameters"], after["parameters"]
    assert old.keys() == new.keys()
    for name in old:
        assert torch.equal(old[name][0], new[name][0])
        assert old[name][1] == new[name][1]
    assert {key: before[key] for key in before if key != "parameters"} == {
        key: after[key] for key in after if key != "parameters"
    }


@pytest.fixture(scope="module")
def earlier() -> tuple[NetworkStudent, Tensor]:
    """A transformer that has a student in training mode and a style LoRA, and what the student draws."""
    from peft import LoraConfig

    transformer = transformer_of("qwen")
    transformer.add_adapter(LoraConfig(r=2, lora_dropout=0.3, target_modules=["to_q"]), "style")
    student = student_on(transformer, "qwen", "dx", seed=7)
    return student, drawn(student, "qwen")


def assert_untouched(student: NetworkStudent, expected: Tensor, load: Callable[[], object], match: str) -> None:
    transformer = network_of(student).transformer
    transformer.train()
    before = state_of(transformer)
    with pytest.raises(ValueError, match=match) as caught:
        load()
    assert "\n" not in str(caught.value)
    assert_same(before, state_of(transformer))
    transformer.eval()
    assert torch.equal(drawn(student, "qwen"), expected)


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(
    case: str, saved: Saved, earlier: tuple[NetworkStudent, Tensor], tmp_path: Path
) -> None:
    policy, change, match = REFUSED[case]
    path = change(Adapter.read(saved("qwen", policy))).write(tmp_path / "adapter")
    assert_untouched(*earlier, lambda: load_adapter(network_of(earlier[0]).transformer, path), match)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-30] ^= 0x01
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("file", "damage", "match"),
    [
        (WEIGHTS, cut, "damaged"),
        (WEIGHTS, flip, "its tensors are not those that were written"),
        (WEIGHTS, lambda path: path.write_bytes(b""), "damaged"),
        (WEIGHTS, lambda path: path.unlink(), f"has no {WEIGHTS}"),
        (CONFIG, lambda path: path.write_text("{"), "config.json is damaged"),
        (CONFIG, lambda path: path.write_bytes(b"\xff\xfe{"), "config.json cannot be read"),
    ],
)
def test_damaged_files_are_refused_and_change_nothing(
    file: str,
    damage: Callable[[Path], object],
    match: str,
    earlier: tuple[NetworkStudent, Tensor],
    tmp_path: Path,
) -> None:
    save_adapter(student_on(transformer_of("qwen"), "qwen", "gm"), tmp_path)
    damage(tmp_path / file)
    assert_untouched(*earlier, lambda: load_adapter(network_of(earlier[0]).transformer, tmp_path), match)


def test_places_without_an_adapter_are_refused(
    saved: Saved, earlier: tuple[NetworkStudent, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, transformer = saved("qwen", "gm"), network_of(earlier[0]).transformer

    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no connection\nand a second line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: load_adapter(transformer, "owner/name", "sub"), "owner/name/sub is no local file.*: no connection"),
        (lambda: load_adapter(transformer, "not there"), "'not there' is no file, no folder, and no hub id"),
        (lambda: load_adapter(transformer, "/a/b/c"), "no hub id"),
        (lambda: load_adapter(transformer, folder.parent), "subfolders that have one: .*qwen-gm"),
        (lambda: load_adapter(transformer, folder, "nowhere"), f"nowhere has no {WEIGHTS}"),
        (lambda: load_adapter(transformer, folder / WEIGHTS, "sub"), "subfolder 'sub' cannot be of the single file"),
        (lambda: load_adapter(transformer, folder / CONFIG), "no safetensors file"),
    ]
    for call, match in calls:
        assert_untouched(*earlier, call, match)


def test_each_base_refuses_the_adapters_of_the_others(saved: Saved, tmp_path: Path) -> None:
    """By the class, and for a file alone, which may say no class, by what it has."""
    for name in BACKBONES:
        for other in BACKBONES:
            if other == name:
                continue
            with pytest.raises(ValueError, match=r"is an adapter of a .*, not of this"):
                load_adapter(transformer_of(name), saved(other, "gm"))
            bare = replace(Adapter.read(saved(other, "gm")).without_ours(), config={})
            with pytest.raises(ValueError, match=r"has no such layer|does not fit|rows|width"):
                load_adapter(transformer_of(name), bare.write(tmp_path / f"{other}_4step"))


def test_a_transformer_with_fused_lora_is_refused(saved: Saved) -> None:
    from peft import LoraConfig

    transformer = transformer_of("qwen")
    transformer.add_adapter(LoraConfig(r=2, lora_dropout=0.3, target_modules=["to_q"]), "style")
    transformer.fuse_lora()
    before = state_of(transformer)
    with pytest.raises(ValueError, match="LoRA style is fused"):
        load_adapter(transformer, saved("qwen", "gm"))
    assert_same(before, state_of(transformer))


@every_backbone
@pytest.mark.parametrize("policy", ["gm", "dx"])
def test_an_adapter_tells_its_base_before_there_is_one(name: str, policy: str, saved: Saved, tmp_path: Path) -> None:
    folder = saved(name, policy)
    expected = BACKBONES[name].class_name
    told = [purpose_of(folder), purpose_of(folder / WEIGHTS), purpose_of(folder.parent, folder.name)]
    assert [each.base for each in told] == [expected] * 3
    bare = Adapter.read(folder).without_ours()
    told.append(purpose_of(bare.write(tmp_path)))
    assert told[-1].base == expected
    with pytest.raises(ValueError, match="does not say of which transformer"):
        purpose_of(tmp_path / WEIGHTS)
    # And what it was trained for, as the student on that base has it.
    for purpose, where in zip(told, (folder, folder, folder, tmp_path), strict=True):
        student = load_adapter(transformer_of(name), where)
        assert (purpose.schedule, purpose.guidance) == (student.schedule, network_of(student).guidance)


def test_a_transformer_of_no_known_class_is_refused(saved: Saved) -> None:
    with pytest.raises(ValueError, match="a Linear has no adapter"):
        load_adapter(nn.Linear(2, 2), saved("qwen", "gm"))


def test_what_cannot_be_published_is_refused(tmp_path: Path) -> None:
    student = student_on(transformer_of("qwen"), "qwen", "gm")
    own = {name: value.detach() for name, value in trained_parameters(network_of(student)).items()}
    bias = own["heads.velocities.bias"]
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: save_adapter(replace(student, network=lambda *_: None), tmp_path), "must be an AdaptedPolicy"),
        (lambda: save_adapter(replace(student, head=ShortcutHead()), tmp_path), "ShortcutHead has no published form"),
        (lambda: save_adapter(student, tmp_path, weights={}), "weights does not fit: .* missing"),
        (lambda: save_adapter(student, tmp_path, weights={**own, "x": bias}), r"1 surplus \(x\)"),
        (
            lambda: save_adapter(student, tmp_path, weights={**own, "heads.velocities.bias": bias[:5]}),
            r"heads.velocities.bias must be \(192,\), got \(5,\)",
        ),
        (
            lambda: save_adapter(student, tmp_path, weights={**own, "heads.velocities.bias": bias / 0}),
            "proj_out_means.bias has values that are not finite",
        ),
        (
            lambda: save_adapter(
                student, tmp_path, weights={**own, "heads.velocities.bias": bias + 1e6}, dtype=torch.float16
            ),
            "proj_out_means.bias has values that are not finite",
        ),
    ]
    for call, match in refused:
        with pytest.raises(ValueError, match=match):
            call()
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_adapter(student_on(transformer_of("qwen"), "qwen", "gm"), tmp_path / "file")


def test_the_package_is_light_and_its_names_are_there() -> None:
    code = (
        "import sys, scale; print('torch' in sys.modules, 'diffusers' in sys.modules); "
        "print(scale.load_adapter.__module__, scale.save_adapter.__name__, hasattr(scale, 'no_such_name'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert run.stdout.split("\n")[:2] == ["False False", "scale.published save_adapter False"], run.stderr


def test_the_adapter_among_peft_is_ours_alone(saved: Saved) -> None:
    transformer = transformer_of("qwen")
    load_adapter(transformer, saved("qwen", "gm"))
    assert list(transformer.peft_config) == [ADAPTER]
    assert transformer.peft_config[ADAPTER].r == transformer.peft_config[ADAPTER].lora_alpha == RANK
