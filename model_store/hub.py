"""Module files and backbones in a repository of the Hugging Face hub (extra `hub`).

    README.md                         the model card
    TASK.safetensors                  a module file
    TASK.safetensors.NUMBER.KEYID.sig signatures of it
    backbone/manifest.json            the backbone they belong to
    backbone/weights.safetensors

What comes from a repository is a stranger's until it has been checked: sizes before anything is downloaded,
digests after, and then module and backbone as any other.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from model_store.backbone import BackboneArtefact, BackboneManifest, check_pass
from model_store.errors import CorruptStore, HubUnavailable, InvalidBackbone, InvalidModule
from model_store.manifest import TASK_NAME
from model_store.model_card import write_card
from model_store.module_file import ModuleFile, read_module
from model_store.signatures import Signature

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
SUFFIX = ".safetensors"
BACKBONE_MANIFEST, BACKBONE_WEIGHTS = "backbone/manifest.json", "backbone/weights.safetensors"
_MAX_TEXT_BYTES = 4 * 2**20
_MAX_SIGNATURES = 100


@dataclass(frozen=True, slots=True)
class SizeLimits:
    """The most bytes that are downloaded."""

    module: int = 64 * 2**20
    backbone: int = 8 * 2**30


@dataclass(frozen=True, slots=True)
class PulledModule:
    """A module file as a repository holds it: digest checked, content not yet judged."""

    task: str
    data: bytes
    signatures: tuple[Signature, ...]


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    size_bytes: int
    sha256: str | None  # None for what the hub keeps as text


class HubRepository:
    """One repository of a hub, at one revision. Every method raises HubUnavailable."""

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        endpoint: str | None = None,
        limits: SizeLimits | None = None,
    ) -> None:
        """`name` is OWNER/NAME; `endpoint` a hub other than Hugging Face's. The token is that of the library:
        HF_TOKEN, or what `hf auth login` keeps."""
        self.name = name
        self._revision = revision
        self._limits = limits or SizeLimits()
        self._api = _api(endpoint)
        self._commit: str | None = None
        self._files: dict[str, _RemoteFile] | None = None

    @property
    def commit(self) -> str:
        """The commit that everything is read from, fixed by the first look."""
        self._look()
        assert self._commit is not None, "looked at"
        return self._commit

    def tasks(self) -> list[str]:
        """Names of the module files."""
        stems = [name.removesuffix(SUFFIX) for name in self._look() if name.endswith(SUFFIX)]
        return sorted(stem for stem in stems if TASK_NAME.fullmatch(stem))

    def module(self, task: str) -> PulledModule:
        """Download a module file and its signatures. Raises InvalidModule."""
        name = f"{task}{SUFFIX}"
        if not TASK_NAME.fullmatch(task) or name not in self._look():
            held = ", ".join(self.tasks()) or "none"
            raise HubUnavailable(f"repository {self.name} has no module file of {task!r}; it has {held}")
        data = self._download(name, self._limits.module).read_bytes()
        digest = hashlib.sha256(data).hexdigest()  # signatures of earlier versions may lie there still
        signatures = tuple(one for one in self._signatures(name) if one.module_sha256 == digest)
        return PulledModule(task, data, signatures)

    def backbone(self) -> BackboneArtefact:
        """Download the backbone and check that its weights are those of its manifest, and embed a picture.

        Raises InvalidBackbone.
        """
        for name in (BACKBONE_MANIFEST, BACKBONE_WEIGHTS):
            if name not in self._look():
                raise HubUnavailable(f"repository {self.name} has no {name}")
        text = self._download(BACKBONE_MANIFEST, _MAX_TEXT_BYTES).read_bytes()
        try:
            manifest = BackboneManifest.model_validate_json(text)
            weights = self._download(BACKBONE_WEIGHTS, self._limits.backbone).read_bytes()
            artefact = BackboneArtefact(manifest, weights)
            artefact.verify()
            check_pass(artefact.model(), manifest)
        except (ValidationError, CorruptStore, InvalidBackbone) as error:
            raise InvalidBackbone(f"the backbone of repository {self.name} is unusable: {error}") from error
        return artefact

    def push(
        self,
        modules: Sequence[tuple[bytes, Sequence[Signature]]],
        backbone: BackboneManifest,
        *,
        weights: bytes | None = None,
        licence: str | None = None,
        private: bool = True,
        message: str = "",
    ) -> str:
        """Put module files, with `weights` the backbone too, and the card into the repository.

        Returns the commit's id. The repository is made when absent, and other tasks in it stay. A commit
        that somebody else made meanwhile is a fault.
        """
        from huggingface_hub import CommitOperationAdd

        with self._translated():
            self._api.create_repo(self.name, private=private, exist_ok=True)
        self._files = None
        files: dict[str, bytes] = {}
        read: dict[str, ModuleFile] = {}
        for data, signatures in modules:
            file = read_module(data)
            name = f"{file.manifest.task}{SUFFIX}"
            read[file.manifest.task] = file
            files[name] = data
            for i, one in enumerate(signatures):  # several may name one key
                files[f"{name}.{i}.{one.key_id}.sig"] = one.model_dump_json().encode() + b"\n"
        read |= {task: self._read_present(task) for task in self.tasks() if task not in read}
        if weights is not None:
            files[BACKBONE_MANIFEST] = backbone.model_dump_json(indent=2).encode()
            files[BACKBONE_WEIGHTS] = weights
        strangers = [
            task for task, file in read.items() if file.manifest.backbone_fingerprint != backbone.fingerprint
        ]
        if strangers:
            raise HubUnavailable(
                f"repository {self.name} holds {', '.join(strangers)} of another backbone than "
                f"{backbone.fingerprint[:12]}…: use one repository for each backbone"
            )
        files[CARD] = write_card(
            self.name,
            read,
            backbone,
            holds_backbone=weights is not None or BACKBONE_WEIGHTS in self._look(),
            licence=licence,
            previous=self._previous_card(),
        ).encode()
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        with self._translated():
            commit = self._api.create_commit(
                self.name,
                operations,
                commit_message=message or f"tosca push: {', '.join(sorted(files))}"[:200],
                revision=self._revision,
                parent_commit=self.commit,
            )
        return str(commit.oid)

    # -- reading -------------------------------------------------------------------------------------

    def _look(self) -> dict[str, _RemoteFile]:
        if self._files is None:
            with self._translated():
                info = self._api.model_info(self.name, revision=self._revision, files_metadata=True)
            self._commit = info.sha
            self._files = {
                one.rfilename: _RemoteFile(one.size or 0, one.lfs.sha256 if one.lfs else None)
                for one in info.siblings or ()
            }
        return self._files

    def _download(self, name: str, max_bytes: int) -> Path:
        file = self._look()[name]
        if file.size_bytes > max_bytes:
            raise HubUnavailable(
                f"{name} of repository {self.name} has {file.size_bytes} bytes, the limit is {max_bytes}"
            )
        with self._translated():
            path = Path(self._api.hf_hub_download(self.name, name, revision=self.commit))
            with path.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if file.sha256 is not None and digest != file.sha256:
            path.resolve().unlink()  # else every later pull finds it in the library's cache
            path.unlink(missing_ok=True)
            raise HubUnavailable(
                f"{name} of repository {self.name} came with SHA-256 {digest}, the hub says {file.sha256}"
            )
        return path

    def _signatures(self, name: str) -> Iterator[Signature]:
        """The signatures beside a module file, none of them judged; unreadable ones are left out."""
        beside = [one for one in self._look() if one.startswith(f"{name}.") and one.endswith(".sig")]
        for one in sorted(beside)[:_MAX_SIGNATURES]:
            with contextlib.suppress(ValidationError):
                yield Signature.model_validate_json(self._download(one, _MAX_TEXT_BYTES).read_bytes())

    def _read_present(self, task: str) -> ModuleFile:
        try:
            return read_module(self.module(task).data)
        except InvalidModule as error:
            raise HubUnavailable(
                f"{task}{SUFFIX} of repository {self.name} cannot be read: {error}"
            ) from error

    def _previous_card(self) -> str | None:
        if CARD not in self._look():
            return None
        return self._download(CARD, _MAX_TEXT_BYTES).read_text(encoding="utf-8", errors="replace")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Name every fault of the hub and its client HubUnavailable."""
        try:
            yield
        except Exception as error:  # HTTP, validation and file faults of the library have no common root
            told = [str(one) for one in (error, error.__cause__) if one is not None]
            message = " ".join(": ".join(told).split())[:500]
            raise HubUnavailable(f"repository {self.name}: {message or type(error).__name__}") from error


def _api(endpoint: str | None) -> "HfApi":
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise HubUnavailable("this needs huggingface_hub: pip install 'tosca-serving[hub]'") from error
    options: dict[str, Any] = {"endpoint": endpoint.rstrip("/")} if endpoint else {}
    return HfApi(library_name="tosca-serving", **options)
