"""A PostgreSQL of the tests' own: Debian's, in a directory of its own, reached by a unix socket and by nobody else."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from tests.support.service import wait_until

#: What a crash of the machine would cost does not matter here.
OPTIONS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=200", "shared_buffers=32MB",
           "listen_addresses=", "lock_timeout=30s", "deadlock_timeout=200ms")  # fmt: skip


class Postgres:
    """A running server. `url` names one of its databases, for SQLAlchemy; `create` makes one, copied from another."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._numbers = itertools.count()

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://{_user()}@/{database}?host={self.directory}"

    def create(self, template: str = "template1") -> str:
        """The name of a new database with the content of `template`, which nobody may be connected to."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop(self, name: str) -> None:
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def execute(self, statement: str, database: str = "postgres") -> None:
        dsn = f"host={self.directory} user={_user()} dbname={database}"
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(statement.encode())

    def answers(self) -> bool:
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def postgres_running() -> Iterator[Postgres]:
    """Made, started, and after the block stopped and gone."""
    directory = Path(tempfile.mkdtemp(prefix="stratus-pg-"))
    server: subprocess.Popen[bytes] | None = None
    try:
        if os.getuid() == 0:
            shutil.chown(directory, _user())
        # The PostgreSQL of a machine is run by nobody's root: initdb refuses to.
        _run("initdb", "-D", directory / "data", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8")
        options = [word for option in OPTIONS for word in ("-c", option)]
        argv = _as_user("postgres", "-D", directory / "data", "-k", directory, *options)
        with (directory / "log").open("wb") as log:
            server = subprocess.Popen(argv, cwd=directory, stdout=log, stderr=log)
        postgres = Postgres(directory)
        wait_until(postgres.answers, 60, "PostgreSQL")
        yield postgres
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)  # "fast": sessions are ended
            server.wait(30)
        shutil.rmtree(directory)


def _user() -> str:
    if os.getuid() != 0:
        return pwd.getpwuid(os.getuid()).pw_name
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def _as_user(program: str, *arguments: object) -> list[str]:
    binary = max(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    entry = pwd.getpwnam(_user())
    change = [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"] if os.getuid() == 0 else []
    # It goes with us, whatever ends us.
    return ["setpriv", *change, "--pdeathsig", "INT", "--", str(binary), *map(str, arguments)]


def _run(program: str, *arguments: object) -> None:
    subprocess.run(_as_user(program, *arguments), cwd="/", check=True, capture_output=True)
