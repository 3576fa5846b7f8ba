"""Images where they lie: in memory, in a folder, or in an array. Each is `[C, H, W]` in [-1, 1], on the CPU.

FOLDER/samples.json    what `pitools sample` writes: the images' names, and the prompt or the class of each
FOLDER/**/*.png        any other folder: all images in it and below it, in order of their paths
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LISTED = "samples.json"


class Images(Protocol):
    """Images in an order; a tensor `[S, C, H, W]` is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """One image `[C, H, W]` in [-1, 1]."""
        ...


@dataclass(frozen=True)
class Files:
    """Files of images, read as they are asked for."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """`[3, H, W]`, turned as the file says. `ValueError` for one that is damaged."""
        from PIL import Image, ImageOps

        path = self.paths[index]
        try:
            with Image.open(path) as opened:
                return from_pil(ImageOps.exif_transpose(opened))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # a SyntaxError is of a broken PNG
            raise ValueError(f"the image {path} cannot be read ({error}); replace it or leave it out") from error


@dataclass(frozen=True, eq=False)
class Pixels:
    """Pixels `[N, H, W, 3]`, uint8, as ADM's reference batches have them."""

    array: np.ndarray[Any, np.dtype[np.uint8]]

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Tensor:
        """`[3, H, W]`."""
        return _scaled(self.array[index])


@dataclass(frozen=True)
class Folder:
    """The images of a folder. asked: the prompt or the class of each, None where nothing tells."""

    images: Files
    asked: Sequence[object] | None


def read_folder(folder: Path) -> Folder:
    """The images of a folder, as the head of this module says.

    `ValueError` for one without images, a list that is damaged, and a listed image that is not there.
    """
    listed = folder / LISTED
    if not listed.is_file():
        found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
        paths = sorted(path for path in found if not path.name.startswith("."))
        if not paths:
            raise ValueError(f"{folder} holds no images; those are files that end in {', '.join(SUFFIXES)}")
        return Folder(Files(paths), None)
    try:
        rows = json.loads(listed.read_text(encoding="utf-8"))["images"]
        paths = [folder / row["file"] for row in rows]
        known = [_asked(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{listed} is damaged ({error!r}); delete it to take all images of the folder") from None
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None or not paths:
        raise ValueError(f"{listed} lists {missing or 'no images'}{', which is not there' if missing else ''}")
    return Folder(Files(paths), None if any(one is None for one in known) else known)


def _asked(row: Mapping[str, object]) -> object:
    return row.get("prompt", row.get("label"))


def batches(images: Images, size: int) -> Iterator[Tensor]:
    """Batches `[B, C, H, W]` of at most `size`, in order; each of images of one shape."""
    with ThreadPoolExecutor() as pool:  # decoding is most of the work on a GPU
        for start in range(0, len(images), size):
            rows = range(start, min(start + size, len(images)))
            part: list[Tensor] = []
            for image in pool.map(images.__getitem__, rows):
                if part and image.shape != part[0].shape:
                    yield torch.stack(part)
                    part = []
                part.append(image)
            yield torch.stack(part)


def from_pil(image: Image) -> Tensor:
    """`[3, H, W]` in [-1, 1]."""
    return _scaled(np.asarray(image.convert("RGB")))


def to_pil(image: Tensor) -> Image:
    """A picture of `[1 or 3, H, W]`, what lies outside of [-1, 1] clipped. `ValueError` for other channels."""
    from PIL import Image

    if image.ndim != 3 or len(image) not in (1, 3):
        raise ValueError(f"an image must be [1, H, W] or [3, H, W], got {tuple(image.shape)}")
    pixels = (image.detach().cpu().float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _scaled(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    return torch.tensor(pixels).permute(2, 0, 1) / 127.5 - 1
