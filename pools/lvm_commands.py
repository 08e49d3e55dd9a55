"""lvm(8) and dmsetup(8) for one volume group."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blockdev.command import Output, run
from pools.lvm_filter import NO_UDEV_LIST, Filter

TOOLS = ("lvm", "dmsetup", "thin_check", "thin_delta")
DEADLINE = 120.0
"""Seconds for a command. Those of a volume group queue for its lock, so this is the time for many of them."""

_ALWAYS = "global{wait_for_locks=1}"
# lvm(8) waits for udev to make and to confirm each device, for ever when there is none. Then it makes them itself.
_NO_UDEV = f"activation{{udev_sync=0 udev_rules=0 verify_udev_operations=0 monitoring=0}} {NO_UDEV_LIST}"
_FIELDS = (
    "lv_name", "vg_uuid", "lv_uuid", "lv_size", "lv_tags", "lv_layout", "lv_active", "lv_suspended", "pool_lv",
    "thin_id", "data_percent", "zero", "discards", "lv_when_full", "chunk_size", "vg_extent_size",
    "transaction_id",
)  # fmt: skip


@dataclass(frozen=True)
class LogicalVolume:
    """A logical volume as lvs(8) tells it. Those after `data_percent` are a thin pool's."""

    name: str
    uuid: str
    size: int
    tags: frozenset[str]
    active: bool
    suspended: bool
    pool: str
    thin_id: int
    data_percent: float | None
    is_thin_pool: bool
    zeroing: bool
    discards: str
    errors_when_full: bool
    chunk_size: int
    extent_size: int
    transaction: int

    @classmethod
    def parse(cls, row: dict[str, str]) -> LogicalVolume:
        return cls(
            name=row["lv_name"].strip("[]"),
            uuid="LVM-" + (row["vg_uuid"] + row["lv_uuid"]).replace("-", ""),
            size=int(row["lv_size"]),
            tags=frozenset(filter(None, row["lv_tags"].split(","))),
            active=row["lv_active"] == "active",
            suspended=row["lv_suspended"] == "suspended",
            pool=row["pool_lv"].strip("[]"),
            thin_id=int(row["thin_id"] or 0),
            data_percent=float(row["data_percent"]) if row["data_percent"] else None,
            is_thin_pool=row["lv_layout"] == "thin,pool",
            zeroing=row["zero"] == "zero",
            discards=row["discards"],
            errors_when_full=row["lv_when_full"] == "error",
            chunk_size=int(row["chunk_size"]),
            extent_size=int(row["vg_extent_size"]),
            transaction=int(row["transaction_id"] or 0),
        )


@dataclass(frozen=True)
class Lvm:
    """The commands, for the volume group `group`. Each one holds the locks `fds` until it ends, however we end.

    One that is not done within `deadline` seconds is told to end; it may be done all the same. `trace(verb)` is called
    before each command that changes something. All methods raise CommandError.
    """

    group: str
    trace: Callable[[str], None]
    deadline: float = DEADLINE
    fds: tuple[int, ...] = ()
    filter: Filter = field(default_factory=Filter)

    def beside_the_site(self) -> Lvm:
        """The same, but what the site has in lvm.conf(5) counts as well."""
        return replace(self, filter=Filter.beside_the_site(self._run))

    def holding(self, fds: tuple[int, ...]) -> Lvm:
        """The same, but each command holds the locks `fds` until it ends."""
        return replace(self, fds=fds)

    def change(self, verb: str, *arguments: str) -> None:
        """Run lvcreate(8), lvremove(8), ... and nobody is asked anything."""
        self.trace(verb)
        self._lvm(verb, "--yes", *arguments)

    def volumes(self, select: str) -> list[LogicalVolume]:
        """The logical volumes of the group that `select` picks: lvmreport(7), SELECTION."""
        report = ["--reportformat", "json", "--units", "b", "--nosuffix", "--options", ",".join(_FIELDS)]
        output = self._lvm("lvs", "--all", *report, "--select", select, self.group)
        found: dict[str, Any] = json.loads(output.stdout)
        return [LogicalVolume.parse(row) for part in found["report"] for row in part.get("lv", [])]

    def message(self, device: Path, text: str) -> None:
        """Tell the thin pool `device`: Linux, Documentation/admin-guide/device-mapper/thin-provisioning.rst."""
        self._run("dmsetup", "message", str(device), "0", text)

    def status(self, device: Path) -> str:
        """The status of the device-mapper `device`, without making it commit anything first."""
        return self._run("dmsetup", "status", "--noflush", str(device)).stdout

    def _lvm(self, verb: str, *arguments: str) -> Output:
        udev = "" if os.path.exists("/run/udev/control") else _NO_UDEV
        return self._run("lvm", verb, "--config", f"{_ALWAYS} {self.filter.config()} {udev}", *arguments)

    def _run(self, *argv: str) -> Output:
        # lvm(8) tells of every descriptor that it inherits unless it is told not to.
        environment = {"LVM_SUPPRESS_FD_WARNINGS": "1"}
        return run(argv, timeout=self.deadline, pass_fds=self.fds, env=environment, ending=signal.SIGTERM)
