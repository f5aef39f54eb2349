"""Banks in an epoch: what a few tasks say together serves many, whichever tasks come and go."""
# B batch, D features, K classes

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from epochs import NUM_TASKS, _real_fingerprint, answers, classes, tasks
from random_modules import FEATURE_DIM, build_bank, random_cls, random_module
from torch import Tensor

import model_store.impact
from model_store.bank import ModuleBank
from model_store.epoch import Epoch
from model_store.impact import compare_banks, measure_health
from model_store.known_vectors import unseen_scores
from model_store.selection import WhitenedCosine
from model_store.task_module import TaskModule

__all__ = ["_real_fingerprint", "classes"]  # fixtures


def in_epoch(modules: Sequence[TaskModule], epoch: Epoch, previous: ModuleBank | None = None) -> ModuleBank:
    return ModuleBank.build(
        modules,
        revision=7,
        backbone_fingerprint="b" * 64,
        feature_dim=modules[0].mean_KD.shape[1],
        epoch=epoch,
        previous=previous,
    )


def test_the_tasks_that_begin_an_epoch_answer_as_they_did() -> None:
    own = build_bank(tasks())
    assert answers(in_epoch(tasks(), own.begin_epoch())) == answers(own)


@pytest.mark.parametrize("num_tasks", [3, NUM_TASKS])  # fewer classes than features, and more
def test_a_bank_built_from_the_one_before_equals_one_built_from_nothing(num_tasks: int) -> None:
    epoch = build_bank(tasks(num_tasks)).begin_epoch()
    new = [random_module(f"new{t}", seed=900 + t) for t in range(3)]
    bank = in_epoch(tasks(), epoch)
    answers(bank)  # so that it knows what it may hand on
    for modules in ([*tasks(), new[0]], [*tasks()[2:], *new], [*tasks()[5:], new[1]]):
        bank = in_epoch(modules, epoch, previous=bank)
        assert set(bank._known_vectors) <= {module.sha256 for module in modules}
        assert answers(bank) == answers(in_epoch(modules, epoch))


def known_scores(bank: ModuleBank, task: str) -> Tensor:
    """What calibration vectors of a task get as if unseen, in this bank."""
    bank.prepare(task)
    return bank._known_vectors[bank.module(task).sha256].best_score_M


def test_known_vectors_are_not_handed_on_where_the_span_of_few_classes_changes() -> None:
    few = tasks(4, feature_dim=64, num_calibration=12, per_class=8)
    epoch = build_bank(few).begin_epoch()
    before = in_epoch(few, epoch)
    earlier = known_scores(before, "task01")
    more = [*few, random_module("new", seed=77, feature_dim=64)]
    after, restarted = in_epoch(more, epoch, previous=before), in_epoch(more, epoch)
    assert not torch.equal(known_scores(restarted, "task01"), earlier)
    assert torch.equal(known_scores(after, "task01"), known_scores(restarted, "task01"))
    x_BD = 1.5 * random_cls(200, feature_dim=64)
    assert after.answer(x_BD) == restarted.answer(x_BD)


def test_known_vectors_are_not_handed_on_when_classes_begin_to_be_screened(
    classes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = build_bank(tasks()).begin_epoch()
    before = in_epoch(tasks(), epoch)
    earlier = known_scores(before, "task01")
    assert known_scores(in_epoch(tasks(), epoch, previous=before), "task01") is earlier
    monkeypatch.setattr(
        "model_store.bank.MAX_DENSE_CLASSES", 10_000 if classes == "screened" else FEATURE_DIM
    )
    after, restarted = in_epoch(tasks(), epoch, previous=before), in_epoch(tasks(), epoch)
    assert not torch.equal(known_scores(restarted, "task01"), earlier)
    assert torch.equal(known_scores(after, "task01"), known_scores(restarted, "task01"))


def test_a_further_task_leaves_the_blocks_of_others_alone(classes: str) -> None:
    before = in_epoch(tasks(), build_bank(tasks()).begin_epoch())
    assert before.epoch is not None and before.selector is not None
    after = in_epoch([*tasks(), random_module("task05x", seed=5)], before.epoch, previous=before)
    assert after.selector is not None and after.selector.metric is before.selector.metric
    if classes == "dense":
        assert after.selector.screen is None
        return
    assert before.selector.screen is not None and after.selector.screen is not None
    old = {id(block) for block in before.selector.screen.blocks.values()}
    fresh = [block for block in after.selector.screen.blocks.values() if id(block) not in old]
    assert len(old) >= 4 and 1 <= len(fresh) <= 2


def test_a_task_that_comes_and_goes_leaves_no_trace() -> None:
    before = in_epoch(tasks(), build_bank(tasks()).begin_epoch())
    assert before.epoch is not None
    after = in_epoch([*tasks(), random_module("new", seed=77)], before.epoch, previous=before)
    assert answers(after) != answers(before)
    assert answers(in_epoch(tasks(), before.epoch, previous=after)) == answers(before)


def test_leaving_an_epoch_gives_the_bank_of_those_tasks_alone() -> None:
    modules = tasks()
    bank = in_epoch(modules, build_bank(modules).begin_epoch())
    assert bank.epoch is not None
    bank = in_epoch([*modules[2:], random_module("new", seed=77)], bank.epoch, previous=bank)
    wanted = [*modules[3:], random_module("new", seed=77), random_module("newer", seed=78)]
    recalled = []

    def recall(sha256: str) -> TaskModule:
        recalled.append(sha256)
        return next(module for module in modules if module.sha256 == sha256)

    left = ModuleBank.build(
        wanted,
        revision=7,
        backbone_fingerprint="b" * 64,
        feature_dim=FEATURE_DIM,
        previous=bank,
        recall=recall,
    )
    own = build_bank(wanted)
    assert sorted(recalled) == sorted(module.sha256 for module in modules[:2])
    assert torch.equal(left.pooled.scatter_P, own.pooled.scatter_P) and left.blend == own.blend
    assert answers(left) == answers(own)


@pytest.mark.parametrize("num_tasks", [3, NUM_TASKS])
def test_calibration_vectors_of_a_later_task_are_left_out_of_its_means_alone(num_tasks: int) -> None:
    """Against the same metric with class means computed anew."""
    later = random_module("later", seed=55, spread=0.5, num_classes=2)
    bank = in_epoch([*tasks(num_tasks), later], build_bank(tasks(num_tasks)).begin_epoch())
    assert bank.selector is not None
    t = [module.task for module in bank.modules].index("later")
    known_MC = unseen_scores(bank.selector, later, t, own_classes=True)
    statistics, calibration = later.statistics, later.calibration
    for m, (x_D, k) in enumerate(zip(calibration.cls_MD.double(), calibration.label_M.tolist(), strict=True)):
        mean_KD, count = statistics.mean_KD.double(), int(statistics.count_K[k])
        mean_KD[k] -= (x_D - mean_KD[k]) / (count - 1)
        without = dataclasses.replace(
            later, statistics=dataclasses.replace(statistics, mean_KD=mean_KD.float())
        )
        assert bank.epoch is not None
        left_out = in_epoch([*tasks(num_tasks), without], bank.epoch).selector
        assert left_out is not None
        torch.testing.assert_close(known_MC[m], _own_scores(left_out, x_D, t), rtol=1e-5, atol=1e-6)


def _own_scores(selector: WhitenedCosine, x_D: Tensor, t: int) -> Tensor:
    return selector.scores(x_D[None], [t])[0]


def test_a_report_among_the_tasks_around_a_change_finds_what_one_among_all_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_store.impact, "MAX_TASKS", 4)
    modules = tasks(40)
    epoch = build_bank(modules).begin_epoch()
    twin = dataclasses.replace(modules[7], task="twin", sha256="f" * 64)
    before, after = in_epoch(modules, epoch), in_epoch([*modules, twin], epoch)
    monkeypatch.setattr(model_store.impact, "AROUND", 1000)
    among_all = compare_banks(before, after)
    monkeypatch.setattr(model_store.impact, "AROUND", 10)
    around = compare_banks(before, after)
    assert [one.task for one in around.tasks] == [one.task for one in among_all.tasks]
    assert around.num_unmeasured == among_all.num_unmeasured == 37
    for one, other in zip(around.tasks, among_all.tasks, strict=True):
        assert one.accuracy_loss == pytest.approx(other.accuracy_loss, abs=1e-9), one.task
    worst = around.worst_loss(ignoring="twin")
    assert worst is not None and worst.task == "task07" and worst.accuracy_loss > 0.3


def test_a_report_of_fewer_classes_than_features_is_of_what_really_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A further task moves the scores of all others: among a few of them it would be others that it moves."""
    modules = tasks(40, feature_dim=256, num_calibration=9, per_class=5, spread=3.0)
    epoch = build_bank(modules).begin_epoch()
    new = random_module("new", seed=500, feature_dim=256, num_calibration=9, per_class=5, spread=3.0)
    before, after = in_epoch(modules, epoch), in_epoch([*modules, new], epoch)
    monkeypatch.setattr(model_store.impact, "MAX_TASKS", 4)
    monkeypatch.setattr(model_store.impact, "AROUND", 10)
    for one in compare_banks(before, after).tasks:
        assert one.before == (measure_health(before, one.task) if one.task in before else None)
        assert one.after == measure_health(after, one.task)
