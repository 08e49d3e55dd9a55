"""What somebody altered in an export, below what `inventory` tells."""

from __future__ import annotations

from collections.abc import Iterator

from iscsi.lio_backstores import attributes
from iscsi.lio_configfs import Acl, Backstore, Volume, read
from iscsi.target import Connection, Export


def altered(volume: Volume, export: Export) -> list[str]:
    """The layers that are there and not as `export` says. Secrets are compared, and not told."""
    backstore = volume.backstore()
    layers = list(_of_backstore(backstore, export)) if backstore is not None and backstore.device is not None else []
    there = volume.initiators()
    for connection in export.connections:
        if connection.initiator in there:
            layers += _of_acl(volume.acl(connection.initiator), connection, read_only=export.read_only)
    return layers


def _of_backstore(backstore: Backstore, export: Export) -> Iterator[str]:
    if any(read(f"{backstore.path}/attrib/{name}") != value for name, value in attributes(backstore).items()):
        yield "attributes of the backstore"
    if backstore.size != export.size:
        yield "size"


def _of_acl(acl: Acl, connection: Connection, *, read_only: bool) -> Iterator[str]:
    own, mutual = connection.credentials, connection.mutual
    wanted = (own.username, own.password, *((mutual.username, mutual.password) if mutual else ("", "")))
    if wanted != (acl.username, acl.password, acl.mutual_username, acl.mutual_password) or not acl.chap:
        yield f"CHAP of {acl.initiator}"
    if acl.mapped and acl.read_only != read_only:
        yield f"write protection of {acl.initiator}"
