"""How far an operation or a transfer is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from blockdev.units import format_size
from stratus.errors import Document, describe
from stratus.output import Output
from stratus.text import clean

Progress = Callable[[Document], None]
Transfer = Callable[[int, int], None]
"""Told how many bytes are done, and of how many."""


@contextlib.contextmanager
def progress_of(output: Output) -> Iterator[Progress]:
    """A function to call with the operation whenever it was looked at. Everything goes to stderr."""
    if output.quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _Lines(output)


class _Lines:
    """A line whenever there is something new to say, ten per cent apart."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._said = ""

    def __call__(self, operation: Document) -> None:
        line = f"{describe(operation)}: {operation['state']}, {operation['progress'] // 10 * 10} %"
        if line != self._said:
            self._output.say(line)
            self._said = line


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    # rich costs as much as the rest of a start: only who sees it pays for it.
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    # Not as markup: what the service says is text.
    label = TextColumn("{task.description}", markup=False)
    columns = (label, BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=100)

        def show(operation: Document) -> None:
            what = operation.get("message") or f"{operation['kind']}, {operation['state']}"
            bar.update(task, completed=operation["progress"], description=clean(what))

        yield show


@contextlib.contextmanager
def transfer_of(output: Output, what: str) -> Iterator[Transfer]:
    """A function to call with the bytes done and their total; `what` says what is being done. To stderr."""
    if output.quiet:
        yield lambda _, __: None
    elif sys.stderr.isatty():
        with _transfer_bar(what) as show:
            yield show
    else:
        yield _TransferLines(output, what)


class _TransferLines:
    """A line for each ten per cent."""

    def __init__(self, output: Output, what: str) -> None:
        self._output = output
        self._what = what
        self._said = -1

    def __call__(self, done: int, total: int) -> None:
        tenth = 10 * done // total if total else 10
        if tenth != self._said:
            self._output.say(f"{self._what}: {10 * tenth} % of {format_size(total)}")
            self._said = tenth


@contextlib.contextmanager
def _transfer_bar(what: str) -> Iterator[Transfer]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    label = TextColumn("{task.description}", markup=False)
    columns = (label, BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(clean(what))
        yield lambda done, total: bar.update(task, completed=done, total=total)
