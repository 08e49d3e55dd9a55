"""What tgtd cannot do, or would do otherwise than it was asked: refused before anything is changed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from iscsi import names
from iscsi.target import Connection, Export, TargetRefused
from iscsi.tgt_accounts import is_filler

_PATH_MAX = 1000  # tgtd copies a path into 1024 bytes


def check_export(export: Export) -> None:
    """Raises TargetRefused unless tgtd can make `export` exactly so."""
    for connection in export.connections:
        _check_connection(connection)
    if len({connection.mutual for connection in export.connections if connection.mutual}) > 1:
        raise _refused("tgt has one mutual account per volume")
    accounts = {account for c in export.connections for account in (c.credentials, c.mutual) if account}
    if len({account.username for account in accounts}) < len(accounts):
        raise _refused("one CHAP name with two secrets")
    _check_path(export.path)
    size = _size(export.path, read_only=export.read_only)
    if size != export.size:
        raise _refused(f"{export.path} has {size} bytes, not {export.size}")


def _check_connection(connection: Connection) -> None:
    if connection.networks:
        raise _refused("tgt lets in by name or by address, it cannot demand both: networks need a firewall")
    if names.validate_initiator(connection.initiator) != connection.initiator:
        raise _refused(f"{connection.initiator} is not in its normal form")
    if is_filler(connection.credentials.username):
        raise _refused(f"{connection.credentials.username} is a name of our own")
    if connection.mutual and connection.mutual.password == connection.credentials.password:
        raise _refused("RFC 7143 §9.2.1 forbids one secret for both directions")


def _check_path(path: Path) -> None:
    if not path.is_absolute() or len(os.fsencode(path)) > _PATH_MAX or re.search(r"[,\x00-\x1f]", str(path)):
        raise _refused(f"tgtd cannot take the path {str(path)[:200]!r}")


def _size(path: Path, *, read_only: bool) -> int:
    """The bytes of a file or block device. Opened as tgtd shall open it, which would silently fall back to reading."""
    try:
        descriptor = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(f"{path}: {error.strerror}") from error
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)


def _refused(message: str) -> TargetRefused:
    return TargetRefused("ensure export", 0, message)
