"""The database's history: every revision up and down, with rows in the tables."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, select, text

from app.config import ConfigError, Settings
from app.db import Database
from app.models import Base, Counter
from app.service import alembic_config, is_migrated, migrate
from tests.support.databases import KINDS, settings_for
from tests.support.postgres import Postgres
from tests.support.rows import one_of_each

#: Each revision with the one before it.
REVISIONS = [
    (script.revision, str(script.down_revision or "base"))
    for script in ScriptDirectory.from_config(alembic_config("")).walk_revisions()
]


@pytest.fixture(params=KINDS)
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Settings that name a database without any table."""
    if request.param == "sqlite":
        yield settings_for(tmp_path / "home", f"sqlite:///{tmp_path / 'new.db'}")
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = server.create()
    yield settings_for(tmp_path / "home", server.url(name))
    server.drop(name)


@pytest.fixture
def opened(empty: Settings) -> Iterator[Database]:
    database = Database(empty.database_url)
    yield database
    database.close()


def tables(database: Database) -> set[str]:
    return set(inspect(database.engine).get_table_names()) - {"alembic_version"}


def test_the_head_is_what_the_models_say(empty: Settings, opened: Database) -> None:
    migrate(empty)
    with opened.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "render_as_batch": True})
        assert compare_metadata(context, Base.metadata) == []
    with opened.read() as session:  # what no comparison of tables sees
        assert session.scalar(select(Counter.value).where(Counter.name == "tid")) == 0


def test_an_index_that_the_models_do_not_know_is_seen(empty: Settings, opened: Database) -> None:
    migrate(empty)
    with opened.write() as session:
        session.execute(text("DROP INDEX uq_attachments_one_writer"))
    with opened.engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    assert [what for what, *_ in differences] == ["add_index"]


def test_partial_indexes_and_checks_are_in_the_database(empty: Settings, opened: Database) -> None:
    """Alembic compares neither the condition of an index nor a CHECK."""
    migrate(empty)
    seen = inspect(opened.engine)
    checks = {check["name"] for table in tables(opened) for check in seen.get_check_constraints(table)}
    assert {"ck_volumes_readers", "ck_snapshots_readers", "ck_attachments_held"} <= checks
    assert "ck_attachments_held_until_detached" in checks
    option = f"{opened.dialect}_where"
    partial = {
        index["name"]: str(index["dialect_options"][option])
        for table in tables(opened)
        for index in seen.get_indexes(table)
        if index.get("dialect_options", {}).get(option) is not None
    }
    wanted = {
        index.name: str(index.dialect_options[opened.dialect]["where"])
        for table in Base.metadata.tables.values()
        for index in table.indexes
        if index.dialect_options[opened.dialect]["where"] is not None
    }
    assert partial.keys() == wanted.keys()
    assert "rw" in partial["uq_attachments_one_writer"]
    assert "running" in partial["uq_operations_one_running"]


@pytest.mark.parametrize(("revision", "before"), REVISIONS)
def test_every_revision_goes_down_and_up_again_with_data(
    empty: Settings, opened: Database, revision: str, before: str
) -> None:
    migrate(empty, revision)
    migrate(empty)
    with opened.write() as session:
        one_of_each(session)
    command.downgrade(alembic_config(empty.database_url), before)
    if before == "base":
        assert tables(opened) == set()
    migrate(empty)
    assert tables(opened) == set(Base.metadata.tables)
    assert is_migrated(opened)
    with opened.write() as session:  # and it can be used
        one_of_each(session, suffix="-again")


def test_migrating_twice_keeps_the_data(empty: Settings, opened: Database) -> None:
    migrate(empty)
    with opened.write() as session:
        one_of_each(session)
    migrate(empty)
    with opened.read() as session:
        for table in Base.metadata.sorted_tables:
            assert session.execute(select(table)).first() is not None, table.name


def test_four_processes_migrate_at_once(empty: Settings, opened: Database) -> None:
    program = (
        "import sys; from pathlib import Path; from app.config import load; from app.service import migrate;"
        "settings = load(Path(sys.argv[1]), flags={'database': {'url': sys.argv[2]}});"
        "sys.stdin.readline(); migrate(settings)"
    )
    argv = [sys.executable, "-c", program, str(empty.home), empty.database_url]
    started = [subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [process.communicate("go\n", timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0] * 4, errors
    assert is_migrated(opened)
    with opened.read() as session:
        assert len(session.execute(text("SELECT version_num FROM alembic_version")).all()) == 1


def test_a_database_that_is_not_migrated_is_known(empty: Settings, opened: Database) -> None:
    assert not is_migrated(opened)
    migrate(empty)
    assert is_migrated(opened)


def test_a_database_of_a_newer_version_is_refused_with_what_to_do(empty: Settings, opened: Database) -> None:
    migrate(empty)
    with opened.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    assert not is_migrated(opened)
    with pytest.raises(ConfigError, match=r"9999(.|\n)*newer version"):
        migrate(empty)
    with opened.read() as session:
        assert session.scalar(text("SELECT version_num FROM alembic_version")) == "9999"


def test_the_command_refuses_a_newer_database_without_a_traceback(empty: Settings, opened: Database) -> None:
    migrate(empty)
    with opened.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    argv = [sys.executable, "-m", "app.cli", "upgrade", "--home", str(empty.home)]
    environment = {"STRATUS_DATABASE__URL": empty.database_url, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "9999" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_images_were_charged_for_is_given_back_on_the_way_down(empty: Settings, opened: Database) -> None:
    migrate(empty)
    with opened.write() as session:
        one_of_each(session)
        before = session.execute(text("SELECT used_size, used_count FROM users")).one()
        promised = session.scalar(text("SELECT promised FROM pools"))
    command.downgrade(alembic_config(empty.database_url), "0001")
    with opened.read() as session:
        after = session.execute(text("SELECT used_size, used_count FROM users")).one()
        assert (before[0] - after[0], before[1] - after[1]) == (1 << 20, 1)
        assert promised - session.scalar(text("SELECT promised FROM pools")) == 64 << 20
