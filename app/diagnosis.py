"""`stratus-storage doctor`: what this host can do, found out by doing it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from app.config import Pool as PoolSettings
from app.config import Settings
from app.db import Database
from app.models import Pool
from app.service import is_migrated
from blockdev.command import CommandError
from blockdev.extents import supports_reflink
from blockdev.fallocate import Zeroing, leaves_old_data
from imagecache.errors import SandboxFailed
from imagecache.sandbox import Sandbox
from iscsi.limits import THREADS_PER_LUN, free_threads
from iscsi.target import TargetError
from iscsi.tgt_daemon import TgtDaemon
from pools import PoolUnusable, open_pool
from pools.lvm_filter import ADVICE, site_looks_into_loops

Verdict = Literal["ok", "limited", "missing"]

#: Target or pool driver that needs it ("": all), tool, Debian package, what for, and what it is to the service without.
TOOLS: tuple[tuple[str, str, str, str, Verdict], ...] = (
    ("tgt", "tgtd", "tgt", "the target", "missing"),
    ("lvm", "lvs", "lvm2", "thin pools", "missing"),
    ("lvm", "thin_delta", "thin-provisioning-tools", "what changed in a thin volume", "missing"),
    ("", "setpriv", "util-linux", "children that die with their parent", "missing"),
    ("", "qemu-img", "qemu-utils", "images", "limited"),
    ("", "iscsi-inq", "libiscsi-bin", "checking a volume from this host", "limited"),
)


@dataclass(frozen=True)
class Check:
    verdict: Verdict
    name: str
    detail: str


def examine(settings: Settings) -> list[Check]:
    database, known = _database(settings)
    pools = (_pool(settings.home, name, pool, known) for name, pool in settings.pools.items())
    target = _lio() if settings.iscsi.target == "lio" else _tgt()
    return [*_tools(settings), target, *pools, *_lvm(settings), *_images(settings), _sqlite(), database]


def _tools(settings: Settings) -> Iterator[Check]:
    drivers = {pool.driver for pool in settings.pools.values()}
    for needs, tool, package, use, otherwise in TOOLS:
        if needs not in ("", settings.iscsi.target, *drivers):
            continue
        path = shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")
        if path:
            yield Check("ok", tool, path)
        else:
            yield Check(otherwise, tool, f"not found; for {use}: apt-get install {package}")


def _lio() -> Check:
    """The kernel's, loaded if it was not."""
    try:
        from iscsi.lio_host import examine as examine_lio

        return Check("ok", "target", examine_lio())
    except ImportError as error:
        return Check("missing", "target", f"LIO needs rtslib-fb: pip install '.[service,lio]' ({error})")
    except (TargetError, OSError) as error:
        return Check("missing", "target", str(error))


def _tgt() -> Check:
    """A private tgtd, started and stopped."""
    with tempfile.TemporaryDirectory(prefix="stratus-doctor-") as name:
        daemon = TgtDaemon(Path(name), Path(name) / "log", control=os.getpid() % 30000 + 1)
        try:
            daemon.start()
            more = free_threads() // THREADS_PER_LUN
            return Check("ok" if more else "limited", "target", f"tgt answers (threads for {more} more volumes)")
        except (TargetError, OSError) as error:
            return Check("missing", "target", f"tgtd does not start: {error}")
        finally:
            daemon.stop()


def _pool(home: Path, name: str, configured: PoolSettings, known: Mapping[str, UUID]) -> Check:
    """What the worker will find when it activates the pool."""
    label, path = f"pool {name}", configured.path
    try:
        if configured.driver == "directory" and not path.exists():
            if not path.is_relative_to(home):
                return Check("missing", label, f"{path}: not there; make the directory, empty and the service's own")
            if name not in known:  # the start makes it
                return _clones(label, *_future(path))
        pool = open_pool(name, configured.driver, path, pool_id=known.get(name))
        pool.examine()
        return _clones(label, path, pool.live_clone)
    except PoolUnusable as error:
        return Check("missing", label, error.reason)
    except OSError as error:
        return Check("missing", label, f"{path}: {error.strerror}")


def _lvm(settings: Settings) -> Iterator[Check]:
    """What guests can do to LVM: LIO exports a file volume as a loop device, which LVM would look into.

    Our own commands never do; an admin's, and a boot's, do what lvm.conf says.
    """
    drivers = {pool.driver for pool in settings.pools.values()}
    if settings.iscsi.target != "lio" or "directory" not in drivers or shutil.which("lvm") is None:
        return
    try:
        looks = site_looks_into_loops()
    except (CommandError, OSError) as error:
        yield Check("limited", "lvm.conf", f"whether LVM looks into guests' disks is not known: {error}")
        return
    if looks:
        detail = "LVM looks into loop devices, so guests can bring volume groups of any name; /etc/lvm/lvm.conf needs"
        yield Check("limited", "lvm.conf", f"{detail}: {ADVICE}")
    else:
        yield Check("ok", "lvm.conf", "LVM leaves loop devices alone, which are guests' disks")


def _future(path: Path) -> tuple[Path, bool]:
    """Where `path` will lie, and whether there is reflink. Raises PoolUnusable for a file system that is not honest."""
    place = next(parent for parent in path.parents if parent.exists())
    if any(leaves_old_data(place, way) for way in Zeroing):
        raise PoolUnusable(path.name, f"{place}: its file system says it zeroed data and did not; use another")
    return place, supports_reflink(place)


def _clones(label: str, place: Path, live: bool) -> Check:
    if live:
        return Check("ok", label, f"{place}: clones take no time, attached volumes can be snapshotted")
    detail = "no reflink; clones copy, and a snapshot needs the volume detached (XFS and btrfs do better)"
    return Check("limited", label, f"{place}: {detail}")


def _images(settings: Settings) -> Iterator[Check]:
    """What images need: a sandbox, readers of what strangers send, and what the settings name."""
    yield _sandbox()
    absent = [name for name in ("lxml", "signxml", "isal", "zstandard") if importlib.util.find_spec(name) is None]
    if absent:
        detail = f"{', '.join(absent)} not there; needed for images: pip install '.[service]'"
        yield Check("missing", "image readers", detail)
    else:
        yield Check("ok", "image readers", "gz, bz2, xz and zst; metadata and its signatures")
    try:
        from app.library import open_library

        open_library(settings)
        yield Check("ok", "image settings", f"the cache is {settings.image_dir}")
    except ImportError:
        return  # told above
    except (OSError, ValueError) as error:
        yield Check("missing", "image settings", str(error))


def _sandbox() -> Check:
    """Made as it is for an image, and left again."""
    if shutil.which("bwrap") is None:
        return Check("limited", "sandbox", "no bwrap; needed for images: apt-get install bubblewrap")
    try:
        Sandbox().check()
    except SandboxFailed as error:
        return Check("limited", "sandbox", f"bwrap does not work here: {error}")
    return Check("ok", "sandbox", "bwrap with namespaces, privileges dropped")


def _sqlite() -> Check:
    wanted = (3, 35, 0)  # UPDATE … RETURNING
    found = sqlite3.sqlite_version_info
    return Check("ok" if found >= wanted else "missing", "sqlite", sqlite3.sqlite_version)


def _database(settings: Settings) -> tuple[Check, Mapping[str, UUID]]:
    """Whether the database answers, and the pools that it knows."""
    try:
        url = make_url(settings.database_url)
        if _is_to_be_made(url):
            return Check("ok", "database", f"{url.database}: made at the first start"), {}
        return _ask(url)
    except (SQLAlchemyError, ImportError, OSError) as error:
        cause = str(getattr(error, "orig", None) or error).splitlines()[0]
        return Check("missing", "database", f"database.url: {cause}"), {}


def _is_to_be_made(url: URL) -> bool:
    """A SQLite file that is not there: to connect would make it, and here nothing is made."""
    return url.get_backend_name() == "sqlite" and not Path(url.database or "").exists()


def _ask(url: URL) -> tuple[Check, Mapping[str, UUID]]:
    shown = url.render_as_string()
    if url.get_backend_name() == "postgresql":
        url = url.update_query_dict({"connect_timeout": "5"})
    database = Database(url.render_as_string(hide_password=False), connections=1)
    try:
        if not is_migrated(database):
            return Check("ok", "database", f"{shown} answers; the next start brings it to this version"), {}
        with database.read() as session:
            known = {name: id for name, id in session.execute(select(Pool.name, Pool.pool_id)) if id is not None}
        return Check("ok", "database", f"{shown} answers"), known
    finally:
        database.close()
