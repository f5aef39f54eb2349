"""The benchmark as a whole: figures against hand-computed ones, resuming, the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pictures import write_splits
from random_modules import backbone_manifest
from synthetic import make_features
from typer.testing import CliRunner

import training.continual.runner as runner_module
from model_store.backbone import BackboneArtefact
from model_store.calibration import expected_calibration_error
from model_store.errors import InvalidRequest
from model_store.store import ModelStore
from training.continual.commands import bench
from training.continual.method import Predictions
from training.continual.metrics import (
    StreamScores,
    mean_and_deviation,
    measure_calibration,
    reliability,
    summarise_stream,
)
from training.continual.registry import METHODS, check_methods
from training.continual.results import BenchmarkResults, RunResult, open_results
from training.continual.runner import Plan, run_benchmark, run_method
from training.continual.streams import Stream
from training.continual.tasks import ContinualTask

D = 16
CONFIG = {"stream": "x"}


def small_plan(methods: tuple[str, ...], seeds: tuple[int, ...], heard: list[tuple[str, int]]) -> Plan:
    def done(method: str, seed: int, _: RunResult) -> None:
        heard.append((method, seed))

    return Plan(
        Stream.model_validate(
            {
                "name": "x",
                "scenario": "class-incremental",
                "split": {"folder": ".", "classes_per_task": 3},
            }
        ),
        [make_features("all", num_classes=9, feature_dim=D, spread=2.0)],
        backbone_manifest(feature_dim=D),
        methods,
        seeds,
        "all",
        32,
        done,
    )


# -- figures -----------------------------------------------------------------------------------------


def test_stream_scores_by_hand() -> None:
    matrix = [[0.9], [0.7, 0.8], [0.75, 0.6, 1.0]]
    scores = summarise_stream([0.9, 0.75, 0.78], matrix)
    assert scores == StreamScores(
        average_accuracy=pytest.approx((0.9 + 0.75 + 0.78) / 3),
        last_accuracy=0.78,
        forgetting=pytest.approx(((0.9 - 0.75) + (0.8 - 0.6)) / 2),
        backward_transfer=pytest.approx(((0.75 - 0.9) + (0.6 - 0.8)) / 2),
    )


def test_forgetting_counts_from_the_best_and_transfer_from_the_first() -> None:
    scores = summarise_stream([0.5, 0.9, 0.7], [[0.5], [0.9, 0.9], [0.7, 0.9, 0.5]])
    assert scores.forgetting == pytest.approx((0.2 + 0.0) / 2)
    assert scores.backward_transfer == pytest.approx((0.2 + 0.0) / 2)


def test_a_single_task_forgets_nothing() -> None:
    assert summarise_stream([0.5], [[0.5]]) == StreamScores(0.5, 0.5, 0.0, 0.0)


def test_calibration_by_hand() -> None:
    prob_NL = torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)
    predictions = Predictions(torch.zeros(2), torch.tensor([0, 1]), prob_NL.max(dim=1).values, prob_NL)
    measured = measure_calibration(predictions, torch.tensor([0, 0]))
    assert measured is not None
    assert measured.ece == pytest.approx((0.2 + 0.6) / 2)
    assert measured.brier == pytest.approx((2 * 0.2**2 + 2 * 0.6**2) / 2)
    assert measured.nll == pytest.approx(-float(torch.log(torch.tensor([0.8, 0.4])).mean()))
    unstated = Predictions(torch.zeros(2), torch.tensor([0, 1]), None, None)
    assert measure_calibration(unstated, torch.tensor([0, 0])) is None


def test_the_reliability_bins_make_up_the_ece() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence_N = torch.rand(500, generator=generator, dtype=torch.float64)
    correct_N = torch.rand(500, generator=generator) < 0.5
    bins = reliability(confidence_N, correct_N)
    assert sum(count for count, *_ in bins) == 500
    ece = sum(count * abs(right - sure) for count, sure, right in bins) / 500
    assert ece == pytest.approx(expected_calibration_error(confidence_N, correct_N))


def test_mean_and_deviation_are_those_of_a_sample() -> None:
    assert mean_and_deviation([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1.0))
    assert mean_and_deviation([2.0]) == (2.0, 0.0)


class Scripted:
    """A method whose answers are the test: label k of every picture is written in its first feature."""

    saved_s = 0.0
    size_bytes = 8

    def __init__(self) -> None:
        self.num_learnt = 0

    def learn(self, task: ContinualTask) -> None:
        self.num_learnt += 1

    def predict(self, cls_ND: torch.Tensor) -> Predictions:
        return Predictions(cls_ND[:, 1].long(), cls_ND[:, 0].long(), None, None)

    def predict_within(self, cls_ND: torch.Tensor, task: int) -> Predictions:
        return Predictions(torch.full((len(cls_ND),), task), cls_ND[:, 2].long(), None, None)


def scripted_task(name: str, rows: list[tuple[int, int, int, int]]) -> ContinualTask:
    """Rows of (true label, predicted label, predicted task, label predicted within the task)."""
    features = make_features(name, num_classes=2, feature_dim=3)
    table = torch.tensor(rows)
    return ContinualTask(
        name, features, torch.tensor([0, 1]), table[:, 1:4][:, [0, 1, 2]].float(), table[:, 0]
    )


def test_a_run_measures_what_the_method_answers() -> None:
    first = scripted_task("a", [(0, 0, 0, 0), (1, 0, 0, 1)])
    second = scripted_task("b", [(2, 2, 1, 2), (2, 2, 0, 2), (3, 0, 0, 2), (3, 3, 1, 3)])
    run = run_method(Scripted(), [first, second])
    assert [step.accuracy for step in run.steps] == pytest.approx([1 / 2, 4 / 6])
    assert [step.accuracy_by_task for step in run.steps] == [(0.5,), (0.5, 0.75)]
    assert run.steps[-1].selection_accuracy == pytest.approx(4 / 6)
    assert run.steps[-1].accuracy_given_task == pytest.approx(5 / 6)
    assert run.steps[-1].num_classes == 4 and run.steps[-1].ece is None and run.reliability is None
    assert run.average_accuracy == pytest.approx((1 / 2 + 4 / 6) / 2)
    assert (run.forgetting, run.backward_transfer) == (0.0, 0.0)
    oracle = run_method(Scripted(), [first, second], told_task=True, every_step=False)
    assert oracle.last_accuracy == pytest.approx(5 / 6) and oracle.average_accuracy is None
    assert oracle.steps[0].selection_accuracy == 1.0 and len(oracle.steps) == 1


@pytest.mark.parametrize("name", ["fecam", "lda", "ranpac"])
def test_measuring_every_step_changes_no_last_figure(name: str) -> None:
    plan = small_plan((name,), (0,), [])
    every = run_benchmark(plan, BenchmarkResults(config=CONFIG), None)
    last = run_benchmark(
        Plan(*(getattr(plan, field) if field != "steps" else "last" for field in Plan.__dataclass_fields__)),
        BenchmarkResults(config=CONFIG),
        None,
    )
    assert every.runs[name]["0"].steps[-1] == last.runs[name]["0"].steps[-1]


# -- results file ------------------------------------------------------------------------------------


def test_a_second_run_computes_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, heard = tmp_path / "out.json", list[tuple[str, int]]()
    first = run_benchmark(small_plan(("lda", "simplecil"), (0, 1), heard), open_results(path, CONFIG), path)
    assert heard == [("lda", 0), ("simplecil", 0), ("lda", 1), ("simplecil", 1)]
    found = open_results(path, CONFIG)
    assert found == first

    def fail(*_: object, **__: object) -> RunResult:
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr(runner_module, "run_method", fail)
    assert run_benchmark(small_plan(("lda", "simplecil"), (0, 1), heard), found, path) == first
    assert len(heard) == 4


def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    path, heard = tmp_path / "out.json", list[tuple[str, int]]()
    run_benchmark(small_plan(("lda",), (0,), heard), open_results(path, CONFIG), path)
    run_benchmark(small_plan(("lda", "simplecil"), (0, 1), heard), open_results(path, CONFIG), path)
    assert heard == [("lda", 0), ("simplecil", 0), ("lda", 1), ("simplecil", 1)]
    assert open_results(path, CONFIG).summary["lda"]["last_accuracy"].num_seeds == 2


def test_chosen_methods_run_again() -> None:
    heard: list[tuple[str, int]] = []
    both = small_plan(("lda", "simplecil"), (0,), heard)
    results = run_benchmark(both, BenchmarkResults(config=CONFIG), None)
    run_benchmark(both, results.without(["lda"]), None)
    assert heard == [("lda", 0), ("simplecil", 0), ("lda", 0)]


def test_results_of_another_configuration_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    open_results(path, CONFIG).write(path)
    with pytest.raises(InvalidRequest, match="stream"):
        open_results(path, {"stream": "y"})
    path.write_text("{}")
    with pytest.raises(InvalidRequest, match="no results file"):
        open_results(path, CONFIG)


def test_unknown_methods_are_refused() -> None:
    assert check_methods(["lda", "default", "lda"]) == ("lda", "default")
    with pytest.raises(InvalidRequest, match="'magic'"):
        check_methods(["lda", "magic"])
    with pytest.raises(InvalidRequest, match="no method"):
        check_methods([])
    assert len(METHODS) == 11


# -- command line ------------------------------------------------------------------------------------


@pytest.fixture
def invoke(tmp_path: Path, tiny_store: ModelStore, tiny_artefact: BackboneArtefact) -> Callable[..., object]:
    def call(*arguments: str) -> dict[str, object]:
        place = ["--store", str(tmp_path / "store"), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
        result = CliRunner().invoke(bench, [*arguments, *place], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        found: dict[str, object] = json.loads((tmp_path / "out.json").read_text())
        return found

    return call


def test_a_stream_runs_from_pictures_to_plots(tmp_path: Path, invoke: Callable[..., dict[str, dict]]) -> None:
    for i, name in enumerate(("a", "b")):
        write_splits(tmp_path / "data" / name, train=4 + i, test=2)
    (tmp_path / "s.toml").write_text(
        'name = "s"\nscenario = "mixed"\ntasks = [{name = "a", folder = "a"}, {name = "b", folder = "b"}]\n'
    )
    found = invoke(
        *("continual", "--stream", str(tmp_path / "s.toml"), "--data", str(tmp_path / "data")),
        *(
            "--methods",
            "default,simplecil,joint_linear",
            "--seeds",
            "0,1",
            "--json",
            str(tmp_path / "out.json"),
        ),
        *("--plots", str(tmp_path / "plots")),
    )
    assert set(found["runs"]) == {"default", "simplecil", "joint_linear"}
    assert set(found["runs"]["default"]) == {"0", "1"}
    assert found["summary"]["default"]["last_accuracy"]["num_seeds"] == 2
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert plots == {
        "accuracy.png",
        "coverage.png",
        "reliability.png",
        "matrix-default.png",
        "matrix-simplecil.png",
        "matrix-joint_linear.png",
    }


def test_the_published_protocol_runs_on_a_small_folder(
    tmp_path: Path, invoke: Callable[..., dict[str, dict]]
) -> None:
    write_splits(tmp_path / "data", train=4, test=2)
    found = invoke(
        *("paper", "--dataset", "cub200", "--data", str(tmp_path / "data"), "--increment", "2"),
        *("--methods", "lda,ranpac", "--seeds", "1993,1994", "--json", str(tmp_path / "out.json")),
        *("--ranpac-width", "20"),
    )
    assert found["config"]["stream"]["split"] == {"folder": ".", "classes_per_task": 2}
    run = found["runs"]["lda"]["1993"]
    assert [step["num_classes"] for step in run["steps"]] == [2, 3]
    assert run["average_accuracy"] == pytest.approx(sum(step["accuracy"] for step in run["steps"]) / 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["paper", "--dataset", "mnist", "--data", "."],
        ["paper", "--dataset", "vtab", "--data", ".", "--order", "random"],
    ],
)
def test_wrong_options_are_usage_errors(arguments: list[str]) -> None:
    assert CliRunner().invoke(bench, arguments).exit_code == 2
