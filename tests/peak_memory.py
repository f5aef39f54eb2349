"""The memory that decoding a picture takes, and making pixels of it where a side and a decoding are given."""

from collections.abc import Sequence
from pathlib import Path

import torch
from pictures import encoded, noise

from model_store.decoding import ImageLimits, OpenedImage, open_image
from model_store.preprocess import OpenedPicture, Preprocessing, open_picture

STATUS = Path("/proc/self/status")


def resident_bytes(field: str) -> int:
    """`VmRSS` now, or `VmHWM` at its highest."""
    line = next(one for one in STATUS.read_text().splitlines() if one.startswith(field))
    return 1024 * int(line.split()[1])


def opened(data: bytes, given: Sequence[int]) -> OpenedImage | OpenedPicture:
    if not given:
        return open_image(data, ImageLimits())
    side, decoding = given
    wanted = {"height": side, "width": side, "crop_fraction": 0.9, "decoding": decoding}
    preprocessing = Preprocessing.model_validate(
        wanted | {"interpolation": "bicubic", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    )
    return open_picture(data, preprocessing, ImageLimits())


def work(picture: OpenedImage | OpenedPicture) -> None:
    if isinstance(picture, OpenedImage):
        picture.decode()
    else:
        picture.load()


def measure(data: bytes, given: Sequence[int]) -> tuple[int, int]:
    """The bytes that the picture's header promised and those it took; in a process that has done nothing yet."""
    torch.set_num_threads(1)  # as a thread of the decode pool
    work(opened(encoded(noise(size=(16, 16))), given))  # what the first picture loads is no picture's
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
    before = resident_bytes("VmRSS")
    picture = opened(data, given)
    work(picture)
    return picture.peak_bytes, resident_bytes("VmHWM") - before
