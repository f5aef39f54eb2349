"""`tosca bench continual`, `tosca bench paper` and `tosca bench sparsity`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from model_store.backbone import Backbone
from model_store.console import (
    DEFAULT_STORE,
    DeviceOption,
    RuntimeOption,
    StoreOption,
    err,
    out,
    print_table,
)
from model_store.store import ModelStore
from training.continual.protocol import ARCHITECTURE, DATASETS, SEEDS, paper_stream
from training.continual.random_ridge import PUBLISHED_WIDTH
from training.continual.registry import METHODS, check_methods
from training.continual.results import RunResult, Steps, open_results
from training.continual.runner import Plan, run_benchmark
from training.continual.sources import open_stream
from training.continual.sparsity import SparsityResult, sparsity_curve
from training.continual.streams import Order, Stream, read_stream
from training.continual.table import TABLE_WIDTH, results_table
from training.continual.tasks import arrange
from training.loading import DEFAULT_CACHE, CacheOption, load_backbone, load_features
from training.pictures import PictureSource

_ALL_METHODS = ",".join(METHODS)
_PAPER_SEEDS = ",".join(str(seed) for seed in SEEDS)
MethodsOption = Annotated[
    str, typer.Option("--methods", help=f"Names with commas between, of: {', '.join(METHODS)}.")
]
SeedsOption = Annotated[str, typer.Option("--seeds", help="Numbers with commas between.")]
StepsOption = Annotated[str, typer.Option("--steps", help="Measure after `all` tasks or the `last` alone.")]
ResultsOption = Annotated[Path | None, typer.Option("--json", help="Results file; an existing one resumes.")]
PlotsOption = Annotated[Path | None, typer.Option("--plots", help="Folder for the pictures.")]
AgainOption = Annotated[str, typer.Option("--again", help="Methods to run anew although the file has them.")]
WidthOption = Annotated[
    int, typer.Option("--ranpac-width", min=1, max=PUBLISHED_WIDTH, help="Random features of ranpac.")
]
UnrelatedOption = Annotated[
    list[Path], typer.Option("--unrelated", help="Stream files whose tasks are learnt afterwards; repeated.")
]
ImagesOption = Annotated[
    int | None, typer.Option("--images-per-class", min=1, help="Learn from so many pictures a class.")
]
LeaveOutOption = Annotated[
    bool, typer.Option("--leave-out", help="Also leave each task out and reject its pictures.")
]
bench = typer.Typer(name="bench", help="Benchmarks.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add `tosca bench …`."""
    app.add_typer(bench)


@bench.command()
def continual(
    stream: Annotated[Path, typer.Option(help="Stream file, as in benchmarks/streams.")],
    data: Annotated[Path, typer.Option(help="Folder that the stream's folders are relative to.")] = Path(),
    methods: MethodsOption = _ALL_METHODS,
    seeds: SeedsOption = "0,1,2",
    steps: StepsOption = "all",
    json: ResultsOption = None,
    plots: PlotsOption = None,
    again: AgainOption = "",
    ranpac_width: WidthOption = PUBLISHED_WIDTH,
    unrelated: UnrelatedOption = [],  # noqa: B006  (typer copies it)
    images_per_class: ImagesOption = None,
    leave_out: LeaveOutOption = False,
    cache: CacheOption = DEFAULT_CACHE,
    device: DeviceOption = "auto",
    runtime: RuntimeOption = "auto",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Learn a stream of tasks with several methods and compare them.

    Example: tosca bench continual --stream benchmarks/streams/mixed.toml --data pictures --json out.json
    """
    options = _Options.parse(methods, seeds, steps, json, plots, again, ranpac_width)
    streams = [read_stream(path) for path in (stream, *unrelated)]
    opened = [(one, open_stream(one, data)) for one in streams]
    backbone = load_backbone(ModelStore(store), device, runtime)
    _run(opened, backbone, cache, replace(options, images_per_class=images_per_class, leave_out=leave_out))


@bench.command()
def paper(
    dataset: Annotated[str, typer.Option(help=f"One of: {', '.join(DATASETS)}.")],
    data: Annotated[Path, typer.Option(help="Folder with train/CLASS and test/CLASS.")],
    methods: MethodsOption = _ALL_METHODS,
    seeds: SeedsOption = _PAPER_SEEDS,
    increment: Annotated[int | None, typer.Option(min=2, help="Classes a task, if not as published.")] = None,
    order: Annotated[
        str, typer.Option(help="`shuffled` by the seed, or `fixed`: sorted by name.")
    ] = "shuffled",
    steps: StepsOption = "all",
    json: ResultsOption = None,
    plots: PlotsOption = None,
    again: AgainOption = "",
    ranpac_width: WidthOption = PUBLISHED_WIDTH,
    cache: CacheOption = DEFAULT_CACHE,
    device: DeviceOption = "auto",
    runtime: RuntimeOption = "auto",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Run the published class-incremental protocol on a data set you have (docs/continual.md).

    Example: tosca bench paper --dataset cifar100 --data cifar100 --store in21k --json cifar100.json
    """
    known = ", ".join(DATASETS)
    if dataset not in DATASETS:
        raise typer.BadParameter(f"{dataset!r}: expected one of {known}", param_hint="--dataset")
    chosen: Order = "fixed" if order == "fixed" else "shuffled"
    if order != chosen:
        raise typer.BadParameter(f"{order!r}: expected shuffled or fixed", param_hint="--order")
    options = _Options.parse(methods, seeds, steps, json, plots, again, ranpac_width)
    stream = paper_stream(dataset, increment, chosen)
    sources = open_stream(stream, data)
    backbone = load_backbone(ModelStore(store), device, runtime)
    for published, found in (
        (f"{DATASETS[dataset].num_classes} classes", f"{len(sources[0].labels)} classes"),
        (ARCHITECTURE, backbone.manifest.architecture),
    ):
        if found != published:
            err.print(f"not the published setting: {found}, published {published}", style="yellow")
    _run([(stream, sources)], backbone, cache, options)


@bench.command()
def sparsity(
    stream: Annotated[Path, typer.Option(help="Stream file, as in benchmarks/streams.")],
    data: Annotated[Path, typer.Option(help="Folder that the stream's folders are relative to.")] = Path(),
    seeds: SeedsOption = "0,1,2",
    json: Annotated[Path | None, typer.Option("--json", help="Results file.")] = None,
    cache: CacheOption = DEFAULT_CACHE,
    device: DeviceOption = "auto",
    runtime: RuntimeOption = "auto",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Accuracy against bytes for several strengths of the proximal penalty.

    Example: tosca bench sparsity --stream benchmarks/streams/mixed.toml --data pictures --json out.json
    """
    described = read_stream(stream)
    sources = open_stream(described, data)
    backbone = load_backbone(ModelStore(store), device, runtime)
    features = [load_features(source, backbone, cache) for source in sources]
    chosen = _seeds(seeds)

    def done(one: SparsityResult) -> None:
        err.print(f"penalty {one.proximal_l1:g}: accuracy {one.accuracy:.4f}")

    arranged = [(seed, arrange(described, features, seed)) for seed in chosen]
    curve = sparsity_curve(arranged, backbone.manifest, done=done)
    print_table(
        ["penalty", "density", "LuCA kB", "file kB", "LuCA alone %", "end to end %"],
        (
            (
                f"{one.proximal_l1:g}",
                f"{one.density:.3f}",
                f"{one.luca_bytes / 1e3:.0f}",
                f"{one.file_bytes / 1e3:.0f}",
                f"{100.0 * one.luca_accuracy:.1f}",
                f"{100.0 * one.accuracy:.1f}",
            )
            for one in curve
        ),
    )
    if json is not None:
        document = {
            "stream": described.model_dump(mode="json"),
            "backbone": backbone.fingerprint,
            "runtime": backbone.runtime_name,
            "seeds": list(chosen),
            "data_sha256": {one.name: one.data_sha256 for one in features},
            "curve": [one.model_dump() for one in curve],
        }
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(dumps(document, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Options:
    """What both commands are told about the runs, checked."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: Steps
    json: Path | None
    plots: Path | None
    again: tuple[str, ...]
    ranpac_width: int
    images_per_class: int | None = None
    leave_out: bool = False

    @classmethod
    def parse(
        cls,
        methods: str,
        seeds: str,
        steps: str,
        json: Path | None,
        plots: Path | None,
        again: str,
        ranpac_width: int,
    ) -> "_Options":
        chosen: Steps = "last" if steps == "last" else "all"
        if steps != chosen:
            raise typer.BadParameter(f"{steps!r}: expected all or last", param_hint="--steps")
        to_repeat = check_methods(_split(again)) if again else ()
        return cls(
            check_methods(_split(methods)), _seeds(seeds), chosen, json, plots, to_repeat, ranpac_width
        )


def _run(
    streams: Sequence[tuple[Stream, tuple[PictureSource, ...]]],
    backbone: Backbone,
    cache: Path,
    options: _Options,
) -> None:
    """The first stream is measured; tasks of the others are learnt after it."""
    (stream, features), *unrelated = (
        (one, [load_features(source, backbone, cache) for source in sources]) for one, sources in streams
    )
    every = [*features, *(one for _, parts in unrelated for one in parts)]
    config = {
        "stream": stream.model_dump(mode="json"),
        "unrelated": [one.model_dump(mode="json") for one, _ in unrelated],
        "images_per_class": options.images_per_class,
        "leave_out": options.leave_out,
        "steps": options.steps,
        "backbone": backbone.fingerprint,
        "architecture": backbone.manifest.architecture,
        "runtime": backbone.runtime_name,
        "ranpac_width": options.ranpac_width,
        "data_sha256": {one.name: one.data_sha256 for one in every},
    }
    results = open_results(options.json, config).without(options.again)

    def done(method: str, seed: int, run: RunResult) -> None:
        seconds = sum(run.learn_s_by_task) + run.settle_s + run.answer_s
        line = f"{method}, seed {seed}: last accuracy {run.last_accuracy:.4f}, {seconds:.1f} s"
        err.print(line)

    plan = Plan(
        stream,
        features,
        backbone.manifest,
        options.methods,
        options.seeds,
        options.steps,
        options.ranpac_width,
        done,
        unrelated,
        options.images_per_class,
        options.leave_out,
    )
    results = run_benchmark(plan, results, options.json)
    print_table(*results_table(results), min_width=TABLE_WIDTH)
    if options.plots is not None:
        from training.continual.plots import write_plots  # matplotlib takes a second to import

        for path in write_plots(results, options.plots):
            out.print(f"wrote {path}")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(dict.fromkeys(int(part) for part in _split(text)))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: expected whole numbers", param_hint="--seeds") from error
    if not seeds or min(seeds) < 0:
        raise typer.BadParameter(f"{text!r}: expected numbers from 0 on", param_hint="--seeds")
    return seeds
