"""What tgtd cannot do, or would do otherwise than it was asked: refused before anything is changed."""

from __future__ import annotations

from iscsi.checks import check_connection, check_path, check_size, refused
from iscsi.target import Connection, Export
from iscsi.tgt_accounts import is_filler

_PATH_MAX = 1000  # tgtd copies a path into 1024 bytes


def check_export(export: Export) -> None:
    """Raises TargetRefused unless tgtd can make `export` exactly so."""
    for connection in export.connections:
        _check_connection(connection)
    if len({connection.mutual for connection in export.connections if connection.mutual}) > 1:
        raise refused("tgt has one mutual account per volume")
    accounts = {account for c in export.connections for account in (c.credentials, c.mutual) if account}
    if len({account.username for account in accounts}) < len(accounts):
        raise refused("one CHAP name with two secrets")
    check_path(export.path, _PATH_MAX)
    check_size(export)


def _check_connection(connection: Connection) -> None:
    check_connection(connection)
    if connection.networks:
        raise refused("tgt lets in by name or by address, it cannot demand both: networks need a firewall")
    if is_filler(connection.credentials.username):
        raise refused(f"{connection.credentials.username} is a name of our own")
