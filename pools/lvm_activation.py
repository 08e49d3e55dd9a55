"""Which thin pools are trusted with data, and what makes one ours."""

from __future__ import annotations

import re
import shutil
from uuid import UUID, uuid4

from blockdev.command import CommandMissing
from pools.interface import PoolUnusable
from pools.lvm_commands import TOOLS, LogicalVolume, Lvm
from pools.lvm_devices import ThinPoolStatus
from pools.lvm_volumes import POOL_TAG, TAG, UUID_PATTERN


def examined(lvm: Lvm, name: str, thin_pool: str) -> LogicalVolume:
    """The thin pool of the pool `name`. Raises PoolUnusable, CommandError."""
    for tool in TOOLS:
        if shutil.which(tool) is None:
            raise CommandMissing(tool)
    path = f"{lvm.group}/{thin_pool}"
    found = next(iter(lvm.volumes(f'lv_name="{thin_pool}"')), None)
    if found is None or not found.is_thin_pool:
        raise PoolUnusable(name, f"{path} is {'no thin pool' if found else 'missing'}")
    if not found.zeroing:
        raise PoolUnusable(
            name, f"{path} does not zero what it gives out, so what was deleted could be read: lvchange --zero y {path}"
        )
    if found.discards == "ignore":
        raise PoolUnusable(
            name,
            f"{path} ignores discards, so what machines free would never come back: deactivate it, then"
            f" lvchange --discards passdown {path}",
        )
    return found


def identity(lvm: Lvm, name: str, found: LogicalVolume, expected: UUID | None) -> UUID | None:
    """Which pool it is; None for one that may become ours. Raises PoolUnusable, CommandError."""
    path = f"{lvm.group}/{found.name}"
    tags = sorted(tag for tag in found.tags if tag.startswith(POOL_TAG))
    if not tags:
        if expected:
            raise PoolUnusable(name, f"{path} has not the tag {POOL_TAG}{expected}: is it the right thin pool?")
        if lvm.volumes(f'pool_lv="{found.name}" && tags={TAG} && lv_name=~"^{TAG}-[vstr]-"'):
            raise PoolUnusable(name, f"{path} holds volumes or snapshots but has lost its tag {POOL_TAG}…")
        return None
    if len(tags) > 1 or not re.fullmatch(POOL_TAG + UUID_PATTERN, tags[0]):
        raise PoolUnusable(name, f"{path} has the tags {', '.join(tags)}, which name no one pool")
    pool_id = UUID(tags[0].removeprefix(POOL_TAG))
    if expected not in (None, pool_id):
        raise PoolUnusable(name, f"{path} is pool {pool_id}, not {expected}")
    return pool_id


def initialise(lvm: Lvm, found: LogicalVolume) -> UUID:
    """Make it a pool. Raises CommandError."""
    pool_id = uuid4()
    lvm.change("lvchange", "--addtag", f"{POOL_TAG}{pool_id}", f"{lvm.group}/{found.name}")
    return pool_id


def start(lvm: Lvm, found: LogicalVolume) -> None:
    """Activate or resume the thin pool, and let writes to a full one fail: else they wait, and every machine hangs.

    Raises CommandError.
    """
    path = f"{lvm.group}/{found.name}"
    if found.suspended:
        resume(lvm, found.name)
    if not found.errors_when_full:
        lvm.change("lvchange", "--errorwhenfull", "y", path)
    if not found.active:
        lvm.change("lvchange", "--activate", "y", path)


def resume(lvm: Lvm, thin_pool: str) -> None:
    """Resume the thin pool, which a command of lvm(8) that was killed has left suspended. It waits for one that is at
    work, as each command does. Raises CommandError.
    """
    lvm.change("lvchange", "--refresh", f"{lvm.group}/{thin_pool}")


def check_health(name: str, path: str, status: ThinPoolStatus) -> None:
    """Raises PoolUnusable for a thin pool that has stopped to change."""
    if status.broken:
        raise PoolUnusable(
            name,
            f"{path} is {status.mode}{' and needs a check' if status.needs_check else ''}, most likely because its"
            f" metadata was full: deactivate it, run lvconvert --repair {path}, and give it more by"
            f" lvextend --poolmetadatasize +SIZE {path}",
        )
