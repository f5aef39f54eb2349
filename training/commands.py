"""`tosca train`, `tosca evaluate` and `tosca demo`."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

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
    err,
    out,
    print_json,
    print_table,
)
from model_store.luca import FLOWS
from model_store.measuring import Plan, tune
from model_store.parity import read_labelled
from model_store.publishing import Publisher
from model_store.selection import SELECTIONS
from model_store.store import ModelStore
from model_store.tune_command import print_measurements
from model_store.tuning import hardware_name
from training.continual import commands as continual_commands
from training.demo import write_demo_pictures
from training.evaluation import evaluate_bank
from training.loading import (
    DEFAULT_CACHE,
    DEFAULT_MAX_CORRUPT,
    CacheOption,
    load_backbone,
    load_features,
)
from training.recipes import RECIPES
from training.sources import PictureSource, open_source
from training.trainer import TrainedTask, check_names, train_task

# The demo's tuning is a short one: enough to tell a sound runtime from a damaged one, and a fast from a slow.
_TUNING_RUNTIMES = (
    "torch-float32",
    "torch-bfloat16",
    "onnxruntime-float32",
    "openvino-int8",
    "openvino-int8-bfloat16",
)
_TUNING_PICTURES, _TUNING_BATCH_SIZE, _TUNING_ROUNDS = 24, 8, 2
CorruptOption = Annotated[
    float, typer.Option("--max-corrupt", min=0.0, max=1.0, help="Share of unreadable pictures tolerated.")
]


def register(app: typer.Typer) -> None:
    """Add this package's commands to `tosca`."""
    app.command()(train)
    app.command()(evaluate)
    app.command()(demo)
    continual_commands.register(app)


def train(
    task: Annotated[str, typer.Option(help="Name of the task.")],
    data: Annotated[
        Path, typer.Option(help="Image folder, or .csv / .parquet manifest with path and label.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Write the module file here instead of publishing.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for the report (default .tosca/reports).")
    ] = None,
    recipe: Annotated[str, typer.Option(help=f"One of: {', '.join(RECIPES)}.")] = "default",
    flow: Annotated[str, typer.Option(help=f"One of: {', '.join(FLOWS)}.")] = "tosca",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    label_space: Annotated[
        str | None, typer.Option(help="Tasks that name the same space answer together about its labels.")
    ] = None,
    abstain_level: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Abstain at or below this p-value, whatever the server's level."),
    ] = None,
    min_images: Annotated[int, typer.Option(min=1, help="Training pictures every class needs.")] = 2,
    max_corrupt: CorruptOption = DEFAULT_MAX_CORRUPT,
    force: Annotated[
        bool, typer.Option(help="Publish even if another task loses more than the margin.")
    ] = False,
    cache: CacheOption = DEFAULT_CACHE,
    device: DeviceOption = "auto",
    runtime: RuntimeOption = "auto",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Train one task on labelled pictures and publish it into the store.

    Example: tosca train --task birds --data pictures/birds
    """
    chosen_recipe = choose(recipe, RECIPES, "--recipe")
    chosen_flow = choose(flow, FLOWS, "--flow")
    source = open_source(data, min_images_per_class=min_images)
    check_names(task, source.labels, label_space)
    opened = ModelStore(store)
    backbone = load_backbone(opened, device, runtime)
    features = load_features(source, backbone, cache, max_corrupt)
    for line in features.skipped:
        err.print(f"skipped {line}", style="yellow")
    started = time.monotonic()
    trained = train_task(
        task,
        features,
        backbone.manifest,
        recipe=chosen_recipe,
        flow=chosen_flow,
        seed=seed,
        label_space=label_space,
        abstain_level=abstain_level,
    )
    seconds = time.monotonic() - started
    result = _keep(trained, opened, output, report or Path(".tosca/reports"), force)
    result |= {
        "task": task,
        "seconds": round(seconds, 3),
        "pictures": len(features.label_N),
        "features_computed": features.num_computed,
        "skipped": list(features.skipped),
        "metrics": trained.manifest.metrics,
    }
    if json:
        print_json(result)
        return
    out.print(
        f"{task}: {len(features.labels)} classes, {len(features.label_N)} pictures "
        f"({features.num_computed} new features), trained in {seconds:.1f} s\n"
        f"held-out {_figures(trained)} ({trained.held_out.evidence})\n"
        f"report {result['report']}\n"
        + (f"wrote {output}" if output else f"published as revision {result['revision']}")
    )


def _figures(trained: TrainedTask) -> str:
    return (
        ", ".join(f"{name} {value:.4g}" for name, value in trained.manifest.metrics.items())
        or "figures: none"
    )


def _keep(
    trained: TrainedTask, store: ModelStore, output: Path | None, report: Path, force: bool
) -> dict[str, Any]:
    from training.report import write_report  # matplotlib takes a second to import

    page = write_report(trained, report)
    result: dict[str, Any] = {"report": str(page), "size_bytes": len(trained.data)}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(trained.data)
        return result | {"output": str(output)}
    outcome = Publisher(store).register(trained.data, force=force, reason=f"train {trained.manifest.task}")
    return result | {"revision": outcome.active.revision.number}


def evaluate(
    data: Annotated[list[str], typer.Option(help="TASK=SOURCE, repeated; a test split is used alone.")],
    selection: Annotated[str, typer.Option(help=f"One of: {', '.join(SELECTIONS)}.")] = "lda",
    revision: Annotated[int | None, typer.Option(help="A revision other than the newest.")] = None,
    max_corrupt: CorruptOption = DEFAULT_MAX_CORRUPT,
    cache: CacheOption = DEFAULT_CACHE,
    device: DeviceOption = "auto",
    runtime: RuntimeOption = "auto",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Answer labelled pictures with a store's bank and report the decomposition.

    Example: tosca evaluate --data birds=pictures/birds --data parts=pictures/parts
    """
    chosen = choose(selection, SELECTIONS, "--selection")
    named = dict(_split_data(one) for one in data)
    sources = {task: open_source(path, to_train=False) for task, path in named.items()}
    opened = ModelStore(store)
    backbone = load_backbone(opened, device, runtime)
    bank = Publisher(opened, revision=revision).active.bank
    features = {
        task: load_features(_test_part(source), backbone, cache, max_corrupt)
        for task, source in sources.items()
    }
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
    missing = [task for task in pictures if task not in opened.require_head().tasks]
    backbone = load_backbone(opened, device, runtime) if missing else None
    for task in missing:
        assert backbone is not None, "loaded when something is missing"
        features = load_features(open_source(pictures[task]), backbone, cache, 0.0)
        trained = train_task(task, features, backbone.manifest)
        _keep(trained, opened, None, folder / "reports", force=False)
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
    print_measurements(tuned.tuning.table)


def _test_part(source: PictureSource) -> PictureSource:
    """The test split of a source that has one, so that no feature is computed in vain."""
    test = tuple(one for one in source.pictures if one.split == "test")
    return PictureSource(source.name, test, source.labels) if test else source


def _split_data(text: str) -> tuple[str, Path]:
    task, separator, path = text.partition("=")
    if not separator or not task or not path:
        raise typer.BadParameter(f"{text!r}: expected TASK=SOURCE", param_hint="--data")
    return task, Path(path)
