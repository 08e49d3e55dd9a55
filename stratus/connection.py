"""The connection of an attachment: what an initiator needs to log in, and it is secret."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

import click

from blockdev.files import durable_rename
from stratus.errors import ConfigError, Document
from stratus.output import Output
from stratus.views import connection_view, flat


class ConnectionFile:
    """A file for a connection, readable by its owner only. With no `path`, nothing is written.

    Entering makes sure that it can be written, and raises ConfigError if not; an older file stays until save().
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._draft: IO[str] | None = None

    def __enter__(self) -> ConnectionFile:
        if self._path is not None:
            try:
                # mkstemp(3) makes it with mode 0600 from the start.
                self._draft = tempfile.NamedTemporaryFile(
                    "w", dir=self._path.parent, prefix=f".{self._path.name}.", delete=False
                )
            except OSError as error:
                raise ConfigError(f"cannot write {self._path}: {error.strerror}") from error
        return self

    def save(self, connection: Document) -> None:
        """Put `connection` there as JSON."""
        if self._path is None or self._draft is None:
            return
        json.dump(connection, self._draft, indent=2)
        self._draft.write("\n")
        self._draft.close()
        durable_rename(Path(self._draft.name), self._path)
        self._draft = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._draft is not None:
            self._draft.close()
            os.unlink(self._draft.name)


def connection_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of commands that receive a connection."""
    file = click.option(
        "--connection-file",
        type=click.Path(path_type=Path),
        help="Write the connection here as JSON, secrets included, readable by you only.",
    )
    secret = click.option("--show-secret", is_flag=True, help="Let a table or CSV show the passwords too.")
    return file(secret(function))


def show_connection(output: Output, attachment: Document, connection: Document, show_secret: bool) -> None:
    """In JSON the attachment with its connection, in full; otherwise the passwords only with `show_secret`."""
    whole = {**attachment, "connection": connection}
    output.record(connection_view(show_secret), flat(attachment["id"], connection), whole)
