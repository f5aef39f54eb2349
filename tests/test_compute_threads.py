"""The same bytes and bits however many compute threads there are: processors, and so replicas, differ."""
# D features

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import torch
from pictures import encoded, noise
from random_modules import backbone_manifest, module_bytes, random_module
from synthetic import make_features
from torch import Tensor

import service.app
from model_store.backbone import Backbone, BackboneArtefact
from model_store.compute_threads import one_compute_thread
from model_store.publishing import Publisher
from model_store.store import ModelStore, with_task
from service.settings import Settings
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


def test_passes_have_their_threads_though_another_begins_to_compute_by_itself_at_the_start(
    tiny_store: ModelStore,
    tiny_backbone: Backbone,
    make_module: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loader may be at that very point when the serving thread computes for the first time."""
    tiny_store.publish(with_task("birds", tiny_store.put_module(make_module("birds"))), "add birds")
    load = service.app._load

    def load_and_be_at_that_point(*given: Any) -> Any:
        engine, registry = load(*given)
        registry._loader.submit(int).result()  # its own beginning is over
        torch.set_num_threads(1)
        return engine, registry

    async def threads_of_passes() -> list[int]:
        seen = []

        def counted(pixels_BCHW: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return embed(pixels_BCHW)

        embed = tiny_backbone.embed
        monkeypatch.setattr(tiny_backbone, "embed", counted)
        app = service.app.create_app(Settings(store=tiny_store.url, replica_heartbeat_s=0), tiny_backbone)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                response = await client.post("/predict", content=encoded(noise(0)))
        assert response.status_code == 200, response.text
        return seen

    monkeypatch.setattr(service.app, "_load", load_and_be_at_that_point)
    with compute_threads(2), ThreadPoolExecutor(1) as serving:
        assert serving.submit(asyncio.run, threads_of_passes()).result()[-1] == 2
