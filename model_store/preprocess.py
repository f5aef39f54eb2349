"""Bytes to pixels, the same way in training and in serving.

The geometry belongs to the weights: resize the shorter side, crop the centre, normalise with the mean
and standard deviation the backbone was trained with. Pixels stay uint8 until they reach the device.
"""
# C channels (3), H height, W width

import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from model_store.errors import ImageTooLarge, InvalidImage, UnsupportedImageFormat

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_WHITE = (255, 255, 255, 255)


class Preprocessing(BaseModel):
    """How the weights want their pictures; part of the backbone's fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: int = Field(gt=0, le=4096)
    width: int = Field(gt=0, le=4096)
    crop_fraction: float = Field(gt=0.0, le=1.0)
    interpolation: Literal["bilinear", "bicubic", "lanczos"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Bounds checked from the header, before a pixel is decoded."""

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000


def decode_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """An upright RGB picture; transparency is laid on white, of an animation the first frame is taken.

    Raises ImageTooLarge, UnsupportedImageFormat or InvalidImage.
    """
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(f"image has {len(data)} bytes, the limit is {limits.max_bytes}")
    if not data:
        raise InvalidImage("image is empty: expected the bytes of a picture")
    # Pillow's parsers raise whatever a hostile file provokes, from SyntaxError to struct.error: anything
    # that goes wrong while reading somebody's bytes is a fault of those bytes.
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"image declares too many pixels, the limit is {limits.max_pixels}") from error
    except UnidentifiedImageError as error:
        raise UnsupportedImageFormat(f"not a picture in one of the formats {', '.join(FORMATS)}") from error
    except Exception as error:
        raise InvalidImage(f"image cannot be read: {error}") from error
    if image.width * image.height > limits.max_pixels:
        raise ImageTooLarge(f"image is {image.width}×{image.height} pixels, the limit is {limits.max_pixels}")
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise InvalidImage(f"{image.format} image cannot be decoded: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "I":  # 16-bit PNGs may open as 32-bit integers
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise InvalidImage("floating-point pixels have no defined white")
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")


def to_pixels(image: Image.Image, preprocessing: Preprocessing, limits: ImageLimits) -> Tensor:
    """[3, H, W] uint8 pixels of an RGB picture: shorter side resized, centre cropped, as timm does it."""
    height = math.floor(preprocessing.height / preprocessing.crop_fraction)
    width = math.floor(preprocessing.width / preprocessing.crop_fraction)
    if height == width:
        short, long = sorted(image.size)
        scaled_long = int(height * long / short)
        size = (height, scaled_long) if image.width <= image.height else (scaled_long, height)
    else:
        scale = max(width / image.width, height / image.height)
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if size[0] * size[1] > limits.max_pixels:
        raise ImageTooLarge(
            f"image of {image.width}×{image.height} pixels is too elongated: resized to {size[0]}×{size[1]}, "
            f"it exceeds the limit of {limits.max_pixels} pixels"
        )
    if image.size != size:
        image = image.resize(size, _RESAMPLING[preprocessing.interpolation])
    top = round((image.height - preprocessing.height) / 2.0)
    left = round((image.width - preprocessing.width) / 2.0)
    crop = image.crop((left, top, left + preprocessing.width, top + preprocessing.height))
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()


def load_pixels(data: bytes, preprocessing: Preprocessing, limits: ImageLimits) -> Tensor:
    """Picture bytes to [3, H, W] uint8 pixels."""
    return to_pixels(decode_image(data, limits), preprocessing, limits)
