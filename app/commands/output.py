"""Records on stdout, as a table for people or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click

from blockdev.units import format_size

Record = dict[str, Any]

format_option = click.option(
    "--format", "style", type=click.Choice(["table", "json"]), default="table", show_default=True
)
#: Members whose value is bytes: with units in a table, plain in JSON.
_SIZES = frozenset({"size", "used_size", "free", "allocated", "promised"})


def show(style: str, columns: Sequence[str], records: Iterable[Any]) -> None:
    """Documents of the API: those `columns` of them as a table, or all of them as a JSON array."""
    show_records(style, columns, [record.model_dump(mode="json") for record in records])


def show_records(style: str, columns: Sequence[str], records: Sequence[Record]) -> None:
    if style == "json":
        click.echo(json.dumps(records, indent=2))
        return
    lines = [[name.upper() for name in columns]]
    lines += [[_cell(name, record.get(name)) for name in columns] for record in records]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(cell.ljust(room) for cell, room in zip(line, widths, strict=True)).rstrip())


def _cell(name: str, value: Any) -> str:
    if value is None or value == []:
        return "-"
    if name in _SIZES:
        return format_size(value)
    if name.endswith("_at"):
        return str(value)[:16].replace("T", " ")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(" ".join(value) if isinstance(value, list) else str(value))


def printable(text: str) -> str:
    """`text` with nothing in it that could drive a terminal."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
