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


def _size(name: str) -> Column:
    def shown(record: Document) -> str:
        size = record.get(name)
        return "" if size is None else format_size(size)

    return Column(name, lambda record: record.get(name), shown)


def _image_origin(image: Document) -> str:
    """What a person knows it by: its reference, where that is told, else what kind of thing it was made from."""
    kind = _text((image.get("origin") or {}).get("kind"))
    return _text(image.get("reference")) or kind


def _short_digest(image: Document) -> str:
    """Enough to compare by eye."""
    digest = _text(image.get("digest"))
    return f"{digest[:12]}…" if digest else ""


_SIZE = _size("size")
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
IMAGE: View = (
    _plain("id"),
    _plain("name"),
    _size("size"),
    _size("file_size"),
    _STATE,
    _plain("owner"),
    _plain("visibility"),
    Column("origin", lambda record: (record.get("origin") or {}).get("kind"), _image_origin),
    _plain("identifier"),
    _plain("os"),
    _plain("endorser"),
    Column("digest", lambda record: record.get("digest"), _short_digest),
)
PIN: View = (_plain("name"), _plain("kind"), _plain("digest"), _plain("path"))
LISTED_PIN: View = (_plain("name"), _plain("kind"), _plain("principal"), _time("created_at"))
STATEMENT: View = (_plain("identifier"), _size("size"), _plain("sha256"), _plain("file"))
RECEIPT: View = (_plain("status"), _plain("location"), _plain("said"))
JUDGED: View = (
    _plain("verdict"),
    _plain("rule"),
    _plain("detail"),
    _plain("identifier"),
    _plain("endorser"),
    _plain("source"),
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


def judged(judgement: Document) -> list[Document]:
    """The entry that passed, or every refused one with its rule, as flat records."""
    if passed := judgement.get("passed"):
        return [{**passed, "verdict": "passed"}]
    refused = judgement["refused"]
    return [{**each["entry"], "verdict": "refused", "rule": each["rule"], "detail": each["detail"]} for each in refused]
