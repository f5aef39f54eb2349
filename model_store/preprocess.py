"""Bytes to pixels, the same way in training and in serving.

The geometry belongs to the weights: resize the shorter side, crop the centre, normalise with the mean
and standard deviation the backbone was trained with. Pixels stay uint8 until they reach the device.
"""
# C channels (3), H height, W width

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import interpolate

from model_store.decoding import ImageLimits, OpenedImage, open_image
from model_store.errors import ImageTooLarge

Decoding = Literal[2, 3]
# Numbers the way from bytes to pixels, here and in `decoding`: raise it with every change of the pixels. What
# was stored with an earlier one is decoded as it was. 1 decoded JPEGs at full size and took all colours for
# sRGB; 2 resizes with Pillow, 3 with torch (docs/decisions/0009-resizing.md).
DECODING: Decoding = 3

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# A JPEG reduced inside its decoder keeps at least so many times the pixels that resizing leaves of a side
# (docs/decisions/0002-reduced-decoding.md has the cosines that chose it).
REDUCING_GAP = 2
# Most bytes that a pixel takes in resizing, with every copy that is held at once (tests/test_decoding.py
# measures them): as it is given, resized in width, in both, and cropped.
_GIVEN_BYTES, _NARROWED_BYTES, _RESIZED_BYTES, _CROPPED_BYTES = 10, 4, 7, 13


class Preprocessing(BaseModel):
    """How the weights want their pictures; part of the backbone's fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: int = Field(gt=0, le=4096)
    width: int = Field(gt=0, le=4096)
    crop_fraction: float = Field(gt=0.0, le=1.0)
    interpolation: Literal["bilinear", "bicubic", "lanczos"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    decoding: Decoding = DECODING

    @property
    def pixels_bytes(self) -> int:
        """Bytes of the pixels of one picture on their way to the device."""
        return 3 * self.height * self.width

    @property
    def resized_side(self) -> int:
        """The most pixels a picture's shorter side has after resizing, before the crop."""
        return math.floor(max(self.height, self.width) / self.crop_fraction)


def to_pixels(rgb_HWC: NDArray[np.uint8], preprocessing: Preprocessing, limits: ImageLimits) -> Tensor:
    """[3, H, W] uint8 pixels of an RGB picture: shorter side resized, centre cropped, as timm does it.

    They lie in memory pixel by pixel, as they were decoded (torch's `channels_last`).
    """
    height, width, _ = rgb_HWC.shape
    size = _resized_size((width, height), preprocessing)
    if size[0] * size[1] > limits.max_pixels:
        raise ImageTooLarge(
            f"image of {width}×{height} pixels is too elongated: resized to {size[0]}×{size[1]}, "
            f"it exceeds the limit of {limits.max_pixels} pixels"
        )
    top = round((size[1] - preprocessing.height) / 2.0)
    left = round((size[0] - preprocessing.width) / 2.0)
    bottom, right = top + preprocessing.height, left + preprocessing.width
    if (width, height) == size:
        crop_HWC = rgb_HWC[top:bottom, left:right]
    elif preprocessing.decoding == 2:
        resized = Image.fromarray(rgb_HWC).resize(size, _RESAMPLING[preprocessing.interpolation])
        crop_HWC = np.asarray(resized.crop((left, top, right, bottom)))
    else:
        crop_HWC = _resized_by_torch(rgb_HWC, size, preprocessing)[top:bottom, left:right]
    # NumPy copies on this thread. torch would share so small a copy among threads, which then wait for each
    # other while the processors are busy: milliseconds instead of microseconds (docs/experiments.md).
    return torch.from_numpy(np.array(crop_HWC, order="C")).permute(2, 0, 1)


def _resized_by_torch(
    rgb_HWC: NDArray[np.uint8], size: tuple[int, int], preprocessing: Preprocessing
) -> NDArray[np.uint8]:
    """[H, W, 3] pixels of the whole picture at a width and height."""
    # In this order: of a batch of one made last, torch does not see that it lies pixel by pixel.
    given_1CHW = torch.from_numpy(rgb_HWC)[None].permute(0, 3, 1, 2)
    mode, shape = preprocessing.interpolation, (size[1], size[0])
    resized_1CHW = interpolate(given_1CHW, size=shape, mode=mode, antialias=True)
    return resized_1CHW[0].permute(1, 2, 0).numpy()


def stack_pixels(pixels: Sequence[Tensor]) -> Tensor:
    """[B, 3, H, W] of the [3, H, W] pixels of pictures, which lie pixel by pixel as each of them does."""
    return torch.stack([one_CHW.permute(1, 2, 0) for one_CHW in pixels]).permute(0, 3, 1, 2)


def _resized_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height that a picture of a width and height is resized to."""
    image_width, image_height = size
    height = math.floor(preprocessing.height / preprocessing.crop_fraction)
    width = math.floor(preprocessing.width / preprocessing.crop_fraction)
    if height == width:
        short, long = sorted(size)
        scaled_long = int(height * long / short)
        return (height, scaled_long) if image_width <= image_height else (scaled_long, height)
    scale = max(width / image_width, height / image_height)
    return max(width, round(image_width * scale)), max(height, round(image_height * scale))


@dataclass(frozen=True, slots=True)
class OpenedPicture:
    """A picture of which only the header was read, and the way its pixels will go."""

    opened: OpenedImage
    preprocessing: Preprocessing
    limits: ImageLimits

    @property
    def peak_bytes(self) -> int:
        """The most memory that `load` takes at once."""
        width, height = self.opened.size
        upright = ((width, height), (height, width))  # which of them, only the metadata behind it may say
        return max(self.opened.peak_bytes, *(self._resizing_bytes(size) for size in upright))

    def _resizing_bytes(self, size: tuple[int, int]) -> int:
        width, height = _resized_size(size, self.preprocessing)
        return (
            _GIVEN_BYTES * size[0] * size[1]
            + _NARROWED_BYTES * width * size[1]
            + _RESIZED_BYTES * width * height
            + _CROPPED_BYTES * self.preprocessing.height * self.preprocessing.width
        )

    def load(self) -> Tensor:
        """[3, H, W] uint8 pixels; to be called once. Raises ImageTooLarge and InvalidImage."""
        return to_pixels(self.opened.rgb(), self.preprocessing, self.limits)


def open_picture(data: bytes, preprocessing: Preprocessing, limits: ImageLimits) -> OpenedPicture:
    """Raises ImageTooLarge, UnsupportedImageFormat and InvalidImage for what the header shows."""
    opened = open_image(data, limits, min_side=REDUCING_GAP * preprocessing.resized_side)
    return OpenedPicture(opened, preprocessing, limits)


def load_pixels(data: bytes, preprocessing: Preprocessing, limits: ImageLimits) -> Tensor:
    """Picture bytes to [3, H, W] uint8 pixels."""
    return open_picture(data, preprocessing, limits).load()
