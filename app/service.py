"""What a process of the service is made of, from its settings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError

import migrations
from app.config import ConfigError, Settings
from app.db import Database
from app.keys import KeyRing
from app.notify import Bus, Waiters, open_bus
from app.transfers import Places


@dataclass
class Service:
    """Settings, database, keys and the way to wake the others; each made when first needed."""

    settings: Settings
    connections: int = 10

    @cached_property
    def database(self) -> Database:
        return Database(self.settings.database_url, self.connections)

    @cached_property
    def keys(self) -> KeyRing:
        return KeyRing.load(self.settings.key_dir / "secrets.json")

    @cached_property
    def bus(self) -> Bus:
        return open_bus(self.database, self.settings.run_dir)

    @cached_property
    def waiters(self) -> Waiters:
        return Waiters(self.bus, places=max(1, self.settings.server.threads // 2))

    @cached_property
    def downloads(self) -> Places:
        return Places(self.settings.server.threads // 4)

    @cached_property
    def uploads(self) -> Places:
        return Places(self.settings.server.threads // 8)


def alembic_config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations.DIRECTORY))
    config.attributes["url"] = url
    return config


def migrate(settings: Settings, revision: str = "head") -> None:
    """Bring the database to `revision`; safe for two at once. ConfigError when it is at one that we do not know."""
    try:
        command.upgrade(alembic_config(settings.database_url), revision)
    except CommandError as error:
        raise ConfigError(
            f"the database cannot be brought to {revision}: {error}. If a newer version of this service has used it, "
            "start that one, or restore the backup from before"
        ) from error


def is_migrated(database: Database) -> bool:
    """Whether the database is at the revision this code was written for."""
    head = ScriptDirectory.from_config(alembic_config("")).get_current_head()
    with database.read() as session:
        return MigrationContext.configure(session.connection()).get_current_revision() == head
