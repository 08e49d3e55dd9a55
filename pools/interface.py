"""The interface of a pool, its types and its errors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol
from uuid import UUID

from blockdev.extents import Progress
from blockdev.units import format_size

Kind = Literal["volume", "snapshot"]


class PoolError(Exception):
    """A pool could not do what it was asked; `pool` is its name."""

    def __init__(self, pool: str, message: str) -> None:
        super().__init__(f"pool {pool}: {message}")
        self.pool = pool


class PoolUnusable(PoolError):
    """The pool cannot be activated."""

    def __init__(self, pool: str, reason: str) -> None:
        super().__init__(pool, reason)
        self.reason = reason


class PoolFull(PoolError):
    """No space is left, or a quota of the file system is used up. What was begun is removed."""

    def __init__(self, pool: str, detail: str = "") -> None:
        super().__init__(pool, f"no space left{detail and f': {detail}'}")


class PoolFailed(PoolError):
    """A tool of the host failed, or did not end in time. Trying again may do; the tool's own words are in `reason`."""

    def __init__(self, pool: str, reason: str) -> None:
        super().__init__(pool, reason)
        self.reason = reason


class BackingMissing(PoolError):
    """The pool has no such volume or snapshot."""

    def __init__(self, pool: str, kind: Kind, id: UUID) -> None:
        super().__init__(pool, f"no {kind} {id}")
        self.kind = kind
        self.id = id


class ShrinkRefused(PoolError):
    """A volume was to become smaller than it, or its source, is."""

    def __init__(self, pool: str, size: int, wanted: int) -> None:
        super().__init__(pool, f"{size} bytes cannot become {wanted}: volumes only grow")
        self.size = size
        self.wanted = wanted


class SizeMismatch(PoolError):
    """The volume exists already, with another size."""

    def __init__(self, pool: str, id: UUID, size: int, wanted: int) -> None:
        super().__init__(pool, f"volume {id} exists with {size} bytes, not {wanted}")
        self.id = id
        self.size = size
        self.wanted = wanted


class SizeTooLarge(PoolError):
    """The pool cannot have a volume of that size, however much space it has."""

    def __init__(self, pool: str, wanted: int) -> None:
        super().__init__(pool, f"it has no room for volumes of {format_size(wanted)}, were it empty")
        self.wanted = wanted


@dataclass(frozen=True)
class Backing:
    """What a target opens: a regular file or a block device of `size` bytes."""

    path: Path
    kind: Literal["file", "block"]
    size: int


@dataclass(frozen=True)
class Usage:
    """Bytes: `size` is all of the pool, `free` what new writes may use, `allocated` what volumes and snapshots hold.

    `metadata_percent` is how full the pool's own metadata is, where that is a space of its own.
    """

    size: int
    free: int
    allocated: int
    metadata_percent: float = 0.0


@dataclass(frozen=True)
class Item:
    """A volume or snapshot that really is in the pool: its size, and the bytes allocated for it.

    `allocated` is None where the pool cannot tell without much work.
    """

    kind: Kind
    id: UUID
    size: int
    allocated: int | None


@dataclass(frozen=True)
class Extent:
    """A run of bytes that may differ from another's; `zeros`: it has no data of its own now, and reads as zeros."""

    offset: int
    length: int
    zeros: bool


def no_progress(done: int, total: int) -> None:
    """The Progress of those who do not watch."""


class Pool(Protocol):
    """One pool.

    Every method can be repeated: what is there already, or gone already, is success after a look that it is so, and
    what a method has done survives a power cut once it returns. An interrupted one leaves either nothing or all of it
    to be seen; `sweep` clears the rest away. Methods for different volumes may run at the same time, in threads and
    in processes; the caller lets only one at a time work on a volume.

    `progress(done, total)` is called now and then in bytes, never if the work is instant. What it raises cancels the
    work, and the next call starts anew.

    Sizes are rounded up to whole units of `granularity`: `backing` has the size that a machine will see.

    Raises PoolFull where anything is written, PoolUnusable where the pool is no longer what was activated, PoolFailed,
    and OSError for what the host itself reports (an I/O error; EBUSY for a volume that is still open).
    """

    @property
    def name(self) -> str:
        """The site's name for the pool."""

    @property
    def pool_id(self) -> UUID | None:
        """The pool's own identity, known once it was activated. Keep it, and open the pool with it from then on."""

    reserve: int
    """Bytes of free space that a copy leaves to the guests of the volumes that are there already; PoolFull instead."""

    @property
    def granularity(self) -> int:
        """The unit of sizes in bytes. Valid once activated or examined."""

    @property
    def live_clone(self) -> bool:
        """Whether a clone or snapshot of an attached volume is one moment of it. Valid once activated or examined."""

    def activate(self) -> None:
        """Look whether the pool can be trusted with data, and make it a pool if it is new. Raises PoolUnusable."""

    def examine(self) -> None:
        """Look whether `activate` would succeed, and make nothing. Raises PoolUnusable."""

    def create(self, volume_id: UUID, size: int) -> None:
        """A volume of `size` bytes that reads as zeros. Raises SizeMismatch, SizeTooLarge."""

    def clone_volume(self, source: UUID, volume_id: UUID, size: int, progress: Progress = no_progress) -> None:
        """A volume with the bytes of volume `source`, then zeros up to `size`.

        Raises BackingMissing, ShrinkRefused, SizeMismatch, SizeTooLarge.
        """

    def clone_snapshot(self, snapshot: UUID, volume_id: UUID, size: int, progress: Progress = no_progress) -> None:
        """A volume with the bytes of `snapshot`, then zeros up to `size`.

        Raises BackingMissing, ShrinkRefused, SizeMismatch, SizeTooLarge.
        """

    def snapshot(self, volume_id: UUID, snapshot_id: UUID, progress: Progress = no_progress) -> None:
        """A snapshot of the volume as it is now, or as it was when this succeeded before. Raises BackingMissing."""

    def revert(self, volume_id: UUID, snapshot_id: UUID, progress: Progress = no_progress) -> None:
        """Give the volume the snapshot's bytes again. One that grew since keeps its size, the rest reads as zeros.

        The caller sees to it that nobody has the volume open. Raises BackingMissing for either.
        """

    def resize(self, volume_id: UUID, size: int) -> None:
        """Grow the volume, attached or not. Raises BackingMissing, ShrinkRefused, SizeTooLarge."""

    def delete_volume(self, volume_id: UUID) -> None:
        """Remove the volume and whatever was begun for it. Its clones and snapshots do not depend on it."""

    def delete_snapshot(self, snapshot_id: UUID) -> None:
        """Remove the snapshot and whatever was begun for it. Its clones do not depend on it."""

    def backing(self, volume_id: UUID, read_only: bool = False) -> Backing:
        """What to export; `read_only`: it will only be read. Raises BackingMissing."""

    def usage(self) -> Usage:
        """How full the pool is."""

    def inventory(self) -> list[Item]:
        """All volumes and snapshots that are really there."""

    def foreign(self) -> list[str]:
        """The names of what else lies where the pool is. It is never touched."""

    def sweep(self) -> list[str]:
        """Remove what interrupted work left behind, never what is being worked on or is not ours; what was removed."""


class DeltaPool(Pool, Protocol):
    """A pool that knows from its own metadata what was written."""

    def changed_extents(self, id: UUID, since: UUID) -> list[Extent]:
        """Where volume or snapshot `id` may differ from volume or snapshot `since`: in order, apart from one another.

        Outside of them the bytes are equal; what lies beyond the end of `since` counts as zeros. The caller sees to it
        that nobody writes meanwhile. Raises BackingMissing for either.
        """
