"""`tosca push` and `tosca pull`: module files and backbones in a repository of the Hugging Face hub."""

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from model_store.console import DEFAULT_STORE, JsonOption, StoreOption, err, out, print_json
from model_store.errors import InvalidModule, InvalidTrust, ToscaError
from model_store.hub import HubRepository, PulledModule, SizeLimits
from model_store.publishing import Publisher
from model_store.signatures import Signature, Trust
from model_store.store import ModelStore, without_task

RepositoryArgument = Annotated[str, typer.Argument(help="OWNER/NAME of the repository.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]
EndpointOption = Annotated[
    str | None, typer.Option(envvar="HF_ENDPOINT", help="A hub other than huggingface.co.")
]


def push(
    repository: RepositoryArgument,
    task: Annotated[list[str] | None, typer.Option(help="An active task; repeated for several.")] = None,
    backbone: Annotated[bool, typer.Option("--backbone", help="The store's backbone too.")] = False,
    licence: Annotated[
        str | None, typer.Option("--license", help="Identifier for the card, such as mit or cc-by-4.0.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Where it is made: for everybody to see.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "",
    revision: RevisionOption = None,
    endpoint: EndpointOption = None,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Put active tasks of a store, with signatures and a model card, into a repository of the hub.

    The token is that of `hf auth login`, or HF_TOKEN. The repository is made when absent, private unless
    --public.

    Example: tosca push me/birds --task birds --license mit
    """
    tasks = task or []
    if not tasks and not backbone:
        raise typer.BadParameter("name a task, or --backbone", param_hint="--task")
    opened = ModelStore(store)
    head = opened.require_head()
    for one in tasks:
        without_task(one)(head)  # raises UnknownTask
    modules = [
        (opened.module(sha256), opened.signatures(sha256)) for sha256 in (head.tasks[t] for t in tasks)
    ]
    manifest = opened.backbone_manifest(head.backbone_fingerprint)
    weights = opened.backbone(head.backbone_fingerprint).weights if backbone else None
    commit = HubRepository(repository, revision=revision, endpoint=endpoint).push(
        modules, manifest, weights=weights, licence=licence, private=not public, message=message
    )
    if json:
        print_json({"repository": repository, "commit": commit, "tasks": tasks, "backbone": backbone})
    else:
        out.print(f"pushed {', '.join([*tasks, *(['the backbone'] if backbone else [])])} as commit {commit}")


def pull(
    repository: RepositoryArgument,
    task: Annotated[
        list[str] | None, typer.Option(help="A task of the repository; repeated for several (default: all).")
    ] = None,
    backbone: Annotated[
        bool, typer.Option("--backbone", help="Only the backbone, and make it the store's.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write checked module files here instead of publishing.")
    ] = None,
    sha256: Annotated[str | None, typer.Option(help="What the one task's file must have.")] = None,
    force: Annotated[
        bool, typer.Option(help="Publish even if another task loses more than the margin.")
    ] = False,
    trusted_signers: Annotated[
        Path | None, typer.Option(envvar="TOSCA_TRUSTED_SIGNERS", help="List of the signers of module files.")
    ] = None,
    require_signature: Annotated[
        bool,
        typer.Option(
            "--require-signature",
            envvar="TOSCA_REQUIRE_SIGNATURE",
            help="Refuse modules that no trusted signer has signed.",
        ),
    ] = False,
    max_module_bytes: Annotated[
        int, typer.Option(min=1, help="Larger module files are not downloaded.")
    ] = SizeLimits().module,
    max_backbone_bytes: Annotated[
        int, typer.Option(min=1, help="Larger weights are not downloaded.")
    ] = SizeLimits().backbone,
    revision: RevisionOption = None,
    endpoint: EndpointOption = None,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Take tasks from a repository of the hub into a store, checked as any other module file.

    A task that is refused stops no other; the exit status is then 1.

    Example: tosca pull me/birds --task birds
    """
    opened = ModelStore(store)
    hub = HubRepository(
        repository,
        revision=revision,
        endpoint=endpoint,
        limits=SizeLimits(max_module_bytes, max_backbone_bytes),
    )
    if backbone:
        number = opened.publish_first(opened.put_backbone(hub.backbone())).number
        found: dict[str, Any] = {"repository": repository, "commit": hub.commit, "revision": number}
        print_json(found) if json else out.print(f"backbone of {repository} is in revision {number}")
        return
    tasks = task or hub.tasks()
    if not tasks:
        raise InvalidModule(f"repository {repository} holds no module files")
    if sha256 is not None and len(tasks) != 1:
        raise typer.BadParameter("is of one file: name one task", param_hint="--sha256")
    if require_signature and trusted_signers is None:
        raise InvalidTrust("a required signature needs a list of trusted signers: nobody is trusted yet")
    trust = Trust.read(trusted_signers, is_required=require_signature) if trusted_signers else Trust.nobody()
    publisher = Publisher(opened, trust=trust)
    rows: list[dict[str, Any]] = []
    for one in tasks:
        try:
            pulled = hub.module(one)
            _check(pulled, sha256)
            rows.append({"task": one} | _keep(pulled, publisher, trust, output, force, f"pull {repository}"))
        except ToscaError as error:
            err.print(f"{one}: {error}", style="red")
            rows.append({"task": one, "fault": str(error)})
    if json:
        print_json({"repository": repository, "commit": hub.commit, "tasks": rows})
    else:
        for row in rows:
            if "fault" not in row:
                place = row.get("output") or f"published as revision {row['revision']}"
                out.print(f"{row['task']}: {row['sha256'][:12]}, {place}")
    if any("fault" in row for row in rows):
        raise typer.Exit(1)


def _check(pulled: PulledModule, sha256: str | None) -> None:
    digest = hashlib.sha256(pulled.data).hexdigest()
    if sha256 is not None and digest != sha256.lower():
        raise InvalidModule(f"the file has SHA-256 {digest}, expected {sha256}")


def _keep(
    pulled: PulledModule, publisher: Publisher, trust: Trust, output: Path | None, force: bool, reason: str
) -> dict[str, Any]:
    """Publish a pulled file, or write it, after the same checks."""
    file = publisher.admit(pulled.data)
    if file.manifest.task != pulled.task:
        raise InvalidModule(f"{pulled.task}.safetensors holds task {file.manifest.task!r}")
    if output is not None:
        trust.signer_of(file.sha256, pulled.signatures)  # raises UntrustedModule
        return {"sha256": file.sha256, "output": str(_write(output / f"{pulled.task}.safetensors", pulled))}
    outcome = publisher.register(
        pulled.data, force=force, reason=reason, signature=_best(pulled.signatures, trust)
    )
    return {"sha256": file.sha256, "revision": outcome.active.revision.number}


def _best(signatures: tuple[Signature, ...], trust: Trust) -> Signature | None:
    """The signature to keep beside the module: one of a trusted signer that holds before any other."""
    return min(signatures, key=lambda one: trust.signer_by(one) is None, default=None)


def _write(path: Path, pulled: PulledModule) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pulled.data)
    except OSError as error:
        raise ToscaError(f"{path} cannot be written: {error.strerror}") from error
    return path
