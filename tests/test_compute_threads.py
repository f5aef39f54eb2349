"""The same bytes and bits however many compute threads there are: processors, and so replicas, differ."""
# D features

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from random_modules import backbone_manifest, module_bytes, random_module
from synthetic import make_features
from torch import Tensor

from model_store.backbone import BackboneArtefact
from model_store.compute_threads import one_compute_thread
from model_store.publishing import Publisher
from model_store.store import ModelStore
from training.trainer import train_task

D = 768  # at which the products of more threads are summed in another order
Result = TypeVar("Result")


@contextlib.contextmanager
def compute_threads(num: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_one_and_two(work: Callable[[], Result]) -> list[Result]:
    results = []
    for num in (1, 2):
        with compute_threads(num):
            results.append(work())
            assert torch.get_num_threads() == num, "as it was"
    return results


def test_a_task_is_trained_to_the_same_bytes() -> None:
    features = make_features("shapes", feature_dim=D)
    one, two = with_one_and_two(lambda: train_task("shapes", features, backbone_manifest(D)).data)
    assert one == two


def test_a_bank_that_is_read_has_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BackboneArtefact, "verify", lambda _: None)
    store = ModelStore(tmp_path)
    store.publish_first(store.put_backbone(BackboneArtefact(backbone_manifest(D), b"nobody loads them")))
    files = {
        f"task{t}": store.put_module(module_bytes(random_module(f"task{t}", seed=t, feature_dim=D)))
        for t in range(3)
    }
    store.publish(lambda _: files, "three tasks")

    def metric_root() -> Tensor:
        selector = Publisher(ModelStore(tmp_path)).active.bank.selector
        assert selector is not None
        return selector.metric.root_DD

    one, two = with_one_and_two(metric_root)
    assert torch.equal(one, two)


def test_within_one_compute_thread_there_is_one() -> None:
    with compute_threads(2):
        with pytest.raises(ZeroDivisionError), one_compute_thread():
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
