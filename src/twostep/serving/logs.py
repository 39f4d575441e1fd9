"""The log: a line of JSON for each request and for what else happens. No prompts, no keys."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

_LOGGER = "twostep.serving"


class JsonLines(logging.Formatter):
    """A record as one line of JSON; a traceback is a field of it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log(event: str, level: int = logging.INFO, **facts: Any) -> None:
    """Writes a line."""
    logging.getLogger(_LOGGER).log(level, event, extra={"facts": facts})


def log_error(event: str, error: BaseException, **facts: Any) -> None:
    """Writes a line with a traceback, which goes nowhere else."""
    logging.getLogger(_LOGGER).error(event, exc_info=error, extra={"facts": facts})


def log_to_stderr() -> None:
    """From now on, this log and the web server's own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in ((_LOGGER, logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
