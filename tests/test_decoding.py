"""Pictures as a person sees them, whatever the encoder did: real files, written by real encoders.

Transparency, animations and further oddities: tests/attacks/test_hostile_pictures.py.
"""

import io
import multiprocessing
import struct
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import get_args

import numpy as np
import peak_memory
import pytest
from pictures import encoded, noise, tiled_tiff
from PIL import Image, ImageCms, ImageFilter, TiffImagePlugin

from model_store.decoding import ImageLimits, OpenedImage, decode_image, open_image
from model_store.errors import ImageTooLarge, InvalidImage
from model_store.preprocess import Decoding

LIMITS = ImageLimits()
SIDE = 64


def corner_picture(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Upright when its red quarter is at the top left; the others are green, blue and white."""
    pixels = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
    middle = (size[1] // 2, size[0] // 2)
    pixels[: middle[0], : middle[1]] = (200, 30, 30)
    pixels[: middle[0], middle[1] :] = (30, 160, 30)
    pixels[middle[0] :, : middle[1]] = (30, 30, 200)
    return Image.fromarray(pixels)


def decode(data: bytes, min_side: int | None = None) -> np.ndarray:
    image = decode_image(data, LIMITS, min_side)
    assert image.mode == "RGB"
    assert np.array_equal(open_image(data, LIMITS, min_side).rgb(), image)
    return np.asarray(image).astype(np.int16)


def same(one: np.ndarray, other: np.ndarray, tolerance: float) -> bool:
    return one.shape == other.shape and float(np.abs(one - other).mean()) <= tolerance


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


# How an upright picture is stored so that each EXIF orientation turns it back.
STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_every_orientation_comes_out_upright(file_format: str, orientation: int) -> None:
    upright = corner_picture()
    turn = STORED_AS[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    options = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}
    options |= {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(stored, file_format, exif=exif(orientation), **options)
    assert same(decode(data), decode(encoded(upright)), 1.0)


def test_an_unknown_orientation_changes_nothing() -> None:
    upright = corner_picture()
    assert same(decode(encoded(upright, "PNG", exif=exif(99))), decode(encoded(upright)), 0)


# -- depth, palettes, several pictures in one --------------------------------------------------------


def ramp16() -> np.ndarray:
    return np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)


def big_endian_tiff() -> bytes:
    file = io.BytesIO()
    tags = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"MM")
    Image.frombytes("I;16B", (64, 48), ramp16().astype(">u2").tobytes()).save(file, "TIFF", tiffinfo=tags)
    return file.getvalue()


DEEP: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: encoded(Image.fromarray(ramp16()), "PNG"),
    "TIFF": lambda: encoded(Image.fromarray(ramp16()), "TIFF"),
    "big-endian TIFF": big_endian_tiff,
}


@pytest.mark.parametrize("name", DEEP)
def test_sixteen_bits_keep_their_brightness(name: str) -> None:
    """Clipping to 255, the naive conversion, would turn all but the darkest 0.4 % white."""
    expected = np.repeat((ramp16() >> 8)[..., None], 3, axis=2).astype(np.int16)
    assert same(decode(DEEP[name]()), expected, 0)


def test_sixteen_bit_colours_keep_their_brightness() -> None:
    """Pillow writes no such PNG, so it is put together from chunks."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\x00" + struct.pack(">HHH", 0xC000, 0x4000, 0x8000) * 8
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(row * 8)
    )
    pixels = decode(b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b""))
    assert (pixels == (0xC0, 0x40, 0x80)).all()


def test_palettes_and_black_and_white_show_their_colours() -> None:
    paletted = corner_picture().convert("P", palette=Image.Palette.ADAPTIVE)
    assert same(decode(encoded(paletted)), decode(encoded(corner_picture())), 1.0)
    striped = Image.fromarray(np.tile(np.array([[0, 255]], dtype=np.uint8), (8, 4))).convert("1")
    assert sorted(np.unique(decode(encoded(striped))).tolist()) == [0, 255]


def test_a_multi_picture_jpeg_shows_its_first_picture() -> None:
    first, second = (noise(i, spread=0) for i in (0, 1))
    data = encoded(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert same(decode(data), decode(encoded(first)), 2.0)


# -- colours -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_cmyk_shows_its_colours(file_format: str) -> None:
    """Adobe's JPEGs store the inks inverted; taken as they are, red paper would come out as cyan night."""
    expected = decode(encoded(corner_picture()))
    options = {"quality": 95} if file_format == "JPEG" else {}
    data = encoded(corner_picture().convert("CMYK"), file_format, **options)
    assert (b"Adobe" in data) == (file_format == "JPEG")
    assert same(decode(data), expected, 3.0)


def swapped_profile() -> bytes:
    """An sRGB profile with its red and blue primaries exchanged: a colour space nobody could overlook."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(128, 128 + 4 + 12 * struct.unpack_from(">I", data, 128)[0], 1):
        if data[i : i + 4] in (b"rXYZ", b"bXYZ"):
            data[i] = ord("b") if data[i] == ord("r") else ord("r")
    return bytes(data)


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_colour_profile_is_obeyed(file_format: str) -> None:
    image = Image.new("RGB", (16, 16), (220, 20, 20))
    options = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}
    pixels = decode(encoded(image, file_format, icc_profile=swapped_profile(), **options))
    assert np.abs(pixels - (20, 20, 220)).max() < 12


def test_srgb_by_name_changes_no_pixel() -> None:
    plain, named = (encoded(noise(), icc_profile=profile) for profile in (None, srgb_profile()))
    assert same(decode(plain), decode(named), 0)


BROKEN_PROFILES = {
    "noise": b"\x00\x01not a profile" * 20,
    "empty": b"",
    "truncated": srgb_profile()[:200],
    "for other colours": ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
}


@pytest.mark.parametrize("name", BROKEN_PROFILES)
def test_a_broken_colour_profile_is_passed_over(name: str) -> None:
    data = encoded(noise(), icc_profile=BROKEN_PROFILES[name])
    assert same(decode(data), decode(encoded(noise())), 0)


def test_a_profile_for_rgb_is_passed_over_in_a_grey_picture() -> None:
    grey = noise().convert("L")
    assert same(decode(encoded(grey, icc_profile=swapped_profile())), decode(encoded(grey)), 0)


# -- reduced decoding --------------------------------------------------------------------------------


def photograph(size: tuple[int, int]) -> Image.Image:
    return noise(size=size, spread=120).filter(ImageFilter.GaussianBlur(3))


@pytest.mark.parametrize(
    ("size", "min_side", "expected"),
    [
        ((1600, 1200), 150, (200, 150)),
        ((1600, 1200), 151, (400, 300)),
        ((1200, 1600), 300, (300, 400)),
        ((1600, 1200), 601, (1600, 1200)),
        ((400, 300), 448, (400, 300)),
        ((1601, 1203), 100, (201, 151)),
    ],
)
def test_a_large_jpeg_is_reduced_while_it_is_decoded(
    size: tuple[int, int], min_side: int, expected: tuple[int, int]
) -> None:
    data = encoded(photograph(size), "JPEG")
    image = decode_image(data, LIMITS, min_side)
    assert image.size == expected and min(image.size) >= min(min_side, min(size))


def test_a_reduced_picture_shows_the_same() -> None:
    data = encoded(photograph((1600, 1200)), "JPEG", quality=92)
    whole = decode_image(data, LIMITS).resize((200, 150), Image.Resampling.BOX)
    assert same(decode(data, 150), np.asarray(whole).astype(np.int16), 2.0)


def test_other_formats_are_decoded_whole() -> None:
    assert decode_image(encoded(photograph((800, 600))), LIMITS, 100).size == (800, 600)


def test_a_turned_jpeg_is_reduced_and_upright() -> None:
    stored = corner_picture((1600, 1200)).transpose(Image.Transpose.ROTATE_90)
    image = decode_image(encoded(stored, "JPEG", quality=95, exif=exif(6)), LIMITS, 150)
    assert image.size == (200, 150)
    assert np.abs(np.asarray(image)[10, 10].astype(int) - (200, 30, 30)).max() < 12


def test_the_limit_holds_for_the_size_in_the_header_and_not_the_reduced_one() -> None:
    data = encoded(photograph((1600, 1200)), "JPEG")
    with pytest.raises(ImageTooLarge, match="1600×1200 pixels"):
        decode_image(data, ImageLimits(max_pixels=1_000_000), 100)


# -- plain JPEGs, which Pillow only opens ------------------------------------------------------------


def without_pillow(data: bytes, min_side: int | None, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    def forbidden(_: OpenedImage) -> Image.Image:
        raise AssertionError("decoded by Pillow")

    with monkeypatch.context() as within:
        within.setattr(OpenedImage, "decode", forbidden)
        return open_image(data, LIMITS, min_side).rgb()


JPEG_OPTIONS: dict[str, dict[str, object]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "restarting": {"restart_marker_blocks": 3},
    "of low quality": {"quality": 10},
    "of full quality": {"quality": 100},
    "RGB": {"keep_rgb": True},
    "in sRGB by name": {"icc_profile": srgb_profile()},
    "upright by name": {"exif": exif(1)},
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", JPEG_OPTIONS.values(), ids=JPEG_OPTIONS)
def test_a_plain_jpeg_has_the_pixels_that_pillow_gives(
    options: dict[str, object], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in [(1, 1), (8, 300), (97, 63), (256, 171), (641, 480)]:
        data = encoded(noise(seed=3, size=size, spread=60).convert(mode), "JPEG", **options)
        for min_side in (None, 20, 60, 130):
            pixels = without_pillow(data, min_side, monkeypatch)
            assert np.array_equal(pixels, decode_image(data, LIMITS, min_side))


def test_what_pillow_bears_with_is_shown_and_what_it_does_not_is_refused() -> None:
    data = encoded(photograph((400, 300)), "JPEG")
    middle = len(data) // 2
    damaged = data[:middle] + bytes(200) + data[middle + 200 :]
    assert np.array_equal(open_image(damaged, LIMITS).rgb(), decode_image(damaged, LIMITS))
    with pytest.raises(InvalidImage, match="truncated"):
        open_image(data[:middle], LIMITS).rgb()
    with pytest.raises(InvalidImage, match="truncated"):
        open_image(data[:-2], LIMITS).rgb()


def test_libjpeg_turbo_decodes_no_size_that_was_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is known of which the two read different sizes; its limits would be those of another picture."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("simplejpeg.decode_jpeg_header", lambda *_, **__: (60_000, 60_000, "YCbCr", "420"))
    monkeypatch.setattr("simplejpeg.decode_jpeg", forbidden)
    data = encoded(photograph((40, 30)), "JPEG")
    assert np.array_equal(open_image(data, LIMITS).rgb(), decode_image(data, LIMITS))


# -- memory ----------------------------------------------------------------------------------------------


def patches(mode: str, size: tuple[int, int] = (2500, 2500)) -> Image.Image:
    """A picture of patches in a mode: it compresses well, so that the file itself takes no memory."""
    values = np.random.default_rng(0).integers(0, 256, (size[1] // 50, size[0] // 50, 4), dtype=np.uint8)
    rgba = Image.fromarray(np.kron(values, np.ones((50, 50, 1), np.uint8)))
    grey = rgba.convert("L")
    match mode:
        case "RGBA":
            return rgba
        case "LA":
            return Image.merge("LA", (grey, grey))
        case "I;16":
            return Image.fromarray(np.asarray(grey).astype(np.uint16) * 200)
        case "I":
            return Image.fromarray(np.asarray(grey).astype(np.int32) * 200)
        case _:
            return rgba.convert("RGB").convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "JPEG", {"exif": exif(6)}),
        ("RGB", "JPEG", {"exif": exif(6), "progressive": True, "subsampling": 0}),
        ("CMYK", "JPEG", {"progressive": True}),
        ("RGBA", "PNG", {"exif": exif(6)}),
        ("LA", "PNG", {"exif": exif(6)}),
        ("P", "PNG", {"transparency": 3}),
        ("I;16", "PNG", {"exif": exif(6)}),
        ("RGBA", "WEBP", {"exif": exif(6), "lossless": True, "method": 0}),
        ("RGB", "WEBP", {"exif": exif(6), "method": 0}),
        ("P", "GIF", {"transparency": 3}),
        ("I", "TIFF", {"compression": "tiff_lzw"}),
        ("LAB", "TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_decoding_takes_no_more_memory_than_the_header_promises(
    mode: str, kind: str, options: dict[str, object]
) -> None:
    promised, taken = peak_bytes(encoded(patches(mode), kind, **options))
    assert 0.2 * promised < taken <= promised


@pytest.mark.parametrize("decoding", get_args(Decoding))
@pytest.mark.parametrize(
    ("size", "side"), [((500, 500), 3600), ((50, 5000), 512), ((5000, 50), 512), ((3000, 2500), 2000)]
)
def test_resizing_takes_no_more_memory_than_the_header_promises(
    size: tuple[int, int], side: int, decoding: int
) -> None:
    promised, taken = peak_bytes(encoded(patches("RGB", size)), side, decoding)
    assert 0.2 * promised < taken <= promised


@pytest.mark.parametrize("options", [{}, {"save_all": True, "append_images": [noise()]}])
def test_the_scans_of_a_reduced_jpeg_are_in_the_promise(options: dict[str, object]) -> None:
    data = encoded(patches("RGB"), "MPO", progressive=True, subsampling=0, **options)  # of one picture: JPEG
    promised, taken = peak_bytes(data, 224, 3)
    assert 0.2 * promised < taken <= promised


def test_a_tile_larger_than_its_picture_is_in_the_promise() -> None:
    promised, taken = peak_bytes(tiled_tiff((16, 16), (4096, 4096)))
    assert 4096 * 4096 < taken <= promised


def peak_bytes(data: bytes, *given: int) -> tuple[int, int]:
    """What a picture's header promised and what it took, in a process of its own."""
    return _processes().submit(peak_memory.measure, data, given).result()


@cache
def _processes() -> ProcessPoolExecutor:
    """A new process a call, forked from one that has imported what is measured, and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["model_store.preprocess"])
    return ProcessPoolExecutor(1, context, max_tasks_per_child=1)
