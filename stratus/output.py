"""Records on stdout, as a table, JSON or CSV; everything else on stderr."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

from stratus.errors import Document
from stratus.text import clean, clean_json, width
from stratus.views import View


class Output:
    """Shows records in `format` (table, json or csv). Tables are for people: sizes have units, nothing can drive the
    terminal. JSON and CSV hold what the service said: sizes are bytes, times RFC 3339."""

    def __init__(self, format: str = "table", quiet: bool = False) -> None:
        self.format = format
        self.quiet = quiet

    def record(self, view: View, record: Document, document: Any = None) -> None:
        """One record; in JSON an object: `document` if given, else the record itself."""
        if self.format == "json":
            self._json(record if document is None else document)
        else:
            self.records(view, [record])

    def records(self, view: View, records: Iterable[Document]) -> None:
        """Any number of records; in JSON an array."""
        rows = list(records)
        if self.format == "json":
            self._json(rows)
        elif self.format == "csv":
            self._csv(view, rows)
        else:
            self._table(view, rows)

    def say(self, text: str) -> None:
        """Tell a person something, unless --quiet."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Tell a person something that must not be missed."""
        click.echo(clean(text), err=True)

    def _json(self, value: Any) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=not _prints_unicode())
        click.echo(clean_json(text))

    def _csv(self, view: View, rows: Sequence[Document]) -> None:
        """RFC 4180. A terminal, unlike a file, is given no character that drives it."""
        safe = clean if sys.stdout.isatty() else str
        writer = csv.writer(sys.stdout)
        writer.writerow([column.name for column in view])
        for row in rows:
            values = [column.value(row) for column in view]
            writer.writerow(["" if value is None else safe(value) for value in values])

    def _table(self, view: View, rows: Sequence[Document]) -> None:
        lines = [[column.name.upper() for column in view]]
        lines += [[clean(column.shown(row)) or "-" for column in view] for row in rows]
        widths = [max(width(cell) for cell in cells) for cells in zip(*lines, strict=True)]
        for line in lines:
            cells = [cell + " " * (room - width(cell)) for cell, room in zip(line, widths, strict=True)]
            click.echo("  ".join(cells).rstrip())


def _prints_unicode() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
