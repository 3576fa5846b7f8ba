"""Sampling the DiT: classes, generators, steps, and the VAE's part."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from rich.console import Console
from torch import Tensor

import pitools as pi
from pitools.policies import GMHead, NetworkFlowMap, NetworkStudent
from pitools.training import keyed_generator
from pitools.types import Schedule
from scale.classes import PiDiTPipeline, sample_classes
from scale.dit import DiT, DiTHead
from scale.whole import DiTFlowMapStudent

HEAD = GMHead(4)
DIT = DiT(4, 8, 2, 2, 2, 8, 5, weights="random", head=DiTHead(log_std_width=8))


@pytest.fixture(scope="module")
def pipe() -> PiDiTPipeline:
    network = DIT.student(DIT.teacher(keyed_generator(0, "teacher")), HEAD, keyed_generator(1, "head"))
    student = NetworkStudent(network.eval(), HEAD, Schedule(nfe=2), DIT.factorisation)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, scaling_factor=0.5)
    return PiDiTPipeline(student, vae.eval())


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_images_are_the_decoded_samples_of_the_student(pipe: PiDiTPipeline) -> None:
    noise = torch.stack([torch.randn(4, 8, 8, generator=own) for own in seeded(3, 4)])
    latents = pi.sample(pipe.student, noise, conditions={"class_labels": torch.tensor([1, 4])})
    assert torch.equal(pipe([1, 4], generator=seeded(3, 4), output_type="latent"), latents)
    images = pipe([1, 4], generator=seeded(3, 4), output_type="pt")
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / 0.5).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))


def test_each_generator_is_an_image_as_if_alone(pipe: PiDiTPipeline) -> None:
    together = pipe([1, 4], generator=seeded(3, 4), renoise=0.5, output_type="latent")
    alone = [
        pipe([label], generator=seeded(seed), renoise=0.5, output_type="latent") for label, seed in ((1, 3), (4, 4))
    ]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("labels", [[5], [-1], []])
def test_labels_that_are_none_are_refused(labels: list[int], pipe: PiDiTPipeline) -> None:
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.4"):
        pipe(labels)


def test_other_steps_need_force(pipe: PiDiTPipeline) -> None:
    with pytest.raises(ValueError, match="num_inference_steps must be 2 for this adapter, got 3"):
        pipe([1], num_inference_steps=3)
    assert pipe([1], num_inference_steps=3, force=True, output_type="latent").isfinite().all()


def test_as_many_generators_as_images(pipe: PiDiTPipeline) -> None:
    with pytest.raises(ValueError, match="one for each of the 2 images, got 1"):
        pipe([1, 2], generator=seeded(0))


def test_files_say_what_they_show(pipe: PiDiTPipeline, tmp_path: Path) -> None:
    paths = sample_classes(
        pipe, [1, 4], nfe=None, seed=7, per_label=2, renoise=0.0, force=False, out=tmp_path, console=Console(quiet=True)
    )
    told = json.loads((tmp_path / "samples.json").read_text())
    assert [(row["label"], row["seed"]) for row in told["images"]] == [(1, 7), (1, 8), (4, 9), (4, 10)]
    assert told["nfe"] == 2
    assert Image.open(tmp_path / "sheet.png").size == (32, 32)
    (alone,) = pipe([4], generator=seeded(10))
    assert Image.open(paths[3]).tobytes() == alone.tobytes()


@pytest.fixture(scope="module")
def flow_map(pipe: PiDiTPipeline) -> PiDiTPipeline:
    teacher = DIT.teacher(keyed_generator(0, "teacher"))
    network = DIT.flow_map(teacher, ("delta", "guidance"), keyed_generator(1, "flow map")).eval()
    with torch.no_grad():
        for value in network.embeddings.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=keyed_generator(2, "shake")))
    student = DiTFlowMapStudent(NetworkFlowMap(network), DIT.factorisation, 2.0, (1.0, 3.0))
    return PiDiTPipeline(student, pipe.vae)


def test_a_flow_map_is_guided_as_told_or_as_its_teacher_was(flow_map: PiDiTPipeline) -> None:
    def latents(guidance: float | None, force: bool = False) -> Tensor:
        found: Tensor = flow_map(
            [1, 4], guidance_scale=guidance, force=force, generator=seeded(3, 4), output_type="latent"
        )
        return found

    noise = torch.stack([torch.randn(4, 8, 8, generator=own) for own in seeded(3, 4)])
    one = torch.ones(2)
    assert isinstance(flow_map.student, DiTFlowMapStudent)
    for guidance in (1.5, None, 5.0):
        given = {"class_labels": torch.tensor([1, 4]), "delta": one, "guidance": one * (guidance or 2.0)}
        with torch.no_grad():
            expected = noise - flow_map.student.network(noise, one, given)
        torch.testing.assert_close(latents(guidance, force=guidance == 5), expected, rtol=1e-4, atol=1e-4)
    assert (latents(1.5) - latents(None)).abs().max() > 1e-3
    for wrong in (0.5, 3.5, float("nan")):
        with pytest.raises(ValueError, match=r"guidance_scale must lie in \[1, 3\], which .* trained for, got"):
            latents(wrong)


def test_a_policys_guidance_cannot_be_chosen(pipe: PiDiTPipeline) -> None:
    with pytest.raises(ValueError, match="guidance_scale cannot be chosen: this student has its teacher's in it"):
        pipe([1], guidance_scale=2.0)


def test_a_flow_map_takes_one_evaluation(flow_map: PiDiTPipeline) -> None:
    with pytest.raises(ValueError, match="num_inference_steps must be 1 for this adapter, got 2"):
        flow_map([1], num_inference_steps=2)
    with pytest.raises(ValueError, match="a flow map starts at t = 1 and takes one evaluation"):
        flow_map([1], num_inference_steps=2, force=True)


def test_files_tell_a_flow_maps_guidance(flow_map: PiDiTPipeline, tmp_path: Path) -> None:
    for guidance in (None, 1.5):
        sample_classes(
            flow_map,
            [1],
            nfe=None,
            seed=7,
            per_label=1,
            renoise=0.0,
            guidance=guidance,
            force=False,
            out=tmp_path,
            console=Console(quiet=True),
        )
        assert json.loads((tmp_path / "samples.json").read_text())["guidance"] == (guidance or 2.0)
