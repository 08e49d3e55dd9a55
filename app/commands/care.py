"""pools, reconcile, reset-state, verify-events, rotate-keys: looking after a service."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import click

from app.commands.common import Failure, act, finish, service, with_settings
from app.commands.output import format_option, printable, show
from app.config import Settings

timeout_option = click.option(
    "--timeout", type=click.FloatRange(min=0), default=60.0, show_default=True, help="Seconds to wait for the worker."
)


@click.command()
@with_settings
@format_option
def pools(settings: Settings, style: str) -> None:
    """Show how full the pools are, what was promised, and what is wrong."""
    from sqlalchemy import select

    from app.models import Pool
    from app.schemas import PoolDocument

    with service(settings).database.read() as session:
        found = session.scalars(select(Pool).order_by(Pool.name)).all()
    columns = ("name", "state", "size", "free", "allocated", "promised", "alarm", "reason")
    show(style, columns, map(PoolDocument.model_validate, found))


@click.command()
@with_settings
@click.option("--dry-run", is_flag=True, help="Print the drift and the plan, change nothing.")
@timeout_option
@format_option
def reconcile(settings: Settings, dry_run: bool, timeout: float, style: str) -> None:
    """Compare the database with what is really there, and bring every volume back."""
    from app import operations
    from app.notify import WORK
    from app.steps.site import SITE

    found = service(settings)
    with found.database.write() as session:
        operation = operations.enqueue(session, "site.reconcile", None, SITE, ("site", SITE), dry_run=dry_run)
    found.bus.announce(WORK)
    drifts = json.loads(finish(found, operation.id, timeout).message or "[]")
    if style == "json":
        click.echo(json.dumps(drifts, indent=2))
    else:
        for drift in drifts:
            outcome = f"could not be done: {drift['trouble']}" if drift["trouble"] else drift["plan"]
            click.echo(printable(f"{drift['layer']:8} {drift['volume_id'] or '-':36} {drift['found']} -> {outcome}"))
    foreign = sum(drift["layer"] == "foreign" for drift in drifts)
    told = f"{len(drifts) - foreign} differences" + (f", {foreign} things that are not ours" if foreign else "")
    click.echo(told + (" (nothing was changed)" if dry_run else ""), err=True)
    failed = sum(bool(drift["trouble"]) for drift in drifts)
    if failed:
        raise Failure(
            f"{failed} could not be done; they are tried again every {settings.worker.reconcile_interval:.0f} s"
        )


@click.command("reset-state")
@with_settings
@click.argument("volume_id", type=click.UUID)
@timeout_option
def reset_state(settings: Settings, volume_id: UUID, timeout: float) -> None:
    """Derive the state of a volume in error again, from what is really there."""
    from app.models import Volume
    from app.notify import WORK

    operation = act(settings, lambda session, caller: _ask_for_reset(session, caller, volume_id))
    found = service(settings)
    found.bus.announce(WORK)
    finish(found, operation.id, timeout)
    with found.database.read() as session:
        volume = session.get_one(Volume, volume_id)
    reason = f": {volume.error}" if volume.error else ""
    click.echo(printable(f"volume {volume_id} is {volume.state}{reason}"), err=True)


def _ask_for_reset(session: Any, caller: Any, volume_id: UUID) -> Any:
    """As `volumes.reset_state`, for a caller who is no user and so cannot be an operation's principal."""
    from app import operations, volumes
    from app.events import record

    volume = volumes.find(session, caller, volume_id)
    record(session, caller.actor, "volume.reset-state", ("volume", volume.id), before=volume.state)
    return operations.enqueue(session, "volume.reset", None, volume.id, ("volume", volume.id))


@click.command("verify-events")
@with_settings
@click.option("--pubkey", "keys", multiple=True,
              help="Base64 key that heads may be signed with; can be repeated. [HOME/keys/events.pub]")  # fmt: skip
@click.option("--heads", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A copy of the signed heads, kept elsewhere. [HOME/log/event-heads.jsonl]")  # fmt: skip
def verify_events(settings: Settings, keys: Sequence[str], heads: Path | None) -> None:
    """Recompute the chain of events and compare it with the signed heads; exit 1 where it is broken."""
    from app import events

    file = heads or settings.log_dir / "event-heads.jsonl"
    verdict = events.verify(service(settings).database, file, *(keys or _own_key(settings)))
    if verdict.broken:
        raise Failure(f"BROKEN: {verdict.broken}")
    click.echo(f"{verdict.sealed} events hold, {verdict.heads} signed heads agree, {verdict.unsealed} not sealed yet")
    if verdict.sealed and not verdict.heads:
        told = f"no signed heads found in {file}: the tail is not protected"
        if heads is not None:
            raise Failure(told)
        click.echo(f"Warning: {told}", err=True)


def _own_key(settings: Settings) -> list[str]:
    file = settings.key_dir / "events.pub"
    return [file.read_text(encoding="ascii").strip()] if file.exists() else []


@click.command("rotate-keys")
@with_settings
def rotate_keys(settings: Settings) -> None:
    """Make a new key for the secrets of connections; old ones stay readable. Restart the service afterwards."""
    from app.keys import KeyRing

    service(settings)
    ring = KeyRing.load(settings.key_dir / "secrets.json")
    click.echo(f"the current key is now {ring.rotate()}; restart the service, and back up {settings.key_dir}")
