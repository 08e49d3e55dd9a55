"""What users may write for an id, a size, an initiator, a filter."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from blockdev.units import InvalidSize, format_size, parse_size
from stratus.completion import suggest
from stratus.errors import Document

UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)
_INITIATOR = re.compile(r"(iqn\.|eui\.|naa\.)[!-~]{1,219}", re.ASCII)
_CHECKSUM = re.compile(r"(sha1:)?[0-9a-f]{40}|(sha256:)?[0-9a-f]{64}|(sha512:)?[0-9a-f]{128}", re.ASCII | re.IGNORECASE)
_BARE_NUMBER = re.compile(r"[0-9.]+", re.ASCII)


class Id(click.ParamType[str]):
    """The UUID of a record of one `kind`; completed with those the service knows."""

    name = "id"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not UUID.fullmatch(str(value)):
            self.fail(
                f"{value!r} is no {self.kind} id; an id looks like {uuid.UUID(int=0)}. "
                f"List them with: stratus-describe-{self.kind}s",
                param,
                ctx,
            )
        return str(uuid.UUID(value))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return suggest(f"/v1/{self.kind}s", ctx.params, incomplete)


class Size(click.ParamType[int]):
    """GiB, or a number with its unit; the value is bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip()
        try:
            size = parse_size(text + "GiB" if _BARE_NUMBER.fullmatch(text) else text)
        except InvalidSize as error:
            self.fail(f"{error}. A bare number is GiB: 10, 1.5, 512MiB, 2TiB", param, ctx)
        if not size:
            self.fail("a volume of no size holds nothing", param, ctx)
        return size


class Initiator(click.ParamType[str]):
    """The iSCSI name of an initiator (RFC 3720 §3.2.6)."""

    name = "iqn"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not _INITIATOR.fullmatch(str(value)):
            self.fail(
                f"{value!r} is no initiator name, like iqn.2004-10.org.example:host7. "
                "That of a Linux machine stands in /etc/iscsi/initiatorname.iscsi",
                param,
                ctx,
            )
        return str(value)


class Filter(NamedTuple):
    """A record passes when `pattern` is found in one of the texts of a field."""

    texts: Callable[[Document], list[str]]
    pattern: re.Pattern[str]

    def passes(self, record: Document) -> bool:
        """Whether the record is one of those asked for."""
        return any(self.pattern.search(text) for text in self.texts(record))


class FilterType(click.ParamType[Filter]):
    """`field:regex`, for one of `fields`; `tag` is the name. A size is tried as bytes and as tables show it."""

    name = "field:regex"

    def __init__(self, fields: tuple[str, ...]) -> None:
        self.fields = fields

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Filter:
        if isinstance(value, Filter):
            return value
        field, colon, pattern = str(value).partition(":")
        if not colon or field not in self.fields:
            self.fail(f"{value!r} does not start with a field and ':'; fields are {', '.join(self.fields)}", param, ctx)
        try:
            return Filter(_texts_of(field), re.compile(pattern))
        except re.error as error:
            self.fail(f"{pattern!r} is no regular expression: {error}", param, ctx)


def _texts_of(field: str) -> Callable[[Document], list[str]]:
    if field == "size":
        return lambda record: [] if record["size"] is None else [str(record["size"]), format_size(record["size"])]
    key = {"tag": "name", "volume": "volume_id"}.get(field, field)
    return lambda record: [str(record.get(key) or "")]


def _digest(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not _CHECKSUM.fullmatch(value):
        raise click.BadParameter(
            f"{value!r} is no checksum: sha256:HEX (or sha512:, sha1:), or the hexadecimal digits alone"
        )
    return None if value is None else value.lower()


def checksum_option(help: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """--checksum, in a form the service reads."""
    return click.option("--checksum", metavar="SHA256:HEX", callback=_digest, help=help)


ATTACHMENT_ID = Id("attachment")
IMAGE_ID = Id("image")
OPERATION_ID = Id("operation")
SNAPSHOT_ID = Id("snapshot")
VOLUME_ID = Id("volume")
SIZE = Size()
INITIATOR = Initiator()
VOLUME_FILTER = FilterType(("tag", "name", "state", "owner", "visibility", "pool", "size", "id"))
IMAGE_FILTER = FilterType(
    ("tag", "name", "state", "owner", "visibility", "size", "id", "identifier", "digest", "title", "os", "endorser",
     "reference")
)  # fmt: skip
SNAPSHOT_FILTER = FilterType(("tag", "name", "state", "owner", "pool", "size", "id", "volume"))
