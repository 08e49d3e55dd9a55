"""What all commands share: the home they act on, the service there, and how they fail."""

from __future__ import annotations

import errno
import os
import pwd
import time
from collections.abc import Callable
from enum import IntEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from app.commands.output import printable
from app.config import DEFAULT_HOME, ConfigError, Settings, load, read_effective
from app.errors import Problem

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from app.auth import Caller
    from app.models import Operation
    from app.service import Service


class Exit(IntEnum):
    """Exit codes, the same as those of the users' commands."""

    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    AUTH = 5
    TIMEOUT = 6
    UNAVAILABLE = 7


EXIT_OF_STATUS = {
    404: Exit.NOT_FOUND,
    409: Exit.CONFLICT,
    412: Exit.CONFLICT,
    401: Exit.AUTH,
    403: Exit.AUTH,
    504: Exit.TIMEOUT,
    503: Exit.UNAVAILABLE,
}


class Failure(Exception):
    """Ends the command with one line on stderr and `code`."""

    def __init__(self, message: str, code: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.code = code


# ---------------------------------------------------------------- the home


def with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """--home and --config, loaded as the first argument; errors that an operator can understand are one line."""
    return with_bare_settings(_explained(command))


def with_bare_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a process nobody looks at: what goes wrong while it runs keeps its traceback."""

    @click.option("--home", type=click.Path(path_type=Path), envvar="STRATUS_HOME", default=DEFAULT_HOME,
                  show_default=True, help="Where all state lies.")  # fmt: skip
    @click.option("--config", "config_file", type=click.Path(path_type=Path), envvar="STRATUS_CONFIG",
                  help="TOML file; HOME/config.toml when left out.")  # fmt: skip
    @wraps(command)
    def run(home: Path, config_file: Path | None, **options: Any) -> Any:
        _require_owner(home)
        effective = os.environ.get("STRATUS_EFFECTIVE")
        try:
            settings = read_effective(Path(effective)) if effective else load(home, config_file, flags=_flags(options))
            return command(settings, **options)
        except ConfigError as error:
            raise click.UsageError(str(error)) from error

    return run


def _require_owner(home: Path) -> None:
    """Files that somebody else, root above all, makes in a home could not be read by its service."""
    try:
        owner = home.stat().st_uid
    except OSError:
        return  # not there yet, or not to be seen: what needs it says so
    if owner == os.geteuid():
        return
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = f"#{owner}"
    raise click.UsageError(f"{home} belongs to {name}: run it as {name} (sudo -u '{name}' stratus-storage …)")


def _flags(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `serve` that override the file."""
    places = {
        "listen": ("server", "listen"),
        "tls_cert": ("server", "tls_cert"),
        "tls_key": ("server", "tls_key"),
        "behind_proxy": ("server", "behind_proxy"),
        "portal": ("iscsi", "portal"),
    }
    flags: dict[str, Any] = {}
    for option, (section, key) in places.items():
        if options.get(option):
            value = options[option]
            flags.setdefault(section, {})[key] = str(value) if isinstance(value, Path) else value
    return flags


# ---------------------------------------------------------------- failures


def _explained(command: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except Exception as error:  # the edge of the process
            failure = _failure(error)
            if failure is None:
                raise
            click.echo(f"Error: {printable(str(failure))}", err=True)
            raise SystemExit(int(failure.code)) from error

    return run


def _failure(error: Exception) -> Failure | None:
    """What an operator is told of `error`; None for what is a defect, or click's own."""
    from sqlalchemy.exc import SQLAlchemyError

    from app.keys import KeyFileError

    match error:
        case Failure():
            return error
        case Problem():
            return Failure(error.detail, EXIT_OF_STATUS.get(error.status, Exit.FAILED))
        case KeyFileError():
            return Failure(str(error))
        case SQLAlchemyError():
            reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            return Failure(f"the database does not do it: {reason}", Exit.UNAVAILABLE)
        case OSError() if error.errno != errno.EPIPE:  # a reader that is gone is click's to handle
            return Failure(str(error), Exit.UNAVAILABLE)
    return None


# ---------------------------------------------------------------- the service


def service(settings: Settings) -> Service:
    """The service of this home. UsageError when there is none, or one of another version; nothing is made."""
    from sqlalchemy.engine import make_url

    from app.service import Service, is_migrated

    url = make_url(settings.database_url)
    there = url.get_backend_name() != "sqlite" or Path(url.database or "").is_file()
    found = Service(settings, connections=2)
    if not (settings.home.is_dir() and there and is_migrated(found.database)):
        raise click.UsageError(
            f"{settings.home} is no service's home: "
            f"run `stratus-storage serve --home {settings.home}` or `upgrade` first"
        )
    return found


def act(settings: Settings, action: Callable[[Session, Caller], Any]) -> Any:
    """`action(session, caller)` in one transaction, as the operator of this host: an admin who is no user."""
    with service(settings).database.write() as session:
        return action(session, _operator())


def look(settings: Settings, action: Callable[[Session, Caller], Any]) -> Any:
    """The same for what changes nothing."""
    with service(settings).database.read() as session:
        return action(session, _operator())


def _operator() -> Caller:
    from app.auth import Caller

    return Caller(UUID(int=0), "operator", "admin")


def valid(model: str, **values: Any) -> Any:
    """A request document of the API, with its checks; UsageError says what is wrong."""
    from pydantic import ValidationError

    from app import schemas

    try:
        return getattr(schemas, model)(**values)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
        raise click.UsageError(f"{'.'.join(map(str, found['loc']))}: {found['msg']}") from error


def finish(found: Service, identifier: UUID, timeout: float) -> Operation:
    """The operation once it has succeeded; its Problem if it has not, Failure (TIMEOUT) after `timeout` seconds."""
    from app.models import Operation
    from app.operations import FINAL, problem_of

    deadline = time.monotonic() + timeout
    while True:
        with found.database.read() as session:
            operation = session.get_one(Operation, identifier)
        if operation.state == "succeeded":
            return operation
        if operation.state in FINAL:
            raise problem_of(operation)
        if time.monotonic() > deadline:
            why = operation.message or "is it running?"
            raise Failure(f"the worker has not done it within {timeout:g} s: {why}", Exit.TIMEOUT)
        time.sleep(0.05)
