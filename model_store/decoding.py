"""Bytes of a picture to upright sRGB pixels, as a person would see them and within bounds.

The same steps in training and in serving. `preprocess.DECODING` numbers them; it is part of the preprocessing
and so of the backbone's fingerprint, because another way of decoding gives other CLS vectors.
"""

import io
import struct
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

from model_store.errors import ImageTooLarge, InvalidImage, UnsupportedImageFormat

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_WHITE = (255, 255, 255, 255)
_ORIENTATION = 0x0112  # the EXIF tag
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What an ICC header calls the colours of a mode; a profile for other colours than the picture's is ignored.
_PROFILE_SPACE = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}
_MAX_PROFILE_BYTES = 4 * 2**20
# Most bytes a pixel takes on its way, with every copy that is held at once. tests/test_decoding.py measures
# that no format takes more.
_PEAK_BYTES = 17
_WEBP_PEAK_BYTES = 28  # its decoder keeps two canvases of its own
# A JPEG in several scans is gathered whole before it is reduced: four channels of 16 bits.
_JPEG_SCAN_BYTES = 8
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF tags
_TIFF_INTEGERS = {3: "H", 4: "I", 16: "Q"}  # SHORT, LONG and LONG8
_MAX_TRANSFORMS = 16


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Bounds checked from the header, before a pixel is decoded."""

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """A picture of which only the header was read. Decoding it takes `peak_bytes` of memory at most."""

    image: Image.Image
    peak_bytes: int
    data: bytes

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as decoded, before the picture is turned upright."""
        return self.image.size

    def rgb(self) -> NDArray[np.uint8]:
        """[H, W, 3], the pixels that `decode` gives; to be called once. Raises InvalidImage.

        A JPEG that needs nothing but decoding is decoded by libjpeg-turbo alone, to the same pixels in less
        time (docs/decisions/0011-plain-jpegs.md).
        """
        pixels = self._decode_plain() if _is_plain_jpeg(self.image) else None
        return np.array(self.decode()) if pixels is None else pixels

    def _decode_plain(self) -> NDArray[np.uint8] | None:
        """By libjpeg-turbo; None where it finds a fault, or another size than was checked. Pillow bears with
        some faults, and says what is wrong of others."""
        width, height = self.image.size
        at_least = {"min_height": height, "min_width": width}
        try:
            if simplejpeg.decode_jpeg_header(self.data, **at_least)[:2] != (height, width):
                return None
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(self.data, "RGB", **at_least)
        except ValueError:
            return None
        return pixels

    def decode(self) -> Image.Image:
        """The pixels, upright and RGB; to be called once. Raises InvalidImage."""
        try:
            self.image.load()
            turn = _TURN.get(_orientation(self.image))
            rgb = _to_srgb(self.image)
            return rgb if turn is None else rgb.transpose(turn)
        except Exception as error:
            raise InvalidImage(f"{self.image.format} image cannot be decoded: {error}") from error


def decode_image(data: bytes, limits: ImageLimits, min_side: int | None = None) -> Image.Image:
    """An upright RGB picture; transparency is laid on white (16-bit greys have none), of an animation the
    first frame is taken.

    With `min_side`, a JPEG comes reduced by 2, 4 or 8 from inside its decoder where its shorter side keeps
    at least so many pixels. Raises ImageTooLarge, UnsupportedImageFormat or InvalidImage.
    """
    return open_image(data, limits, min_side).decode()


def open_image(data: bytes, limits: ImageLimits, min_side: int | None = None) -> OpenedImage:
    """The same before a pixel is decoded: what it will take is known from its header.

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
        tile = _tile_size(image, data) if isinstance(image, TiffImagePlugin.TiffImageFile) else (0, 0)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"image declares too many pixels, the limit is {limits.max_pixels}") from error
    except UnidentifiedImageError as error:
        raise UnsupportedImageFormat(f"not a picture in one of the formats {', '.join(FORMATS)}") from error
    except Exception as error:
        raise InvalidImage(f"image cannot be read: {error}") from error
    for what, (width, height) in (("is", image.size), ("has tiles of", tile)):
        if width * height > limits.max_pixels:
            raise ImageTooLarge(f"image {what} {width}×{height} pixels, the limit is {limits.max_pixels}")
    num_pixels = image.width * image.height
    if min_side is not None:
        try:
            _reduce(image, min_side)
        except Exception as error:
            raise InvalidImage(f"{image.format} image cannot be decoded: {error}") from error
    return OpenedImage(image, _peak_bytes(image, num_pixels, tile[0] * tile[1]), data)


def _peak_bytes(image: Image.Image, num_pixels: int, tile_pixels: int) -> int:
    """`num_pixels` before a reduction; a tile is decoded whole, however little of it the picture shows."""
    each = _WEBP_PEAK_BYTES if image.format == "WEBP" else _PEAK_BYTES
    scan_bytes = _JPEG_SCAN_BYTES * num_pixels if image.format in ("JPEG", "MPO") else 0
    return each * max(image.width * image.height, tile_pixels) + scan_bytes


def _tile_size(image: TiffImagePlugin.TiffImageFile, data: bytes) -> tuple[int, int]:
    """Width and height of a TIFF's tiles, 0 where it has none.

    From the bytes, because libtiff takes entries that Pillow passes over.
    """
    order = "<" if data.startswith(b"II") else ">"
    is_big = 43 in data[2:4]  # BigTIFF
    count, entry, value_bytes = ("Q", "HHQ", 8) if is_big else ("H", "HHI", 4)
    (num_entries,) = struct.unpack_from(order + count, data, image.tag_v2.offset)
    start = image.tag_v2.offset + struct.calcsize(order + count)
    step = struct.calcsize(order + entry) + value_bytes
    sides = {_TILE_WIDTH: 0, _TILE_LENGTH: 0}
    for at in range(start, min(start + step * num_entries, len(data) - step + 1), step):
        tag, kind, num_values = struct.unpack_from(order + entry, data, at)
        if tag not in sides:
            continue
        form = order + _TIFF_INTEGERS.get(kind, "")
        if num_values != 1 or not 0 < struct.calcsize(form) <= value_bytes:
            raise ValueError("its tiles are of no known size")
        sides[tag] = max(sides[tag], *struct.unpack_from(form, data, at + step - value_bytes))
    return sides[_TILE_WIDTH], sides[_TILE_LENGTH]


def _reduce(image: Image.Image, min_side: int) -> None:
    """Let a JPEG decoder leave out what would be averaged away; other formats ignore it."""
    short = min(image.size)
    if short > min_side:
        # Pillow takes the largest reduction that keeps both sides at the size asked for.
        image.draft(None, (image.width * min_side // short, image.height * min_side // short))


def _orientation(image: Image.Image) -> int:
    """How the picture is to be turned (EXIF, 1 to 8); 1 where the metadata cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever damaged metadata provokes; the pixels are sound
        return 1


def _is_plain_jpeg(image: Image.Image) -> bool:
    """Whether its pixels are upright, grey or RGB, and in sRGB as they are."""
    is_jpeg = image.format == "JPEG" and image.mode in ("L", "RGB")
    return is_jpeg and _orientation(image) not in _TURN and _transform_of(image, image.mode) is None


def _to_srgb(image: Image.Image) -> Image.Image:
    flat = _flatten(image)
    transform = _transform_of(image, flat.mode)
    if transform is not None:
        return transform.apply(flat)
    return flat if flat.mode == "RGB" else flat.convert("RGB")


def _flatten(image: Image.Image) -> Image.Image:
    """Opaque 8-bit pixels in mode RGB, L or CMYK, in the picture's own colour space."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "I":  # 16-bit PNGs may open as 32-bit integers
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise InvalidImage("floating-point pixels have no defined white")
    if "A" in image.mode or "transparency" in image.info:
        grey = image.mode in ("L", "LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
        return image.convert("L" if grey else "RGB")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in _PROFILE_SPACE else image.convert("RGB")


def _transform_of(image: Image.Image, mode: str) -> ImageCms.ImageCmsTransform | None:
    profile = image.info.get("icc_profile")
    if isinstance(profile, bytes) and len(profile) <= _MAX_PROFILE_BYTES:
        return _colour_transform(profile, mode)
    return None


@lru_cache(_MAX_TRANSFORMS)
def _colour_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a mode and ICC profile to sRGB; None where that changes nothing, or the profile is broken."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != _PROFILE_SPACE[mode]:
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            # Decoding threads share the transform, which is safe without its one-pixel cache.
            ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE,
        )
        return None if _is_identity(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether the profile is sRGB by another name: most are, and rounding apart nothing would change."""
    if mode == "CMYK":
        return False
    level = np.arange(0, 256, 15, dtype=np.uint8)
    if mode == "RGB":
        probe = np.stack(np.meshgrid(level, level, level), axis=-1).reshape(-1, len(level), 3)
    else:
        probe = level[None]
    image = Image.fromarray(probe)
    changed, same = np.asarray(transform.apply(image)), np.asarray(image.convert("RGB"))
    return bool(np.abs(changed.astype(np.int16) - same).max() <= 1)
