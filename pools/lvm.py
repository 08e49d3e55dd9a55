"""A pool in an LVM thin pool: each volume and snapshot is a thin logical volume.

    <group>/
      <thin pool>         its tag stratus-pool-<uuid> is the pool's identity
      stratus-v-<uuid>    a volume
      stratus-s-<uuid>    a snapshot: read-only, not active
      stratus-t-<uuid>    being made for the volume <uuid>
      stratus-r-<uuid>    whole, and about to replace the volume <uuid>

All of ours lie in the thin pool and have the tags stratus and stratus-pool-<uuid>. What lacks one of these, or has
another name, is not ours: it is neither spoken of nor touched, whatever else it is in the group or in the thin pool.

One command of lvm(8) is one transaction. An act that needs several builds stratus-t and ends with its renaming. A
revert cannot replace a name in one command: it makes stratus-r, removes the volume, which is its last word, and gives
the name to stratus-r. Who finds stratus-r without its volume renames it; who finds it beside the volume, or finds
stratus-t, removes it.

Acts on a volume hold a flock(2), and so does each of their commands until it ends, however we end: none does its work
after a successor has looked. Other volumes share the lock (there are LOCKS of them), so nothing slow is done under it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import UUID

from blockdev.command import CommandFailed
from blockdev.extents import Progress
from blockdev.files import fsync_file
from blockdev.locks import LockTimeout
from pools import lvm_activation as activation
from pools.interface import (
    Backing,
    BackingMissing,
    Extent,
    Item,
    Kind,
    PoolFailed,
    PoolFull,
    PoolUnusable,
    ShrinkRefused,
    SizeMismatch,
    Usage,
    no_progress,
)
from pools.lvm_commands import DEADLINE, LogicalVolume, Lvm
from pools.lvm_delta import TIMEOUT, metadata_snapshot, release, thin_delta
from pools.lvm_devices import Device, find_device, node
from pools.lvm_thinpool import ThinPool
from pools.lvm_volumes import (
    LETTERS,
    POOL_TAG,
    REPLACEMENT,
    STAGED,
    Found,
    Volumes,
    is_heir,
    is_leftover,
    is_unsettled,
    name_of,
    parsed,
)

LOCKS = 64
_PATH = re.compile(r"([\w+.][\w+.-]*)/([\w+.][\w+.-]*)", re.ASCII)


def no_trace(step: str) -> None:
    """The trace of those who do not watch."""


class LvmPool:
    """The thin pool `path`, VOLUME_GROUP/THIN_POOL; see pools.interface.DeltaPool for what its methods promise.

    With `pool_id`, activation refuses a thin pool without that tag. Without, one that holds nothing of ours becomes a
    pool; it may hold what is others'. Raises PoolUnusable for another kind of path.

    `deadline` is in seconds, for each command and each lock; a look that found room is believed for `room_for` seconds,
    since nothing that is made takes much of it at once. `trace(step)` is called before each command that changes
    something, with its name, for tests that stop there.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        *,
        pool_id: UUID | None = None,
        trace: Callable[[str], None] = no_trace,
        deadline: float = DEADLINE,
        room_for: float = 1.0,
    ) -> None:
        match = _PATH.fullmatch(str(path))
        if match is None:
            raise PoolUnusable(name, f"{path} is not VOLUME_GROUP/THIN_POOL")
        self.name = name
        self.path = path
        self.pool_id = pool_id
        self.live_clone = True
        self.reserve = 0
        self.granularity = 0
        self._group, lv = match.groups()
        self._thin_pool = ThinPool(name, Lvm(self._group, trace, deadline), lv, room_for)
        self._known: set[str] = set()  # devices seen to be ours, by their UUID, which they keep for life

    # Activation

    def activate(self) -> None:
        """Check how the thin pool is set up and that it is well, give it its tag, start it with its volumes, and let go
        of a metadata snapshot that somebody died with.

        Can be called again at any time. Raises PoolUnusable.
        """
        pool = self._thin_pool
        with pool.unusable():
            pool.lvm = pool.lvm.beside_the_site()
            with pool.locked("pool") as fds:
                lvm = pool.lvm.holding(fds)
                found = activation.examined(lvm, self.name, pool.lv)
                known = activation.identity(lvm, self.name, found, self.pool_id)
                activation.start(lvm, found)
                self.pool_id = known or activation.initialise(lvm, found)
            pool.found(found)
            self.granularity = found.extent_size
            if pool.status().held:
                with suppress(LockTimeout), pool.locked("metadata", timeout=0):
                    release(pool.lvm, pool.device())
            self._start_volumes()

    def examine(self) -> None:
        """As activate, but a thin pool without a tag stays without, and one that is not active stays so."""
        pool = self._thin_pool
        with pool.unusable():
            pool.lvm = pool.lvm.beside_the_site()
            found = activation.examined(pool.lvm, self.name, pool.lv)
            activation.identity(pool.lvm, self.name, found, self.pool_id)
            pool.found(found)
            self.granularity = found.extent_size
            if found.active and not found.suspended:
                pool.status()

    def _start_volumes(self) -> None:
        """Activate what the boot has not, in one command: `backing` would do it one by one."""
        found = self._ours.all()
        for id in {parsed(name)[1] for name in found if found[name].suspended or is_heir(name, found)}:
            self._swept(id)
        volumes = [each for name, each in found.items() if parsed(name)[0] == "v"]
        self._known.update(each.uuid for each in volumes)
        asleep = [each.name for each in volumes if not each.active]
        if asleep:
            with suppress(CommandFailed):  # one that cannot start must not keep the others: `backing` will tell
                self._ours.activate(*asleep)

    # Volumes and snapshots

    def create(self, volume_id: UUID, size: int) -> None:
        size = self._rounded(size)
        with self._act(volume_id, size=size) as ours:
            if find_device(self._node(REPLACEMENT, volume_id)):  # the name is free in the middle of a revert, too
                ours.settled(volume_id)
            try:
                self._check_room()
                ours.create(volume_id, size)
                self._remember(volume_id)
            except (PoolFull, CommandFailed):
                if not self._exists(ours.look(volume_id), volume_id, size):
                    raise
                self._deliver()

    def clone_volume(self, source: UUID, volume_id: UUID, size: int, progress: Progress = no_progress) -> None:
        self._clone("volume", source, volume_id, size)

    def clone_snapshot(self, snapshot: UUID, volume_id: UUID, size: int, progress: Progress = no_progress) -> None:
        self._clone("snapshot", snapshot, volume_id, size)

    def _clone(self, kind: Kind, source: UUID, volume_id: UUID, size: int) -> None:
        size = self._rounded(size)
        with self._act(source, volume_id, size=size) as ours:
            found = ours.settled(source, volume_id)
            if self._exists(found, volume_id, size):
                self._deliver()
                return
            origin = self._one(found, kind, source)
            if size < origin.size:
                raise ShrinkRefused(self.name, origin.size, size)
            self._check_room()
            ours.copy(origin, volume_id, size, "v")
            self._remember(volume_id)

    def snapshot(self, volume_id: UUID, snapshot_id: UUID, progress: Progress = no_progress) -> None:
        with self._act(volume_id, snapshot_id) as ours:
            found = ours.settled(volume_id, snapshot_id)
            if name_of("s", snapshot_id) in found:
                self._deliver()
                return
            volume = self._one(found, "volume", volume_id)
            self._check_room()
            ours.freeze(volume, snapshot_id)

    def revert(self, volume_id: UUID, snapshot_id: UUID, progress: Progress = no_progress) -> None:
        with self._act(volume_id, snapshot_id) as ours:
            found = ours.settled(volume_id, snapshot_id)
            snapshot = self._one(found, "snapshot", snapshot_id)
            volume = self._one(found, "volume", volume_id)
            self._check_room()
            ours.copy(snapshot, volume_id, max(snapshot.size, volume.size), REPLACEMENT)
            try:
                ours.remove("v", volume_id)
            finally:  # it may be in use, or be removed and only its answer lost: what is there tells
                ours.settle(ours.look(volume_id))

    def resize(self, volume_id: UUID, size: int) -> None:
        size = self._rounded(size)
        with self._act(volume_id, size=size) as ours:
            volume = self._one(ours.settled(volume_id), "volume", volume_id)
            if size < volume.size:
                raise ShrinkRefused(self.name, volume.size, size)
            if size > volume.size:
                self._check_room()
                ours.extend(volume.name, size)

    def delete_volume(self, volume_id: UUID) -> None:
        with self._act(volume_id) as ours:
            ours.remove("vtr", volume_id)

    def delete_snapshot(self, snapshot_id: UUID) -> None:
        with self._act(snapshot_id) as ours:
            ours.remove("s", snapshot_id)

    # What is there

    def backing(self, volume_id: UUID, read_only: bool = False) -> Backing:
        """Runs no command where the device is there and known. A volume that is not active is activated."""
        device = find_device(self._node("v", volume_id))
        if device is None or device.suspended or device.uuid not in self._known:
            device = self._started(volume_id)
        return Backing(device.path, "block", device.size)

    def _remember(self, volume_id: UUID) -> None:
        """The device of a volume that was made just now needs no looking up to be known as ours."""
        device = find_device(self._node("v", volume_id))
        if device is not None and self._thin_pool.is_of_group(device.uuid):
            self._known.add(device.uuid)

    def _started(self, volume_id: UUID) -> Device:
        with self._act(volume_id) as ours:
            volume = self._one(ours.settled(volume_id), "volume", volume_id)
            if not volume.active:
                ours.activate(volume.name)
            device = find_device(self._node("v", volume_id))
            if device is None or device.uuid != volume.uuid:
                raise PoolFailed(self.name, f"{volume.name} is active, but {self._node('v', volume_id)} is not it")
            if device.suspended:
                raise PoolFailed(self.name, f"{volume.name} is suspended, and was not resumed")
            self._known.add(device.uuid)
            return device

    def usage(self) -> Usage:
        """Asks the kernel alone. What several share counts once, and so does what is others' in the thin pool."""
        with self._thin_pool.errors():
            return self._thin_pool.usage()

    def inventory(self) -> list[Item]:
        """`allocated` is known of volumes only: for what is not active the metadata would have to be held still."""
        with self._thin_pool.errors():
            self._thin_pool.device()
            found = self._ours.all()
        return [_item(each) for name, each in found.items() if not is_leftover(name, found)]

    def foreign(self) -> list[str]:
        """Of the whole volume group."""
        with self._thin_pool.errors():
            self._thin_pool.device()
            public, ours = self._thin_pool.lvm.volumes("lv_role=public"), self._ours
        return sorted(each.name for each in public if each.name != self._thin_pool.lv and not ours.has(each))

    def changed_extents(self, id: UUID, since: UUID) -> list[Extent]:
        """As the thin pool's metadata tells it, in whole chunks. One at a time: it has one metadata snapshot."""
        with self._act(id, since) as ours:
            pool, found = self._thin_pool.device(), ours.settled(id, since)
            new, old = (self._either(found, each) for each in (id, since))
        if new.active:
            # What lies in the page cache has no place yet. With udev the node is a link to the device.
            fsync_file(node(self._group, new.name).resolve())
        metadata = node(self._group, self._thin_pool.lv, "_tmeta")
        with (
            self._thin_pool.errors(),
            self._thin_pool.locked("metadata", timeout=TIMEOUT) as fds,
            metadata_snapshot(self._thin_pool.lvm.holding(fds), pool),
        ):
            return thin_delta(metadata, old.thin_id, new.thin_id, new.size)

    # What was begun

    def sweep(self) -> list[str]:
        with self._thin_pool.errors():
            with suppress(CommandFailed):  # the next change will tell; what is there can be used until then
                self._deliver()
            found = self._ours.all()
            begun = {parsed(name)[1] for name in found if is_unsettled(name, found)}
            return sorted(name for id in begun for name in self._swept(id))

    def _swept(self, id: UUID) -> list[str]:
        try:
            with self._thin_pool.locked(_stripe(id), timeout=0) as fds:
                ours = self._ours.holding(fds)
                found = ours.look(id)
                ours.settle(found)
                return [name for name in found if is_leftover(name, found)]
        except LockTimeout:  # somebody works on it
            return []

    # Helpers

    @property
    def _ours(self) -> Volumes:
        return Volumes(self._thin_pool.lvm, self._thin_pool.lv, f"{POOL_TAG}{self.pool_id}")

    @contextmanager
    def _act(self, *ids: UUID, size: int = 0) -> Iterator[Volumes]:
        """Be the only one to work on `ids`, in the pool that was activated."""
        with self._thin_pool.errors(size), ExitStack() as stack:
            self._thin_pool.device()
            stripes = sorted({_stripe(id) for id in ids})  # all take them in this order, or two could wait in a circle
            fds = [fd for stripe in stripes for fd in stack.enter_context(self._thin_pool.locked(stripe))]
            ours = self._ours.holding(tuple(fds))
            if any(self._suspended(id) for id in ids):
                ours.settled(*ids)
            yield ours

    def _deliver(self) -> None:
        """See to it that what LVM has noted exists. If lvm(8) was killed in between, a snapshot that is listed would be
        taken at the next change of anything, with all that is written until then."""
        status = self._thin_pool.status()
        noted = self._thin_pool.lvm.volumes(f'lv_name="{self._thin_pool.lv}"')
        if [each.transaction for each in noted] != [status.transaction]:
            with self._thin_pool.locked("pool") as fds:
                self._ours.holding(fds).deliver()

    def _check_room(self) -> None:
        self._thin_pool.check_room(self.reserve)

    def _rounded(self, size: int) -> int:
        return -(-size // self.granularity) * self.granularity

    def _node(self, letter: str, id: UUID) -> Path:
        return node(self._group, name_of(letter, id))

    def _suspended(self, id: UUID) -> bool:
        devices = (find_device(self._node(letter, id)) for letter in ("v", STAGED, REPLACEMENT))
        return any(device and device.suspended for device in devices)

    def _one(self, found: Found, kind: Kind, id: UUID) -> LogicalVolume:
        try:
            return found[name_of(LETTERS[kind], id)]
        except KeyError:
            raise BackingMissing(self.name, kind, id) from None

    def _either(self, found: Found, id: UUID) -> LogicalVolume:
        return found.get(name_of("s", id)) or self._one(found, "volume", id)

    def _exists(self, found: Found, volume_id: UUID, size: int) -> bool:
        """Whether an earlier attempt succeeded."""
        volume = found.get(name_of("v", volume_id))
        if volume and volume.size != size:
            raise SizeMismatch(self.name, volume_id, volume.size, size)
        return volume is not None


def _item(each: LogicalVolume) -> Item:
    letter, id = parsed(each.name)
    allocated = None if each.data_percent is None else round(each.size * each.data_percent / 100)
    return Item("snapshot" if letter == "s" else "volume", id, each.size, allocated)


def _stripe(id: UUID) -> str:
    return f"{id.int % LOCKS:02}"
