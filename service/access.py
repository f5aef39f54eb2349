"""Who is asking, and may they: API keys as bearer tokens (RFC 6750), scopes, and when no key is needed."""

import ipaddress
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from service.errors import Forbidden, InvalidKeys, InvalidSettings, Unauthenticated
from service.keys import SCOPES, ApiKey, Scope, now_utc, read_keys, split_token
from service.settings import Settings

log = logging.getLogger("tosca.access")
_NOBODY = ApiKey(
    key_id="0" * 12,
    name="nobody",
    scopes=("read",),
    secret_sha256="0" * 64,
    created_at=datetime.min.replace(tzinfo=UTC),
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request: the name of a key, or nobody in particular."""

    name: str
    scopes: frozenset[Scope]
    key_id: str | None = None

    @property
    def author(self) -> str | None:
        """The name to put into a revision; None leaves it to the store's own."""
        return self.name if self.key_id else None


class KeyRing:
    """The keys of a file, read again whenever the file changes.

    A file that cannot be read any more leaves the keys as they were; a file that is gone leaves none.
    """

    def __init__(self, path: Path) -> None:
        """Raises InvalidKeys when the file cannot be read."""
        self._path = path
        self._state = self._stat()
        self._keys = self._read()

    def find(self, token: str, now: datetime) -> ApiKey | None:
        """The key of a token, unless it has expired."""
        self._refresh()
        key_id, secret = split_token(token) or ("", token)
        key = self._keys.get(key_id)
        is_right = (key or _NOBODY).fits(secret)  # an unknown id costs the same comparison
        return key if key is not None and is_right and not key.is_expired(now) else None

    def _refresh(self) -> None:
        state = self._stat()
        if state == self._state:
            return
        self._state = state
        try:
            self._keys = self._read()
        except InvalidKeys as error:
            log.error("keeping the %d keys read before: %s", len(self._keys), error)
        else:
            log.info("read %d keys", len(self._keys))

    def _read(self) -> Mapping[str, ApiKey]:
        return {one.key_id: one for one in read_keys(self._path)}

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._path)  # noqa: PTH116 - this runs for every request
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


class Access:
    """Tells callers apart. Without a keys file everybody may do everything, but only on loopback."""

    def __init__(self, settings: Settings, clock: Callable[[], datetime] = now_utc) -> None:
        """Raises InvalidSettings where strangers would get in without anybody having said so."""
        self._ring = KeyRing(settings.keys_file) if settings.keys_file else None
        self._clock = clock
        self._own_origins = frozenset(settings.cors_origins)
        self._is_local = all(is_loopback(host) for host in settings.hosts)
        allowed = settings.allow_anonymous
        if allowed in ("auto", "without-keys"):
            if allowed == "auto" and self._ring is None and not self._is_local:
                raise InvalidSettings(
                    f"no keys file, and {settings.host} can be reached by others: make keys with `tosca keys "
                    "create` and set TOSCA_KEYS_FILE, or say TOSCA_ALLOW_ANONYMOUS=predict or everything"
                )
            allowed = "everything" if self._ring is None else "nothing"
        if allowed == "nothing" and self._ring is None:
            raise InvalidSettings("TOSCA_ALLOW_ANONYMOUS=nothing needs TOSCA_KEYS_FILE: nobody could get in")
        scopes: dict[str, tuple[Scope, ...]] = {"nothing": (), "predict": ("predict",), "everything": SCOPES}
        self._anonymous = Caller("anonymous", frozenset(scopes[allowed]))

    def identify(self, authorization: str | None) -> Caller:
        """The caller of a request with this Authorization header. Raises Unauthenticated."""
        if authorization is None:
            return self._anonymous
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("Authorization must be: Bearer <API key>", is_wrong=True)
        key = self._ring.find(token.strip(), self._clock()) if self._ring else None
        if key is None:
            raise Unauthenticated("the API key is unknown, revoked or expired", is_wrong=True)
        return Caller(key.name, frozenset(key.scopes), key.key_id)

    def check(self, caller: Caller, scope: Scope) -> None:
        """Raises Unauthenticated or Forbidden unless the caller may act under `scope`."""
        if scope in caller.scopes:
            return
        if caller.key_id is None:
            raise Unauthenticated(f"this needs an API key with scope {scope!r}")
        raise Forbidden(f"key {caller.name!r} has no scope {scope!r}", scope=scope)

    def check_origin(self, caller: Caller, origin: str | None, host: str | None) -> None:
        """Refuse what a page of another site makes a visitor's browser send to a server without keys."""
        if origin is None or caller.key_id is not None or origin in self._own_origins:
            return
        try:
            there = urlsplit(origin)
            is_same = there.netloc == host and (not self._is_local or is_loopback(there.hostname or ""))
        except ValueError:  # as http://[
            is_same = False
        if not is_same:
            raise Forbidden(f"origin {origin[:100]!r} may not send requests without an API key", scope=None)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
