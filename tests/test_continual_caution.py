"""Few pictures, unrelated tasks, tasks left out, prediction sets: what the benchmark adds to accuracy."""

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from pictures import write_splits
from random_modules import backbone_manifest
from sklearn.metrics import roc_auc_score
from synthetic import make_features
from test_continual_streams import write_alphabets
from torch import Tensor
from typer.testing import CliRunner

from model_store.backbone import BackboneArtefact
from model_store.errors import InvalidRequest
from model_store.store import ModelStore
from training.continual.caution import leave_tasks_out, measure_coverage
from training.continual.class_means import Lda
from training.continual.commands import bench
from training.continual.method import Predictions
from training.continual.metrics import area_under_roc, false_positives_at_95
from training.continual.modules import ModuleMethod, ModuleTrainer
from training.continual.runner import ask_again, run_method
from training.continual.sources import open_stream
from training.continual.streams import Alphabets, Stream, TaskEntry
from training.continual.tasks import ContinualTask, arrange, renumber

D = 16
PAIR = (TaskEntry(name="a", folder="a"), TaskEntry(name="b", folder="b"))


def tasks(
    names: tuple[str, ...], first_seed: int = 0, images_per_class: int | None = None
) -> tuple[ContinualTask, ...]:
    features = [
        replace(
            make_features(name, feature_dim=D, seed=first_seed + i, per_class=20, num_test=10),
            data_sha256=name,
        )
        for i, name in enumerate(names)
    ]
    stream = Stream(name="s", scenario="mixed", order="fixed", tasks=PAIR)
    return arrange(stream, features, 0, images_per_class)


# -- figures -----------------------------------------------------------------------------------------


def test_area_under_roc_is_the_librarys_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.randint(0, 6, (70,), generator=generator).double()
    unknown = torch.randint(-2, 4, (45,), generator=generator).double()
    truth = [1] * 70 + [0] * 45
    assert area_under_roc(known, unknown) == pytest.approx(roc_auc_score(truth, torch.cat([known, unknown])))


def test_false_positives_are_counted_where_95_percent_of_known_ones_pass() -> None:
    known = torch.arange(100.0)
    unknown = torch.tensor([4.0, 5.0, 6.0, -1.0])
    assert false_positives_at_95(known, unknown) == 0.5
    assert float((known >= 5.0).double().mean()) == 0.95


# -- prediction sets ---------------------------------------------------------------------------------


@dataclass
class Scripted:
    """States the sets it is given, from coverage 0.95 on."""

    sets: list[frozenset[int]]
    p_value_of: dict[float, float] = field(default_factory=dict)
    saved_s = 0.0
    size_bytes = 0

    def learn(self, task: ContinualTask) -> None: ...

    def predict(self, cls_ND: Tensor) -> Predictions: ...

    def predict_within(self, cls_ND: Tensor, task: int) -> Predictions: ...

    def prediction_sets(self, cls_ND: Tensor, coverage: float) -> list[frozenset[int]]:
        if coverage > 0.95:
            raise InvalidRequest("too few vectors")
        return self.sets

    def p_values(self, cls_ND: Tensor) -> Tensor:
        return cls_ND[:, 0]


def test_coverage_size_and_the_equal_list_by_hand() -> None:
    prob_NL = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]])
    label_N = torch.tensor([0, 1, 0, 2])  # ranks 1, 2, 3, 1
    sets = [frozenset({0}), frozenset({0, 1}), frozenset({1}), frozenset({1, 2})]
    predictions = Predictions(torch.zeros(4), prob_NL.argmax(dim=1), prob_NL.amax(dim=1), prob_NL)
    results = measure_coverage(Scripted(sets), torch.zeros(4, D), label_N, predictions)
    assert [one.nominal for one in results] == [0.9, 0.95], "a coverage without evidence is left out"
    for one in results:
        assert (one.coverage, one.mean_size, one.equal_top_k) == (0.75, 1.5, 2)


def test_the_products_sets_hold_the_truth_about_as_often_as_asked() -> None:
    learnt = tasks(("a", "b", "c"))
    run = run_method(
        ModuleMethod(ModuleTrainer(backbone_manifest(feature_dim=D)), "default", "lda", 0), learnt
    )
    assert run.coverage is not None and [one.nominal for one in run.coverage] == [0.9, 0.95, 0.99]
    for one in run.coverage:
        assert one.coverage >= one.nominal - 0.08 and one.mean_size >= one.coverage
    assert run_method(Lda(), learnt).coverage is None


# -- unknown tasks -----------------------------------------------------------------------------------


def test_a_task_left_out_is_measured_against_all_others() -> None:
    def shifted(task: ContinualTask, value: float) -> ContinualTask:
        return replace(task, test_cls_UD=torch.full_like(task.test_cls_UD, value))

    a, b, c = (
        shifted(one, value) for one, value in zip(tasks(("a", "b", "c")), (0.01, 0.5, 0.9), strict=True)
    )
    found = leave_tasks_out(lambda: Scripted([]), [a, b, c])
    assert found is not None and [one.task for one in found] == ["a", "b", "c"]
    assert [one.auroc for one in found] == [1.0, 0.5, 0.0]
    assert [one.abstained_unknown for one in found] == [1.0, 0.0, 0.0]
    assert [one.abstained_known for one in found] == [0.0, 0.5, 0.5]
    assert leave_tasks_out(Lda, [a, b, c]) is None, "no p-values, nothing to measure"


def test_unrelated_tasks_get_labels_of_their_own_and_are_not_asked_about() -> None:
    main, others = tasks(("a", "b")), tasks(("c", "d", "e"), first_seed=7)
    first = 1 + max(int(task.label_K.max()) for task in main)
    unrelated = renumber(others, first)
    assert torch.cat([task.label_K for task in unrelated]).tolist() == list(range(first, first + 9))
    method = Lda()
    before = run_method(method, main)
    after = ask_again(method, main, unrelated, told_task=False)
    together = run_method(Lda(), [*main, *unrelated]).steps[-1]
    asked = sum(len(task.test_label_U) for task in main)
    right = sum(
        share * len(task.test_label_U) for share, task in zip(together.accuracy_by_task, main, strict=False)
    )
    assert after.num_tasks == 3 and after.accuracy == pytest.approx(right / asked)
    assert after.accuracy <= before.last_accuracy


# -- fewer pictures, smaller alphabets ---------------------------------------------------------------


def test_a_few_pictures_of_every_class_are_drawn_by_the_seed() -> None:
    for task in tasks(("a", "b"), images_per_class=2):
        assert torch.bincount(task.train.label_N).tolist() == [2, 2, 2]
        assert len(task.test_label_U) == 30, "test pictures are all there"
    full, few = tasks(("a",))[0].train, tasks(("a",), images_per_class=2)[0].train
    assert all(bool((full.cls_ND == one).all(dim=1).any()) for one in few.cls_ND)
    assert torch.equal(few.cls_ND, tasks(("a",), images_per_class=2)[0].train.cls_ND)


def test_alphabets_are_cut_into_tasks_of_nearly_equal_size(tmp_path: Path) -> None:
    write_alphabets(tmp_path / "first", ("Greek", "Latin"))
    for i in range(5):
        shutil.copytree(tmp_path / "first" / "Greek" / "one", tmp_path / "first" / "Greek" / f"c{i}")
    rule = Alphabets(folders=("first",), train_per_class=3, classes_per_task=3)
    sources = open_stream(Stream(name="x", scenario="class-incremental", alphabets=rule), tmp_path)
    greek = [source for source in sources if source.name.startswith("Greek")]
    assert [source.name for source in greek] == ["Greek-00", "Greek-01", "Greek-02"]
    assert [len(source.labels) for source in greek] == [2, 2, 3]
    assert len({label for source in greek for label in source.labels}) == 7
    assert all({one.label for one in source.pictures} == set(source.labels) for source in sources)


# -- command line ------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    for name in ("a", "b", "c", "d"):
        write_splits(tmp_path / name, train=5, test=2)
    for name, pair in (("main", "ab"), ("other", "cd")):
        entries = ", ".join(f'{{name = "{one}", folder = "{one}"}}' for one in pair)
        (tmp_path / f"{name}.toml").write_text(f'name = "{name}"\nscenario = "mixed"\ntasks = [{entries}]\n')
    yield tmp_path


def test_the_command_measures_all_of_it(
    data: Path, tiny_store: ModelStore, tiny_artefact: BackboneArtefact
) -> None:
    arguments = [
        "continual",
        "--stream",
        str(data / "main.toml"),
        "--data",
        str(data),
        "--methods",
        "default,lda",
    ]
    arguments += [
        "--unrelated",
        str(data / "other.toml"),
        "--images-per-class",
        "4",
        "--leave-out",
        "--seeds",
        "0",
    ]
    place = ["--store", str(data / "store"), "--cache", str(data / "cache"), "--device", "cpu"]
    result = CliRunner().invoke(
        bench, [*arguments, *place, "--json", str(data / "out.json")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    found = json.loads((data / "out.json").read_text())
    assert found["config"]["images_per_class"] == 4 and len(found["config"]["unrelated"]) == 1
    run = found["runs"]["default"]["0"]
    assert run["unrelated"]["num_tasks"] == 2 and len(run["rejection"]) == 2
    assert (
        found["runs"]["lda"]["0"]["rejection"] is None and found["runs"]["lda"]["0"]["unrelated"] is not None
    )
    assert {"auroc", "fpr95", "unrelated_accuracy"} <= set(found["summary"]["default"])


def test_the_sparsity_curve_trades_bytes_for_accuracy(data: Path, tiny_store: ModelStore) -> None:
    arguments = ["sparsity", "--stream", str(data / "main.toml"), "--data", str(data), "--seeds", "0"]
    place = ["--store", str(data / "store"), "--cache", str(data / "cache"), "--device", "cpu"]
    result = CliRunner().invoke(
        bench, [*arguments, *place, "--json", str(data / "out.json")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    curve = json.loads((data / "out.json").read_text())["curve"]
    density = [one["density"] for one in curve]
    assert density == sorted(density, reverse=True) and density[0] > density[-1]
    for one, other in itertools.pairwise(curve):
        saved = one["luca_bytes"] - other["luca_bytes"]
        assert one["file_bytes"] - other["file_bytes"] == pytest.approx(saved, abs=64), "but for the header"
        assert 0.0 <= other["accuracy"] <= 1.0
