"""Prints what torch uses of this processor, and a digest of pixels that it resized.

ATEN_CPU_CAPABILITY=default python tests/pixels_digest.py
"""

import hashlib

import numpy as np
import torch
from pictures import noise

from model_store.decoding import ImageLimits
from model_store.preprocess import Preprocessing, to_pixels

SIZES = [(300, 200), (250, 250), (37, 911), (3, 50), (1500, 1000)]


def main() -> None:
    digest = hashlib.sha256()
    for interpolation in ("bicubic", "bilinear", "lanczos"):
        wanted = {"height": 224, "width": 224, "crop_fraction": 0.9, "interpolation": interpolation}
        preprocessing = Preprocessing.model_validate(
            wanted | {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        )
        for seed, size in enumerate(SIZES):
            image = noise(seed=seed, size=size, spread=120)
            digest.update(to_pixels(np.array(image), preprocessing, ImageLimits()).numpy().tobytes())
    print(torch.backends.cpu.get_cpu_capability(), digest.hexdigest())


if __name__ == "__main__":
    main()
