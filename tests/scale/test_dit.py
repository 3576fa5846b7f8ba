"""The DiT backbone against the diffusers transformer that it wraps: parity, channel orders, gradients, randomness."""

import copy
import itertools
import math
import sys
from collections import Counter

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from pitools.guidance import Teacher, frozen
from pitools.policies import DXHead, GMHead, Head, NetworkStudent, Outputs, PolynomialHead, Segment
from pitools.training import keyed_generator
from pitools.types import Schedule
from scale.dit import DiT, DiTHead, DiTPolicy, DiTVelocity, Factor
from scale.heads import LOG_STD

SIZE, PATCH, CLASSES = 8, 2, 5
HEADS: dict[str, Head] = {"gm": GMHead(3), "dx": DXHead(4), "polynomial": PolynomialHead(3)}
T = torch.tensor([0.2, 0.7, 1.0], dtype=torch.float64)
LABELS = {"class_labels": torch.tensor([1, CLASSES, 4])}

factors = pytest.mark.parametrize("factor", ["pixel", "patch"])
channel_counts = pytest.mark.parametrize("channels", [1, 3])
every_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def backbone(factor: Factor = "pixel", channels: int = 3, spread: float = 0.05) -> DiT:
    head = DiTHead(factor=factor, spread=spread, log_std_width=8)
    return DiT(channels, SIZE, PATCH, layers=2, heads=2, head_width=8, classes=CLASSES, head=head)


@torch.no_grad()
def shaken(network: nn.Module, seed: int = 7) -> nn.Module:
    """The network with no weight at the zero where a DiT's training starts."""
    generator = keyed_generator(seed, "shake")
    for value in network.parameters():
        value.add_(0.2 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
    return network


def teacher_of(dit: DiT) -> DiTVelocity:
    """A trained teacher, as it were; frozen, float64."""
    network = shaken(dit.teacher(keyed_generator(0, "teacher")).double())
    assert isinstance(network, DiTVelocity)
    return frozen(network)


def student_of(dit: DiT, head: Head, seed: int = 1) -> tuple[DiTVelocity, NetworkStudent]:
    teacher = teacher_of(dit)
    network = dit.student(teacher, head, keyed_generator(seed, "head"))
    return teacher, NetworkStudent(network, head, Schedule(nfe=2), dit.factorisation)


def network_of(student: NetworkStudent) -> DiTPolicy:
    assert isinstance(student.network, DiTPolicy)
    return student.network


def latents(dit: DiT, seed: int = 2) -> Tensor:
    return torch.randn(len(T), *dit.shape, generator=keyed_generator(seed, "latents"), dtype=torch.float64)


def loss_of(outputs: Outputs, dit: DiT, head: GMHead) -> Tensor:
    """A squared error of the policy's velocity at a state that it did not start from."""
    x_src = latents(dit, 2)
    policy = NetworkStudent(lambda *_: outputs, head, Schedule(), dit.factorisation)(x_src, T)
    x_t, target = (dit.factorisation.pack(latents(dit, seed)) for seed in (3, 4))
    return (policy.velocity(x_t, T * 0.6) - target).square().mean()


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad for name, value in network.named_parameters() if value.grad is not None}


@channel_counts
def test_a_teacher_is_the_transformer_at_a_thousand_times_t(channels: int) -> None:
    dit = backbone(channels=channels)
    network = teacher_of(dit)
    x = latents(dit)
    direct = network.transformer(x, timestep=T * 1000, class_labels=LABELS["class_labels"]).sample
    assert isinstance(network.transformer, DiTTransformer2DModel)
    assert direct.std() > 0.1
    torch.testing.assert_close(Teacher(network).velocity(x, T, LABELS), direct, rtol=0, atol=0)


def test_a_new_teacher_answers_zero_and_its_blocks_are_the_identity() -> None:
    dit = backbone()
    network = dit.teacher(keyed_generator(0, "teacher"))
    assert network(latents(dit).float(), T.float(), LABELS).eq(0).all()
    tokens = torch.randn(2, 16, 16)
    block = network.transformer.transformer_blocks[0]
    assert torch.equal(block(tokens, timestep=T[:2].float(), class_labels=LABELS["class_labels"][:2]), tokens)


@factors
@channel_counts
def test_every_velocity_of_a_new_dx_student_is_the_teachers(factor: Factor, channels: int) -> None:
    dit = backbone(factor, channels)
    teacher, student = student_of(dit, HEADS["dx"])
    x = latents(dit)
    u = dit.factorisation.pack(teacher(x, T, LABELS)).unsqueeze(2)
    outputs = network_of(student)(x, T, LABELS)
    torch.testing.assert_close(outputs.velocities, u.expand(-1, -1, 4, -1), rtol=0, atol=1e-12)
    assert outputs.factor.shape == (*u.shape[:2], 0)
    assert outputs.sample.shape == (len(x), 0)
    torch.testing.assert_close(student(x, T, LABELS).velocity(dit.factorisation.pack(x), T), u.squeeze(2))


@factors
@channel_counts
def test_a_new_polynomial_student_has_the_teachers_velocity_first_and_then_zeros(factor: Factor, channels: int) -> None:
    dit = backbone(factor, channels)
    teacher, student = student_of(dit, HEADS["polynomial"])
    x = latents(dit)
    u = dit.factorisation.pack(teacher(x, T, LABELS))
    velocities = network_of(student)(x, T, LABELS).velocities
    torch.testing.assert_close(velocities[:, :, 0], u, rtol=0, atol=1e-12)
    assert velocities[:, :, 1:].eq(0).all()
    policy, packed = student(x, T, LABELS), dit.factorisation.pack(x)
    torch.testing.assert_close(policy.velocity(packed, T), u)
    torch.testing.assert_close(policy.velocity(packed, T * (1 - 1e-7)), u, rtol=0, atol=1e-5)


@factors
@channel_counts
def test_a_new_mixture_without_spread_has_the_teachers_velocity(factor: Factor, channels: int) -> None:
    dit = backbone(factor, channels, spread=0.0)
    teacher, student = student_of(dit, HEADS["gm"])
    x = latents(dit)
    u = dit.factorisation.pack(teacher(x, T, LABELS))
    torch.testing.assert_close(student(x, T, LABELS).velocity(dit.factorisation.pack(x), T), u, rtol=0, atol=1e-10)
    outputs = network_of(student)(x, T, LABELS)
    assert outputs.factor.shape == (*u.shape[:2], 3)
    assert outputs.factor.eq(0).all()
    torch.testing.assert_close(outputs.sample, torch.full_like(outputs.sample, math.log(0.05)))
    assert outputs.sample.shape == (len(x), 1)
    assert pytest.approx(math.log(0.05)) == LOG_STD


@channel_counts
def test_the_spread_of_a_mixture_over_pixels_is_the_same_at_every_pixel(channels: int) -> None:
    dit = backbone("pixel", channels, spread=0.5)
    head = GMHead(200)
    teacher, student = student_of(dit, head)
    x = latents(dit)
    u = dit.factorisation.pack(teacher(x, T, LABELS)).unsqueeze(2)
    noise = network_of(student)(x, T, LABELS).velocities - u
    torch.testing.assert_close(noise, noise[:1, :1].expand_as(noise), rtol=0, atol=1e-12)
    assert 0.4 < noise[0, 0].std() < 0.6
    assert len(noise[0, 0].unique()) == 200 * channels


def test_the_spread_of_a_mixture_over_patches_differs_between_the_pixels() -> None:
    dit = backbone("patch", spread=0.5)
    teacher, student = student_of(dit, GMHead(200))
    x = latents(dit)
    noise = network_of(student)(x, T, LABELS).velocities - dit.factorisation.pack(teacher(x, T, LABELS)).unsqueeze(2)
    torch.testing.assert_close(noise, noise[:1, :1].expand_as(noise), rtol=0, atol=1e-12)
    assert 0.45 < noise[0, 0].std() < 0.55
    assert noise[0, 0].std(0).min() > 0.3
    assert torch.corrcoef(noise[0, 0].T).fill_diagonal_(0).abs().max() < 0.4


@factors
@channel_counts
@every_head
def test_channels_come_in_the_documented_order_whatever_the_weights(factor: Factor, channels: int, head: Head) -> None:
    """Loops over what a head's channel means, against the tokens that enter the last projection."""
    dit = backbone(factor, channels)
    _, student = student_of(dit, head)
    network = network_of(student)
    shaken(network)
    seen: list[Tensor] = []
    network.transformer.proj_out_2.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    outputs = network(latents(dit), T, LABELS)
    sizes, (tokens,) = head.sizes, seen
    raw = tokens @ network.heads.velocities.weight.T + network.heads.velocities.bias
    count, side = sizes.velocities, SIZE // PATCH

    fields = torch.full((count, len(T), channels, SIZE, SIZE), math.nan, dtype=torch.float64)
    for n, p, q, v, c in itertools.product(range(side**2), range(PATCH), range(PATCH), range(count), range(channels)):
        pixel = ((p * PATCH + q) * count + v) * channels + c
        patch = ((v * channels + c) * PATCH + p) * PATCH + q
        y, x = (n // side) * PATCH + p, (n % side) * PATCH + q
        fields[v, :, c, y, x] = raw[:, n, pixel if factor == "pixel" else patch]
    expected = torch.stack([dit.factorisation.pack(one) for one in fields], 2)
    torch.testing.assert_close(outputs.velocities, expected, rtol=0, atol=1e-12)

    if network.heads.factors is None:
        assert sizes.factor == 0
        return
    raw = tokens @ network.heads.factors.weight.T + network.heads.factors.bias
    if factor == "patch":
        torch.testing.assert_close(outputs.factor, raw, rtol=0, atol=1e-12)
        return
    for n, p, q, e in itertools.product(range(side**2), range(PATCH), range(PATCH), range(sizes.factor)):
        y, x = (n // side) * PATCH + p, (n % side) * PATCH + q
        value = raw[:, n, (p * PATCH + q) * sizes.factor + e]
        torch.testing.assert_close(outputs.factor[:, y * SIZE + x, e], value, rtol=0, atol=1e-12)


def test_the_log_std_reads_the_embedding_and_leaves_it_alone() -> None:
    dit = backbone()
    network = network_of(student_of(dit, HEADS["gm"])[1])
    shaken(network)
    outputs = network(latents(dit), T, LABELS)
    embedding = network.transformer.transformer_blocks[0].norm1.emb(
        T * 1000, LABELS["class_labels"], hidden_dtype=T.dtype
    )
    assert network.heads.samples is not None
    _, inner, _, outer = network.heads.samples
    hidden = embedding * embedding.sigmoid() @ inner.weight.T + inner.bias
    torch.testing.assert_close(outputs.sample, hidden * hidden.sigmoid() @ outer.weight.T + outer.bias)
    outputs.sample.sum().backward()
    assert set(gradients(network)) == {f"heads.samples.{i}.{kind}" for i in (1, 3) for kind in ("weight", "bias")}


@factors
def test_labels_are_never_dropped_and_nothing_draws_from_the_global_state(factor: Factor) -> None:
    dit, head = backbone(factor), GMHead(3)
    x, t = latents(dit).float(), T.float()
    torch.rand(1)  # a state that no earlier test has left
    before = torch.get_rng_state()
    teacher = dit.teacher(keyed_generator(0, "teacher"))
    network = dit.student(teacher, head, keyed_generator(1, "head"))
    for module in (teacher, network):
        module.train()
        shaken(module)
        one, two = module(x, t, LABELS), module(x, t, LABELS)
        probabilities = [part.dropout_prob for part in module.modules() if hasattr(part, "dropout_prob")]
        assert probabilities == [0.0] * dit.layers
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b)
        # Dropping would say "no class", an embedding of its own.
        other = module(x, t, {"class_labels": torch.full((len(x),), CLASSES)})
        assert not torch.allclose(one[0], other[0])
    assert torch.equal(torch.get_rng_state(), before)


@factors
def test_weights_are_a_function_of_the_generator(factor: Factor) -> None:
    dit, head = backbone(factor), GMHead(3)

    def weights(seed: int) -> list[Tensor]:
        teacher = dit.teacher(keyed_generator(seed, "teacher"))
        network = dit.student(teacher, head, keyed_generator(seed, "head"))
        return [*teacher.parameters(), network.heads.velocities.bias, network.heads.samples[1].weight]  # type: ignore[index]

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    drawn = [i for i, (a, b) in enumerate(zip(first, other, strict=True)) if not torch.equal(a, b)]
    constant = [i for i, value in enumerate(first) if len(value.unique()) == 1]
    assert sorted(drawn + constant) == list(range(len(first)))

    generator = keyed_generator(0, "teacher")
    one, two = dit.teacher(generator), dit.teacher(generator)
    assert not torch.equal(one.transformer.pos_embed.proj.weight, two.transformer.pos_embed.proj.weight)


@every_head
def test_no_weight_is_left_as_it_was_found(head: Head) -> None:
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        network = network_of(student_of(backbone(), head)[1])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(value.isfinite().all() for value in network.parameters())


@factors
def test_a_student_lies_where_its_teacher_lies(factor: Factor) -> None:
    dit = backbone(factor)
    for head in HEADS.values():
        teacher = dit.teacher(keyed_generator(0, "teacher")).to("meta", torch.bfloat16)
        network = dit.student(teacher, head, keyed_generator(1, "head"))
        assert {(value.device.type, value.dtype) for value in network.parameters()} == {("meta", torch.bfloat16)}


def test_what_a_dit_cannot_take_is_refused() -> None:
    dit = backbone()
    network = teacher_of(dit)
    x = latents(dit)
    for conditions in (None, {}, {"labels": LABELS["class_labels"]}):
        with pytest.raises(ValueError, match=r'pass conditions=\{"class_labels": \[B\]\}'):
            network(x, T, conditions)
    for wrong in (x[..., :4], x[..., :7, :7]):
        with pytest.raises(ValueError, match="square latents of whole 2 x 2 patches, got"):
            network(wrong, T, LABELS)
    with pytest.raises(ValueError, match="not from a Linear"):
        dit.student(nn.Linear(1, 1), HEADS["gm"], keyed_generator(1, "head"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patch": 3}, "size 32 is not a multiple of patch 3"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"heads": 3, "head_width": 2}, "heads 3 x head_width 2 must be a multiple of 4"),
    ],
)
def test_impossible_sizes_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"factor": "pixels"}, 'factor must be "pixel" or "patch", got \'pixels\''),
        ({"spread": -0.1}, "spread must not be negative, got -0.1"),
        ({"spread": math.nan}, "spread must not be negative, got nan"),
        ({"log_std_width": 0}, "log_std_width must be at least 1, got 0"),
    ],
)
def test_an_impossible_head_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiTHead(**wrong)  # type: ignore[arg-type]


def test_without_diffusers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r'backbone "dit" needs diffusers .* run `pip install "pitools\[scale\]"`'):
        backbone().teacher(keyed_generator(0, "teacher"))


@factors
def test_a_loss_of_the_policy_reaches_every_parameter_that_trains(factor: Factor) -> None:
    dit, head = backbone(factor), GMHead(3)
    teacher, student = student_of(dit, head)
    network = network_of(student)
    shaken(network)
    assert not any(value.requires_grad for value in teacher.parameters())
    trained = {name for name, value in network.named_parameters() if value.requires_grad}
    idle = {name for name, _ in network.named_parameters()} - trained
    assert idle == {"transformer.proj_out_2.weight", "transformer.proj_out_2.bias"}
    loss_of(network(latents(dit), T, LABELS), dit, head).backward()
    reached = gradients(network)
    assert set(reached) == trained
    # A bias of keys moves all of a query's logits alike, and so not the attention.
    zero = {name for name, gradient in reached.items() if gradient.abs().max() < 1e-12}
    assert zero == {f"transformer.transformer_blocks.{i}.attn1.to_k.bias" for i in range(dit.layers)}
    assert not gradients(teacher)


def test_a_students_weights_are_its_own() -> None:
    dit = backbone()
    teacher, student = student_of(dit, HEADS["dx"])
    x = latents(dit)
    before = teacher(x, T, LABELS)
    shaken(network_of(student))
    assert torch.equal(teacher(x, T, LABELS), before)


@factors
def test_recomputed_activations_give_the_same_gradients(factor: Factor) -> None:
    dit, head = backbone(factor), GMHead(3)
    network = network_of(student_of(dit, head)[1])
    shaken(network)
    calls: Counter[str] = Counter()
    network.transformer.transformer_blocks[1].ff.register_forward_hook(lambda *_: calls.update(["ff"]))

    def run() -> tuple[Outputs, dict[str, Tensor]]:
        network.zero_grad()
        outputs = network(latents(dit), T, LABELS)
        loss_of(outputs, dit, head).backward()
        return outputs, {name: value.clone() for name, value in gradients(network).items()}

    stored, expected = run()
    assert calls["ff"] == 1
    network.checkpoint_gradients()
    recomputed, found = run()
    assert calls["ff"] == 3  # forward, and once more in the backward pass
    for a, b in zip(stored, recomputed, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@every_head
def test_a_policy_is_exact_while_its_network_is_not(head: Head) -> None:
    dit = backbone()
    _, student = student_of(dit, head)
    network = network_of(student)
    shaken(network.float())
    x, t = latents(dit).float(), T.float()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(x, t, LABELS)
        policy = student(x, t, LABELS)
    assert {value.dtype for value in outputs if value.numel()} == {torch.bfloat16}
    exact = Outputs(*(value.float() for value in outputs))
    segment = Segment(student.schedule.segment, student.schedule.shift)
    x_t, later = dit.factorisation.pack(latents(dit, 3).float()), t * 0.8
    expected = head.read(exact, dit.factorisation.pack(x), t, segment).velocity(x_t, later)
    found = policy.velocity(x_t, later)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_copy_reads_its_own_tokens() -> None:
    dit = backbone()
    network = network_of(student_of(dit, HEADS["gm"])[1])
    x = latents(dit)
    before = network(x, T, LABELS)
    twin = copy.deepcopy(network)
    for a, b in zip(twin(x, T, LABELS), before, strict=True):
        assert torch.equal(a, b)
    shaken(twin.transformer)
    assert not torch.allclose(twin(x, T, LABELS).velocities, before.velocities)
    assert torch.equal(network(x, T, LABELS).velocities, before.velocities)


@pytest.mark.parametrize(
    ("name", "heads"),
    [("gm", "velocities factors samples.1 samples.3"), ("dx", "velocities"), ("polynomial", "velocities")],
)
def test_the_state_is_the_transformers_and_the_heads(name: str, heads: str) -> None:
    dit = backbone()
    teacher, student = student_of(dit, HEADS[name])
    network = network_of(student)
    kinds = ("weight", "bias")
    expected = [f"transformer.{key}" for key in teacher.transformer.state_dict()]
    assert list(teacher.state_dict()) == expected
    assert list(network.state_dict()) == expected + [f"heads.{head}.{kind}" for head in heads.split() for kind in kinds]
    assert {key.split(".")[1] for key in expected} == {"pos_embed", "transformer_blocks", "proj_out_1", "proj_out_2"}

    other = dit.student(dit.teacher(keyed_generator(9, "teacher")).double(), HEADS[name], keyed_generator(9, "head"))
    other.load_state_dict(network.state_dict())
    for a, b in zip(other(latents(dit), T, LABELS), network(latents(dit), T, LABELS), strict=True):
        assert torch.equal(a, b)


def test_shards_cover_the_blocks_inner_ones_first() -> None:
    dit = backbone()
    network = network_of(student_of(dit, HEADS["gm"])[1])
    shards = network.shards()
    covered = {id(value) for shard in shards for value in shard.parameters()}
    left = {name for name, value in network.named_parameters() if id(value) not in covered}
    assert {name.removeprefix("transformer.").split(".")[0] for name in left} == {
        "pos_embed",
        "proj_out_1",
        "proj_out_2",
        "heads",
    }
    for i, outer in enumerate(shards):
        assert not any(later in set(outer.modules()) for later in shards[i + 1 :]), "an outer module comes first"

    # A shard is whole only within its own call: no other module may use what it holds.
    called: list[nn.Module] = []
    outside: list[str] = []

    def enter(module: nn.Module, _: object) -> None:
        called.append(module)
        if next(module.parameters(recurse=False), None) is not None and not any(one in shards for one in called):
            outside.append(next(name for name, one in network.named_modules() if one is module))

    for module in network.modules():
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(lambda *_: called.pop() and None)
    network(latents(dit), T, LABELS)
    assert not any("transformer_blocks" in name for name in outside)
    assert "transformer.proj_out_1" in outside
