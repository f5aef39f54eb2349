"""The oracle: whatever order changes come in and whoever makes them, every answer is that of its receipt."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pictures import encoded, noise
from starlette.testclient import TestClient

from model_store.backbone import Backbone, BackboneArtefact
from model_store.bank import ModuleBank
from model_store.preprocess import ImageLimits, load_pixels
from model_store.publishing import Publisher
from model_store.replay import GivenAnswer, Replayed, differences
from model_store.store import ModelStore, with_task, without_task
from service.app import create_app
from service.settings import DEFAULT_ABSTAIN_LEVEL, Settings

TASKS = ("birds", "cars", "planes")
VERSIONS = (0, 1)
PICTURES = [encoded(noise(colour=i, seed=i, size=(36, 40))) for i in range(4)]

tasks = st.sampled_from(TASKS)
versions = st.sampled_from(VERSIONS)


class Churn(RuleBasedStateMachine):
    """A running service, a second writer on its store, and the sets of tasks that ought to be active."""

    backbone: ClassVar[Backbone]
    artefact: ClassVar[BackboneArtefact]
    modules: ClassVar[Mapping[tuple[str, int], bytes]]

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.store = ModelStore(self.folder)
        self.store.publish_first(self.store.put_backbone(self.artefact))
        self.sets: dict[int, Mapping[str, str]] = {1: {}}
        self.banks: dict[int, ModuleBank] = {}
        self.answers_of_set: dict[tuple[Any, int], tuple[Any, ...]] = {}
        settings = Settings(store=self.store.url, store_poll_s=0.0)
        self.client = TestClient(create_app(settings, self.backbone))
        self.client.__enter__()
        self.cls = [
            self.backbone.embed(load_pixels(one, self.backbone.preprocessing, ImageLimits()).unsqueeze(0))
            for one in PICTURES
        ]

    def teardown(self) -> None:
        if hasattr(self, "client"):
            self.client.__exit__(None, None, None)
            shutil.rmtree(self.folder)

    @property
    def head(self) -> int:
        return max(self.sets)

    def _changed(self, response: Any, tasks: Mapping[str, str]) -> None:
        """A change by the service is acknowledged with the revision that holds it, and only if it is one."""
        assert response.is_success, response.text
        change = response.json()
        if tasks == self.sets[self.head]:
            assert not change["published"]
        else:
            self.sets[self.head + 1] = tasks
        assert change["revision"] == self.head
        assert self.store.require_head().tasks == tasks

    @rule(task=tasks, version=versions)
    def register(self, task: str, version: int) -> None:
        data = self.modules[task, version]
        response = self.client.post("/tasks", content=data, params={"force": True})
        sha256 = self.store.put_module(data)
        self._changed(response, {**self.sets[self.head], task: sha256})

    @precondition(lambda self: self.sets[self.head])
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(sorted(self.sets[self.head])))
        left = {name: sha256 for name, sha256 in self.sets[self.head].items() if name != task}
        self._changed(self.client.delete(f"/tasks/{task}"), left)

    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.sets)))
        self._changed(self.client.post(f"/revisions/{number}/rollback"), self.sets[number])

    @rule(task=tasks, version=versions)
    def another_writer_adds(self, task: str, version: int) -> None:
        other = ModelStore(self.store.url, author="another")
        sha256 = other.put_module(self.modules[task, version])
        revision = other.publish(with_task(task, sha256), "by another")
        self.sets[revision.number] = dict(revision.tasks)

    @precondition(lambda self: self.sets[self.head])
    @rule(data=st.data())
    def another_writer_removes(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(sorted(self.sets[self.head])))
        revision = ModelStore(self.store.url).publish(without_task(task), "by another")
        self.sets[revision.number] = dict(revision.tasks)

    @rule(index=st.integers(0, len(PICTURES) - 1), top_k=st.sampled_from((1, 3)))
    def predict(self, index: int, top_k: int) -> None:
        response = self.client.post("/predict", content=PICTURES[index], params={"top_k": top_k})
        if response.status_code == 422:
            assert "no task is registered" in response.text
            return
        assert response.status_code == 200, response.text
        given = GivenAnswer.model_validate(response.json()["predictions"][0])
        revision = given.receipt.revision
        if revision not in self.banks:
            self.banks[revision] = Publisher(ModelStore(self.store.url), revision=revision).active.bank
        asked = {"top_k": top_k, "abstain_level": DEFAULT_ABSTAIN_LEVEL}
        bank = self.banks[revision]
        offline = Replayed.of(bank.answer(self.cls[index], **asked)[0], bank, **asked)
        assert differences(given, offline) == []
        assert given.receipt.module_sha256 == self.sets[revision][given.task]
        self._check_same_as_before(index, top_k, given)

    def _check_same_as_before(self, index: int, top_k: int, given: GivenAnswer) -> None:
        """The same set of tasks gives the same bits, whatever came and went in between."""
        if top_k != 1:
            return
        key = (frozenset(self.sets[given.receipt.revision].items()), index)
        answer = (given.task, given.label, given.confidence, given.receipt.module_sha256)
        assert self.answers_of_set.setdefault(key, answer) == answer

    @invariant()
    def the_service_is_never_ahead_of_the_store_and_lists_what_it_serves(self) -> None:
        if not hasattr(self, "client"):
            return
        listed = self.client.get("/tasks").json()
        assert listed["revision"] <= self.head
        served = {one["task"]: one["module_sha256"] for one in listed["tasks"]}
        assert served == self.sets[listed["revision"]]


@pytest.fixture
def churn(
    tiny_backbone: Backbone, tiny_artefact: BackboneArtefact, make_module: Callable[..., bytes]
) -> type[Churn]:
    Churn.backbone = tiny_backbone
    Churn.artefact = tiny_artefact
    Churn.modules = {
        (task, version): make_module(task, seed=10 * i + version)
        for i, task in enumerate(TASKS)
        for version in VERSIONS
    }
    return Churn


def run(machine: type[Churn], max_examples: int, steps: int) -> None:
    hypothesis.stateful.run_state_machine_as_test(
        machine,
        settings=hypothesis.settings(
            max_examples=max_examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )


def test_every_answer_is_that_of_its_receipt(churn: type[Churn]) -> None:
    run(churn, max_examples=6, steps=15)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_answer_is_that_of_its_receipt_in_many_orders(churn: type[Churn]) -> None:
    run(churn, max_examples=150, steps=40)
