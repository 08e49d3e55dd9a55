"""What LIO or rtslib cannot do, or would do otherwise than asked: refused before anything is changed."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from iscsi import names
from iscsi.target import Connection, Export, TargetRefused

_PATH_MAX = 500  # udev_path of a backstore has 512 bytes
_SECTOR = 512
_INITIATOR = re.compile(r"iqn\..*|eui\..*|naa\.[125c-f][0-9a-f]{15}")  # rtslib knows no naa. of 32 digits


def check_export(export: Export) -> None:
    """Raises TargetRefused unless LIO can make `export` exactly so."""
    for connection in export.connections:
        _check_connection(connection)
    (name, count), *_ = Counter(c.initiator for c in export.connections).most_common(1) or [("", 0)]
    if count > 1:
        raise _refused(f"LIO has one account for each initiator: {name} is there {count} times")
    _check_path(export.path)
    size = _size(export.path, read_only=export.read_only)
    if size != export.size:
        raise _refused(f"{export.path} has {size} bytes, not {export.size}")
    if size % _SECTOR or not size:
        raise _refused(f"{size} bytes are no whole number of sectors")


def _check_connection(connection: Connection) -> None:
    if connection.networks:
        raise _refused("LIO lets in by name from anywhere: networks need a firewall")
    if names.validate_initiator(connection.initiator) != connection.initiator:
        raise _refused(f"{connection.initiator} is not in its normal form")
    if not _INITIATOR.fullmatch(connection.initiator):
        raise _refused(f"{connection.initiator}: rtslib takes naa. with 16 digits only")
    if connection.mutual and connection.mutual.password == connection.credentials.password:
        raise _refused("RFC 7143 §9.2.1 forbids one secret for both directions")
    for account in filter(None, (connection.credentials, connection.mutual)):
        if account.username.startswith("NULL") or account.password.startswith("NULL"):
            raise _refused("a CHAP name or secret that begins with NULL unsets it in LIO")


def _check_path(path: Path) -> None:
    if not path.is_absolute() or len(os.fsencode(path)) > _PATH_MAX or re.search(r"[,\x00-\x1f]|\s$", str(path)):
        raise _refused(f"LIO cannot take the path {str(path)[:200]!r}")


def _size(path: Path, *, read_only: bool) -> int:
    """The bytes of a file or block device, opened as it shall be used."""
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
