"""What can go wrong on the way to a server.

ToscaError
└── ClientError
    ├── ServerRefused        the server answered with a problem document
    └── ServerUnreachable    no answer came
"""

from typing import Any

from model_store.errors import ToscaError


class ClientError(ToscaError):
    pass


class ServerRefused(ClientError):
    """A refusal: the HTTP status, the kind of problem (`unknown-task`), and the id of the request in the
    server's log."""

    def __init__(self, status: int, kind: str, detail: str, request_id: str | None = None) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.kind = kind
        self.detail = detail
        self.request_id = request_id

    @classmethod
    def of(cls, status: int, document: Any, text: str) -> "ServerRefused":
        """From a response: its JSON `document` where it is a problem (RFC 9457), else its `text`."""
        if not isinstance(document, dict):
            return cls(status, "http", text[:300] or "no explanation was given")
        kind = str(document.get("type", "http")).rpartition(":")[2]
        return cls(status, kind, str(document.get("detail", text[:300])), document.get("request_id"))

    @property
    def concerns_a_picture(self) -> bool:
        """Whether a picture of the request is at fault: too large, unreadable, of an unknown format."""
        return self.kind in ("invalid-image", "image-too-large", "unsupported-image-format")


class ServerUnreachable(ClientError):
    pass
