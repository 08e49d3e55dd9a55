"""Fixtures: a database of each kind, migrated, fresh for every test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.config import Settings, load
from app.db import Database
from app.service import migrate
from tests.support.postgres import Postgres, postgres_running

KINDS = ("sqlite", "postgresql")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with postgres_running() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_template(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A migrated database to copy from."""
    name = postgres.create()
    migrate(settings_for(tmp_path_factory.mktemp("template"), postgres.url(name)))
    return name


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "stratus.db"
    migrate(settings_for(path.parent, f"sqlite:///{path}"))
    assert not path.with_name("stratus.db-wal").exists()  # a file alone is the whole of it
    return path


@pytest.fixture(params=KINDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a migrated, empty database."""
    if request.param == "sqlite":
        path = tmp_path / "stratus.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = server.create(request.getfixturevalue("postgres_template"))
    yield server.url(name)
    server.drop(name)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url, connections=60)
    yield opened
    opened.close()


def settings_for(home: Path, url: str, **sections: object) -> Settings:
    """Settings with that database; `sections` as flags."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("STRATUS_")}
    settings = load(home, environ=environ, flags={"database": {"url": url}, **sections})
    settings.make_directories()
    return settings
