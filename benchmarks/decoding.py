"""What reduced decoding costs and saves: milliseconds and CLS vectors of 12-megapixel JPEGs decoded whole,
and reduced inside the decoder to 1, 2 and 3 times the side that resizing leaves.

The photographs are scikit-learn's two and the demo's textiles, enlarged, with sensor noise added, since a
smooth enlargement would flatter the reduction. Beside that, what decoding costs as it is served: the small
pictures of benchmarks/serving.py, and the large ones at 500 and at 4000 pixels; with plain JPEGs decoded by
Pillow, too, and with Pillow's resizing, as decoding 2 had it.
"""

import io
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.machine import machine
from model_store.backbone import Backbone
from model_store.backbone_loading import load_backbone
from model_store.decoding import ImageLimits, decode_image
from model_store.measuring import embed_all
from model_store.preprocess import REDUCING_GAP, open_picture, to_pixels
from model_store.runtimes.runtime import REFERENCE
from model_store.store import ModelStore

DEMO = Path(".tosca")
RESULT = Path(__file__).parent / "results" / "decoding.json"
LONG_SIDE = 4000
GAPS = (None, 1, 2, 3)
NOISE = 4.0
NUM_TEXTILES = 10
SMALL_SIDE, WEB_SIDE = 256, 500  # the small ones are those of benchmarks/serving.py
SERVED_ROUNDS = 5


def main() -> None:
    about = machine()
    backbone = load_backbone(ModelStore(DEMO / "store"), runtime=REFERENCE)
    side, limits = backbone.preprocessing.resized_side, ImageLimits()
    photographs = [large_jpeg(one, seed) for seed, one in enumerate(photographs_at_hand())]
    milliseconds: dict[int | None, list[float]] = {gap: [] for gap in GAPS}
    pixels: dict[int | None, list[torch.Tensor]] = {gap: [] for gap in GAPS}
    for data in photographs:
        for gap in GAPS:  # alternating, so that other work on the machine strikes all alike
            started = time.process_time()
            image = decode_image(data, limits, min_side=None if gap is None else gap * side)
            pixels[gap].append(to_pixels(np.array(image), backbone.preprocessing, limits))
            milliseconds[gap].append(1e3 * (time.process_time() - started))
    cls_ND = {gap: embed_all(backbone, torch.stack(pixels[gap])) for gap in GAPS}
    rows = []
    for gap in GAPS:
        cosine_N = torch.cosine_similarity(cls_ND[gap], cls_ND[None], dim=1)
        rows.append(
            {
                "reduced_to": "whole" if gap is None else f"{gap} × the resized side",
                "cpu_ms": statistics.median(milliseconds[gap]),
                "mean_cosine": float(cosine_N.mean()),
                "min_cosine": float(cosine_N.min()),
            }
        )
        print(rows[-1])
    result = {
        "machine": about,
        "pictures": len(photographs),
        "long_side": LONG_SIDE,
        "chosen_gap": REDUCING_GAP,
        "rows": rows,
        "as_served": measure_as_served(photographs, backbone),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def measure_as_served(large: list[bytes], backbone: Backbone) -> list[dict[str, float]]:
    """Bytes and processor time of a picture, file to pixels on one thread, by its long side, medians; decoded
    by Pillow, too, to the same pixels; and with Pillow's resizing, and what that does to the vectors."""
    torch.set_num_threads(1)
    camera = [Image.open(io.BytesIO(data)) for data in large]
    sent = {SMALL_SIDE: shrunk(photographs_at_hand(), SMALL_SIDE), WEB_SIDE: shrunk(camera, WEB_SIDE)}
    sent[LONG_SIDE] = large
    now = backbone.preprocessing
    decodings = {"cpu_ms": now, "pillow_cpu_ms": now.model_copy(update={"decoding": 2})}
    rows = []
    for side, files in sorted(sent.items()):
        milliseconds: dict[str, list[float]] = {name: [] for name in decodings}
        pixels: dict[str, list[torch.Tensor]] = {name: [] for name in decodings}
        by_pillow: list[float] = []
        for data in files * SERVED_ROUNDS:
            for name, preprocessing in decodings.items():
                started = time.process_time()
                pixels[name].append(open_picture(data, preprocessing, ImageLimits()).load())
                milliseconds[name].append(1e3 * (time.process_time() - started))
            started = time.process_time()
            image = open_picture(data, now, ImageLimits()).opened.decode()
            same = to_pixels(np.array(image), now, ImageLimits())
            by_pillow.append(1e3 * (time.process_time() - started))
            assert torch.equal(same, pixels["cpu_ms"][-1]), "libjpeg-turbo gives the pixels that Pillow gives"
        cls_of = {name: embed_all(backbone, torch.stack(some[: len(files)])) for name, some in pixels.items()}
        cosine_N = torch.cosine_similarity(*cls_of.values(), dim=1)
        rows.append(
            {
                "long_side": side,
                "bytes": round(statistics.median(map(len, files))),
                **{name: statistics.median(some) for name, some in milliseconds.items()},
                "decoded_by_pillow_cpu_ms": statistics.median(by_pillow),
                "min_cosine_to_pillow": float(cosine_N.min()),
            }
        )
        print(rows[-1])
    return rows


def shrunk(photographs: list[Image.Image], side: int) -> list[bytes]:
    """JPEGs of at most `side` pixels a side."""
    files = []
    for photograph in photographs:
        photograph.thumbnail((side, side), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        photograph.save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def photographs_at_hand() -> list[Image.Image]:
    textiles = sorted((DEMO / "demo" / "textiles" / "test").rglob("*.jpg"))
    opened = [Image.open(one).convert("RGB") for one in textiles[:: len(textiles) // NUM_TEXTILES]]
    return [Image.fromarray(one) for one in load_sample_images().images] + opened


def large_jpeg(photograph: Image.Image, seed: int) -> bytes:
    """The photograph at `LONG_SIDE` pixels with noise, as a camera would store it."""
    scale = LONG_SIDE / max(photograph.size)
    size = round(photograph.width * scale), round(photograph.height * scale)
    large = np.asarray(photograph.resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    noisy = large + np.random.default_rng(seed).normal(0.0, NOISE, large.shape)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


if __name__ == "__main__":
    main()
