"""`stratus-storage doctor`: what this host can do, found out by doing it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app.config import Settings
from blockdev.command import CommandError, run
from blockdev.extents import supports_reflink
from blockdev.fallocate import Zeroing, leaves_old_data
from iscsi.target import TargetError
from iscsi.tgt_daemon import TgtDaemon

Verdict = Literal["ok", "limited", "missing"]

#: Tool → Debian package, what it is for, and whether the service can run without it.
TOOLS: tuple[tuple[str, str, str, Verdict], ...] = (
    ("tgtd", "tgt", "the target", "missing"),
    ("setpriv", "util-linux", "children that die with their parent", "missing"),
    ("qemu-img", "qemu-utils", "images", "limited"),
    ("iscsi-inq", "libiscsi-bin", "checking a volume from this host", "limited"),
)


@dataclass(frozen=True)
class Check:
    verdict: Verdict
    name: str
    detail: str


def examine(settings: Settings) -> list[Check]:
    return [*_tools(), _target(), *_pools(settings), _sandbox(), _database()]


def _tools() -> Iterator[Check]:
    for tool, package, use, otherwise in TOOLS:
        path = shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")
        if path:
            yield Check("ok", tool, path)
        else:
            yield Check(otherwise, tool, f"not found; for {use}: apt-get install {package}")


def _target() -> Check:
    """A private tgtd, started and stopped."""
    with tempfile.TemporaryDirectory(prefix="stratus-doctor-") as name:
        daemon = TgtDaemon(Path(name), Path(name) / "log", control=os.getpid() % 30000 + 1)
        try:
            daemon.start()
            return Check("ok", "target", f"tgt answers (threads for {_luns()} more volumes)")
        except (TargetError, OSError) as error:
            return Check("missing", "target", f"tgtd does not start: {error}")
        finally:
            daemon.stop()


def _luns() -> int:
    in_use = int(Path("/proc/loadavg").read_text().split()[3].split("/")[1])
    limits = (int(Path("/proc/sys/kernel", name).read_text()) for name in ("pid_max", "threads-max"))
    return max(0, (min(limits) - in_use) // 4)


def _pools(settings: Settings) -> Iterator[Check]:
    for name, pool in settings.pools.items():
        place = next(p for p in (pool.path, *pool.path.parents) if p.exists())
        yield _pool(name, place)


def _pool(name: str, place: Path) -> Check:
    label = f"pool {name}"
    try:
        if any(leaves_old_data(place, way) for way in Zeroing):
            return Check("missing", label, f"{place}: its file system says it zeroed data and did not; use another")
        if supports_reflink(place):
            return Check("ok", label, f"{place}: reflink; clones take no time, attached volumes can be snapshotted")
    except OSError as error:
        return Check("missing", label, f"{place}: {error.strerror}")
    detail = "no reflink; clones copy, and a snapshot needs the volume detached (XFS and btrfs do better)"
    return Check("limited", label, f"{place}: {detail}")


def _sandbox() -> Check:
    if shutil.which("bwrap") is None:
        return Check("limited", "sandbox", "no bwrap; needed for images: apt-get install bubblewrap")
    try:
        run(["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"], timeout=5)
    except CommandError as error:
        return Check("limited", "sandbox", f"bwrap does not work here: {error}")
    return Check("ok", "sandbox", "bwrap with namespaces")


def _database() -> Check:
    wanted = (3, 35, 0)  # UPDATE … RETURNING
    found = sqlite3.sqlite_version_info
    return Check("ok" if found >= wanted else "missing", "sqlite", sqlite3.sqlite_version)
