"""qemu-img(1), a function for each verb, and images named so that it never guesses.

A bare name lets qemu look into the file for its format, and a file's header then for other files. So every image is
named by a `json:{...}` block device with its driver, an absolute path, and "backing": null. That overrides what the
header says of a backing file; a data file cannot be overridden so, and is refused before qemu-img sees the image.

A function is given what runs the tool (blockdev.command.run, or a sandbox): stdlib only, and no word about where.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from blockdev.command import CommandFailed, Output

Format = Literal["raw", "qcow2"]
Run = Callable[[Sequence[str]], Output]
#: Runs a tool and gives its stdout as it comes, undecoded, and b"" now and then; raises as a Run does, at the end.
Stream = Callable[[Sequence[str]], Iterator[bytes]]

_PERCENT = re.compile(rb"\(([0-9]{1,3}\.[0-9]{2})/100%\)")
_NO_ROOM = ("No space left on device", "Disk quota exceeded")
#: Of a cluster that a check was to count (block/qcow2-refcount.c).
_PAST_END = "exceeding the end of the file"
#: A file grown past RLIMIT_FSIZE: prlimit(2), EFBIG.
_TOO_LARGE = "File too large"
KILLED_BY_SIZE = (-signal.SIGXFSZ, 128 + signal.SIGXFSZ)
_NOT_CHECKED, _CORRUPT, _LEAKS = 1, 2, 3


class QemuImgError(Exception):
    """qemu-img could not do its work."""


class NoRoom(QemuImgError):
    """The target's file system is full."""


class OutgrewLimit(QemuImgError):
    """The target became larger than the process was allowed to make it."""


class Unreadable(QemuImgError):
    """The image cannot be opened, read or checked as what it is said to be."""


@dataclass(frozen=True)
class Check:
    """What `qemu-img check` found: `errors` are corruptions, `leaks` clusters that nobody refers to. `cut`: it refers
    to clusters past the end of the file."""

    errors: int
    leaks: int
    cut: bool


def node(path: Path | PurePosixPath, format: Format, *, device: bool = False) -> str:
    """The name of the image at the absolute `path`, for reading, on the command line."""
    assert path.is_absolute()
    file = {"driver": "host_device" if device else "file", "filename": str(path)}
    return "json:" + json.dumps(
        {"driver": format, "read-only": True, "file": file} | ({"backing": None} if format == "qcow2" else {})
    )


def check(run: Run, path: Path | PurePosixPath) -> Check:
    """`qemu-img check` of a qcow2, which repairs nothing. Raises Unreadable."""
    try:
        said = run(["qemu-img", "check", "--output=json", node(path, "qcow2")])
    except CommandFailed as error:
        if error.returncode not in (_CORRUPT, _LEAKS):
            raise _named(error) from error
        said = Output(error.stdout, error.stderr)
    found = _parsed(said.stdout)
    errors = found.get("corruptions", 0) + found.get("check-errors", 0)
    return Check(errors, found.get("leaks", 0), _PAST_END in said.stderr)


def convert_to_qcow2(stream: Stream, source: str, target: Path | PurePosixPath) -> Iterator[float]:
    """`qemu-img convert` into a fresh qcow2 without backing, compression or lazy refcounts; yields percents done,
    over and over.

    Clusters are written in order, and those of zeros not at all: the same content always makes the same file. Raises
    NoRoom, OutgrewLimit, Unreadable.
    """
    options = "compat=1.1,lazy_refcounts=off,cluster_size=65536,preallocation=off"
    return _convert(stream, ["-O", "qcow2", "-o", options, source, str(target)])


def convert_to_raw(
    stream: Stream, source: str, target: Path | PurePosixPath, *, reads_as_zeros: bool
) -> Iterator[float]:
    """`qemu-img convert` into the existing file or device `target`, which must be large enough. If all of it
    `reads_as_zeros` already, zeros are not written. Yields percents done; raises as convert_to_qcow2 does."""
    zeros = ["--target-is-zero"] if reads_as_zeros else []
    return _convert(stream, ["-n", *zeros, "-O", "raw", source, str(target)])


def create_overlay(run: Run, path: Path, backing: Path, backing_format: Format, size: int | None = None) -> None:
    """A qcow2 at `path` over `backing`: an absolute path with its format, or qemu would look for one at every start.
    Raises NoRoom, Unreadable."""
    assert path.is_absolute()
    assert backing.is_absolute()
    more = [] if size is None else [str(size)]
    try:
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", backing_format, "-b", str(backing), str(path), *more])
    except CommandFailed as error:
        raise _named(error) from error


def _convert(stream: Stream, arguments: Sequence[str]) -> Iterator[float]:
    try:
        done = 0.0
        for said in stream(["qemu-img", "convert", "-p", *arguments]):
            done = max([done, *map(float, _PERCENT.findall(said)[-1:])])
            yield done
    except CommandFailed as error:
        raise _named(error) from error


def _named(error: CommandFailed) -> QemuImgError:
    reason = error.stderr.strip() or f"exit code {error.returncode}"
    if error.returncode in KILLED_BY_SIZE or _TOO_LARGE in reason:
        return OutgrewLimit(reason)
    return NoRoom(reason) if any(words in reason for words in _NO_ROOM) else Unreadable(reason)


def _parsed(said: str) -> dict[str, int]:
    try:
        found = json.loads(said)
        return {key: value for key, value in found.items() if isinstance(value, int)}
    except (ValueError, AttributeError, RecursionError):  # a program that read a stranger's bytes says this
        raise Unreadable("qemu-img check did not answer in JSON") from None
