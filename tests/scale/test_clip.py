"""The CLIP scorer, on a tiny random model that is saved as a real one is."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from pitools.evaluation import load_scorer

PROMPTS = ["a fox", "an owl", "a fox in the snow " * 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with a vocabulary of letters, and 12 places for a text."""
    from transformers import CLIPImageProcessor, CLIPTokenizer

    path = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    model.save_pretrained(path)
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(path)
    return path


def pictures() -> list[Image.Image]:
    return [Image.effect_noise((20, 12), 80).convert("RGB"), *(Image.new("RGB", (9, 9), c) for c in ("red", "blue"))]


def test_scores_are_cosines_of_the_models_embeddings(folder: Path) -> None:
    images, scorer = pictures(), load_scorer(f"clip:{folder}")
    scores = torch.as_tensor(scorer(images, PROMPTS))
    assert scores.shape == (3,)
    # The model's own similarities are the cosines, times the exponential of its temperature.
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=PROMPTS, images=images, return_tensors="pt", padding=True, truncation=True, max_length=12)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    torch.testing.assert_close(scores, logits.diagonal() / model.logit_scale.exp())
    # Each image with its prompt, whatever stands beside it.
    alone = [float(torch.as_tensor(scorer([image], [text]))) for image, text in zip(images, PROMPTS, strict=True)]
    torch.testing.assert_close(torch.tensor(alone), scores)
    swapped = torch.as_tensor(scorer(images, PROMPTS[::-1]))
    assert (swapped[[0, 2]] - scores[[0, 2]]).abs().min() > 1e-4


def test_what_cannot_be_scored_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"takes prompts, and these images are of classes: 7"):
        load_scorer(f"clip:{folder}")(pictures(), ["a fox", 7, 7])
    with pytest.raises(ValueError, match="clip needs a model, a folder or a hub id, such as clip:openai/"):
        load_scorer("clip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"clip:.*empty is no CLIP model that can be loaded"):
        load_scorer(f"clip:{tmp_path / 'empty'}")
