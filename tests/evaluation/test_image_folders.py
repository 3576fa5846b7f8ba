"""Images in folders and arrays, and statistics in files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mixtures import randn, random
from PIL import Image

from pitools.evaluation.images import Files, Pixels, batches, read_folder, to_pil
from pitools.evaluation.statistics import moments_of, read_statistics, statistics_file
from pitools.metrics import Moments, frechet_distance


def save(path: Path, seed: int, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_a_folder_is_read_in_order_and_below(tmp_path: Path) -> None:
    names = ["b/1.png", "a/2.PNG", "a/10.webp", "c.bmp"]
    for number, name in enumerate(names):
        save(tmp_path / name, number)
    (tmp_path / "notes.txt").write_text("no image")
    save(tmp_path / ".hidden.png", 9)
    folder = read_folder(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in folder.images.paths] == sorted(names)
    assert folder.asked is None
    image = folder.images[1]
    with Image.open(tmp_path / "a/2.PNG") as opened:
        expected = torch.tensor(np.asarray(opened)).permute(2, 0, 1)
    assert torch.equal(((image + 1) * 127.5).round().to(torch.uint8), expected)


def test_every_pixel_survives_the_way_there_and_back() -> None:
    levels = torch.arange(256).view(1, 16, 16).expand(3, -1, -1)
    picture = to_pil(levels / 127.5 - 1)
    assert np.array_equal(np.asarray(picture), levels.permute(1, 2, 0).numpy())
    assert torch.equal(Pixels(np.asarray(picture)[None])[0], levels / 127.5 - 1)
    grey = to_pil(levels[:1] / 127.5 - 1)
    assert np.array_equal(np.asarray(grey), np.asarray(picture))
    with pytest.raises(ValueError, match=r"an image must be \[1, H, W\] or \[3, H, W\], got \(4, 16, 16\)"):
        to_pil(torch.zeros(4, 16, 16))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_any_mode_are_three_channels(mode: str, tmp_path: Path) -> None:
    files = Files([save(tmp_path / "image.png", 0, mode=mode)])
    with Image.open(tmp_path / "image.png") as opened:
        expected = torch.tensor(np.asarray(opened.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(((files[0] + 1) * 127.5).round().to(torch.uint8), expected)


def test_an_image_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_folder(tmp_path).images[0].shape == (3, 8, 4)


def test_batches_are_of_one_size(tmp_path: Path) -> None:
    sizes = [(4, 4), (4, 4), (6, 4), (4, 4), (4, 4), (4, 4)]
    files = Files([save(tmp_path / f"{number}.png", number, size) for number, size in enumerate(sizes)])
    found = list(batches(files, 4))
    assert [part.shape for part in found] == [(2, 3, 4, 4), (1, 3, 4, 6), (1, 3, 4, 4), (2, 3, 4, 4)]
    ones = [image for part in found for image in part]
    assert all(torch.equal(image, files[index]) for index, image in enumerate(ones))
    tensor = randn(random(0), 7, 1, 2, 2)
    assert torch.equal(torch.cat(list(batches(tensor, 3))), tensor)


def listing(folder: Path, rows: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "samples.json").write_text(json.dumps({"nfe": 4, "images": rows}))
    return folder


def test_what_pitools_sample_lists_is_taken_and_nothing_else(tmp_path: Path) -> None:
    for name in ("0000.png", "0001.png", "sheet.png"):
        save(tmp_path / name, 0)
    rows = [{"file": "0001.png", "prompt": "a fox", "seed": 1}, {"file": "0000.png", "prompt": "an owl", "seed": 0}]
    folder = read_folder(listing(tmp_path, rows))
    assert [path.name for path in folder.images.paths] == ["0001.png", "0000.png"]
    assert folder.asked == ["a fox", "an owl"]
    classes = read_folder(listing(tmp_path, [{"file": "0000.png", "label": 0}, {"file": "0001.png", "label": 7}]))
    assert classes.asked == [0, 7]
    assert read_folder(listing(tmp_path, [{"file": "0000.png"}])).asked is None


def test_folders_that_are_no_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no images; those are files that end in \.bmp, "):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match=r"lists .*gone\.png, which is not there"):
        read_folder(listing(tmp_path, [{"file": "gone.png"}]))
    with pytest.raises(ValueError, match="lists no images"):
        read_folder(listing(tmp_path, []))
    for rows in ({"file": "a.png"}, [{"name": "a.png"}], 3):
        with pytest.raises(ValueError, match=r"samples\.json is damaged \(.*\); delete it to take all images"):
            read_folder(listing(tmp_path, rows))
    (tmp_path / "broken.png").write_bytes(save(tmp_path / "good.png", 0).read_bytes()[:40])
    with pytest.raises(ValueError, match=r"the image .*broken\.png cannot be read \(.*\); replace it or leave it out"):
        Files([tmp_path / "broken.png"])[0]


def test_statistics_measure_as_the_features_do(tmp_path: Path) -> None:
    x, y = randn(random(1), 200, 5), 1 + 2 * randn(random(2), 300, 5)
    path = tmp_path / "reference.npz"
    path.write_bytes(statistics_file(Moments.of(y)))
    kept = read_statistics(path)
    assert kept.images is None
    assert kept.moments is not None
    assert kept.moments.count == 300
    expected = frechet_distance(x, y)
    assert frechet_distance(Moments.of(x), kept.moments) == pytest.approx(expected, rel=1e-9)
    # As others write them, without a count; NumPy's own mean and covariance.
    np.savez(path, mu=y.numpy().mean(0), sigma=np.cov(y.numpy(), rowvar=False), mu_s=np.zeros(3), sigma_s=np.eye(3))
    theirs = read_statistics(path).moments
    assert theirs is not None
    assert frechet_distance(Moments.of(x), theirs) == pytest.approx(expected, rel=1e-9)


def test_a_covariance_of_less_than_full_rank_is_one(tmp_path: Path) -> None:
    y = randn(random(3), 4, 6)  # of rank 3
    again = moments_of(y.mean(0), torch.tensor(np.cov(y.numpy(), rowvar=False)), 4)
    torch.testing.assert_close(again.root.mT @ again.root, Moments.of(y).root.mT @ Moments.of(y).root)


def test_a_reference_batch_has_both(tmp_path: Path) -> None:
    path, pixels = tmp_path / "adm.npz", np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    np.savez(path, arr_0=pixels, mu=np.zeros(2), sigma=np.eye(2))
    both = read_statistics(path)
    assert both.moments is not None
    assert both.images is not None
    assert len(both.images) == 3
    assert torch.equal(((both.images[2] + 1) * 127.5).round(), torch.tensor(pixels[2]).permute(2, 0, 1).float())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "has neither mu and sigma nor images in arr_0"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"mu must be \[F\] and sigma \[F, F\]"),
        ({"mu": np.zeros(2), "sigma": np.diag([1.0, np.nan])}, "must be finite"),
        ({"mu": np.zeros(2), "sigma": np.diag([1.0, -0.5])}, "no negative eigenvalues"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.9], [0.0, 1.0]])}, "must be symmetric"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"arr_0 \(2, 3, 4, 4\) of uint8, and not pixels \[N, H, W, 3\]"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, "of float64, and not pixels"),
        ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "holds no mean and covariance"),
        ({"mu": np.array([object()], dtype=object), "sigma": np.eye(1)}, r"cannot be read as \.npz"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_are_no_use_are_refused(arrays: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        read_statistics(path)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    for contents in (b"", b"PK\x03\x04", b"mu, sigma", b"\x93NUMPY"):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=r"bad\.npz cannot be read as \.npz"):
            read_statistics(path)
    np.save(tmp_path / "mu.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"cannot be read as \.npz"):
        read_statistics(tmp_path / "mu.npy")
