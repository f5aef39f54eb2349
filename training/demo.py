"""Demo tasks from real pictures that come inside PyPI packages, so that nothing has to be downloaded.

- `digits`: handwritten digits of scikit-learn's `load_digits` (UCI, 8×8 grey levels, enlarged)
- `textiles`: textile surfaces of the package conformal-clip-data (MIT): nominal, local or global defect
"""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np
from PIL import Image

from model_store.errors import InvalidDataset

DEMO_TASKS = ("digits", "textiles")
_DIGIT_SIDE = 112


def write_demo_pictures(folder: Path, num_train: int = 20, num_test: int = 10) -> dict[str, Path]:
    """Write `num_train` + `num_test` pictures a class as FOLDER/TASK/{train,test}/CLASS/; task to folder.

    Existing folders are kept as they are. Raises InvalidDataset when a demo package is not installed.
    """
    writers = {"digits": _write_digits, "textiles": _write_textiles}
    for task, write in writers.items():
        target = folder / task
        if not target.is_dir():
            partial = folder / f".{task}.partial"
            write(partial, num_train, num_test)
            partial.rename(target)
    return {task: folder / task for task in writers}


def _write_digits(folder: Path, num_train: int, num_test: int) -> None:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InvalidDataset("the demo needs scikit-learn: pip install 'tosca-serving[demo]'") from error
    digits = load_digits()
    for label in range(10):
        pictures = digits.images[digits.target == label][: num_train + num_test]
        for i, grey in enumerate(pictures):
            path = _picture_path(folder, i, num_train, str(label), "png")
            picture = Image.fromarray((grey * (255 / 16)).astype(np.uint8))
            picture.resize((_DIGIT_SIDE, _DIGIT_SIDE), Image.Resampling.BICUBIC).save(path)


def _write_textiles(folder: Path, num_train: int, num_test: int) -> None:
    try:
        listed = files("conformal-clip-data") or []
    except PackageNotFoundError as error:
        raise InvalidDataset(
            "the demo needs conformal-clip-data: pip install 'tosca-serving[demo]'"
        ) from error
    for label in ("nominal", "local", "global"):
        pictures = sorted(
            (file for file in listed if file.match(f"simulated/{label}/*.jpg")), key=lambda file: file.name
        )
        for i, file in enumerate(pictures[: num_train + num_test]):
            path = _picture_path(folder, i, num_train, label, "jpg")
            path.write_bytes(Path(str(file.locate())).read_bytes())


def _picture_path(folder: Path, i: int, num_train: int, label: str, suffix: str) -> Path:
    split = "train" if i < num_train else "test"
    path = folder / split / label / f"{i:03d}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
