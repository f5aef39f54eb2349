"""`tosca ray`: the service on a Ray cluster. Ray itself is imported when a command runs."""

import contextlib
import importlib.util
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from model_store.console import JsonOption, out, print_json, read_settings
from model_store.store import ModelStore
from service.errors import InvalidSettings
from service.settings import Settings

if TYPE_CHECKING:
    from service.ray_serving import Arguments

ray_app = typer.Typer(help="Replicas on a Ray cluster.", no_args_is_help=True)
_APPLICATION = "tosca"
_PATHS = {"keys_file", "trusted_signers", "audit_log"}
_NEEDS_EXTRA = "Ray is not installed: pip install 'tosca-serving[ray]'"

StoreOption = Annotated[str | None, typer.Option(help="Folder or URL of the store [TOSCA_STORE].")]
HostOption = Annotated[str | None, typer.Option(help="Address the proxies listen on [TOSCA_HOST].")]
PortOption = Annotated[int | None, typer.Option(help="Port the proxies listen on [TOSCA_PORT].")]
ReplicasOption = Annotated[int | None, typer.Option(min=1, help="Replicas, a fixed number (1).")]
MinOption = Annotated[int | None, typer.Option(min=1, help="Fewest replicas, with --max-replicas (1).")]
MaxOption = Annotated[int | None, typer.Option(min=1, help="Most replicas: their number follows the load.")]
TargetOption = Annotated[
    float | None,
    typer.Option("--target-ongoing", help="Requests in a replica that autoscaling aims at (two batches)."),
]
CpusOption = Annotated[
    float | None, typer.Option("--cpus", help="Processors, and so threads, a replica (1).")
]
GpusOption = Annotated[float | None, typer.Option("--gpus", help="GPUs a replica; 0.5: two share one (0).")]
OngoingOption = Annotated[
    int | None, typer.Option("--max-ongoing", help="Requests let into a replica [TOSCA_MAX_CONNECTIONS].")
]


@ray_app.command()
def deploy(
    store: StoreOption = None,
    host: HostOption = None,
    port: PortOption = None,
    replicas: ReplicasOption = None,
    min_replicas: MinOption = None,
    max_replicas: MaxOption = None,
    target_ongoing: TargetOption = None,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    max_ongoing: OngoingOption = None,
    env: Annotated[
        list[str] | None,
        typer.Option(help="NAME of a variable to hand on to the replicas, or NAME=VALUE; repeated."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS", help="A running cluster, host:port or auto; without it, one of its own."
        ),
    ] = None,
    config: Annotated[
        bool, typer.Option("--config", help="Print the Serve config file of this, and deploy nothing.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Serve a store with replicas on Ray; deploying again replaces them one by one under load.

    On a running cluster (`--address`) the replicas stay when the command ends. Without one the command starts
    a cluster on this machine and keeps it until Ctrl-C or SIGTERM, which drains the replicas.

    Example: tosca ray deploy --store s3://models/store --replicas 2 --cpus 2 --address auto

    Example: tosca ray deploy --store s3://models/store --max-replicas 8 --config > serve.yaml
    """
    settings, arguments = _read(
        {"store": store, "host": host, "port": port},
        {
            "replicas": replicas,
            "min_replicas": min_replicas,
            "max_replicas": max_replicas,
            "target_ongoing_requests": target_ongoing,
            "num_cpus": cpus,
            "num_gpus": gpus,
            "max_ongoing_requests": max_ongoing,
            "env": dict(environment_variable(one) for one in env) if env else None,
        },
    )
    if config:
        typer.echo(config_file(settings, arguments), nl=False)
        return
    ModelStore(settings.store).require_head()  # a clear error before those of a cluster
    url = f"http://{settings.host}:{settings.port}"
    with _connected(address):
        _deploy(settings, arguments)
        if json:
            print_json({"application": _APPLICATION, "url": url})
        else:
            out.print(f"{_APPLICATION} answers on {url}")
        if address is None:
            _wait_for_signal()
            _drain()


def config_file(settings: Settings, arguments: "Arguments") -> str:
    """What `serve deploy` and KubeRay take, as YAML. Raises InvalidSettings."""
    import yaml

    from service.ray_serving import IMPORT_PATH, build_app

    build_app(arguments)  # says now what would be wrong later
    document = {
        "proxy_location": "EveryNode",
        "http_options": _http_options(settings),
        "applications": [
            {
                "name": _APPLICATION,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": arguments.model_dump(mode="json", exclude_unset=True),
            }
        ],
    }
    return yaml.safe_dump(document, sort_keys=False)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """A cluster while the block runs: the one at `address`, or one of its own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if address is None:
        ray.init(address="local", include_dashboard=False)
    else:
        ray.init(address=address, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def _deploy(settings: Settings, arguments: "Arguments") -> None:
    """Returns when the replicas are ready. Raises InvalidSettings, and what Ray Serve does."""
    from ray import serve

    from service.ray_serving import build_app

    application = build_app(arguments)
    serve.start(http_options=_http_options(settings))
    serve.run(application, name=_APPLICATION, route_prefix="/")


def _wait_for_signal() -> None:
    """Until Ctrl-C or SIGTERM."""
    stop = threading.Event()
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, lambda *_: stop.set())
    stop.wait()


def _drain() -> None:
    """End the replicas once they have answered, while the proxies are still there for the answers."""
    from ray import serve

    serve.delete(_APPLICATION)
    serve.shutdown()  # type: ignore[no-untyped-call]


def _read(given: dict[str, Any], deployment: dict[str, Any]) -> tuple[Settings, "Arguments"]:
    """The settings of this command, and the arguments that carry them to the replicas.

    Raises InvalidSettings.
    """
    if importlib.util.find_spec("ray") is None:
        raise InvalidSettings(_NEEDS_EXTRA)
    from service.ray_serving import Arguments

    settings = read_settings(Settings, given)
    carried = settings.model_dump(mode="json", exclude_unset=True) | {
        "store": settings.store if "://" in settings.store else str(Path(settings.store).absolute()),
        "host": settings.host,
    }
    for name in _PATHS & carried.keys():
        carried[name] = str(Path(carried[name]).absolute())  # a replica starts in another folder
    carried.pop("port", None)  # the proxies'
    wanted = {name: value for name, value in deployment.items() if value is not None}
    try:
        return settings, Arguments(settings=carried, **wanted)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise InvalidSettings(
            f"{'.'.join(map(str, fault['loc']))} {fault['msg'].removeprefix('Value error, ')}".strip()
        ) from error


def _http_options(settings: Settings) -> dict[str, Any]:
    return {
        "host": settings.host,
        "port": settings.port,
        "keep_alive_timeout_s": max(1, int(settings.keep_alive_s)),
    }


def environment_variable(text: str) -> tuple[str, str]:
    """NAME=VALUE, or NAME with the value it has here."""
    name, is_given, value = text.partition("=")
    if not is_given and name not in os.environ:
        raise typer.BadParameter(f"{name} has no value here", param_hint="--env")
    return name, value if is_given else os.environ[name]
