"""Faults that only a service has: too much, too late, too large, not now, not you.

ToscaError
├── Refused                  may be asked again later; `retry_after_s` says when
│   ├── Overloaded           the queue or the memory for bodies is full
│   │   └── DeviceOutOfMemory
│   ├── TooManyRequests      one key has too many requests under way
│   ├── ShuttingDown
│   └── EngineStopped        an inference thread has died
├── DeadlineExceeded         not answered in time
├── BodyTimeout              the client sends its body too slowly
├── BodyTooLarge
├── UnsupportedMediaType
├── Unauthenticated          no key, or a wrong one
├── Forbidden                a key without the scope
├── NotFound
│   └── UnknownVersion       a model is not served in the version asked for
├── RevisionBehind           a newer revision is asked for than is served
├── NotFinite                an answer that is no number
├── InvalidKeys              a keys file that cannot be used
├── InvalidSettings          settings that contradict each other or are unsafe
├── AuditUnavailable         the audit log cannot be written
├── CannotListen             the address is taken or is not ours
└── UnknownAnswer            (a NotFound) feedback on an answer that is not remembered
"""

from model_store.errors import NotFound, ToscaError


class Refused(ToscaError):
    """Not now; `retry_after_s` is a guess at when."""

    def __init__(self, message: str, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(Refused):
    pass


class DeviceOutOfMemory(Overloaded):
    pass


class TooManyRequests(Refused):
    pass


class ShuttingDown(Refused):
    pass


class EngineStopped(Refused):
    pass


class DeadlineExceeded(ToscaError):
    pass


class BodyTimeout(ToscaError):
    pass


class BodyTooLarge(ToscaError):
    pass


class UnsupportedMediaType(ToscaError):
    pass


class Unauthenticated(ToscaError):
    """`is_wrong` when credentials came and do not hold, False when none came."""

    def __init__(self, message: str, *, is_wrong: bool = False) -> None:
        super().__init__(message)
        self.is_wrong = is_wrong


class Forbidden(ToscaError):
    """`scope` is what the caller's key lacks, if a scope is what it lacks."""

    def __init__(self, message: str, *, scope: str | None) -> None:
        super().__init__(message)
        self.scope = scope


class UnknownVersion(NotFound):
    pass


class RevisionBehind(ToscaError):
    """`served` is the revision that answers here, and `minimum` the one asked for."""

    def __init__(self, minimum: int, served: int, why: str) -> None:
        super().__init__(f"revision {minimum} is asked for, revision {served} is served: {why}")
        self.minimum = minimum
        self.served = served


class NotFinite(ToscaError):
    pass


class InvalidKeys(ToscaError):
    pass


class InvalidSettings(ToscaError):
    pass


class AuditUnavailable(ToscaError):
    pass


class CannotListen(ToscaError):
    pass


class UnknownAnswer(NotFound):
    pass
