"""Networks whose features compare images: Inception from a file, and what anybody's function may answer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import rand, random
from torch import Tensor, nn

from pitools.evaluation.extractors import Extracted, extracted, load_extractor
from pitools.metrics import inception_score


class TinyInception(nn.Module):
    """Of the signature of the published TorchScript file: 8 features, 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.output = nn.Linear(8, 5)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        assert img.dtype == torch.uint8
        assert img.shape[1] == 3
        features = self.body(img.float() / 255).mean((2, 3))
        if return_features:
            return features
        logits = features @ self.output.weight.T
        if not no_output_bias:
            logits = logits + self.output.bias
        return logits.softmax(1)


@pytest.fixture(scope="module")
def network() -> TinyInception:
    torch.manual_seed(0)
    return TinyInception().eval().requires_grad_(False)


@pytest.fixture
def file(network: TinyInception, tmp_path: Path) -> Path:
    path = tmp_path / "inception:2015.pt"  # a colon of its own
    torch.jit.script(network).save(str(path))
    return path


def test_inception_is_read_from_a_file(network: TinyInception, file: Path) -> None:
    inception = load_extractor(f"inception:{file}")
    pixels = torch.randint(0, 256, (6, 3, 20, 30), generator=random(0), dtype=torch.uint8)
    found = extracted(inception, "inception", pixels / 127.5 - 1)
    # Exactly: the pixels that come in are the ones of the file.
    assert torch.equal(found.features, network(pixels, return_features=True))
    assert found.logits is not None
    probabilities = network(pixels, no_output_bias=True)
    torch.testing.assert_close(found.logits.softmax(1), probabilities)
    # Salimans et al., of the probabilities themselves.
    mean = probabilities.mean(0)
    expected = float((probabilities * (probabilities / mean).log()).sum(1).mean().exp())
    assert inception_score(found.logits).mean == pytest.approx(expected, rel=1e-5)


def test_inception_sees_grey_images_and_clips(file: Path) -> None:
    inception = load_extractor(f"inception:{file}")
    grey = 2 * rand(random(1), 4, 1, 9, 9).float() - 1
    features = extracted(inception, "inception", grey).features
    assert torch.equal(features, extracted(inception, "inception", grey.repeat(1, 3, 1, 1)).features)
    outside = torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1).expand(2, 3, 9, 9)
    clipped = extracted(inception, "inception", outside).features
    assert torch.equal(clipped, extracted(inception, "inception", outside.clamp(-1, 1)).features)


def test_a_file_that_is_not_inception_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"inception needs a file, as inception:FILE: .*inception-2015-12-05\.pt"):
        load_extractor("inception")
    with pytest.raises(ValueError, match=r"there is no file 'gone\.pt' to take Inception from; download"):
        load_extractor("inception:gone.pt")
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match=r"damaged\.pt cannot be read as TorchScript \([^\n]*\); download it again"):
        load_extractor(f"inception:{damaged}")
    other = tmp_path / "other.pt"
    torch.jit.script(nn.Linear(3, 4)).save(str(other))
    with pytest.raises(ValueError, match=r"other\.pt is TorchScript, but not the Inception network \("):
        load_extractor(f"inception:{other}")


def test_functions_are_extractors_with_and_without_logits() -> None:
    images = rand(random(2), 5, 1, 2, 2)
    alone = extracted(lambda x: x.flatten(1), "mine", images)
    assert torch.equal(alone.features, images.flatten(1))
    assert alone.logits is None
    both = extracted(lambda x: Extracted(x.flatten(1), x[:, 0, 0]), "mine", images)
    assert both.logits is not None
    assert both.logits.shape == (5, 2)


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (torch.zeros(5), r"got features \(5,\)"),
        (torch.zeros(4, 3), r"got features \(4, 3\)"),
        (torch.zeros(5, 3, 1, 1), r"got features \(5, 3, 1, 1\)"),
        (Extracted(torch.zeros(5, 3), torch.zeros(5)), r"got logits \(5,\)"),
        (None, "got a value of type NoneType"),
        ([[0.0]] * 5, "got a value of type list"),
    ],
    ids=str,
)
def test_an_answer_of_another_form_is_refused(answer: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"feature extractor mine must return features \[5, F\] of 5 images.*{got}"):
        extracted(lambda _: answer, "mine", torch.zeros(5, 1, 2, 2))
