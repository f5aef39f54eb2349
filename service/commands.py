"""`tosca serve` and `tosca predict`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from model_store.backbone import resolve_device
from model_store.console import (
    DEFAULT_STORE,
    DeviceOption,
    JsonOption,
    RuntimeOption,
    StoreOption,
    choose,
    err,
    print_json,
    print_table,
    read_file,
    read_settings,
)
from model_store.errors import InvalidImage
from model_store.offline import OfflinePredictor
from model_store.runtimes.runtime import RUNTIMES
from model_store.selection import SELECTIONS
from model_store.store import ModelStore
from service.bulk_command import predict_in_bulk
from service.client import Client, ServerRefused, Wishes
from service.key_commands import keys_app
from service.ray_commands import ray_app
from service.remote_commands import KeyOption, remote_app
from service.replay_command import replay
from service.settings import DEFAULT_ABSTAIN_LEVEL, Settings

_NUM_WITHOUT_BAR = 16  # pictures: answered before a bar is worth a look


def register(app: typer.Typer) -> None:
    """Add this package's commands to `tosca`."""
    app.command()(serve)
    app.command()(predict)
    app.command()(replay)
    app.add_typer(remote_app, name="remote")
    app.add_typer(keys_app, name="keys")
    app.add_typer(ray_app, name="ray")


def serve(
    store: Annotated[str | None, typer.Option(help="Folder or URL of the store [TOSCA_STORE].")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [TOSCA_HOST].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [TOSCA_PORT].")] = None,
    processes: Annotated[
        int | None, typer.Option(help="Processes that share port and device [TOSCA_PROCESSES].")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N [TOSCA_DEVICE].")] = None,
    runtime: Annotated[
        str | None, typer.Option(help="auto (the tuned one) or its name [TOSCA_RUNTIME].")
    ] = None,
) -> None:
    """Serve a store over HTTP. Every other limit is a TOSCA_* environment variable.

    Example: tosca serve --store .tosca/store --port 8000
    """
    given = {"store": store, "host": host, "port": port, "processes": processes}
    given |= {"device": device, "runtime": runtime}
    settings = read_settings(Settings, given)
    choose(settings.runtime, ("auto", *RUNTIMES), "--runtime")
    resolve_device(settings.device)  # raises InvalidBackbone: a clear error before a server log
    ModelStore(settings.store).require_head()
    if settings.processes > 1:
        from service.supervisor import supervise

        supervise(settings)
    else:
        from service.server import serve as run

        run(settings)


def predict(
    pictures: Annotated[
        list[Path],
        typer.Argument(help="Picture files; with --ray also folders, .csv and .parquet files."),
    ],
    server: Annotated[
        str | None, typer.Option(envvar="TOSCA_SERVER", help="Ask this server; without it, answer offline.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Let this task answer instead of choosing one.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many (task, label) pairs to list.")] = 5,
    selection: Annotated[str, typer.Option(help=f"One of: {', '.join(SELECTIONS)}.")] = "lda",
    coverage: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Also list all (task, label) that this coverage cannot rule out."
        ),
    ] = None,
    abstain_level: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Offline: abstain at or below this p-value.")
    ] = DEFAULT_ABSTAIN_LEVEL,
    ray: Annotated[
        bool, typer.Option("--ray", help="Answer on the Ray cluster of RAY_ADDRESS, or one of its own here.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="With --ray: folder of Parquet files; what it holds is not done again."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray: workers (default: one a GPU, else one a core).")
    ] = None,
    part_size: Annotated[int, typer.Option(min=1, help="With --ray: pictures in a Parquet file.")] = 1024,
    key: KeyOption = None,
    device: DeviceOption = "auto",
    runtime: RuntimeOption = "auto",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Classify pictures, with a running server or offline against a store.

    Example: tosca predict bird.jpg --server http://localhost:8000

    Example: tosca predict pictures --ray --output answers
    """
    chosen = choose(selection, SELECTIONS, "--selection")
    if ray != (output is not None):
        raise typer.BadParameter("--ray and --output go together", param_hint="--ray")
    if output is not None:
        predict_in_bulk(
            pictures,
            output,
            store=store,
            selection=chosen,
            task=task,
            top_k=top_k,
            coverage=coverage,
            abstain_level=abstain_level,
            device=device,
            runtime=runtime,
            workers=workers,
            part_size=part_size,
            as_json=json,
        )
        return
    data = [read_file(path) for path in pictures]
    if server is not None:
        with Client(server, key=key) as client:
            has_bar = err.is_terminal and len(data) > _NUM_WITHOUT_BAR
            wishes = Wishes(task, top_k, chosen, coverage)
            answers = []
            for path, one in zip(pictures, client.predict_each(data, wishes, progress=has_bar), strict=True):
                if isinstance(one, ServerRefused):
                    raise InvalidImage(f"{path}: {one.detail}") from one
                answers.append(asdict(one))
    else:
        predictor = OfflinePredictor(ModelStore(store), device=device, runtime=runtime)
        answered = predictor.answer_each(
            data,
            selection=chosen,
            task=task,
            top_k=top_k,
            coverage=coverage,
            abstain_level=abstain_level,
        )
        answers = []
        for path, answer in zip(pictures, answered, strict=True):
            if isinstance(answer, InvalidImage):
                raise InvalidImage(f"{path}: {answer}") from answer
            answers.append(asdict(answer))
    if json:
        print_json([{"picture": str(path)} | one for path, one in zip(pictures, answers, strict=True)])
        return
    print_table(
        ["picture", "task", "label", "confidence", "p-value", "next" if coverage is None else "set"],
        (
            (
                path,
                one["task"],
                one["label"],
                f"{one['confidence']:.4f}",
                f"{one['p_value']:.3f}" + (" abstained" if one["abstained"] else ""),
                _list(one["alternatives"][:2] if coverage is None else one["prediction_set"]),
            )
            for path, one in zip(pictures, answers, strict=True)
        ),
    )


def _list(choices: list[dict[str, Any]]) -> str:
    return ", ".join(f"{one['task']}/{one['label']} {one['probability']:.3f}" for one in choices)
