"""Does a runtime answer as the reference does? Measured on real pictures, through the bank or class means."""
# N pictures, K classes of all tasks, D features

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model_store.bank import ModuleBank
from model_store.decoding import IMAGE_SUFFIXES, ImageLimits
from model_store.errors import InvalidDataset, InvalidImage
from model_store.preprocess import Preprocessing, load_pixels, stack_pixels
from model_store.tuning import Parity

Answer = tuple[str, str]  # task, label
Answering = Callable[[Tensor], list[Answer]]


@dataclass(frozen=True, slots=True)
class LabelledPixels:
    """Decoded pictures `pixels_NCHW` (uint8) with the (task, label) each of them shows."""

    pixels_NCHW: Tensor
    truth: tuple[Answer, ...]


def read_labelled(
    folders: dict[str, Path],
    preprocessing: Preprocessing,
    max_pictures: int,
    limits: ImageLimits | None = None,
) -> LabelledPixels:
    """At most `max_pictures` evenly spread pictures of FOLDER/…/CLASS/PICTURE, by task name.

    Unreadable pictures are passed over. Raises InvalidDataset when a folder holds none.
    """
    limits = limits or ImageLimits()
    pixels: list[Tensor] = []
    truth: list[Answer] = []
    for task, folder in folders.items():
        files = sorted(
            one for one in folder.rglob("*") if one.suffix.lower() in IMAGE_SUFFIXES and one.is_file()
        )
        before = len(pixels)
        for path in spread(files, max(1, max_pictures // len(folders))):
            try:
                pixels.append(load_pixels(path.read_bytes(), preprocessing, limits))
            except (InvalidImage, OSError):
                continue
            truth.append((task, path.parent.name))
        if len(pixels) == before:
            raise InvalidDataset(f"{folder} holds no readable pictures: expected CLASS/*.jpg below it")
    return LabelledPixels(stack_pixels(pixels), tuple(truth))


def spread(items: Sequence[Path], most: int) -> list[Path]:
    """At most `most` items at even distances."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def bank_answers(bank: ModuleBank) -> Answering:
    """What the tasks of a bank answer."""
    return lambda cls_ND: [(one.task, one.label) for one in bank.answer(cls_ND, top_k=1)]


def class_mean_answers(cls_ND: Tensor, truth: Sequence[Answer]) -> Answering:
    """The nearest class mean, by cosine around the mean of all: answers before any task is trained."""
    classes = sorted(set(truth))
    index_N = torch.tensor([classes.index(one) for one in truth])
    centre_D = cls_ND.mean(dim=0)
    mean_KD = torch.stack([(cls_ND[index_N == k] - centre_D).mean(dim=0) for k in range(len(classes))])

    def answer(cls_ND: Tensor) -> list[Answer]:
        cosine_NK = F.normalize(cls_ND - centre_D, dim=1) @ F.normalize(mean_KD, dim=1).T
        return [classes[k] for k in cosine_NK.argmax(dim=1).tolist()]

    return answer


def compare(cls_ND: Tensor, reference_ND: Tensor, answering: Answering, truth: Sequence[Answer]) -> Parity:
    """The parity of a runtime's CLS vectors with the reference's of the same pictures.

    A vector that is no number is as far away as can be.
    """
    cosine_N = torch.cosine_similarity(cls_ND.double(), reference_ND.double(), dim=1).nan_to_num(-1.0)
    given, expected = answering(cls_ND), answering(reference_ND)
    num = len(truth)
    return Parity(
        num_pictures=num,
        mean_cosine=float(cosine_N.mean()),
        min_cosine=float(cosine_N.min()),
        task_flips=sum(one[0] != other[0] for one, other in zip(given, expected, strict=True)) / num,
        label_flips=sum(one != other for one, other in zip(given, expected, strict=True)) / num,
        accuracy=sum(one == other for one, other in zip(given, truth, strict=True)) / num,
        reference_accuracy=sum(one == other for one, other in zip(expected, truth, strict=True)) / num,
    )
