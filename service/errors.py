"""Faults that only a service has: too much, too late, too large, not now."""

from model_store.errors import ToscaError


class Overloaded(ToscaError):
    """The queue is full; `retry_after_s` is a guess at when it will not be."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ShuttingDown(ToscaError):
    pass


class DeadlineExceeded(ToscaError):
    pass


class BodyTooLarge(ToscaError):
    pass


class UnsupportedMediaType(ToscaError):
    pass
