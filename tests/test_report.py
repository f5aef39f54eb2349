"""The training report: figures that add up, whatever the classes are called."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_modules import backbone_manifest
from synthetic import make_features

from training.report import confusion_matrix, write_report
from training.trainer import HeldOutResult, TrainedTask, train_task


@pytest.fixture(scope="module")
def trained() -> TrainedTask:
    features = make_features("shapes", feature_dim=32, per_class=8, num_test=6, spread=4.0)
    return train_task("shapes", features, backbone_manifest(feature_dim=32), seed=2)


def relabelled(trained: TrainedTask, labels: tuple[str, ...]) -> TrainedTask:
    manifest = trained.manifest.model_copy(update={"labels": labels})
    return TrainedTask(manifest, trained.data, trained.held_out, trained.skipped)


def class_rows(page: str) -> dict[str, list[str]]:
    """The per-class table: label to its cells."""
    table = page.split("| class | pictures | recall | precision |")[1].split("![Confusion")[0]
    rows = [
        re.split(r"(?<!\\) \| ", line.strip("| ")) for line in table.splitlines() if line.startswith("| ")
    ]
    return {row[0]: row[1:] for row in rows}


def test_confusion_matrix_counts_every_pair() -> None:
    true_N, predicted_N = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 2, 0, 2])
    assert confusion_matrix(true_N, predicted_N, 4).tolist() == [
        [1, 1, 0, 0],
        [0, 1, 0, 0],
        [1, 0, 2, 0],
        [0, 0, 0, 0],
    ]


def test_confusion_matrix_of_nothing_is_zero() -> None:
    empty_N = torch.empty(0, dtype=torch.int64)
    assert confusion_matrix(empty_N, empty_N, 3).sum() == 0


def test_the_diagonal_is_the_accuracy(trained: TrainedTask) -> None:
    held_out = trained.held_out
    confusion_KK = confusion_matrix(held_out.label_N, held_out.predictions, 3)
    assert confusion_KK.trace() / confusion_KK.sum() == pytest.approx(held_out.accuracy)
    assert confusion_KK.sum(dim=1).tolist() == [6, 6, 6]


def test_the_report_is_a_page_and_a_picture(trained: TrainedTask, tmp_path: Path) -> None:
    page = write_report(trained, tmp_path / "new" / "reports")
    assert page == tmp_path / "new" / "reports" / "shapes.md"
    picture = page.parent / "shapes-confusion.png"
    assert f"]({picture.name})" in page.read_text(encoding="utf-8")
    with Image.open(picture) as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 200


def test_the_page_has_the_figures_of_the_evidence(trained: TrainedTask, tmp_path: Path) -> None:
    held_out = trained.held_out
    page = write_report(trained, tmp_path).read_text(encoding="utf-8")
    assert f"| accuracy | {held_out.accuracy:.4f} |" in page
    assert f"| ECE (15 bins) | {held_out.ece:.4f} |" in page
    assert "| held-out evidence | test split (18 pictures) |" in page
    assert trained.manifest.backbone_fingerprint in page
    assert f"{len(trained.data):,} bytes" in page
    assert "| seed | 2 |" in page


def test_recall_and_precision_equal_their_definitions(trained: TrainedTask, tmp_path: Path) -> None:
    rows = class_rows(write_report(trained, tmp_path).read_text(encoding="utf-8"))
    true, predicted = trained.held_out.label_N.numpy(), trained.held_out.predictions.numpy()
    for k, label in enumerate(trained.manifest.labels):
        right = np.sum((true == k) & (predicted == k))
        assert rows[label][0] == str(np.sum(true == k))
        assert float(rows[label][1]) == pytest.approx(right / np.sum(true == k), abs=6e-4)
        assert float(rows[label][2]) == pytest.approx(right / np.sum(predicted == k), abs=6e-4)


def test_a_class_without_evidence_has_dashes(trained: TrainedTask, tmp_path: Path) -> None:
    held_out = trained.held_out
    rows = held_out.label_N != 1
    prob_NK = held_out.prob_NK[rows].clone()
    prob_NK[:, 1] = 0.0
    without = HeldOutResult("test split", held_out.label_N[rows], prob_NK)
    page = write_report(TrainedTask(trained.manifest, trained.data, without, ()), tmp_path)
    assert class_rows(page.read_text(encoding="utf-8"))["shapes-1"] == ["0", "–", "–"]


def test_pictures_left_out_are_listed(trained: TrainedTask, tmp_path: Path) -> None:
    assert "## Pictures left out\n\nnone" in write_report(trained, tmp_path).read_text(encoding="utf-8")
    skipped = TrainedTask(trained.manifest, trained.data, trained.held_out, ("a.png: broken", "b.png: gone"))
    assert "- a.png: broken\n- b.png: gone" in write_report(skipped, tmp_path).read_text(encoding="utf-8")


def test_a_label_with_a_bar_keeps_its_row_whole(trained: TrainedTask, tmp_path: Path) -> None:
    page = write_report(relabelled(trained, ("a|b", "c", "d")), tmp_path).read_text(encoding="utf-8")
    assert "| a\\|b | 6 |" in page


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(("$x_1$", "50% off", "a^b"), id="formula"),
        pytest.param(("$\\frac{", "{}", "\\"), id="one dollar"),
        pytest.param(("$5 to $10", "$$", "_"), id="dollars"),
    ],
)
def test_labels_that_look_like_formulas_are_drawn_as_they_are(
    labels: tuple[str, ...], trained: TrainedTask, tmp_path: Path
) -> None:
    write_report(relabelled(trained, labels), tmp_path)


def test_scripts_that_the_font_lacks_cause_no_warning(trained: TrainedTask, tmp_path: Path) -> None:
    page = write_report(relabelled(trained, ("猫", "कुत्ता", "🐈")), tmp_path)
    assert set(class_rows(page.read_text(encoding="utf-8"))) == {"猫", "कुत्ता", "🐈"}


def test_many_classes_fit_on_one_picture(tmp_path: Path) -> None:
    features = make_features("many", feature_dim=32, num_classes=60, per_class=2, num_test=1)
    trained = train_task("many", features, backbone_manifest(feature_dim=32), recipe="reference")
    page = write_report(trained, tmp_path)
    assert len(class_rows(page.read_text(encoding="utf-8"))) == 60
    with Image.open(tmp_path / "many-confusion.png") as image:
        assert max(image.size) < 4000
