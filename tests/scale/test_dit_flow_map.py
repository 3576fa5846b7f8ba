"""A DiT that embeds more scalars than the time: parity with its teacher, gradients, recomputation, derivatives."""

import copy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from test_dit import LABELS, T, backbone, gradients, latents, shaken, teacher_of
from torch import Tensor, nn
from torch.autograd import forward_ad

from pitools.training import keyed_generator
from scale.dit import DiT, DiTFlowMap, share_embedding

BOTH = ("delta", "guidance")
ONE = torch.ones_like(T)
SCALARS = {"delta": T * 0.9, "guidance": 1 + 2 * T}
CONDITIONS = {**LABELS, **SCALARS}

kinds = pytest.mark.parametrize("scalars", [BOTH, ("guidance",), ()], ids=["both", "guidance", "none"])
ranks = pytest.mark.parametrize("lora", [0, 3])


def flow_map_of(scalars: tuple[str, ...] = BOTH, lora: int = 0, seed: int = 1) -> DiTFlowMap:
    dit = backbone()
    return dit.flow_map(teacher_of(dit), scalars, keyed_generator(seed, "flow map"), lora)


@torch.no_grad()
def woken(network: DiTFlowMap) -> DiTFlowMap:
    """The network with scalars that have an effect, and all else as it was."""
    shaken(network.embeddings)
    return network


def shared(dit: DiT) -> nn.Module:
    teacher = teacher_of(dit)
    share_embedding(teacher.transformer)
    return teacher


@ranks
@kinds
@pytest.mark.parametrize("share", [False, True])
def test_it_starts_as_its_teacher_whatever_the_scalars(scalars: tuple[str, ...], lora: int, share: bool) -> None:
    dit = backbone()
    teacher = shared(dit) if share else teacher_of(dit)
    network = dit.flow_map(teacher, scalars, keyed_generator(1, "flow map"), lora)
    x = latents(dit)
    expected = teacher(x, T, LABELS)
    assert expected.std() > 0.1
    for values in (SCALARS, {name: 0 * value for name, value in SCALARS.items()}):
        torch.testing.assert_close(network(x, T, {**LABELS, **values}), expected, rtol=0, atol=0)


@pytest.mark.parametrize("share", [False, True])
def test_the_scalars_embedding_is_added_to_that_of_time_and_class(share: bool) -> None:
    """Against a transformer whose table of classes has the sum in it, one row for each sample."""
    dit = backbone()
    teacher = shared(dit) if share else teacher_of(dit)
    network = woken(dit.flow_map(teacher, BOTH, keyed_generator(1, "flow map")))
    x = latents(dit)
    found = network(x, ONE, CONDITIONS)
    extra = sum(network.embeddings[name](value) for name, value in SCALARS.items())
    assert isinstance(extra, Tensor)
    expected = []
    for i, label in enumerate(LABELS["class_labels"]):
        own = copy.deepcopy(teacher)
        assert isinstance(own.transformer, nn.Module)
        tables = {block.norm1.emb.class_embedder.embedding_table for block in own.transformer.transformer_blocks}  # type: ignore[union-attr]
        for table in tables:
            table.weight.data[label] += extra[i].detach()
        expected.append(own(x[i : i + 1], ONE[:1], {"class_labels": label[None]}))
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-12)
    assert (found - teacher(x, ONE, LABELS)).abs().max() > 0.01


def test_a_scalar_is_seen_by_256_sines_and_cosines_and_two_layers() -> None:
    embed = woken(flow_map_of()).embeddings["delta"]
    waves = torch.stack([wave(T * 10_000 ** (-i / 128)) for wave in (torch.cos, torch.sin) for i in range(128)], 1)
    hidden = waves @ embed.inner.weight.T + embed.inner.bias  # type: ignore[union-attr, operator]
    expected = hidden * hidden.sigmoid() @ embed.outer.weight.T + embed.outer.bias  # type: ignore[union-attr, operator]
    torch.testing.assert_close(embed(T), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BOTH)
def test_the_answer_depends_on_each_scalar_of_each_sample(name: str) -> None:
    network = woken(flow_map_of())
    x = latents(backbone())
    before = network(x, ONE, CONDITIONS)
    value = SCALARS[name].clone()
    value[1] += 0.3
    moved = (network(x, ONE, {**CONDITIONS, name: value}) - before).abs().flatten(1).amax(1)
    assert moved[1] > 1e-3
    assert moved[[0, 2]].eq(0).all()


@ranks
@kinds
def test_gradients_reach_what_trains_and_nothing_else(scalars: tuple[str, ...], lora: int) -> None:
    dit = backbone()
    teacher = teacher_of(dit)
    network = dit.flow_map(teacher, scalars, keyed_generator(1, "flow map"), lora)
    trained = {name for name, value in network.named_parameters() if value.requires_grad}
    if lora:
        layers = [f"attn1.{key}" for key in ("to_q", "to_k", "to_v", "to_out.0")] + ["ff.net.0.proj", "ff.net.2"]
        own = {
            f"transformer.transformer_blocks.{i}.{layer}.lora_{side}.pi_flow.weight"
            for i in range(dit.layers)
            for layer in layers
            for side in "AB"
        }
        sizes = {value.shape[0] for name, value in network.named_parameters() if "lora_A" in name}
        assert sizes == {lora}
    else:
        own = {f"transformer.{name}" for name, _ in teacher.transformer.named_parameters()}
    embeddings = {
        f"embeddings.{name}.{layer}.{kind}"
        for name in scalars
        for layer in ("inner", "outer")
        for kind in ("weight", "bias")
    }
    assert trained == own | embeddings
    shaken(network)
    network(latents(dit), ONE, CONDITIONS).square().sum().backward()
    reached = gradients(network)
    assert set(reached) == trained
    # A bias of keys moves all of a query's logits alike, and so not the attention.
    zero = {name for name, gradient in reached.items() if gradient.abs().max() < 1e-10}
    assert zero == {name for name in trained if name.endswith("to_k.bias")}
    assert not gradients(teacher)


def test_the_first_step_moves_the_embeddings_last_layers() -> None:
    network = flow_map_of()
    network(latents(backbone()), ONE, CONDITIONS).square().sum().backward()
    for name in BOTH:
        assert network.embeddings[name].outer.weight.grad.abs().max() > 0  # type: ignore[union-attr]


@ranks
def test_its_weights_are_its_own(lora: int) -> None:
    dit = backbone()
    teacher = teacher_of(dit)
    x = latents(dit)
    before = teacher(x, T, LABELS)
    network = dit.flow_map(teacher, BOTH, keyed_generator(1, "flow map"), lora)
    shaken(network)
    assert torch.equal(teacher(x, T, LABELS), before)
    assert not any(value.requires_grad for value in teacher.parameters())
    found = network(x, T, CONDITIONS)
    twin = copy.deepcopy(network)
    assert torch.equal(twin(x, T, CONDITIONS), found)
    shaken(twin)
    assert not torch.allclose(twin(x, T, CONDITIONS), found)
    assert torch.equal(network(x, T, CONDITIONS), found)


@ranks
def test_recomputed_activations_see_the_scalars_of_their_own_call(lora: int) -> None:
    """Two calls at different scalars before one backward pass, as prediction and correction make them."""
    network = flow_map_of(lora=lora)
    shaken(network)
    x, other = latents(backbone(), 2), latents(backbone(), 3)
    calls: list[str] = []
    network.transformer.transformer_blocks[1].ff.register_forward_hook(lambda *_: calls.append("ff"))

    def run() -> dict[str, Tensor]:
        network.zero_grad()
        predicted = network(x, ONE, CONDITIONS)
        corrected = network(other, ONE, {**LABELS, "delta": ONE, "guidance": ONE * 3})
        (predicted.square().sum() + corrected.pow(3).sum()).backward()
        return {name: value.clone() for name, value in gradients(network).items()}

    expected = run()
    assert len(calls) == 2
    network.checkpoint_gradients()
    found = run()
    assert len(calls) == 6  # forward, and once more in the backward pass
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", BOTH)
def test_a_forward_derivative_is_the_difference_quotients_limit(name: str, recomputed: bool) -> None:
    network = woken(flow_map_of())
    x, step = latents(backbone()), 1e-5
    value, direction = SCALARS[name], torch.tensor([1.0, -0.5, 2.0], dtype=T.dtype)

    def at(moved: Tensor) -> Tensor:
        answer: Tensor = network(x, ONE, {**CONDITIONS, name: moved})
        return answer

    with torch.no_grad():
        expected = (at(value + step * direction) - at(value - step * direction)) / (2 * step)
    assert expected.abs().max() > 0.01
    stored = at(value)
    weights = list(network.parameters())
    gradient = torch.autograd.grad(stored.square().sum(), weights)
    if recomputed:
        network.checkpoint_gradients()
    with forward_ad.dual_level():
        answer, slope = forward_ad.unpack_dual(at(forward_ad.make_dual(value, direction)))
    assert slope is not None
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(answer, stored, rtol=0, atol=1e-12)
    # The backward pass comes when the dual numbers are gone.
    torch.testing.assert_close(torch.autograd.grad(answer.square().sum(), weights), gradient, rtol=1e-9, atol=1e-9)


def test_autocast_and_half_the_bits_leave_it_close() -> None:
    network = woken(flow_map_of())
    exact = network(latents(backbone()), ONE, CONDITIONS)
    without = network(latents(backbone()), ONE, {**CONDITIONS, "delta": 0 * ONE, "guidance": 0 * ONE})
    x, t = latents(backbone()).float(), ONE.float()
    given = {**LABELS, **{name: value.float() for name, value in SCALARS.items()}}
    with torch.autocast("cpu", torch.bfloat16):
        cast = network.float()(x, t, given)
    half = network.bfloat16()(x.bfloat16(), t, given)
    for found in (cast, half):
        assert found.dtype == torch.bfloat16
        assert (found - exact).norm() < 0.1 * (without - exact).norm()


def test_weights_are_a_function_of_the_generator_alone() -> None:
    before = torch.get_rng_state()
    for lora in (0, 3):
        one, again, other = (dict(flow_map_of(lora=lora, seed=seed).named_parameters()) for seed in (1, 1, 2))
        assert all(torch.equal(value, again[name]) for name, value in one.items())
        drawn = {name for name, value in one.items() if not torch.equal(value, other[name])}
        assert {name.split(".")[-3 if "lora_" in name else -2] for name in drawn} == {"inner", *["lora_A"][: lora // 3]}
    assert torch.equal(torch.get_rng_state(), before)


@ranks
def test_an_outline_has_no_weights_in_memory(lora: int) -> None:
    dit = backbone()
    network = dit.flow_map(dit.outline(), BOTH, keyed_generator(1, "flow map"), lora)
    assert {value.device.type for value in network.parameters()} == {"meta"}
    real = flow_map_of(lora=lora)
    assert [(n, v.shape) for n, v in network.named_parameters()] == [(n, v.shape) for n, v in real.named_parameters()]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r'embeds "delta": pass it in conditions as a tensor \[3\], got None'),
        ({"delta": T}, r'embeds "guidance": pass it in conditions as a tensor \[3\], got None'),
        ({"delta": T[:1], "guidance": T}, r'embeds "delta": .* got \(1,\)'),
        ({"delta": T, "guidance": 2.0}, r'embeds "guidance": .* got 2.0'),
    ],
)
def test_scalars_that_are_missing_or_misshapen_are_refused(given: Mapping[str, object], message: str) -> None:
    network = flow_map_of()
    with pytest.raises(ValueError, match=message):
        network(latents(backbone()), ONE, {**LABELS, **given})


def test_what_no_flow_map_can_start_from_is_refused() -> None:
    dit = backbone()
    teacher, generator = teacher_of(dit), keyed_generator(1, "flow map")
    with pytest.raises(ValueError, match="not from a Linear"):
        dit.flow_map(nn.Linear(1, 1), BOTH, generator)
    with pytest.raises(ValueError, match="not from a DiTFlowMap"):
        dit.flow_map(flow_map_of(), BOTH, generator)
    with pytest.raises(ValueError, match="lora must be a rank, or 0 for none, got -1"):
        dit.flow_map(teacher, BOTH, generator, lora=-1)
    for wrong in (("delta", "delta"), ("",)):
        with pytest.raises(ValueError, match="scalars must be different names"):
            dit.flow_map(teacher, wrong, generator)


WRAPPED = """
import copy, warnings
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from test_dit import LABELS, T, backbone, latents, shaken
from test_dit_flow_map import CONDITIONS, ONE, flow_map_of

warnings.simplefilter("ignore")
torch.set_num_threads(1)
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)

def run(module, network):
    x, other = latents(backbone(), 2), latents(backbone(), 3)
    first = module(x, ONE, CONDITIONS)
    second = module(other, ONE, {**LABELS, "delta": ONE, "guidance": ONE * 3})
    (first.square().sum() + second.pow(3).sum()).backward()
    gradients = {name: value.grad for name, value in network.named_parameters() if value.grad is not None}
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in gradients.items()}

for lora in (0, 3):
    plain = flow_map_of(lora=lora)
    shaken(plain)
    apart, sharded = copy.deepcopy(plain), copy.deepcopy(plain)
    expected = run(plain, plain)
    for network in (apart, sharded):
        network.checkpoint_gradients()
    found = [run(nn.parallel.DistributedDataParallel(apart, broadcast_buffers=False), apart)]
    for module in sharded.shards():
        fully_shard(module)
    fully_shard(sharded, reshard_after_forward=True)
    found.append(run(sharded, sharded))
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-10)
distributed.destroy_process_group()
print("as unwrapped")
"""


@pytest.mark.slow
def test_gradients_are_the_same_under_ddp_and_fsdp2() -> None:
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", WRAPPED], cwd=here, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "as unwrapped"
