"""What `tosca doctor` looks at in a service: its settings, its keys, its certificate, and whether it runs."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
from cryptography import x509
from httpx import codes
from pydantic import ValidationError

from model_store.checkup import Finding, State
from model_store.errors import ToscaError
from model_store.signatures import Trust
from model_store.store import ModelStore
from service.access import Access
from service.keys import now_utc, read_keys
from service.schemas.health import Ready
from service.settings import Settings

_TIMEOUT_S = 2.0
_SOON = timedelta(days=14)


def findings(store_url: str) -> Iterator[Finding]:
    """The service as the TOSCA_* variables describe it, and the one that listens where they say."""
    try:
        settings = Settings(**{"store": store_url})  # type: ignore[arg-type]
    except ValidationError as error:
        for one in error.errors(include_url=False, include_input=False):
            name = "TOSCA_" + ".".join(str(part) for part in one["loc"]).upper()
            yield Finding("service", name, "broken", one["msg"])
        return
    yield from _access(settings)
    yield from _certificate(settings)
    if settings.trusted_signers is not None:
        yield _signers(settings.trusted_signers, is_required=settings.require_signature)
    yield from _server(settings)


def _access(settings: Settings) -> Iterator[Finding]:
    """Who gets in: keys, and what nobody needs a key for."""
    try:
        Access(settings)
        keys = read_keys(settings.keys_file) if settings.keys_file else ()
    except ToscaError as error:
        yield Finding("service", "access", "broken", str(error))
        return
    if settings.keys_file is None:
        yield Finding("service", "keys", "note", f"none: whoever reaches {settings.host} may do everything")
        return
    expired = sum(one.is_expired(now_utc()) for one in keys)
    usable = len(keys) - expired
    text = f"{usable} in {settings.keys_file}, {expired} expired"
    yield Finding("service", "keys", "ok" if usable else "warning", text)


def _certificate(settings: Settings) -> Iterator[Finding]:
    if settings.tls_certificate is None:
        return
    try:
        certificate = x509.load_pem_x509_certificate(settings.tls_certificate.read_bytes())
    except (OSError, ValueError) as error:
        yield Finding("service", "certificate", "broken", f"{settings.tls_certificate}: {error}")
        return
    ends = certificate.not_valid_after_utc
    left = ends - now_utc()
    state: State = "broken" if left < timedelta(0) else "warning" if left < _SOON else "ok"
    yield Finding("service", "certificate", state, f"valid until {ends:%Y-%m-%d}")


def _signers(path: Path, *, is_required: bool) -> Finding:
    try:
        trust = Trust.read(path, is_required=is_required)
    except ToscaError as error:
        return Finding("service", "signers", "broken", str(error))
    return Finding("service", "signers", "ok", f"{len(trust.key_of)} trusted in {path}")


def _server(settings: Settings) -> Iterator[Finding]:
    """The server on the port of the settings, if there is one: whether it is ready, and how far behind."""
    scheme = "https" if settings.tls_certificate else "http"
    url = f"{scheme}://{settings.host}:{settings.port}"
    try:
        # What counts is who listens, not who signed its certificate; no secret is sent.
        answer = httpx.get(f"{url}/health/ready", timeout=_TIMEOUT_S, verify=False)  # noqa: S501
        if answer.status_code == codes.SERVICE_UNAVAILABLE:
            yield Finding("service", "server", "broken", f"{url} is not ready: {answer.text[:200]}")
            return
        state = Ready.model_validate_json(answer.raise_for_status().content)
    except httpx.ConnectError:
        yield Finding("service", "server", "note", f"none listens at {url}")
        return
    except (httpx.HTTPError, ValidationError):
        yield Finding("service", "server", "warning", f"{url} is taken by something that is no tosca server")
        return
    yield Finding("service", "server", "ok", f"{url} ready on {state.device} with {state.runtime}")
    yield from _staleness(settings, state)


def _staleness(settings: Settings, state: Ready) -> Iterator[Finding]:
    served, staleness_s = state.revision, state.staleness_s
    if state.store_fault is not None:
        text = f"revision {served}, and the store fails: {state.store_fault}"
        yield Finding("service", "staleness", "warning", text)
        return
    try:
        newest = ModelStore(settings.store).head_number()
    except ToscaError:
        return  # said already
    is_behind = newest > served and staleness_s > settings.stale_after_s
    text = f"serves revision {served}, the store has {newest}, read {staleness_s:.0f} s ago"
    yield Finding("service", "staleness", "warning" if is_behind else "ok", text)
