"""What lies outside the database, as the worker holds it: pools, the target, locks. Handed to every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from app.config import Settings
from app.db import Database
from app.keys import KeyFileError, KeyRing
from app.operations import LANES
from blockdev.locks import FileLock
from iscsi.target import TargetError
from pools import PoolError

if TYPE_CHECKING:
    from app.library import Library
    from iscsi.target import Target
    from pools import Pool

#: What can be wrong with one volume (its bytes, its secret, its target) and must never keep another one shut.
TROUBLE = (TargetError, PoolError, KeyFileError, OSError, ValueError)


@dataclass
class Outside:
    settings: Settings
    database: Database
    keys: KeyRing
    target: Target
    pools: dict[str, Pool] = field(default_factory=dict)
    #: Of images, while its cache is active.
    library: Library | None = None

    def lock_path(self, subject: UUID, lane: str) -> Path:
        return self.settings.run_dir / "locks" / f"{subject}.{lane}"

    def lock(self, subject: UUID, lane: str, timeout: float | None = None) -> FileLock:
        """Who holds it is the only one to act on this subject in this lane, across processes and their children."""
        return FileLock(self.lock_path(subject, lane), timeout=timeout)

    def forget_locks(self, subject: UUID) -> None:
        """The subject is gone from the database: who still waits will find its operation gone too."""
        for lane in LANES:
            self.lock_path(subject, lane).unlink(missing_ok=True)
