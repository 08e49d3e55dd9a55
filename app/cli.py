"""`stratus-storage`: what an operator runs on the host of the service."""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from uuid import UUID

import click

from app.config import DEFAULT_HOME, ConfigError, Settings, load, read_effective, redacted


def _with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """--home and --config, loaded; a configuration that cannot be used is exit 2."""

    @click.option("--home", type=click.Path(path_type=Path), envvar="STRATUS_HOME", default=DEFAULT_HOME,
                  show_default=True, help="Where all state lies.")  # fmt: skip
    @click.option("--config", "config_file", type=click.Path(path_type=Path), envvar="STRATUS_CONFIG",
                  help="TOML file; HOME/config.toml when left out.")  # fmt: skip
    @wraps(command)
    def run(home: Path, config_file: Path | None, **options: Any) -> Any:
        effective = os.environ.get("STRATUS_EFFECTIVE")
        try:
            settings = read_effective(Path(effective)) if effective else load(home, config_file, flags=_flags(options))
            return command(settings, **options)
        except ConfigError as error:
            raise click.UsageError(str(error)) from error

    return run


def _flags(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `serve` that override the file."""
    places = {
        "listen": ("server", "listen"),
        "tls_cert": ("server", "tls_cert"),
        "tls_key": ("server", "tls_key"),
        "behind_proxy": ("server", "behind_proxy"),
        "portal": ("iscsi", "portal"),
    }
    flags: dict[str, Any] = {}
    for option, (section, key) in places.items():
        if options.get(option):
            value = options[option]
            flags.setdefault(section, {})[key] = str(value) if isinstance(value, Path) else value
    return flags


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stratus-storage")
def main() -> None:
    """Persistent iSCSI volumes for machines: run the service, look after it."""
    os.umask(0o077)  # whatever is made below a home that exists already is nobody else's to read


# ---------------------------------------------------------------- the service


@main.command()
@_with_settings
@click.option("--listen", metavar="HOST:PORT", help="Where the HTTP API listens. [127.0.0.1:8080]")
@click.option("--portal", metavar="HOST:PORT", help="Where initiators reach the volumes. [127.0.0.1:3261]")
@click.option("--tls-cert", type=click.Path(exists=True, path_type=Path), help="Certificate chain, PEM.")
@click.option("--tls-key", type=click.Path(exists=True, path_type=Path), help="Its key, PEM.")
@click.option("--behind-proxy", is_flag=True, help="A proxy in front terminates TLS and sets X-Forwarded-For.")
@click.option("--keep-target", is_flag=True, help="Leave the target serving when this stops; the next start adopts it.")
def serve(settings: Settings, keep_target: bool, **_: Any) -> None:
    """Run the whole service in the foreground: API, worker and a private target, all state under HOME.

    The first start makes the database and HOME/admin.token. Stop it with Ctrl-C or SIGTERM.

    \b
    Example:
      stratus-storage serve --home /srv/stratus --listen 127.0.0.1:8080 --portal 10.0.0.5:3260
    """
    from app import supervisor

    sys.exit(supervisor.serve(settings, keep_target=keep_target))


@main.command()
@_with_settings
def worker(settings: Settings) -> None:
    """Run the worker alone (`serve` does it for you): the one process that touches storage.

    The target outlives it, and is adopted by the next one.
    """
    from app import worker_process

    worker_process.run(settings)


@main.command()
@_with_settings
@click.option("--revision", default="head", show_default=True)
def upgrade(settings: Settings, revision: str) -> None:
    """Bring the database to this version (`serve` does it at its start)."""
    from app.service import migrate

    settings.make_directories()
    migrate(settings, revision)
    click.echo(f"{redacted(settings)['database']['url']} is at {revision}")


@main.command("config")
@_with_settings
def show_config(settings: Settings) -> None:
    """Print the configuration in force, without secrets."""
    click.echo(json.dumps(redacted(settings), indent=2))


@main.command()
@_with_settings
def doctor(settings: Settings) -> None:
    """Say what this host can do and what is missing; exit 1 if the service cannot run."""
    from app import diagnosis

    checks = diagnosis.examine(settings)
    for check in checks:
        click.echo(f"{check.verdict:8} {check.name:14} {check.detail}")
    sys.exit(1 if any(check.verdict == "missing" for check in checks) else 0)


@main.command()
@_with_settings
@click.option("--dry-run", is_flag=True, help="Print the drift and the plan, change nothing.")
@click.option("--timeout", default=60.0, show_default=True, help="Seconds to wait for the worker.")
def reconcile(settings: Settings, dry_run: bool, timeout: float) -> None:
    """Compare the database with what is really there, and bring every volume back."""
    from app import operations
    from app.notify import WORK
    from app.steps.site import SITE

    service = _service(settings)
    with service.database.write() as session:
        operation = operations.enqueue(session, "site.reconcile", None, SITE, ("site", SITE), dry_run=dry_run)
    service.bus.announce(WORK)
    ended = _await(service, operation.id, timeout)
    if ended.state != "succeeded":
        raise click.ClickException(
            ended.error_detail or f"the worker has not answered within {timeout:g} s: is it running?"
        )
    drifts = json.loads(ended.message or "[]")
    for drift in drifts:
        click.echo(f"{drift['layer']:8} {drift['volume_id'] or '-':36} {drift['found']} -> {drift['plan']}")
    click.echo(f"{len(drifts)} differences{' (nothing was changed)' if dry_run else ''}", err=True)


def _await(service: Any, identifier: UUID, timeout: float) -> Any:
    import time

    from app.models import Operation
    from app.operations import FINAL

    deadline = time.monotonic() + timeout
    while True:
        with service.database.read() as session:
            found = session.get_one(Operation, identifier)
        if found.state in FINAL or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


@main.command("verify-events")
@_with_settings
@click.option("--pubkey", help="Base64 key that the chain's heads must be signed with (HOME/keys/events.pub).")
def verify_events(settings: Settings, pubkey: str | None) -> None:
    """Recompute the chain of events and compare it with the signed heads; exit 1 where it is broken."""
    from app import events

    verdict = events.verify(_service(settings).database, settings.log_dir / "event-heads.jsonl", pubkey)
    if verdict.broken:
        raise click.ClickException(f"BROKEN: {verdict.broken}")
    click.echo(f"{verdict.sealed} events hold, {verdict.heads} signed heads agree, {verdict.unsealed} not sealed yet")


@main.command("rotate-keys")
@_with_settings
def rotate_keys(settings: Settings) -> None:
    """Make a new key for the secrets of connections; old ones stay readable. Restart the service afterwards."""
    from app.keys import KeyRing

    ring = KeyRing.load(settings.key_dir / "secrets.json")
    click.echo(f"the current key is now {ring.rotate()}; restart the service, and back up {settings.key_dir}")


# ---------------------------------------------------------------- accounts


def _service(settings: Settings) -> Any:
    from app.service import Service

    if not settings.home.exists():
        raise click.UsageError(f"{settings.home} does not exist: name the service's home with --home")
    return Service(settings, connections=2)


def _act(settings: Settings, action: Callable[[Any, Any], Any]) -> Any:
    """`action(session, caller)` as the operator of this host; a refusal is exit 1."""
    from app.auth import Caller
    from app.errors import Problem

    operator = Caller(UUID(int=0), "operator", "admin")
    try:
        with _service(settings).database.write() as session:
            return action(session, operator)
    except Problem as problem:
        raise click.ClickException(problem.detail) from problem


@main.group()
def user() -> None:
    """Add users and set their passwords."""


@user.command("add")
@_with_settings
@click.argument("name")
@click.option("--role", type=click.Choice(["user", "admin"]), default="user", show_default=True)
@click.option("--password-file", type=click.File("r"), help="A file whose first line is the password ('-': stdin).")
def user_add(settings: Settings, name: str, role: str, password_file: Any) -> None:
    """Add the user NAME. Without a password they sign in with tokens (`stratus-storage token create NAME`)."""
    from app import accounts

    body = _valid("UserCreate", name=name, role=role, password=_first_line(password_file))
    _act(settings, lambda session, caller: accounts.add_user(session, caller, body))
    click.echo(f"user {name} added", err=True)


def _valid(model: str, **values: Any) -> Any:
    """A request document of the API, with its checks."""
    from pydantic import ValidationError

    from app import schemas

    try:
        return getattr(schemas, model)(**values)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
        raise click.UsageError(f"{'.'.join(map(str, found['loc']))}: {found['msg']}") from error


def _first_line(file: Any) -> str | None:
    return file.readline().rstrip("\n") if file else None


@user.command("password")
@_with_settings
@click.argument("name")
@click.option("--password-file", type=click.File("r"), required=True, help="A file whose first line is the password.")
def user_password(settings: Settings, name: str, password_file: Any) -> None:
    """Set the password of NAME."""
    from app import accounts

    body = _valid("UserUpdate", password=_first_line(password_file))
    _act(settings, lambda session, caller: accounts.change_user(session, caller, name, body))


@user.command("disable")
@_with_settings
@click.argument("name")
def user_disable(settings: Settings, name: str) -> None:
    """Let NAME sign in no more."""
    from app import accounts

    body = _valid("UserUpdate", enabled=False)
    _act(settings, lambda session, caller: accounts.change_user(session, caller, name, body))


@main.group()
def token() -> None:
    """Make and revoke API tokens."""


@token.command("create")
@_with_settings
@click.argument("user")
@click.option("--description")
@click.option("--days", type=click.FloatRange(min=0.001), help="Days until it expires; never when left out.")
def token_create(settings: Settings, user: str, description: str | None, days: float | None) -> None:
    """Print a new API token for USER; it is shown this once."""
    from app import accounts

    def issue(session: Any, caller: Any) -> str:
        found = accounts.find_user(session, caller, user)
        lifetime = dt.timedelta(days=days) if days else None
        return accounts.issue_token(session, caller.actor, found, description, lifetime)[1]

    click.echo(_act(settings, issue))


@token.command("revoke")
@_with_settings
@click.argument("token_id", type=click.UUID)
def token_revoke(settings: Settings, token_id: UUID) -> None:
    """Revoke the token with that id, at once."""
    from app import accounts

    _act(settings, lambda session, caller: accounts.revoke_token(session, caller, token_id))


@main.group()
def group() -> None:
    """Make groups, which volumes are shared with."""


@group.command("set")
@_with_settings
@click.argument("name")
@click.argument("members", nargs=-1)
def group_set(settings: Settings, name: str, members: tuple[str, ...]) -> None:
    """Make the group NAME if there is none, with exactly these MEMBERS."""
    from app import accounts
    from app.errors import Problem

    def put(session: Any, caller: Any) -> None:
        try:
            accounts.find_group(session, caller, name)
        except Problem:
            accounts.add_group(session, caller, _valid("GroupCreate", name=name))
        accounts.set_members(session, caller, name, _valid("GroupUpdate", members=list(members)))

    _act(settings, put)


@main.group()
def node() -> None:
    """Register hypervisors."""


@node.command("add")
@_with_settings
@click.argument("name")
@click.argument("initiator")
def node_add(settings: Settings, name: str, initiator: str) -> None:
    """Register the hypervisor NAME with its INITIATOR (iqn.…) and print its token."""
    from app import accounts

    def add(session: Any, caller: Any) -> str:
        found = accounts.add_node(session, caller, _valid("NodeCreate", name=name, initiator=initiator))
        return accounts.issue_token(session, caller.actor, found, "made with the node")[1]

    click.echo(_act(settings, add))


@main.group()
def quota() -> None:
    """Say what a user may have."""


@quota.command("set")
@_with_settings
@click.argument("user")
@click.option("--size", help="Bytes of all their volumes and snapshots: 500GiB; the site's default when left out.")
@click.option("--count", type=click.IntRange(min=0), help="How many; the site's default when left out.")
def quota_set(settings: Settings, user: str, size: str | None, count: int | None) -> None:
    """Set the quota of USER."""
    from app import accounts
    from blockdev.units import parse_size

    try:
        wanted = parse_size(size) if size else None
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    body = _valid("QuotaUpdate", size=wanted, count=count)
    _act(settings, lambda session, caller: accounts.set_quota(session, settings, caller, user, body))


if __name__ == "__main__":
    main()
