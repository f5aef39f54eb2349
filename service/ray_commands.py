"""`tosca ray`: the service on a Ray cluster. Ray itself is imported when a command runs."""

import importlib.util
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from model_store.console import JsonOption, out, print_json
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
    json: JsonOption = False,
) -> None:
    """Serve a store with replicas on Ray; deploying again replaces them one by one under load.

    On a running cluster (`--address`) the replicas stay when the command ends. Without one the command starts
    a cluster on this machine and keeps it until Ctrl-C or SIGTERM, which drains the replicas.

    Example: tosca ray deploy --store s3://models/store --replicas 2 --cpus 2 --address auto
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
            "env": dict(environment_variable(one) for one in env or ()),
        },
    )
    ModelStore(settings.store).require_head()  # a clear error before those of a cluster
    stop = threading.Event()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    from service.ray_serving import build_app

    application = build_app(arguments)
    ray.init(
        address=address or "local", include_dashboard=None if address else False, log_to_driver=not address
    )
    try:
        serve.start(http_options=_http_options(settings))
        serve.run(application, name=_APPLICATION, route_prefix="/")
        url = f"http://{settings.host}:{settings.port}"
        if json:
            print_json({"application": _APPLICATION, "url": url})
        else:
            out.print(f"{_APPLICATION} answers on {url}")
        if address is None:
            for one in (signal.SIGINT, signal.SIGTERM):
                signal.signal(one, lambda *_: stop.set())
            stop.wait()
            serve.delete(
                _APPLICATION
            )  # waits for the replicas; the proxies are still there for their answers
            serve.shutdown()  # type: ignore[no-untyped-call]
    finally:
        ray.shutdown()


@ray_app.command()
def config(
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
) -> None:
    """Print the Serve config file of the same deployment, for `serve deploy` and KubeRay.

    Example: tosca ray config --store s3://models/store --replicas 2 --cpus 2 > serve.yaml
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
        },
    )
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
    typer.echo(yaml.safe_dump(document, sort_keys=False), nl=False)


def _read(given: dict[str, Any], deployment: dict[str, Any]) -> tuple[Settings, "Arguments"]:
    """The settings of this command, and the arguments that carry them to the replicas.

    Raises InvalidSettings.
    """
    if importlib.util.find_spec("ray") is None:
        raise InvalidSettings(_NEEDS_EXTRA)
    from service.ray_serving import Arguments

    settings = Settings(**{name: value for name, value in given.items() if value is not None})
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
