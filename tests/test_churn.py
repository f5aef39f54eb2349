"""Promise 1: any answer equals the offline result for the revision in its receipt, under churn."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from churn import churn, find_mismatches
from serving import running_server
from synthetic import DEMO_PICTURES

from model_store.backbone import Backbone
from model_store.module_file import read_module
from model_store.store import ModelStore, with_task
from training.feature_cache import FeatureCache
from training.features import extract_features
from training.sources import open_source
from training.trainer import train_task


def demo_pictures(num_per_class: int = 2) -> list[bytes]:
    folders = sorted(DEMO_PICTURES.glob("*/test/*"))
    return [path.read_bytes() for folder in folders for path in sorted(folder.iterdir())[:num_per_class]]


def test_answers_equal_their_receipts_while_tasks_come_and_go(
    tiny_store: ModelStore, tiny_backbone: Backbone, make_module: Callable[..., bytes], tmp_path: Path
) -> None:
    base = tiny_store.put_module(make_module("base", seed=9))
    tiny_store.publish(with_task("base", base), "add base")
    modules = {f"task{i}": make_module(f"task{i}", seed=i) for i in range(4)}
    pictures = demo_pictures()
    with running_server(tiny_store.url, tmp_path / "log") as server:
        result = churn(server.url, pictures, modules, num_clients=4, num_changes=24, duration_s=3.0)
    assert result.failures == []
    assert len({answer["receipt"]["revision"] for _, answer in result.answers}) > 5
    mismatches = find_mismatches(tiny_store, tiny_backbone, pictures, result.answers)
    assert mismatches == [], "\n".join(mismatches[:5])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_minute_of_churn_on_the_real_backbone(
    demo_store: ModelStore, clip_backbone: Backbone, tmp_path: Path
) -> None:
    """8 clients, 60 s, 50 registrations and removals of variants of the real demo tasks."""
    store = ModelStore(tmp_path / "store")
    head = demo_store.require_head()
    store.publish_first(store.put_backbone(demo_store.backbone(head.backbone_fingerprint)))
    for task, sha256 in head.tasks.items():
        store.publish(with_task(task, store.put_module(demo_store.module(sha256))), f"add {task}")
    modules = _variants(clip_backbone, tmp_path)
    pictures = demo_pictures(4)
    with running_server(store.url, tmp_path / "log") as server:
        result = churn(server.url, pictures, modules, num_clients=8, num_changes=50, duration_s=60.0)
    mismatches = find_mismatches(store, clip_backbone, pictures, result.answers)
    print(json.dumps({**result.summary(), "mismatches": len(mismatches)}))
    assert result.failures == []
    assert mismatches == []
    assert result.num_registered + result.num_removed == 50


def _variants(backbone: Backbone, folder: Path) -> dict[str, bytes]:
    """Six further tasks: the demo tasks with other seeds and on shifted features, under other names."""
    cache = FeatureCache(Path(".tosca/cache"), backbone.fingerprint, backbone.variant, backbone.feature_dim)
    modules = {}
    for task in ("digits", "textiles"):
        features = extract_features(open_source(DEMO_PICTURES / task), backbone, cache, show_progress=False)
        for seed in range(1, 4):
            generator = torch.Generator().manual_seed(seed)
            shift = 0.3 * torch.randn(features.cls_ND.shape, generator=generator)
            name = f"{task}-{seed}"
            shifted = replace(features, cls_ND=features.cls_ND + shift)
            modules[name] = train_task(name, shifted, backbone.manifest, seed=seed).data
            assert read_module(modules[name]).manifest.task == name
    return modules
