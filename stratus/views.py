"""Which columns a record has, in a table for people and in CSV for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from blockdev.units import format_size
from stratus.errors import Document


class Column(NamedTuple):
    """A column: its name, its plain value in a record (bytes, for a size), and how a person reads that value."""

    name: str
    value: Callable[[Document], Any]
    shown: Callable[[Document], str]


View = tuple[Column, ...]


def _plain(name: str, key: str | None = None) -> Column:
    def value(record: Document) -> Any:
        return record.get(key or name)

    return Column(name, value, lambda record: _text(value(record)))


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _state(record: Document) -> str:
    error = record.get("error")
    return f"{record['state']}: {error}" if error else str(record["state"])


def _time(name: str) -> Column:
    return Column(name, lambda record: record.get(name), lambda record: minute(_text(record.get(name))))


def minute(instant: str) -> str:
    """A time of RFC 3339 in UTC, to the minute."""
    return instant[:16].replace("T", " ")


def live(attachments: Iterable[Document]) -> list[Document]:
    """Those that still hold their volume."""
    return [attachment for attachment in attachments if attachment["state"] != "detached"]


def _holders(volume: Document) -> str:
    return ", ".join(f"{each['node']} ({each['mode']})" for each in live(volume["attachments"]))


def _attachment_ids(volume: Document) -> str:
    return " ".join(str(each["id"]) for each in live(volume["attachments"]))


def _failure(operation: Document) -> str:
    return _text((operation.get("error") or {}).get("detail"))


def _kind_and_id(operation: Document) -> str:
    return f"{operation['resource']['kind']} {operation['resource']['id']}"


_SIZE = Column("size", lambda record: record["size"], lambda record: format_size(record["size"]))
_STATE = Column("state", lambda record: record["state"], _state)

VOLUME: View = (
    _plain("id"),
    _plain("name"),
    _SIZE,
    _STATE,
    _plain("owner"),
    _plain("visibility"),
    _plain("pool"),
    Column("attachments", _attachment_ids, _holders),
)
SNAPSHOT: View = (
    _plain("id"),
    _plain("name"),
    _plain("volume", "volume_id"),
    _SIZE,
    _STATE,
    _plain("owner"),
    _plain("pool"),
    _time("created_at"),
)
ATTACHMENT: View = (
    _plain("id"),
    _plain("volume", "volume_id"),
    _plain("instance", "instance_id"),
    _plain("node"),
    _plain("initiator"),
    _plain("mode"),
    _STATE,
)
OPERATION: View = (
    _plain("id"),
    _plain("kind"),
    _plain("state"),
    Column("progress", lambda record: record["progress"], lambda record: f"{record['progress']} %"),
    Column("resource", _kind_and_id, _kind_and_id),
    Column("error", _failure, _failure),
    _time("created_at"),
)
SHARE: View = (_plain("group"), _plain("mode"))
STEP: View = (_plain("kind"), _plain("text"))

_LOGIN = tuple(_plain(name) for name in ("portal", "target", "lun", "username"))
_SECRETS = tuple(_plain(name) for name in ("password", "mutual_username", "mutual_password"))


def connection_view(show_secret: bool) -> View:
    """The columns of a `flat` connection; the secrets among them only when asked for."""
    return (_plain("attachment"), *_LOGIN, *(_SECRETS if show_secret else ()))


def flat(attachment_id: str, connection: Document) -> Document:
    """A connection with its `auth` beside the rest."""
    return {"attachment": attachment_id, **connection, **connection["auth"]}


def plan_steps(plan: Document) -> list[Document]:
    """A plan as lines of `kind` and `text`."""
    steps = [{"kind": "step", "text": step} for step in plan["steps"]]
    return steps + [{"kind": "conflict", "text": f"{each['detail']} ({each['code']})"} for each in plan["conflicts"]]
