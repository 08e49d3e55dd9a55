"""Where the bytes of volumes and snapshots lie. A pool knows nothing of users, states or exports."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from blockdev.extents import Progress
from pools.directory import DirectoryPool
from pools.interface import (
    Backing,
    BackingMissing,
    DeltaPool,
    Extent,
    Item,
    Pool,
    PoolError,
    PoolFailed,
    PoolFull,
    PoolUnusable,
    ShrinkRefused,
    SizeMismatch,
    SizeTooLarge,
    Usage,
)
from pools.lvm import LvmPool

__all__ = [
    "DRIVERS",
    "Backing",
    "BackingMissing",
    "DeltaPool",
    "Extent",
    "Item",
    "Pool",
    "PoolError",
    "PoolFailed",
    "PoolFull",
    "PoolUnusable",
    "Progress",
    "ShrinkRefused",
    "SizeMismatch",
    "SizeTooLarge",
    "Usage",
    "open_pool",
]

DRIVERS: dict[str, type[DirectoryPool] | type[LvmPool]] = {"directory": DirectoryPool, "lvm": LvmPool}


def open_pool(name: str, driver: str, path: Path, pool_id: UUID | None = None) -> Pool:
    """The pool `name` at `path`, to be activated before use. `pool_id`: what it was at an earlier activation, if any.

    `path` is a directory, or VOLUME_GROUP/THIN_POOL. Raises PoolUnusable for a driver we do not have.
    """
    if driver not in DRIVERS:
        raise PoolUnusable(name, f"no driver {driver!r}; there is {', '.join(sorted(DRIVERS))}")
    return DRIVERS[driver](name, path, pool_id=pool_id)
