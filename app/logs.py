"""Logs: one JSON line an event, UTC, to a file of the process's own."""

from __future__ import annotations

import logging
from pathlib import Path

import structlog


def configure(path: Path) -> None:
    """Everything this process logs, the libraries' lines included, is appended to `path` (rotate it by renaming)."""
    from logging.handlers import WatchedFileHandler

    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    handler = WatchedFileHandler(path, encoding="utf-8")
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.JSONRenderer()],
        foreign_pre_chain=shared,
    )
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
