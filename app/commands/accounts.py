"""user, token, group, node, quota: who may use the service, and how much of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import UUID

import click

from app.commands.common import act, look, valid, with_settings
from app.commands.output import format_option, show, show_records
from app.config import Settings


def _every(list_page: Callable[[Any], Any]) -> list[Any]:
    """The rows of all pages of a list: `list_page(paging)`."""
    rows: list[Any] = []
    cursor = None
    while True:
        page = list_page(valid("Paging", limit=1000, next=cursor))
        rows += page.items
        cursor = page.next
        if cursor is None:
            return rows


def _first_line(file: Any) -> str | None:
    return file.readline().rstrip("\n") if file else None


# ---------------------------------------------------------------- users


@click.group()
def user() -> None:
    """Add users, set their passwords, let them in or not."""


@user.command("list")
@with_settings
@format_option
def user_list(settings: Settings, style: str) -> None:
    """List users and admins."""
    from app import accounts
    from app.schemas import UserDocument

    def find(session: Any, caller: Any) -> list[Any]:
        return _every(lambda paging: accounts.principals(session, caller, paging, nodes=False))

    show(style, ("name", "role", "enabled", "created_at"), map(UserDocument.model_validate, look(settings, find)))


@user.command("add")
@with_settings
@click.argument("name")
@click.option("--role", type=click.Choice(["user", "admin"]), default="user", show_default=True)
@click.option("--password-file", type=click.File("r"), help="A file whose first line is the password ('-': stdin).")
def user_add(settings: Settings, name: str, role: str, password_file: Any) -> None:
    """Add the user NAME. Without a password they sign in with tokens (`stratus-storage token create NAME`)."""
    from app import accounts

    body = valid("UserCreate", name=name, role=role, password=_first_line(password_file))
    act(settings, lambda session, caller: accounts.add_user(session, caller, body))
    click.echo(f"user {name} added", err=True)


def _change_user(settings: Settings, name: str, **changes: Any) -> None:
    from app import accounts

    body = valid("UserUpdate", **changes)
    act(settings, lambda session, caller: accounts.change_user(session, caller, name, body))


@user.command("password")
@with_settings
@click.argument("name")
@click.option("--password-file", type=click.File("r"), required=True, help="A file whose first line is the password.")
def user_password(settings: Settings, name: str, password_file: Any) -> None:
    """Set the password of NAME."""
    _change_user(settings, name, password=_first_line(password_file))


@user.command("disable")
@with_settings
@click.argument("name")
def user_disable(settings: Settings, name: str) -> None:
    """Let NAME sign in no more."""
    _change_user(settings, name, enabled=False)


@user.command("enable")
@with_settings
@click.argument("name")
def user_enable(settings: Settings, name: str) -> None:
    """Let NAME sign in again."""
    _change_user(settings, name, enabled=True)


# ---------------------------------------------------------------- tokens


@click.group()
def token() -> None:
    """Make, list and revoke API tokens."""


@token.command("list")
@with_settings
@click.argument("user", required=False)
@format_option
def token_list(settings: Settings, user: str | None, style: str) -> None:
    """List the tokens of USER, or everybody's."""
    from app import accounts

    def find(session: Any, caller: Any) -> list[dict[str, Any]]:
        if user is not None:  # theirs are what they would be shown themselves
            caller = replace(caller, id=accounts.find_user(session, caller, user).id, role="user")
        rows = _every(lambda paging: accounts.tokens(session, caller, paging))
        return [_token(row) for row in rows]

    columns = ("id", "user", "description", "created_at", "expires_at", "revoked_at")
    show_records(style, columns, look(settings, find))


def _token(row: Any) -> dict[str, Any]:
    from app.schemas import TokenDocument

    members = {name: getattr(row, name) for name in TokenDocument.model_fields if name != "user"}
    return TokenDocument.model_validate(members | {"user": row.user.name}).model_dump(mode="json")


@token.command("create")
@with_settings
@click.argument("user")
@click.option("--description")
@click.option("--days", type=click.FloatRange(0.001, 3660), help="Days until it expires; never when left out.")
def token_create(settings: Settings, user: str, description: str | None, days: float | None) -> None:
    """Print a new API token for USER; it is shown this once."""
    from app import accounts

    lifetime = round(days * 86400) if days else None
    body = valid("TokenCreate", user=user, description=description, expires_in=lifetime)
    click.echo(act(settings, lambda session, caller: accounts.add_token(session, caller, body)[1]))


@token.command("revoke")
@with_settings
@click.argument("token_id", type=click.UUID)
def token_revoke(settings: Settings, token_id: UUID) -> None:
    """Revoke the token with that id, at once."""
    from app import accounts

    act(settings, lambda session, caller: accounts.revoke_token(session, caller, token_id))


# ---------------------------------------------------------------- groups


@click.group()
def group() -> None:
    """Make and list groups, which volumes are shared with."""


@group.command("list")
@with_settings
@format_option
def group_list(settings: Settings, style: str) -> None:
    """List the groups and their members."""
    from app import accounts

    def find(session: Any, caller: Any) -> list[dict[str, Any]]:
        rows = _every(lambda paging: accounts.groups(session, caller, paging))
        return [_group(row, accounts.members(session, row)) for row in rows]

    show_records(style, ("name", "members", "created_at"), look(settings, find))


def _group(row: Any, members: list[str]) -> dict[str, Any]:
    from app.schemas import GroupDocument

    shown = {"id": row.id, "name": row.name, "members": members, "created_at": row.created_at}
    return GroupDocument.model_validate(shown).model_dump(mode="json")


@group.command("set")
@with_settings
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
            accounts.add_group(session, caller, valid("GroupCreate", name=name))
        accounts.set_members(session, caller, name, valid("GroupUpdate", members=list(members)))

    act(settings, put)


# ---------------------------------------------------------------- nodes


@click.group()
def node() -> None:
    """Register and list hypervisors."""


@node.command("list")
@with_settings
@format_option
def node_list(settings: Settings, style: str) -> None:
    """List the hypervisors and their initiators."""
    from app import accounts
    from app.schemas import NodeDocument

    def find(session: Any, caller: Any) -> list[Any]:
        return _every(lambda paging: accounts.principals(session, caller, paging, nodes=True))

    columns = ("name", "initiator", "enabled", "created_at")
    show(style, columns, map(NodeDocument.model_validate, look(settings, find)))


@node.command("add")
@with_settings
@click.argument("name")
@click.argument("initiator")
def node_add(settings: Settings, name: str, initiator: str) -> None:
    """Register the hypervisor NAME with its INITIATOR (iqn.…) and print its token."""
    from app import accounts

    def add(session: Any, caller: Any) -> str:
        found = accounts.add_node(session, caller, valid("NodeCreate", name=name, initiator=initiator))
        return accounts.issue_token(session, caller.actor, found, "made with the node")[1]

    click.echo(act(settings, add))


# ---------------------------------------------------------------- quotas


@click.group()
def quota() -> None:
    """Say what a user may have."""


@quota.command("show")
@with_settings
@click.argument("user")
@format_option
def quota_show(settings: Settings, user: str, style: str) -> None:
    """Show what USER may have, and has."""
    from app import accounts

    found = look(settings, lambda session, caller: accounts.quota(session, settings, caller, user))
    show_records(style, ("user", "size", "used_size", "count", "used_count"), [found])


@quota.command("set")
@with_settings
@click.argument("user")
@click.option("--size", help="GiB, or a number with its unit: all their volumes and snapshots together.")
@click.option("--count", type=click.IntRange(min=0), help="How many volumes and snapshots.")
@click.option("--default", "reset", is_flag=True, help="The site's default for what is not given.")
def quota_set(settings: Settings, user: str, size: str | None, count: int | None, reset: bool) -> None:
    """Change the quota of USER; what is not given stays as it is.

    \b
    Examples:
      stratus-storage quota set alice --size 500
      stratus-storage quota set alice --default
    """
    from app import accounts

    if size is None and count is None and not reset:
        raise click.UsageError("nothing to change: give --size, --count or --default")
    wanted = None if size is None else _size(size)

    def put(session: Any, caller: Any) -> None:
        found = accounts.find_user(session, caller, user)
        before = (None, None) if reset else (found.quota_size, found.quota_count)
        body = valid(
            "QuotaUpdate",
            size=before[0] if wanted is None else wanted,
            count=before[1] if count is None else count,
        )
        accounts.set_quota(session, settings, caller, user, body)

    act(settings, put)


def _size(text: str) -> int:
    """Bytes; a bare number is GiB, as in the users' commands."""
    from blockdev.units import InvalidSize, parse_size

    try:
        return parse_size(text + "GiB" if re.fullmatch(r"[0-9.]+", text) else text)
    except InvalidSize as error:
        raise click.UsageError(f"--size: {error}. A bare number is GiB: 500, 1.5, 512MiB, 2TiB") from error
