"""Pictures of samples: a row of images for each set of them, from the same noises where they are of one run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pitools.evaluation.images import Images, to_pil

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = 10
SIDE, GAP = 96, 6


def thumbnails(images: Images) -> Image:
    """The first ten images in a row, each a square of its middle; between them nothing."""
    from PIL import Image

    pictures = [_thumbnail(images[index]) for index in range(min(COLUMNS, len(images)))]
    row = Image.new("RGBA", (COLUMNS * (SIDE + GAP) - GAP, SIDE))
    for column, picture in enumerate(pictures):
        row.paste(picture, (column * (SIDE + GAP), 0))
    return row


def _thumbnail(image: Tensor) -> Image:
    """Small pixels stay sharp, large images are smoothed."""
    from PIL import Image, ImageOps

    side = min(image.shape[1:])
    how = Image.Resampling.NEAREST if side <= SIDE // 2 else Image.Resampling.LANCZOS
    return ImageOps.fit(to_pil(image), (SIDE, SIDE), how)


def sheet(rows: Sequence[tuple[str, Image]]) -> Image:
    """The rows of `thumbnails` below one another, each with its title, on white."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(_font(), 15)
    titles = max(round(font.getlength(title)) for title, _ in rows) + 3 * GAP
    picture = Image.new("RGB", (titles + rows[0][1].width + GAP, len(rows) * (SIDE + GAP) + GAP), "white")
    draw = ImageDraw.Draw(picture)
    for number, (title, row) in enumerate(rows):
        top = GAP + number * (SIDE + GAP)
        draw.text((titles - 2 * GAP, top + SIDE // 2), title, fill="black", font=font, anchor="rm")
        picture.paste(row, (titles, top), row)
    return picture


def _font() -> Path:
    """That of matplotlib's pictures, which is not imported for it; Pillow's own has no Greek."""
    found = find_spec("matplotlib")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"


def png(picture: Image) -> bytes:
    """The contents of a file."""
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()
