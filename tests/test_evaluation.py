"""The decomposition: selection, class given the task, end to end, and the closed form beside them."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from random_modules import backbone_manifest
from synthetic import make_features

from model_store.bank import ModuleBank
from model_store.errors import InvalidDataset, UnknownTask
from model_store.module_file import read_module
from training.evaluation import Evaluation, evaluate_bank
from training.features import LabelledFeatures
from training.trainer import train_task

D = 32


@pytest.fixture(scope="module")
def data() -> dict[str, LabelledFeatures]:
    """Two tasks whose classes overlap, so that every kind of mistake is made."""
    return {
        "birds": make_features("birds", feature_dim=D, seed=1, num_classes=3, num_test=12, spread=9.0),
        "cars": make_features("cars", feature_dim=D, seed=2, num_classes=4, num_test=9, spread=9.0),
    }


@pytest.fixture(scope="module")
def bank(data: dict[str, LabelledFeatures]) -> ModuleBank:
    backbone = backbone_manifest(feature_dim=D)
    modules = [read_module(train_task(task, one, backbone).data).module for task, one in data.items()]
    return ModuleBank.build(modules, revision=1, backbone_fingerprint=backbone.fingerprint, feature_dim=D)


def by_hand(bank: ModuleBank, task: str, features: LabelledFeatures, rows: list[int]) -> dict[str, float]:
    """Picture after picture, from single answers."""
    right_task, right_given, right, lda = [], [], [], []
    for i in rows:
        x_1D, label = features.cls_ND[i : i + 1], features.labels[int(features.label_N[i])]
        [answer], [given] = bank.answer(x_1D), bank.answer(x_1D, task=task)
        task_1, class_1 = bank.closed_form_answer(x_1D)
        closed = bank.modules[int(task_1)]
        right_task.append(answer.task == task)
        right_given.append(given.label == label)
        right.append((answer.task, answer.label) == (task, label))
        lda.append((closed.task, closed.labels[int(class_1)]) == (task, label))
    return {
        "selection_accuracy": float(np.mean(right_task)),
        "accuracy_given_task": float(np.mean(right_given)),
        "accuracy": float(np.mean(right)),
        "lda_accuracy": float(np.mean(lda)),
    }


def figures(evaluation: Evaluation) -> dict[str, float]:
    every = dataclasses.asdict(evaluation)
    return {name: every[name] for name in every if name not in ("num_pictures", "ece")}


def test_every_figure_equals_a_count_over_single_answers(
    bank: ModuleBank, data: dict[str, LabelledFeatures]
) -> None:
    _, by_task = evaluate_bank(bank, data)
    for task, features in data.items():
        rows = features.rows("test").tolist()
        assert by_task[task].num_pictures == len(rows)
        assert figures(by_task[task]) == pytest.approx(by_hand(bank, task, features, rows))
    assert any(one.selection_accuracy < 1.0 for one in by_task.values()), "too easy to tell figures apart"


def test_the_whole_is_the_mean_over_all_pictures(bank: ModuleBank, data: dict[str, LabelledFeatures]) -> None:
    overall, by_task = evaluate_bank(bank, data)
    assert overall.num_pictures == 36 + 36
    for name, value in figures(overall).items():
        counted = sum(figures(one)[name] * one.num_pictures for one in by_task.values())
        assert value == pytest.approx(counted / overall.num_pictures)


def test_end_to_end_is_at_most_the_right_task(bank: ModuleBank, data: dict[str, LabelledFeatures]) -> None:
    overall, by_task = evaluate_bank(bank, data)
    for one in (overall, *by_task.values()):
        assert one.accuracy <= one.selection_accuracy
        assert all(0.0 <= value <= 1.0 for value in (*figures(one).values(), one.ece))


def test_ece_equals_a_loop_over_bins(bank: ModuleBank, data: dict[str, LabelledFeatures]) -> None:
    features = data["birds"]
    rows = features.rows("test")
    answers = bank.answer(features.cls_ND[rows], top_k=1)
    truth = [features.labels[k] for k in features.label_N[rows].tolist()]
    confidence = np.array([answer.confidence for answer in answers])
    right = np.array([(a.task, a.label) == ("birds", t) for a, t in zip(answers, truth, strict=True)])
    ece = 0.0
    for b in range(15):
        members = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if members.any():
            ece += members.mean() * abs(right[members].mean() - confidence[members].mean())
    _, by_task = evaluate_bank(bank, {"birds": features})
    assert by_task["birds"].ece == pytest.approx(ece, abs=1e-6)


def test_without_a_test_split_every_picture_counts(
    bank: ModuleBank, data: dict[str, LabelledFeatures]
) -> None:
    features = dataclasses.replace(data["birds"], splits=("train",) * len(data["birds"].splits))
    _, by_task = evaluate_bank(bank, {"birds": features})
    assert by_task["birds"].num_pictures == len(features.label_N)


def test_a_part_of_the_classes_may_be_evaluated(bank: ModuleBank, data: dict[str, LabelledFeatures]) -> None:
    whole = data["birds"]
    rows = whole.label_N == 2
    part = dataclasses.replace(
        whole,
        labels=("birds-2",),
        cls_ND=whole.cls_ND[rows],
        label_N=torch.zeros(int(rows.sum()), dtype=torch.int64),
        splits=tuple(split for split, keep in zip(whole.splits, rows.tolist(), strict=True) if keep),
    )
    _, by_task = evaluate_bank(bank, {"birds": part})
    assert by_task["birds"].num_pictures == 12


@pytest.mark.parametrize("selection", ["lda", "entropy"])
def test_every_selection_can_be_evaluated(
    selection: str, bank: ModuleBank, data: dict[str, LabelledFeatures]
) -> None:
    overall, _ = evaluate_bank(bank, data, selection)  # type: ignore[arg-type]
    answered = [
        (answer.task, answer.label) == (task, features.labels[int(features.label_N[i])])
        for task, features in data.items()
        for i in features.rows("test").tolist()
        for answer in bank.answer(features.cls_ND[i : i + 1], selection=selection)  # type: ignore[arg-type]
    ]
    assert overall.accuracy == pytest.approx(np.mean(answered))


def test_an_answer_of_the_same_label_space_is_of_the_right_task() -> None:
    """Two sites with the same pictures: whichever of them answers, the label is what counts."""
    backbone = backbone_manifest(feature_dim=D)
    features = make_features("birds", feature_dim=D, seed=1, num_test=12, spread=0.2)

    def overall(label_space: str | None) -> Evaluation:
        modules = [
            read_module(train_task(task, features, backbone, seed=seed, label_space=label_space).data).module
            for seed, task in enumerate(("north", "south"))
        ]
        bank = ModuleBank.build(modules, revision=1, backbone_fingerprint="b" * 64, feature_dim=D)
        return evaluate_bank(bank, {"north": features, "south": features})[0]

    assert set(figures(overall("birds")).values()) == {1.0}
    apart = overall(None)
    assert (apart.selection_accuracy, apart.accuracy, apart.lda_accuracy) == (0.5, 0.5, 0.5)


def test_an_unknown_task_is_refused(bank: ModuleBank, data: dict[str, LabelledFeatures]) -> None:
    with pytest.raises(UnknownTask, match="'fish' is not active"):
        evaluate_bank(bank, {"fish": data["birds"]})


def test_an_unknown_class_is_refused(bank: ModuleBank, data: dict[str, LabelledFeatures]) -> None:
    with pytest.raises(InvalidDataset, match="cars: task 'birds' has no class 'cars-0'"):
        evaluate_bank(bank, {"birds": data["cars"]})


def test_clearly_separate_tasks_are_all_right() -> None:
    backbone = backbone_manifest(feature_dim=D)
    make: Callable[[str, int], LabelledFeatures] = lambda task, seed: make_features(  # noqa: E731
        task, feature_dim=D, seed=seed, spread=0.2
    )
    data = {"birds": make("birds", 1), "cars": make("cars", 2)}
    modules = [read_module(train_task(task, one, backbone).data).module for task, one in data.items()]
    bank = ModuleBank.build(modules, revision=1, backbone_fingerprint="b" * 64, feature_dim=D)
    overall, _ = evaluate_bank(bank, data)
    assert set(figures(overall).values()) == {1.0}
