"""`tosca evaluate` and `tosca demo`, and what this package adds to `tosca`."""

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from model_store import backbone_sources
from model_store.backbone import resolve_device
from model_store.console import (
    DEFAULT_STORE,
    DeviceOption,
    JsonOption,
    RuntimeOption,
    StoreOption,
    choose,
    out,
    print_json,
    print_table,
)
from model_store.errors import InvalidDataset
from model_store.measuring import Plan, tune
from model_store.parity import read_labelled
from model_store.publishing import Publisher
from model_store.ray_session import ray_session
from model_store.selection import SELECTIONS
from model_store.store import ModelStore
from model_store.tune_command import print_measurements
from model_store.tuning import hardware_name
from training.continual import commands as continual_commands
from training.demo import write_demo_pictures
from training.destinations import StoreDestination
from training.evaluation import evaluate_bank
from training.loading import (
    DEFAULT_CACHE,
    DEFAULT_MAX_CORRUPT,
    CacheOption,
    CorruptOption,
    RayOption,
    load_backbone,
    load_features,
    load_features_of_each,
    load_features_on_ray,
    load_hashes,
)
from training.pictures import PictureSource
from training.sources import open_source
from training.train_command import train
from training.trainer import train_task

# The demo's tuning is a short one: enough to tell a sound runtime from a damaged one, and a fast from a slow.
_TUNING_RUNTIMES = (
    "torch-float32",
    "torch-bfloat16",
    "onnxruntime-float32",
    "openvino-int8",
    "openvino-int8-bfloat16",
)
_TUNING_PICTURES, _TUNING_BATCH_SIZE, _TUNING_ROUNDS = 24, 8, 2


def register(app: typer.Typer) -> None:
    """Add this package's commands to `tosca`."""
    app.command()(train)
    app.command()(evaluate)
    app.command()(demo)
    continual_commands.register(app)


def evaluate(
    data: Annotated[list[str], typer.Option(help="TASK=SOURCE, repeated; a test split is used alone.")],
    selection: Annotated[str, typer.Option(help=f"One of: {', '.join(SELECTIONS)}.")] = "lda",
    revision: Annotated[int | None, typer.Option(help="A revision other than the newest.")] = None,
    ray: RayOption = False,
    max_corrupt: CorruptOption = DEFAULT_MAX_CORRUPT,
    cache: CacheOption = DEFAULT_CACHE,
    device: DeviceOption = "auto",
    runtime: RuntimeOption = "auto",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Answer labelled pictures with a store's bank and report the decomposition.

    Example: tosca evaluate --data birds=pictures/birds --data parts=pictures/parts

    Example: tosca evaluate --data birds=pictures/birds --ray
    """
    chosen = choose(selection, SELECTIONS, "--selection")
    named = _by_task(data)
    sources = {task: open_source(path, to_train=False) for task, path in named.items()}
    opened = ModelStore(store)
    bank = Publisher(opened, revision=revision).active.bank
    hashed = (load_hashes(_test_part(source)) for source in sources.values())
    features = {}
    with ray_session() if ray else contextlib.nullcontext():
        if ray:
            found = load_features_on_ray(hashed, opened, device, runtime, cache, max_corrupt)
        else:
            backbone = load_backbone(opened, device, runtime)
            found = load_features_of_each(hashed, backbone, cache, max_corrupt)
        for task, one in zip(sources, found, strict=True):
            if isinstance(one, InvalidDataset):
                raise one
            features[task] = one
    overall, by_task = evaluate_bank(bank, features, chosen)
    if json:
        print_json(
            {
                "revision": bank.revision,
                "selection": chosen,
                "overall": asdict(overall),
                "tasks": {task: asdict(one) for task, one in by_task.items()},
            }
        )
        return
    print_table(
        ["task", "pictures", "right task", "right class given task", "end to end", "LDA alone", "ECE"],
        (
            (
                task,
                one.num_pictures,
                f"{one.selection_accuracy:.4f}",
                f"{one.accuracy_given_task:.4f}",
                f"{one.accuracy:.4f}",
                f"{one.lda_accuracy:.4f}",
                f"{one.ece:.4f}",
            )
            for task, one in [*by_task.items(), ("all", overall)]
        ),
    )


def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo pictures are written.")] = Path(".tosca/demo"),
    cache: CacheOption = DEFAULT_CACHE,
    store: StoreOption = DEFAULT_STORE,
    device: DeviceOption = "auto",
    runtime: RuntimeOption = "auto",
) -> None:
    """Add the default backbone, choose its runtime and train the demo tasks, unless that was done already.

    Example: tosca demo --store .tosca/store
    """
    opened = ModelStore(store)
    if opened.head() is None:
        out.print("adding the default backbone, CLIP ViT-B/16 …")
        opened.publish_first(opened.put_backbone(backbone_sources.from_clip_wheel()))
    pictures = write_demo_pictures(folder)
    _tune_once(opened, pictures, device)
    from training.report import write_report  # matplotlib takes a second to import

    missing = [task for task in pictures if task not in opened.require_head().tasks]
    backbone = load_backbone(opened, device, runtime) if missing else None
    for task in missing:
        assert backbone is not None, "loaded when something is missing"
        features = load_features(open_source(pictures[task]), backbone, cache, 0.0)
        trained = train_task(task, features, backbone.manifest)
        StoreDestination(opened, force=False).keep(task, trained.data)
        write_report(trained, folder / "reports")
        out.print(f"demo task {task}: test accuracy {trained.held_out.accuracy:.3f}")


def _tune_once(store: ModelStore, pictures: dict[str, Path], device: str) -> None:
    """Choose the runtime by measuring on the demo's pictures, where this hardware has no tuning yet."""
    fingerprint = store.require_head().backbone_fingerprint
    if store.tuning(fingerprint, hardware_name(resolve_device(device))) is not None:
        return
    out.print("measuring the runtimes of the backbone on this machine …")
    artefact = store.backbone(fingerprint)
    labelled = read_labelled(pictures, artefact.manifest.preprocessing, max_pictures=_TUNING_PICTURES)
    plan = Plan(_TUNING_RUNTIMES, device, (_TUNING_BATCH_SIZE,), _TUNING_ROUNDS)
    tuned = tune(artefact, labelled, plan)
    store.put_tuning(tuned.tuning, tuned.export)
    print_measurements(tuned.tuning)


def _test_part(source: PictureSource) -> PictureSource:
    """The test split of a source that has one, so that no feature is computed in vain."""
    test = tuple(one for one in source.pictures if one.split == "test")
    return PictureSource(source.name, test, source.labels) if test else source


def _by_task(data: list[str]) -> dict[str, str]:
    sources: dict[str, str] = {}
    for text in data:
        task, separator, path = text.partition("=")
        if not separator or not task or not path:
            raise typer.BadParameter(f"{text!r}: expected TASK=SOURCE", param_hint="--data")
        if task in sources:
            raise typer.BadParameter(f"task {task!r} is named twice", param_hint="--data")
        sources[task] = path
    return sources
