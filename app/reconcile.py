"""The database against what is really there: each difference, and each volume brought back by itself.

Run when the worker starts, on a timer, whenever the target was lost, and on demand. What is not ours is told and left
alone; bytes are never removed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from uuid import UUID

import structlog
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app import image_drift
from app.db import change
from app.drift import FOREIGN, Drift
from app.events import SYSTEM, record
from app.models import GoldenCopy, Image, Snapshot, Volume
from app.outside import TROUBLE, Outside
from app.states import transition
from app.steps.exports import export_of, exported_volumes
from blockdev.locks import LockTimeout
from imagecache.errors import ImageError
from iscsi.target import Export, ExportState, TargetUnavailable
from pools import BackingMissing

log = structlog.get_logger()


def look(outside: Outside) -> list[Drift]:
    """All differences, changing nothing. Raises TargetUnavailable when the target does not answer."""
    found: dict[str, set[UUID]] = {}
    return [
        *_exports(outside), *_foreign(outside), *_backings(outside, found), *image_drift.look(outside, found)
    ]  # fmt: skip


def converge(outside: Outside) -> list[Drift]:
    """Bring every export to what the database wants; what could not be done is in the returned plans' place."""
    drifts = [_converged(outside, drift) for drift in look(outside)]
    ours = [str(drift) for drift in drifts if drift.layer != FOREIGN]
    if ours:
        log.info("reconciled", drifts=ours)
    return drifts


def _converged(outside: Outside, drift: Drift) -> Drift:
    if drift.layer == "export" and drift.volume_id:
        return replace(drift, trouble=converge_export(outside, drift.volume_id))
    if drift.layer == "backing" and drift.volume_id:
        _mark_missing(outside, drift)
    if drift.subject is not None:
        return replace(drift, trouble=_converged_image(outside, drift))
    return drift


def _converged_image(outside: Outside, drift: Drift) -> str | None:
    try:
        image_drift.converge(outside, drift)
    except (ImageError, *TROUBLE) as error:
        log.error("image not restored", subject=drift.subject, cause=str(error))
        return str(error)
    return None


def rebuild(outside: Outside) -> None:
    """Every export, before the portal opens: one volume's trouble does not keep the others shut."""
    with outside.database.read() as session:
        wanted = exported_volumes(session)
    listed = {state.volume_id for state in outside.target.inventory()}
    for volume_id in [*wanted, *(listed - set(wanted))]:
        converge_export(outside, volume_id, patience=5)
    outside.target.inventory()  # a target that stopped answering meanwhile was not rebuilt: TargetUnavailable


def converge_export(outside: Outside, volume_id: UUID, patience: float = 0) -> str | None:
    """Make or complete one export, or fence one that should not be; skipped while an operation is at it.

    `patience`: seconds to wait for that operation instead. Raises TargetUnavailable; any other trouble is the volume's
    own, told in its record, and returned.
    """
    try:
        with outside.lock(volume_id, "export", timeout=patience):
            export = export_of(outside, volume_id)
            if export is not None:
                outside.target.ensure_export(export)
            elif left := outside.target.drain(volume_id):
                return f"{len(left)} sessions have a write in flight: they are ended, and looked at again"
            else:
                outside.target.remove(volume_id)
    except LockTimeout:
        return "an operation is at work on it"
    except TargetUnavailable:
        raise
    except TROUBLE as error:
        log.error("export not restored", volume=str(volume_id), cause=str(error))
        with outside.database.write() as session:
            changed = update(Volume).where(Volume.id == volume_id, Volume.error.is_distinct_from(str(error)))
            if change(session, changed.values(error=str(error))):
                record(session, SYSTEM, "volume.export-failed", ("volume", volume_id), cause=str(error))
        return str(error)
    _forget_trouble(outside, volume_id)
    return None


def _forget_trouble(outside: Outside, volume_id: UUID) -> None:
    """The record of an attached volume tells what is wrong with its export only as long as it is."""
    troubled = (Volume.id == volume_id, Volume.state == "in-use", Volume.error.is_not(None))
    with outside.database.read() as session:
        if session.scalar(select(Volume.id).where(*troubled)) is None:
            return
    with outside.database.write() as session:
        if change(session, update(Volume).where(*troubled).values(error=None)):
            record(session, SYSTEM, "volume.export-restored", ("volume", volume_id))


# ---------------------------------------------------------------- differences


def _exports(outside: Outside) -> Iterator[Drift]:
    found = {state.volume_id: state for state in outside.target.inventory()}
    with outside.database.read() as session:
        wanted = set(exported_volumes(session))
    for volume_id in wanted | found.keys():
        if volume_id not in found:
            yield Drift("export", volume_id, "attached, but there is no target", "make the export")
        elif volume_id not in wanted:
            yield Drift("export", volume_id, "a target, but nobody is attached", "drain and remove it")
        else:
            yield from _differences(outside, volume_id, found[volume_id])


def _differences(outside: Outside, volume_id: UUID, state: ExportState) -> Iterator[Drift]:
    try:
        export = export_of(outside, volume_id)
        layers = [] if export is None else [*_unequal(export, state), *outside.target.altered(export)]
    except TargetUnavailable:
        raise
    except TROUBLE as error:
        yield Drift("export", volume_id, str(error), "report it; the volume cannot be exported")
        return
    if layers:
        yield Drift("export", volume_id, f"differs from the database in: {', '.join(layers)}", "converge these layers")


def _unequal(export: Export, state: ExportState) -> list[str]:
    """The layers in which they differ."""
    initiators = {connection.initiator for connection in export.connections}
    usernames = {connection.credentials.username for connection in export.connections}
    mutuals = {connection.mutual.username for connection in export.connections if connection.mutual}
    layers = {
        "initiators": state.initiators == initiators,
        "CHAP names": state.usernames == usernames,
        "mutual CHAP names": state.mutuals == mutuals,
        "backing": state.path == export.path,
        "write protection": state.read_only == export.read_only,
    }
    unequal = [layer for layer, equal in layers.items() if not equal]
    return unequal if unequal or state.complete else ["a layer that is not whole"]


def _foreign(outside: Outside) -> Iterator[Drift]:
    for iqn in outside.target.foreign():
        yield Drift(FOREIGN, None, f"{iqn} is not ours", "leave it alone")


def _backings(outside: Outside, found: dict[str, set[UUID]]) -> Iterator[Drift]:
    """Rows without bytes, and bytes without a row; the volumes that each pool has are put into `found`."""
    for name, pool in list(outside.pools.items()):
        try:
            items = {(item.kind, item.id) for item in pool.inventory()}
            foreign = pool.foreign()
        except TROUBLE as error:
            yield Drift("pool", None, f"{name}: {error}", "report it")
            continue
        found[name] = {identifier for kind, identifier in items if kind == "volume"}
        for other in foreign:
            yield Drift(FOREIGN, None, f"{other} in pool {name} is not ours", "leave it alone")
        with outside.database.read() as session:
            stable, known = _records(session, name)
        for kind, identifier in sorted(stable - items, key=str):
            yield Drift(
                "backing",
                identifier if kind == "volume" else None,
                f"{kind} {identifier} has no backing",
                "mark it as in error",
            )
        for kind, identifier in sorted(items - known, key=str):
            yield Drift(FOREIGN, None, f"{name} holds {kind} {identifier}, which has no record", "leave it alone")


def _records(session: Session, pool: str) -> tuple[set[tuple[str, UUID]], set[tuple[str, UUID]]]:
    """What must have a backing, and what may have one."""
    stable: set[tuple[str, UUID]] = set()
    known: set[tuple[str, UUID]] = set()
    for kind, model in (("volume", Volume), ("snapshot", Snapshot)):
        for identifier, state in session.execute(select(model.id, model.state).where(model.pool == pool)):
            known.add((kind, identifier))
            if state in ("available", "in-use"):
                stable.add((kind, identifier))
    # Ours as well: golden copies, and what is cloned only to be read (app.steps.images).
    known |= {("volume", identifier) for identifier in session.scalars(select(GoldenCopy.id))}
    read = select(Image.id).where(Image.state == "fetching", Image.origin_kind.in_(("volume", "snapshot")))
    known |= {("volume", identifier) for identifier in session.scalars(read)}
    return stable, known


def _mark_missing(outside: Outside, drift: Drift) -> None:
    """Look again, alone with the volume: it may have been made or deleted between the two lists."""
    assert drift.volume_id is not None
    try:
        with outside.lock(drift.volume_id, "data", timeout=0), outside.database.write() as session:
            volume = session.get(Volume, drift.volume_id)
            if volume is None or not _is_missing(outside, volume):
                return
            stable = ("available", "in-use")
            if transition(session, Volume, volume.id, "error", only_from=stable, error=drift.found):
                record(session, SYSTEM, "volume.error", ("volume", volume.id), cause=drift.found)
    except LockTimeout:
        return


def _is_missing(outside: Outside, volume: Volume) -> bool:
    try:
        pool = outside.pools.get(volume.pool)
        if pool is not None:
            pool.backing(volume.id)
    except BackingMissing:
        return True
    return False
