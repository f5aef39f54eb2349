"""Logs for machines (one JSON object a line) or for people, each line with the ids of its request, and
which process wrote it where there are several."""

import json
import logging
import logging.config
from datetime import UTC, datetime
from multiprocessing import parent_process

from service.request_context import current_request
from service.settings import Settings


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what a record carries as `extra={"fields": …}` becomes keys of its own."""

    def format(self, record: logging.LogRecord) -> str:
        context = current_request.get()
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **({"process": record.processName} if parent_process() else {}),
            **({"request_id": context.request_id} if context else {}),
            **({"trace_id": context.trace_id} if context and context.trace_id else {}),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """A message is one line: a path may hold what would look like further ones."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        record.message = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        context = current_request.get()
        text = super().format(record)
        return f"{text} [{context.request_id}]" if context else text


def configure_logs(settings: Settings) -> None:
    """Send everything, uvicorn's own lines too, to standard error in one format."""
    process = "%(processName)s " if parent_process() else ""
    formatter = JsonFormatter if settings.log_format == "json" else TextFormatter
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "chosen": {
                    "()": formatter,
                    "format": f"%(asctime)s {process}%(levelname)s %(name)s: %(message)s",
                }
            },
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "chosen"}},
            "root": {"level": settings.log_level.upper(), "handlers": ["stderr"]},
            "loggers": {name: {"handlers": [], "propagate": True} for name in ("uvicorn", "uvicorn.error")},
        }
    )
