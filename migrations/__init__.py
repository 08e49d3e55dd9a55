"""The database's history, for Alembic; it travels with the package, so an installed service migrates itself."""

from pathlib import Path

DIRECTORY = Path(__file__).parent
