"""Fuzz the picture path: any bytes give pixels of the right shape, or InvalidImage."""

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["model_store.preprocess", "model_store.decoding", "PIL"]):
    from model_store.decoding import FORMATS, ImageLimits
    from model_store.errors import InvalidImage
    from model_store.preprocess import Preprocessing, load_pixels

import torch
from pictures import encoded, noise

LIMITS = ImageLimits(max_bytes=2**20, max_pixels=2**18)
PREPROCESSING = Preprocessing(
    height=32,
    width=32,
    crop_fraction=0.9,
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def test_one_input(data: bytes) -> None:
    try:
        pixels = load_pixels(data, PREPROCESSING, LIMITS)
    except InvalidImage:
        return
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.uint8


def seeds() -> list[bytes]:
    colour, grey = noise(size=(24, 18)), noise(size=(9, 30)).convert("L")
    return [
        *(encoded(image, kind) for kind in FORMATS for image in (colour, grey)),
        encoded(colour.convert("RGBA")),
        encoded(colour.convert("P"), "GIF"),
        encoded(colour, "JPEG", progressive=True),
        encoded(colour, "TIFF", compression="tiff_lzw"),
        encoded(colour, "WEBP", lossless=True),
    ]


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")  # Pillow remarks on damaged metadata of pictures it reads all the same
    corpus = Path(sys.argv[-1])
    for i, seed in enumerate(seeds()):
        (corpus / f"seed-{i}").write_bytes(seed)
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
