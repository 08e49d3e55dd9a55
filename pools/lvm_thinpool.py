"""The thin pool itself: its device, how full it is, its locks, and the names that the interface has for its errors."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blockdev.command import CommandError, CommandFailed
from blockdev.locks import HOST_LOCKS, FileLock, LockTimeout
from pools import lvm_activation as activation
from pools.interface import PoolFailed, PoolFull, PoolUnusable, SizeTooLarge, Usage
from pools.lvm_commands import LogicalVolume, Lvm
from pools.lvm_devices import Device, ThinPoolStatus, find_device, node

METADATA_LIMIT = 80.0
"""Per cent. A thin pool whose metadata is full stops for good until it is repaired by hand: stay well below."""
GROUP_UUID = len("LVM-") + 32
"""How much of a logical volume's UUID, as device-mapper has it, is the volume group's."""


class ThinPool:
    """The logical volume `lv` of a group, behind the pool `name`. `lvm` can be replaced by one that knows more.

    A look that found room is believed for `room_for` seconds.
    """

    def __init__(self, name: str, lvm: Lvm, lv: str, room_for: float) -> None:
        self.name, self.lvm, self.lv = name, lvm, lv
        self.path = f"{lvm.group}/{lv}"
        self._room_for, self._room_until = room_for, 0.0
        self._uuid = ""
        self._chunk_size = 0

    def found(self, volume: LogicalVolume) -> None:
        """It is this one, and no other of its name, from now on."""
        self._uuid, self._chunk_size = f"{volume.uuid}-tpool", volume.chunk_size

    def is_of_group(self, uuid: str) -> bool:
        """Whether a device with this UUID is a logical volume of the same group."""
        return uuid.startswith(self._uuid[:GROUP_UUID])

    @contextmanager
    def locked(self, what: str, timeout: float | None = None) -> Iterator[tuple[int, ...]]:
        """Hold a lock of the pool on this host; its descriptors are for commands. Raises LockTimeout."""
        timeout = self.lvm.deadline if timeout is None else timeout
        HOST_LOCKS.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(HOST_LOCKS / f"{node(self.lvm.group, self.lv).name}.{what}", timeout) as lock:
            yield (lock.fd,)

    @contextmanager
    def errors(self, size: int = 0) -> Iterator[None]:
        """Give the interface's names to what lvm(8) tells in words."""
        try:
            yield
        except CommandFailed as error:
            if "reached threshold" in error.stderr:
                raise PoolFull(self.name, error.stderr.strip()) from error
            if "Volume too large" in error.stderr:
                raise SizeTooLarge(self.name, size) from error
            if " in use" in error.stderr:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), self.path) from error
            raise PoolFailed(self.name, str(error)) from error
        except (CommandError, LockTimeout) as error:
            raise PoolFailed(self.name, str(error)) from error

    @contextmanager
    def unusable(self) -> Iterator[None]:
        """The same, where whatever goes wrong means that the pool cannot be used."""
        try:
            yield
        except (CommandError, LockTimeout, OSError) as error:
            raise PoolUnusable(self.name, f"{self.path}: {error}") from error

    def device(self) -> Path:
        """Its device, resumed if need be. What is gone from one that was stopped, or from another of its name, is not
        gone from ours: PoolUnusable. LVM puts it behind another device once it has, or has had, a thin volume."""
        for suffix in ("-tpool", ""):
            device = find_device(node(self.lvm.group, self.lv, suffix))
            if device and device.uuid == self._uuid:
                if device.suspended:
                    self._resume(device)
                return device.path
        raise PoolUnusable(self.name, f"{self.path} is not active, or not the thin pool it was")

    def _resume(self, device: Device) -> None:
        with self.locked("pool") as fds:
            activation.resume(self.lvm.holding(fds), self.lv)
        again = find_device(device.path)
        if again is None or again.suspended:
            raise PoolUnusable(self.name, f"{self.path} is suspended, and was not resumed")

    def status(self) -> ThinPoolStatus:
        """Raises PoolUnusable for one that has stopped to change."""
        status = ThinPoolStatus.parse(self.lvm.status(self.device()))
        activation.check_health(self.name, self.path, status)
        return status

    def usage(self) -> Usage:
        status = self.status()
        used = status.used_chunks * self._chunk_size
        size = status.chunks * self._chunk_size
        return Usage(size, size - used, used, status.metadata_percent)

    def check_room(self, reserve: int) -> None:
        """Raises PoolFull while there is still some: machines live on the reserve, and deleting needs metadata."""
        if time.monotonic() < self._room_until:
            return
        usage = self.usage()
        if usage.free < max(reserve, self._chunk_size):
            raise PoolFull(self.name)
        if usage.metadata_percent >= METADATA_LIMIT:
            detail = f"its metadata is {usage.metadata_percent:.1f} % full; lvextend --poolmetadatasize gives it more"
            raise PoolFull(self.name, detail)
        self._room_until = time.monotonic() + self._room_for
