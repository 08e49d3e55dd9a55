"""What no target can do, whatever its kind: refused before anything is changed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from iscsi import names
from iscsi.target import Connection, Export, TargetRefused


def refused(message: str) -> TargetRefused:
    return TargetRefused("ensure export", 0, message)


def check_connection(connection: Connection) -> None:
    """Raises TargetRefused for a name that is not in its normal form, or one secret for both directions."""
    if names.validate_initiator(connection.initiator) != connection.initiator:
        raise refused(f"{connection.initiator} is not in its normal form")
    if connection.mutual and connection.mutual.password == connection.credentials.password:
        raise refused("RFC 7143 §9.2.1 forbids one secret for both directions")


def check_path(path: Path, longest: int) -> None:
    """Raises TargetRefused for a path of more than `longest` bytes, or with what the targets' own syntax uses."""
    if not path.is_absolute() or len(os.fsencode(path)) > longest or re.search(r"[,\x00-\x1f]|\s$", str(path)):
        raise refused(f"the target cannot take the path {str(path)[:200]!r}")


def check_size(export: Export) -> None:
    """Raises TargetRefused unless the backing opens as the target shall open it, and has the size it is said to have.

    tgtd would silently fall back to reading what it may not write.
    """
    try:
        descriptor = os.open(export.path, (os.O_RDONLY if export.read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        raise refused(f"{export.path}: {error.strerror}") from error
    try:
        size = os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)
    if size != export.size:
        raise refused(f"{export.path} has {size} bytes, not {export.size}")
