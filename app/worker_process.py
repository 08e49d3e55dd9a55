"""The worker as a process: `stratus-storage worker`. One a host, alone by a file lock."""

from __future__ import annotations

import json
import os
import signal
import threading
import zlib

import structlog

from app import logs
from app.config import ConfigError, Settings
from app.housekeeping import Housekeeping
from app.keeper import Keeper
from app.keys import Signer
from app.outside import Outside
from app.service import Service
from app.worker import Worker
from blockdev.files import durable_rename
from blockdev.locks import FileLock
from iscsi.target import TargetError, TargetHost
from iscsi.tgt_host import TgtHost

log = structlog.get_logger()


def _die(failure: threading.ExceptHookArgs) -> None:
    """A worker that lost a thread is half a worker: end, and let the supervisor start a whole one."""
    log.critical("thread died", thread=failure.thread and failure.thread.name, exc_info=failure.exc_value)
    os._exit(70)  # EX_SOFTWARE of sysexits.h


def target_host(settings: Settings) -> TargetHost:
    """The target of this home, of the configured kind."""
    if settings.iscsi.target == "tgt":
        return tgt_host(settings)
    from iscsi.lio_host import LioHost  # rtslib is there only where it is used

    return LioHost(settings.iscsi.iqn_prefix, settings.portals, str(settings.home.resolve()))


def end_former_target(settings: Settings) -> None:
    """A home that exported by another target, or under another prefix, before: what that left in the kernel, or left
    running, is nobody's any more, and no fence would reach its sessions. Raises ConfigError when it cannot be ended.
    """
    note = settings.run_dir / "target.json"
    chosen = {"target": settings.iscsi.target, "iqn_prefix": settings.iscsi.iqn_prefix}
    former = json.loads(note.read_text()) if note.exists() else chosen
    if former != chosen:
        trouble = end_target(settings.model_copy(update={"iscsi": settings.iscsi.model_copy(update=former)}))
        if trouble:
            told = f"{former['target']}, {former['iqn_prefix']}"
            raise ConfigError(f"iscsi: this home exported by {told}, and that cannot be ended: {trouble}")
    scratch = note.with_suffix(".new")
    scratch.write_text(json.dumps(chosen))
    durable_rename(scratch, note)


def end_target(settings: Settings) -> str | None:
    """Once the worker has ended; what stands in the way, if anything."""
    try:
        target_host(settings).stop()
    except (TargetError, OSError) as error:
        return str(error)
    return None


def tgt_host(settings: Settings) -> TgtHost:
    """The private tgtd of this home; its control number is the home's own, so that two homes never meet."""
    control = 1 + zlib.crc32(str(settings.home.resolve()).encode()) % 30000
    log_path = settings.log_dir / "tgtd.log"
    return TgtHost(settings.run_dir, log_path, control, settings.iscsi.iqn_prefix, settings.portals)


def run(settings: Settings) -> None:
    """Until SIGTERM or SIGINT. The target goes on serving, for the next worker to adopt."""
    logs.configure(settings.log_dir / "worker.log")
    threading.excepthook = _die
    service = Service(settings, connections=2 * settings.worker.threads + settings.images.fetches + 8)
    with FileLock(settings.run_dir / "worker.lock"):
        _serve(service)


def _serve(service: Service) -> None:
    settings = service.settings
    host = target_host(settings)
    outside = Outside(settings, service.database, service.keys, host.target)
    worker = Worker(outside, service.bus)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stopping.set())
    chores = Housekeeping(
        outside, Signer.load_or_create(settings.key_dir / "events.key"), worker.ready, worker.stopping
    )
    chores.watch_pools()
    chores.watch_images()
    keeper = Keeper(host, outside, worker.ready, worker.stopping)
    others = [threading.Thread(target=keeper.run, name="keeper"), threading.Thread(target=chores.run, name="chores")]
    threads = [*worker.start(), *others]
    for thread in others:
        thread.start()
    log.info("worker started", worker=worker.name)
    worker.stopping.wait()
    for thread in threads:
        thread.join()
    chores.close()
    log.info("worker stopped")
