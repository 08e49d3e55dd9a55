"""What the tests of the service's inside share."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from app.db import Database
from tests.support.databases import database as database
from tests.support.databases import database_url as database_url
from tests.support.databases import postgres as postgres
from tests.support.databases import postgres_template as postgres_template
from tests.support.databases import sqlite_template as sqlite_template


@pytest.fixture(autouse=True, scope="session")
def quiet() -> Iterator[None]:
    """Nothing is logged: painting a traceback on a terminal takes longer than what it tells of."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.fixture
def sqlite_database(sqlite_template: Path, tmp_path: Path) -> Iterator[Database]:
    """For tests of what no kind of database makes different; `database` is each of them in turn."""
    path = tmp_path / "stratus.db"
    shutil.copy(sqlite_template, path)
    opened = Database(f"sqlite:///{path}", connections=60)
    yield opened
    opened.close()
