"""A module that passes every check and gives no numbers: its weights overflow on pictures, not on what is checked."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from pictures import encoded, noise
from random_modules import module_bytes, random_module, without_calibration
from starlette.testclient import TestClient

from model_store.backbone import Backbone
from model_store.errors import InvalidModule
from model_store.impact import ImpactReport, TaskHealth, TaskImpact
from model_store.publishing import Publisher, _check_finite
from model_store.statistics import ClassStatistics
from model_store.store import ModelStore
from model_store.task_module import TaskModule
from service.app import create_app
from service.settings import Settings

MakeModule = Callable[..., bytes]
PICTURES = [encoded(noise(colour=i % 5, seed=i, spread=20 * i + 5)) for i in range(12)]


def overflowing(task: str, feature_dim: int, statistics: ClassStatistics | None = None) -> TaskModule:
    """Head rows orthogonal to the class means and an enormous scale: finite there, infinite elsewhere."""
    module = without_calibration(
        random_module(task, feature_dim=feature_dim, luca_weight=1e3, ridge_weight=0.0, num_classes=3)
    )
    module = dataclasses.replace(module, statistics=statistics or module.statistics)
    with torch.no_grad():
        on_means_KD = module.luca_output(module.statistics.mean_KD)
        basis_DK = torch.linalg.qr(on_means_KD.T).Q
        weight_KD = module.head.weight_KD
        weight_KD -= (weight_KD @ basis_DK) @ basis_DK.T
        weight_KD.copy_(weight_KD.half().float())
        module.head.scale.fill_(1e38)
    return module


@pytest.fixture
def hostile(tiny_backbone: Backbone) -> bytes:
    return module_bytes(overflowing("hostile", tiny_backbone.feature_dim), tiny_backbone.manifest)


def test_the_attack_passes_the_checks(hostile: bytes, tiny_store: ModelStore) -> None:
    assert Publisher(tiny_store).admit(hostile).manifest.task == "hostile"


def test_no_answer_of_it_holds_a_nan(hostile: bytes, tiny_store: ModelStore, tiny_backbone: Backbone) -> None:
    with TestClient(create_app(Settings(store=tiny_store.url), tiny_backbone)) as client:
        assert client.post("/tasks", content=hostile).status_code == 201
        responses = [client.post("/predict", content=one) for one in PICTURES]
        assert {one.status_code for one in responses} <= {200, 500}
        refused = [one for one in responses if one.status_code == 500]
        assert refused
        assert {one.json()["type"] for one in refused} == {"urn:tosca:problem:not-finite"}
        assert not any("NaN" in one.text for one in responses)
        assert client.get("/health/live").status_code == 200
        assert client.delete("/tasks/hostile").status_code == 200


def test_where_it_wins_pictures_of_another_task_it_is_refused(
    tiny_store: ModelStore, tiny_backbone: Backbone, make_module: MakeModule
) -> None:
    """It claims the statistics of birds, so that it is asked about the calibration set of birds, too."""
    publisher = Publisher(tiny_store)
    birds = publisher.register(make_module("birds")).active.files["birds"].module
    twin = overflowing("twin", tiny_backbone.feature_dim, birds.statistics)
    before = publisher.active
    with pytest.raises(InvalidModule, match="not finite"):
        publisher.register(module_bytes(twin, tiny_backbone.manifest), force=True)
    assert publisher.active is before
    assert tiny_store.head_number() == before.revision.number


def test_an_impact_that_is_no_number_refuses_the_change() -> None:
    healthy = TaskHealth(1.0, 1.0, 0.1, 4)
    good = TaskImpact("birds", healthy, healthy)
    _check_finite(ImpactReport((good,)))
    bad = dataclasses.replace(good, task="cars", after=dataclasses.replace(healthy, ece=float("nan")))
    with pytest.raises(InvalidModule, match="'cars'"):
        _check_finite(ImpactReport((good, bad)))


def test_a_class_mean_far_from_its_pictures_is_no_fault_of_ours(
    tiny_store: ModelStore, tiny_backbone: Backbone
) -> None:
    """One class, so that it lies where the centre is; taking a vector out of it may leave nothing to invert."""
    module = random_module(
        "far", seed=1, num_classes=1, per_class=2, num_calibration=2, feature_dim=tiny_backbone.feature_dim
    )
    with TestClient(create_app(Settings(store=tiny_store.url), tiny_backbone)) as client:

        def status(value: float) -> int:
            mean_KD = module.statistics.mean_KD.clone()
            mean_KD[0, 0] = value
            far = dataclasses.replace(
                module, statistics=dataclasses.replace(module.statistics, mean_KD=mean_KD)
            )
            data = module_bytes(far, tiny_backbone.manifest)
            return client.post("/tasks", content=data, params={"dry_run": True}).status_code

        assert status(1.0) == 200
        assert {status(10.0**exponent) for exponent in range(4, 20)} <= {200, 422}
