"""Small generated pictures: coloured noise that a random backbone can tell apart, in every format needed."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ((230, 40, 40), (40, 200, 60), (50, 60, 220), (220, 200, 40), (160, 50, 190))


def noise(colour: int = 0, seed: int = 0, size: tuple[int, int] = (40, 32), spread: int = 30) -> Image.Image:
    """An RGB picture of (width, height) pixels around one colour."""
    generator = np.random.default_rng(1000 * colour + seed)
    base = np.array(COLOURS[colour], dtype=np.int64)
    pixels = base + generator.integers(-spread, spread + 1, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def write_classes(
    folder: Path, num: int, labels: tuple[str, ...] = ("blue", "green", "red"), seed: int = 0
) -> Path:
    """FOLDER/CLASS/*.png with `num` different pictures a class."""
    for colour, label in enumerate(labels):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(num):
            (folder / label / f"{i:03d}.png").write_bytes(encoded(noise(colour, seed + i)))
    return folder


def write_splits(folder: Path, **num_by_split: int) -> Path:
    """FOLDER/SPLIT/CLASS/*.png; `write_splits(path, train=6, test=2)`."""
    for i, (split, num) in enumerate(num_by_split.items()):
        write_classes(folder / split, num, seed=100 * (i + 1))
    return folder
