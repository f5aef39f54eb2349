"""Pictures made to do harm, and odd ones that are right: only InvalidImage comes out, or the right pixels."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, noise, tiled_tiff
from PIL import Image

from model_store.decoding import FORMATS, ImageLimits, decode_image
from model_store.errors import ImageTooLarge, InvalidImage, UnsupportedImageFormat
from model_store.preprocess import Preprocessing, load_pixels

LIMITS = ImageLimits()
PREPROCESSING = Preprocessing(
    height=32,
    width=32,
    crop_fraction=1.0,
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def load(data: bytes, limits: ImageLimits = LIMITS) -> torch.Tensor:
    return load_pixels(data, PREPROCESSING, limits)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG whose header claims what it likes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff_claiming(width: int, height: int) -> bytes:
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (278, 4, 1, height), (279, 4, 1, 10)]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", *one) for one in entries)
    return b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(entries)) + directory + b"\x00" * 14


def svg() -> bytes:
    return b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


REFUSED: dict[str, tuple[Callable[[], bytes], type[InvalidImage], str]] = {
    "empty": (lambda: b"", InvalidImage, "image is empty"),
    "one byte": (lambda: b"\xff", UnsupportedImageFormat, "not a picture in one of the formats"),
    "text": (lambda: b"hello, world\n" * 50, UnsupportedImageFormat, "not a picture"),
    "JSON": (lambda: b'{"image": "AAAA"}', UnsupportedImageFormat, "not a picture"),
    "SVG": (svg, UnsupportedImageFormat, "not a picture"),
    "PDF": (lambda: b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", UnsupportedImageFormat, "not a picture"),
    "EPS": (
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        UnsupportedImageFormat,
        "not a picture",
    ),
    "PPM": (lambda: encoded(noise(), "PPM"), UnsupportedImageFormat, "not a picture"),
    "ICO": (lambda: encoded(noise(), "ICO"), UnsupportedImageFormat, "not a picture"),
    "zip": (lambda: b"PK\x03\x04" + b"\x00" * 60, UnsupportedImageFormat, "not a picture"),
    "signature alone": (lambda: b"\x89PNG\r\n\x1a\n", InvalidImage, ""),
    "PNG of 100,000 × 100,000 pixels": (lambda: png(100_000, 100_000), ImageTooLarge, "limit is 64000000"),
    "PNG of 2^31 - 1 squared pixels": (lambda: png(2**31 - 1, 2**31 - 1), ImageTooLarge, "limit is 64000000"),
    "PNG just over the limit": (lambda: png(8001, 8000), ImageTooLarge, "8001×8000 pixels"),
    "PNG without pixels": (lambda: png(0, 10), InvalidImage, ""),
    "PNG with too few pixels": (lambda: png(64, 64, b"\x00" * 50), InvalidImage, "PNG image cannot be decoded"),
    "PNG with a bomb in its text": (
        lambda: png(
            4, 4, b"\x00" * 52, extra=chunk(b"zTXt", b"a\x00\x00" + zlib.compress(b"\x00" * 2**24))
        ),
        InvalidImage,
        "cannot be read",
    ),
    "TIFF of 100,000 × 100,000 pixels": (lambda: tiff_claiming(100_000, 100_000), ImageTooLarge, "limit"),
    "TIFF of 16 × 16 pixels in a tile of 8,001 × 8,000": (
        lambda: tiled_tiff((16, 16), (8001, 8000)),
        ImageTooLarge,
        "has tiles of 8001×8000 pixels, the limit is 64000000",
    ),
    "TIFF with a tile whose sides Pillow cannot read": (
        lambda: tiled_tiff((16, 16), (8001, 8000), kind=17),
        InvalidImage,
        "tiles are of no known size",
    ),
    "BMP of 60,000 × 60,000 pixels": (
        lambda: b"BM" + struct.pack("<IHHIIiiHHIIIIII", 200, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        ImageTooLarge,
        "limit",
    ),
    "GIF of 65,535 × 65,535 pixels": (
        lambda: b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + b"\x00" * 6
        + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02L\x01\x00;",
        ImageTooLarge,
        "limit",
    ),
    "1 × 100,000 pixels": (
        lambda: encoded(Image.new("RGB", (1, 100_000))),
        ImageTooLarge,
        r"too elongated: resized to 32×3200000",
    ),
    "100,000 × 1 pixels": (
        lambda: encoded(Image.new("RGB", (100_000, 1))),
        ImageTooLarge,
        r"too elongated: resized to 3200000×32",
    ),
    "floating-point TIFF": (
        lambda: encoded(Image.new("F", (8, 8)), "TIFF"),
        InvalidImage,
        "floating-point pixels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_picture_is_refused(name: str) -> None:
    make, kind, fault = REFUSED[name]
    with pytest.raises(kind, match=fault or None) as refusal:
        load(make())
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.95])
def test_a_truncated_picture_is_refused(file_format: str, share: float) -> None:
    whole = encoded(noise(size=(64, 64)), file_format)
    with pytest.raises(InvalidImage):
        load(whole[: int(share * len(whole))])


def test_too_many_bytes_are_refused_before_they_are_looked_at() -> None:
    data = encoded(noise())
    with pytest.raises(ImageTooLarge, match=f"image has {len(data)} bytes, the limit is {len(data) - 1}"):
        decode_image(data, ImageLimits(max_bytes=len(data) - 1))
    decode_image(data, ImageLimits(max_bytes=len(data)))


def test_too_many_pixels_are_refused() -> None:
    data = encoded(noise(size=(40, 32)))
    with pytest.raises(ImageTooLarge, match=r"image is 40×32 pixels, the limit is 1279"):
        decode_image(data, ImageLimits(max_pixels=40 * 32 - 1))
    decode_image(data, ImageLimits(max_pixels=40 * 32))


@given(data=st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidImage):
        load(data)


SIGNATURES = {
    "JPEG": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
    "PNG": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "WEBP": b"RIFF\x24\x00\x00\x00WEBPVP8 ",
    "BMP": b"BM",
    "GIF": b"GIF89a",
    "TIFF": b"II*\x00\x08\x00\x00\x00",
}


@given(file_format=st.sampled_from(sorted(SIGNATURES)), data=st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_behind_a_signature_are_refused(file_format: str, data: bytes) -> None:
    """A few bytes may by chance be a tiny picture; anything else is InvalidImage, never another error."""
    try:
        pixels = load(SIGNATURES[file_format] + data, ImageLimits(max_pixels=2**16))
    except InvalidImage:
        return
    assert pixels.shape == (3, 32, 32)


@given(
    file_format=st.sampled_from(FORMATS), position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255)
)
@settings(max_examples=200, deadline=None)
def test_a_damaged_byte_is_refused_or_gives_a_picture(file_format: str, position: float, byte: int) -> None:
    data = bytearray(encoded(noise(size=(16, 16)), file_format))
    data[int(position * len(data))] = byte
    try:
        pixels = load(bytes(data), ImageLimits(max_pixels=2**16))
    except InvalidImage:
        return
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8


# -- odd pictures with a right reading ---------------------------------------------------------------


def pixel(data: bytes, x: int = 0, y: int = 0) -> tuple[int, ...]:
    image = decode_image(data, LIMITS)
    assert image.mode == "RGB"
    return image.getpixel((x, y))  # type: ignore[return-value]


def close(one: tuple[int, ...], other: tuple[int, ...], by: int = 3) -> bool:
    return all(abs(a - b) <= by for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_listed_format_is_read(file_format: str) -> None:
    image = Image.new("RGB", (20, 10), (200, 100, 50))
    decoded = decode_image(encoded(image, file_format), LIMITS)
    assert decoded.size == (20, 10)
    assert close(decoded.getpixel((10, 5)), (200, 100, 50), by=6)


def test_a_picture_that_is_also_a_zip_is_read_as_the_picture() -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("harm.txt", "x")
    polyglot = encoded(Image.new("RGB", (4, 4), (10, 20, 30)), "GIF") + archive.getvalue()
    assert zipfile.is_zipfile(io.BytesIO(polyglot))
    assert close(pixel(polyglot), (10, 20, 30), by=1)


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for file_format in ("GIF", "WEBP", "PNG"):
        options = {"save_all": True, "append_images": frames[1:]}
        assert close(pixel(encoded(frames[0], file_format, **options)), (255, 0, 0), by=6), file_format


def test_of_a_many_paged_tiff_the_first_page_is_taken() -> None:
    pages = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    assert pixel(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])) == (255, 0, 0)


def test_cmyk_is_read_as_rgb() -> None:
    data = encoded(Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK"), "JPEG", quality=100)
    assert close(pixel(data), (200, 30, 60), by=8)


def test_sixteen_bits_keep_their_upper_eight() -> None:
    levels = np.array([[0, 255, 256], [0x8000, 0xFF00, 0xFFFF]], dtype=np.uint16)
    data = encoded(Image.fromarray(levels))
    greys = [[pixel(data, x, y) for x in range(3)] for y in range(2)]
    assert greys == [[(0, 0, 0), (0, 0, 0), (1, 1, 1)], [(128, 128, 128), (255, 255, 255), (255, 255, 255)]]


def test_grey_and_one_bit_pictures_are_read() -> None:
    assert pixel(encoded(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert pixel(encoded(Image.new("1", (4, 4), 1))) == (255, 255, 255)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_on_white(file_format: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 128))
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(image, file_format, **options)
    assert pixel(data, 0) == (255, 255, 255)
    # 128/255 of (200, 0, 0) on white
    assert close(pixel(data, 1), (227, 127, 127), by=1)


def test_grey_with_alpha_is_laid_on_white() -> None:
    assert pixel(encoded(Image.new("LA", (4, 4), (0, 0)))) == (255, 255, 255)


def test_a_palette_with_transparency_is_laid_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60] + [0] * 762)
    image.putpixel((1, 0), 1)
    for file_format in ("PNG", "GIF"):
        data = encoded(image, file_format, transparency=0)
        assert [pixel(data, 0), pixel(data, 1)] == [(255, 255, 255), (40, 50, 60)], file_format


def test_a_transparent_colour_of_an_rgb_png_is_laid_on_white() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    data = encoded(image, transparency=(1, 2, 3))
    assert [pixel(data, 0), pixel(data, 1)] == [(255, 255, 255), (9, 9, 9)]


def test_damaged_exif_does_not_spoil_a_picture() -> None:
    data = encoded(
        Image.new("RGB", (16, 16), (200, 30, 60)), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"
    )
    assert close(pixel(data), (200, 30, 60), by=8)
