"""What LIO or rtslib cannot do, or would do otherwise than asked: refused before anything is changed."""

from __future__ import annotations

import re
from collections import Counter

from iscsi.checks import check_connection, check_path, check_size, refused
from iscsi.target import Connection, Export

_PATH_MAX = 500  # udev_path of a backstore has 512 bytes
_SECTOR = 512
_INITIATOR = re.compile(r"iqn\..*|eui\..*|naa\.[125c-f][0-9a-f]{15}")  # rtslib knows no naa. of 32 digits


def check_export(export: Export) -> None:
    """Raises TargetRefused unless LIO can make `export` exactly so."""
    for connection in export.connections:
        _check_connection(connection)
    (name, count), *_ = Counter(c.initiator for c in export.connections).most_common(1) or [("", 0)]
    if count > 1:
        raise refused(f"LIO has one account for each initiator: {name} is there {count} times")
    check_path(export.path, _PATH_MAX)
    check_size(export)
    if export.size % _SECTOR or not export.size:
        raise refused(f"{export.size} bytes are no whole number of sectors")


def _check_connection(connection: Connection) -> None:
    check_connection(connection)
    if connection.networks:
        raise refused("LIO lets in by name from anywhere: networks need a firewall")
    if not _INITIATOR.fullmatch(connection.initiator):
        raise refused(f"{connection.initiator}: rtslib takes naa. with 16 digits only")
    for account in filter(None, (connection.credentials, connection.mutual)):
        if account.username.startswith("NULL") or account.password.startswith("NULL"):
            raise refused("a CHAP name or secret that begins with NULL unsets it in LIO")
