"""`tosca train`: one task, or many in one run."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

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
from model_store.errors import InvalidDataset, ToscaError
from model_store.luca import FLOWS
from model_store.ray_session import ray_session, room_for_workers
from model_store.store import ModelStore
from training.destinations import Destination, FolderDestination, StoreDestination, write_file
from training.features import HashedSource, LabelledFeatures, the_only
from training.loading import (
    DEFAULT_CACHE,
    DEFAULT_MAX_CORRUPT,
    CacheOption,
    CorruptOption,
    RayOption,
    load_backbone,
    load_features_of_each,
    load_features_on_ray,
    load_hashes,
    num_threads,
)
from training.many import TaskOutcome, train_many
from training.plans import MAX_SEED, TaskPlan, read_plans
from training.recipes import RECIPES
from training.sources import open_source
from training.trainer import TrainedTask, check_names, train_task
from training.workers import TrainingPool, Workers

_REPORTS = Path(".tosca/reports")


def train(
    task: Annotated[str | None, typer.Option(help="Name of the task.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Image folder, .csv, .parquet, WebDataset .tar, or hf:NAME.")
    ] = None,
    many: Annotated[
        Path | None,
        typer.Option(
            help="A folder of tasks, or a .toml file that lists them, in place of --task and --data."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that train with --many (default: one a core).")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write the module file here instead of publishing; with --many, a folder."),
    ] = None,
    report: Annotated[Path, typer.Option(help="Folder for the report.")] = _REPORTS,
    recipe: Annotated[str, typer.Option(help=f"One of: {', '.join(RECIPES)}.")] = "default",
    flow: Annotated[str, typer.Option(help=f"One of: {', '.join(FLOWS)}.")] = "tosca",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED)] = 0,
    label_space: Annotated[
        str | None, typer.Option(help="Tasks that name the same space answer together about its labels.")
    ] = None,
    abstain_level: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Abstain at or below this p-value, whatever the server's level."),
    ] = None,
    min_images: Annotated[int, typer.Option(min=1, help="Training pictures every class needs.")] = 2,
    max_corrupt: CorruptOption = DEFAULT_MAX_CORRUPT,
    ray: RayOption = False,
    force: Annotated[
        bool, typer.Option(help="Publish even if another task loses more than the margin.")
    ] = False,
    cache: CacheOption = DEFAULT_CACHE,
    device: DeviceOption = "auto",
    runtime: RuntimeOption = "auto",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Train tasks on labelled pictures and publish them into the store.

    With --many every sub-folder is a task. Those that are there already and unchanged are left alone, one
    that fails does not stop the others, and the exit status is 1 if any failed.

    Example: tosca train --task birds --data pictures/birds

    Example: tosca train --many pictures

    Example: tosca train --many pictures --ray
    """
    like = TaskPlan(
        task or "",
        data or "",
        choose(recipe, RECIPES, "--recipe"),
        choose(flow, FLOWS, "--flow"),
        seed,
        label_space,
        abstain_level,
        min_images,
    )
    if many is not None:
        if task is not None or data is not None:
            raise typer.BadParameter("takes the place of --task and --data", param_hint="--many")
        plans = read_plans(many, like)
    elif task is None or data is None:
        raise typer.BadParameter("expected --task with --data, or --many", param_hint="--task")
    if output is not None and os.path.isdir(output) and many is None:  # noqa: PTH112  (never raises)
        raise typer.BadParameter(f"{output} is a folder, expected a file", param_hint="--output")
    if output is not None and os.path.isfile(output) and many is not None:  # noqa: PTH113
        raise typer.BadParameter(f"{output} is a file, expected a folder", param_hint="--output")
    run = _Run(ModelStore(store), cache, device, runtime, max_corrupt, report, output, force, json, ray)
    with ray_session() if ray else contextlib.nullcontext():
        if many is not None:
            _train_many(plans, run, workers or _num_workers(ray))
        else:
            _train_one(like, run)


@dataclass(frozen=True, slots=True)
class _Run:
    """Where a run reads and writes."""

    store: ModelStore
    cache: Path
    device: str
    runtime: str
    max_corrupt: float
    report: Path
    output: Path | None
    force: bool
    json: bool
    on_ray: bool


def _num_workers(on_ray: bool) -> int:
    return room_for_workers("cpu")[0] if on_ray else num_threads()


def _train_one(plan: TaskPlan, run: _Run) -> None:
    from training.report import write_report  # matplotlib takes a second to import

    source = open_source(plan.data, min_images_per_class=plan.min_images)
    check_names(plan.task, source.labels, plan.label_space)
    backbone = run.store.backbone_manifest(run.store.require_head().backbone_fingerprint)
    hashed = replace(load_hashes(source), min_images_per_class=plan.min_images)
    features = the_only(_features_of_each(run, iter([hashed])))
    _print_skipped(features.skipped)
    started = time.monotonic()
    trained = train_task(
        plan.task,
        features,
        backbone,
        recipe=plan.recipe,
        flow=plan.flow,
        seed=plan.seed,
        label_space=plan.label_space,
        abstain_level=plan.abstain_level,
    )
    seconds = time.monotonic() - started
    if run.output is not None:
        kept: dict[str, Any] = {"output": str(write_file(run.output, trained.data))}
    else:
        kept = StoreDestination(run.store, force=run.force).keep(plan.task, trained.data)
    page = None
    try:
        page = write_report(trained, run.report)
    except ToscaError as error:
        _warn(str(error))
    if run.json:
        print_json(
            {
                "report": page,
                "size_bytes": len(trained.data),
                **kept,
                "task": plan.task,
                "seconds": round(seconds, 3),
                "pictures": len(features.label_N),
                "features_computed": features.num_computed,
                "skipped": list(features.skipped),
                "metrics": trained.manifest.metrics,
            }
        )
        return
    out.print(
        f"{plan.task}: {len(features.labels)} classes, {len(features.label_N)} pictures "
        f"({features.num_computed} new features), trained in {seconds:.1f} s\n"
        f"held-out {_figures(trained)} ({trained.held_out.evidence})\n"
        + (f"report {page}\n" if page else "")
        + _where(kept)
    )


def _train_many(plans: Sequence[TaskPlan], run: _Run, num_workers: int) -> None:
    started = time.monotonic()
    destination: Destination = (
        FolderDestination(run.output)
        if run.output is not None
        else StoreDestination(run.store, force=run.force)
    )
    manifest = run.store.backbone_manifest(run.store.require_head().backbone_fingerprint)
    outcomes = []
    with _training_pool(min(num_workers, len(plans)), run) as workers:
        for outcome in train_many(
            plans,
            manifest,
            destination,
            hash_source=load_hashes,
            extract_each=partial(_features_of_each, run),
            report_folder=run.report.absolute(),
            workers=workers,
        ):
            _print_skipped(outcome.skipped)
            if isinstance(outcome.report, str):
                _warn(f"{outcome.task}: {outcome.report}")
            if outcome.fault is not None:
                err.print(f"{outcome.task}: {outcome.fault}", style="red")
            outcomes.append(outcome)
    seconds = time.monotonic() - started
    failed = [one.task for one in outcomes if one.status == "failed"]
    if run.json:
        print_json({"tasks": [_as_json(one) for one in outcomes], "seconds": round(seconds, 3)})
    else:
        print_table(
            [
                "task",
                "status",
                "classes",
                "pictures",
                "new features",
                "accuracy",
                "ECE",
                "trained in",
                "where",
            ],
            (_row(one) for one in outcomes),
        )
        out.print(f"{len(outcomes)} tasks in {seconds:.1f} s, {len(failed)} failed")
    if failed:
        raise typer.Exit(1)


def _training_pool(num_workers: int, run: _Run) -> contextlib.AbstractContextManager[TrainingPool]:
    if not run.on_ray:
        return Workers(num_workers)
    from training.ray_workers import RayWorkers

    return contextlib.nullcontext(RayWorkers(num_workers))


def _features_of_each(
    run: _Run, sources: Iterator[HashedSource]
) -> Iterator[LabelledFeatures | InvalidDataset]:
    """Loads the backbone, which takes seconds, when the first source is there that wants features."""
    first = next(sources, None)
    if first is None:
        return
    wanted = chain([first], sources)
    if run.on_ray:
        yield from load_features_on_ray(
            wanted, run.store, run.device, run.runtime, run.cache, run.max_corrupt
        )
    else:
        backbone = load_backbone(run.store, run.device, run.runtime)
        yield from load_features_of_each(wanted, backbone, run.cache, run.max_corrupt)


def _row(outcome: TaskOutcome) -> list[object]:
    manifest, is_new = outcome.manifest, outcome.status == "trained"
    metrics = manifest.metrics if manifest else {}
    where = outcome.kept.get("output") or f"revision {outcome.kept.get('revision')}"
    return [
        outcome.task,
        outcome.status,
        len(manifest.labels) if manifest else "–",
        outcome.num_pictures if is_new else "–",
        outcome.num_computed if is_new else "–",
        *(f"{metrics[name]:.4f}" if name in metrics else "–" for name in ("accuracy", "ece")),
        f"{outcome.seconds:.1f} s" if is_new else "–",
        where if is_new else "–",
    ]


def _as_json(outcome: TaskOutcome) -> dict[str, Any]:
    found: dict[str, Any] = {
        "task": outcome.task,
        "status": outcome.status,
        "skipped": list(outcome.skipped),
        **outcome.kept,
    }
    if outcome.fault is not None:
        found["fault"] = outcome.fault
    if outcome.manifest is not None:
        found["metrics"] = outcome.manifest.metrics
    if outcome.status == "trained":
        found |= {
            "seconds": round(outcome.seconds, 3),
            "pictures": outcome.num_pictures,
            "features_computed": outcome.num_computed,
            "report": outcome.report if isinstance(outcome.report, Path) else None,
        }
    return found


def _warn(fault: str) -> None:
    err.print(f"warning: {fault}", style="yellow")


def _print_skipped(skipped: Sequence[str]) -> None:
    for line in skipped:
        err.print(f"skipped {line}", style="yellow")


def _where(kept: dict[str, Any]) -> str:
    """What a destination says, for people."""
    if "output" in kept:
        return f"wrote {kept['output']}"
    if kept["published"]:
        return f"published as revision {kept['revision']}"
    return f"nothing published; the store stays at revision {kept['revision']}"


def _figures(trained: TrainedTask) -> str:
    return (
        ", ".join(f"{name} {value:.4g}" for name, value in trained.manifest.metrics.items())
        or "figures: none"
    )
