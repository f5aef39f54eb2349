"""Small generated pictures: coloured noise that a random backbone can tell apart, in every format needed."""

import io
import struct
import zlib
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


def tiled_tiff(size: tuple[int, int], tile: tuple[int, int], kind: int = 4) -> bytes:
    """A black TIFF of (width, height) pixels in one tile of any size, whose sides are of a TIFF type."""
    packer = zlib.compressobj()
    data = b"".join(packer.compress(bytes(tile[0])) for _ in range(tile[1])) + packer.flush()
    start = 8 + 2 + 10 * 12 + 4
    sides = tile if kind == 4 else (start + len(data), start + len(data) + 8)
    directory = b"".join(
        struct.pack("<HHII", *one)
        for one in [
            (256, 4, 1, size[0]),
            (257, 4, 1, size[1]),
            (258, 3, 1, 8),
            (259, 3, 1, 8),  # Deflate
            (262, 3, 1, 1),
            (277, 3, 1, 1),
            (322, kind, 1, sides[0]),
            (323, kind, 1, sides[1]),
            (324, 4, 1, start),
            (325, 4, 1, len(data)),
        ]
    )
    head = b"II*\x00" + struct.pack("<IH", 8, 10)
    return head + directory + bytes(4) + data + struct.pack("<QQ", *tile)


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
