"""How Alembic reaches the database: by the engine the service uses, one migration at a time."""

from __future__ import annotations

from alembic import context

from app.db import Database
from app.models import Base

#: "stratus" on a telephone's keys; any number will do, as long as it is ours alone.
ADVISORY_LOCK = 7872887


def run() -> None:
    database = Database(context.config.attributes["url"], connections=1)
    try:
        with database.engine.connect() as connection:
            context.configure(
                connection=connection, target_metadata=Base.metadata, render_as_batch=True, transactional_ddl=True
            )
            with context.begin_transaction():
                if database.dialect == "postgresql":
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})")
                context.run_migrations()
    finally:
        database.close()


run()
