"""API keys: what is kept of them, and the file that keeps it.

A secret has 256 random bits. Nobody can try that many, so its plain SHA-256 is enough at rest; the slow
hashes made for passwords would only cost every request their time.
"""

import contextlib
import fcntl
import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from model_store.manifest import Sha256, TaskName
from service.errors import InvalidKeys

Scope = Literal["predict", "read", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_PREFIX = "tosca"


class ApiKey(BaseModel):
    """One key as it is kept: everything but the secret."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key_id: str = Field(pattern=r"^[0-9a-f]{12}$")
    name: TaskName = Field(description="Who holds it; the author of what is done with it.")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    secret_sha256: Sha256
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None

    def is_expired(self, now: datetime) -> bool:
        return self.expires_at is not None and now >= self.expires_at

    def fits(self, secret: str) -> bool:
        """Whether this is the key's secret, in a time that says nothing about it."""
        return hmac.compare_digest(_digest(secret), self.secret_sha256)


class KeyList(BaseModel):
    """The keys file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()


def make_key(
    name: str, scopes: tuple[Scope, ...], *, now: datetime, expires_at: datetime | None = None
) -> tuple[ApiKey, str]:
    """A new key and its token, which nobody can be shown again. Raises InvalidKeys."""
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    try:
        key = ApiKey(
            key_id=key_id,
            name=name,
            scopes=scopes,
            secret_sha256=_digest(secret),
            created_at=now,
            expires_at=expires_at,
        )
    except ValidationError as error:
        raise InvalidKeys(str(error.errors(include_url=False)[0]["msg"])) from error
    return key, f"{_PREFIX}_{key_id}_{secret}"


def split_token(token: str) -> tuple[str, str] | None:
    """Key id and secret of a token; None when it is none of ours."""
    prefix, _, rest = token.partition("_")
    key_id, _, secret = rest.partition("_")
    return (key_id, secret) if prefix == _PREFIX and key_id and secret else None


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys in a file; none where there is no file. Raises InvalidKeys."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise InvalidKeys(f"keys file {path}: {error.strerror}") from error
    try:
        return KeyList.model_validate_json(data).keys
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidKeys(f"keys file {path}: {where}: {first['msg']}") from error


def change_keys(path: Path, change: Callable[[tuple[ApiKey, ...]], tuple[ApiKey, ...]]) -> None:
    """Replace the keys in a file by `change(keys)`: in one step for readers, one writer at a time."""
    try:
        with _locked(path):
            _replace(path, KeyList(keys=change(read_keys(path))).model_dump_json(indent=2).encode())
    except OSError as error:
        raise InvalidKeys(f"keys file {path}: {error.strerror}") from error


def without_key(key_id: str) -> Callable[[tuple[ApiKey, ...]], tuple[ApiKey, ...]]:
    """The change that revokes a key. Raises InvalidKeys when there is none with this id."""

    def change(keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        left = tuple(one for one in keys if one.key_id != key_id)
        if len(left) == len(keys):
            raise InvalidKeys(f"no key has the id {key_id!r}")
        return left

    return change


def now_utc() -> datetime:
    """Wall-clock time, which is what an expiry date means."""
    return datetime.now(UTC)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, in place of the old one or not at all."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # created with mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
