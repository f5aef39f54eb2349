"""Preprocessing is timm's own evaluation transform: pixel for pixel as decoding 2 has it, within a rounding of each
of the two directions as decoding 3 does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pictures import encoded, noise
from PIL import Image, ImageFilter
from torch.nn.functional import interpolate

from model_store.decoding import ImageLimits
from model_store.preprocess import DECODING, Decoding, Preprocessing, load_pixels, stack_pixels, to_pixels
from model_store.timm_import import load_timm

LIMITS = ImageLimits()
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(224, 224), (300, 200), (200, 300), (640, 481), (37, 911), (911, 37), (1, 1), (3, 50), (225, 224)]


def preprocessing(
    height: int = 224,
    width: int = 224,
    crop_fraction: float = 0.875,
    interpolation: str = "bicubic",
    decoding: Decoding = DECODING,
) -> Preprocessing:
    return Preprocessing(
        decoding=decoding,
        height=height,
        width=width,
        crop_fraction=crop_fraction,
        interpolation=interpolation,  # type: ignore[arg-type]
        mean=CLIP_MEAN,
        std=CLIP_STD,
    )


def timm_transform(chosen: Preprocessing, *, normalize: bool) -> Any:
    load_timm()
    from timm.data import create_transform

    return create_transform(
        input_size=(3, chosen.height, chosen.width),
        is_training=False,
        interpolation=chosen.interpolation,
        mean=chosen.mean,
        std=chosen.std,
        crop_pct=chosen.crop_fraction,
        normalize=normalize,
    )


def smooth(size: tuple[int, int]) -> Image.Image:
    return noise(seed=size[0], size=size, spread=120).filter(ImageFilter.GaussianBlur(1.5))


def check_like_timm(image: Image.Image, chosen: Preprocessing) -> None:
    ours_CHW = to_pixels(np.array(image), chosen, LIMITS)
    timms_CHW = timm_transform(chosen, normalize=False)(image)
    if chosen.decoding == 2:
        assert torch.equal(ours_CHW, timms_CHW)
        return
    assert ours_CHW.shape == timms_CHW.shape
    difference_CHW = (ours_CHW.int() - timms_CHW.int()).abs()
    assert difference_CHW.max() <= 2
    assert (difference_CHW > 0).float().mean() < 0.02


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop_fraction", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("decoding", get_args(Decoding))
def test_pixels_are_those_of_timm(
    size: tuple[int, int], crop_fraction: float, interpolation: str, decoding: Decoding
) -> None:
    check_like_timm(
        smooth(size),
        preprocessing(crop_fraction=crop_fraction, interpolation=interpolation, decoding=decoding),
    )


@pytest.mark.parametrize("side", [32, 56, 98, 384, 518])
@pytest.mark.parametrize("decoding", get_args(Decoding))
def test_pixels_are_those_of_timm_at_other_sizes(side: int, decoding: Decoding) -> None:
    for crop_fraction in (0.9, 0.95, 1.0):
        check_like_timm(smooth((333, 250)), preprocessing(side, side, crop_fraction, decoding=decoding))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (500, 200), (64, 64)])
@pytest.mark.parametrize("decoding", get_args(Decoding))
def test_pixels_of_an_oblong_input_are_those_of_timm(size: tuple[int, int], decoding: Decoding) -> None:
    for height, width, crop_fraction in ((192, 256, 1.0), (256, 192, 0.9), (128, 256, 0.875)):
        check_like_timm(smooth(size), preprocessing(height, width, crop_fraction, decoding=decoding))


def test_pixels_do_not_depend_on_what_the_processor_can() -> None:
    """torch has kernels for several kinds of processors; a store's vectors are for all of them."""
    script = Path(__file__).with_name("pixels_digest.py")
    digests = [
        subprocess.run(
            [sys.executable, script],
            env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
            capture_output=True,
            check=True,
            text=True,
        ).stdout.split()
        for capability in ("default", "avx2", "avx512")
    ]
    assert digests[0][0] == "DEFAULT"
    assert len({digest for _, digest in digests}) == 1


def test_what_was_stored_with_an_earlier_decoding_is_read_as_it_was() -> None:
    stored = preprocessing(decoding=2).model_dump_json()
    assert Preprocessing.model_validate_json(stored).decoding == 2
    image = smooth((300, 200))
    now, then = (to_pixels(np.array(image), preprocessing(decoding=one), LIMITS) for one in (3, 2))
    assert not torch.equal(now, then)


def test_normalised_pixels_equal_those_of_timm() -> None:
    """Our backbone normalises on the device: (pixel / 255 − mean) / std."""
    chosen, image = preprocessing(decoding=2), smooth((300, 200))
    mean_C11, std_C11 = (torch.tensor(one).view(3, 1, 1) for one in (CLIP_MEAN, CLIP_STD))
    ours = (to_pixels(np.array(image), chosen, LIMITS).float() / 255 - mean_C11) / std_C11
    torch.testing.assert_close(ours, timm_transform(chosen, normalize=True)(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("decoding", [2, 3])
@pytest.mark.parametrize("size", [(50, 40), (48, 32)], ids=["resized", "of the right size"])
def test_pixels_are_bytes_channel_first_and_lie_pixel_by_pixel(
    size: tuple[int, int], decoding: Decoding
) -> None:
    chosen = preprocessing(32, 48, 1.0, decoding=decoding)
    pixels_CHW = load_pixels(encoded(noise(size=size)), chosen, LIMITS)
    assert (pixels_CHW.shape, pixels_CHW.dtype) == ((3, 32, 48), torch.uint8)
    assert pixels_CHW.permute(1, 2, 0).is_contiguous()
    pixels_BCHW = stack_pixels([pixels_CHW, pixels_CHW + 1])
    assert pixels_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pixels_BCHW, torch.stack([pixels_CHW, pixels_CHW + 1]))


def test_torch_resizes_without_turning_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does so, in more time, unless it sees that they lie pixel by pixel."""
    lying: list[bool] = []

    def watched(given: torch.Tensor, **options: Any) -> torch.Tensor:
        made = interpolate(given, **options)
        lying.append(made.is_contiguous(memory_format=torch.channels_last))
        return made

    monkeypatch.setattr("model_store.preprocess.interpolate", watched)
    to_pixels(np.array(smooth((300, 200))), preprocessing(), LIMITS)
    assert lying == [True]


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    image = smooth((224, 224))
    pixels_CHW = to_pixels(np.array(image), preprocessing(crop_fraction=1.0), LIMITS)
    assert np.array_equal(pixels_CHW.permute(1, 2, 0).numpy(), np.asarray(image))


def test_loading_is_deterministic() -> None:
    data = encoded(smooth((123, 77)), "JPEG")
    assert torch.equal(load_pixels(data, preprocessing(), LIMITS), load_pixels(data, preprocessing(), LIMITS))
