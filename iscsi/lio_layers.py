"""The layers of an export above its backstore, each converged by itself through rtslib.

What rtslib-fb 2.2 and LIO do, and what follows:

- rtslib's constructors create what is not there; nothing here looks by them (see `iscsi.lio_configfs`).
- An ACL lets its initiator in once it has both a CHAP name and a secret; without, CHAP fails. So they come last, after
  the LUN, which a reconnecting writer would otherwise miss. A value that begins with "NULL" unsets it.
- With prod_mode_write_protect a LUN is read-only for an initiator until it is told otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import rtslib_fb as rtslib  # type: ignore[import-untyped]

from blockdev.command import CommandError, run
from iscsi import lio_configfs as configfs
from iscsi import names
from iscsi.lio_backstores import storage_object
from iscsi.lio_configfs import Acl, Backstore, Volume, put, read, write
from iscsi.target import Connection, Credentials, TargetUnavailable

GROUP = {
    "authentication": "1",
    "generate_node_acls": "0",
    "cache_dynamic_acls": "0",
    "demo_mode_discovery": "0",
    "demo_mode_write_protect": "1",
    "prod_mode_write_protect": "1",
}
PARAMETERS = {"AuthMethod": "CHAP", "MaxConnections": "1", "ErrorRecoveryLevel": "0"}  # the fence relies on these

_MODULES = ("target_core_mod", "target_core_iblock", "iscsi_target_mod", "loop")
_TIMEOUT = 30.0


def load() -> None:
    """Load LIO and mount configfs if need be. Raises TargetUnavailable."""
    if _is_there():
        return
    try:
        for module in _MODULES:
            run(["modprobe", module], timeout=_TIMEOUT)
        if not os.path.ismount(configfs.ROOT):
            run(["mount", "-t", "configfs", "configfs", configfs.ROOT], timeout=_TIMEOUT)
        os.makedirs(configfs.FABRIC, exist_ok=True)
    except (CommandError, OSError) as error:
        raise TargetUnavailable(f"LIO cannot be loaded: {error}") from error
    if not _is_there():
        raise TargetUnavailable(f"LIO cannot be seen: {configfs.ROOT} is not the kernel's configfs")


def _is_there() -> bool:
    return os.path.isfile(f"{configfs.FABRIC}/lio_version")


def has_attributes(volume: Volume) -> bool:
    """Whether the portal group has all the attributes and parameters that we set."""
    wanted = {f"attrib/{name}": value for name, value in GROUP.items()}
    wanted |= {f"param/{name}": value for name, value in PARAMETERS.items()}
    return all(read(f"{volume.group}/{name}") == value for name, value in wanted.items())


class Layers:
    """Writes the layers of one volume. `trace` is called with the name of each step done."""

    def __init__(self, volume: Volume, trace: Callable[[str], None]) -> None:
        self._volume, self._trace = volume, trace

    # --- building

    def ensure_group(self) -> None:
        """The target with its portal group, closed."""
        if not os.path.isdir(self._volume.target):
            rtslib.Target(rtslib.FabricModule("iscsi"), self._volume.iqn, mode="create")
            self._trace("target")
        if not os.path.isdir(self._volume.group):
            rtslib.TPG(self._target, 1, mode="create")
            self._trace("group")
        if put(f"{self._volume.group}/attrib", GROUP) | put(f"{self._volume.group}/param", PARAMETERS):
            self._trace("attributes")

    def ensure_lun(self, backstore: Backstore, tid: int) -> None:
        """The LUN of the group leads to the backstore."""
        exported = self._volume.exported()
        if exported and exported[1] == backstore.path:
            return
        if os.path.isdir(self._volume.lun):
            rtslib.LUN(self._group, names.LUN).delete()
        rtslib.LUN(self._group, names.LUN, storage_object(backstore.path), alias=f"tid-{tid}")
        self._trace("lun")

    def ensure_acl(self, connection: Connection, *, read_only: bool) -> None:
        """One initiator may log in, and finds the LUN."""
        initiator = connection.initiator
        if not os.path.isdir(self._volume.acl_path(initiator)):
            rtslib.NodeACL(self._group, initiator, mode="create")
            self._trace("acl")
        acl = self._volume.acl(initiator)
        if not acl.chap:
            put(f"{self._volume.acl_path(initiator)}/attrib", {"authentication": "1"})
        self._ensure_mapped_lun(acl, read_only=read_only)
        self._ensure_secrets(acl, connection)

    def ensure_portals(self, portals: Iterable[str]) -> list[str]:
        """`portals` (HOST:PORT) lead to the target; returns the paths of those that still do and should not."""
        there, wanted = set(self._volume.portals()), set(portals)
        for portal in sorted(wanted - there):
            host, _, port = portal.rpartition(":")
            rtslib.NetworkPortal(self._group, host, int(port), mode="create")
            self._trace("portal")
        return [f"{self._volume.group}/np/{portal}" for portal in sorted(there - wanted)]

    def enable(self) -> None:
        """Open the group for logins."""
        if not self._volume.enabled():
            self._group.enable = True
            self._trace("enabled")

    # --- taking down

    def revoke(self, initiator: str) -> None:
        """The initiator cannot log in any more, and its sessions, if they go on, have lost the LUN."""
        acl = self._volume.acl(initiator)
        if acl.username or acl.password or acl.mutual_username or acl.mutual_password:
            self.forget_secrets(initiator)
            self._trace("secrets forgotten")
        if os.path.isdir(f"{self._volume.acl_path(initiator)}/lun_{names.LUN}"):
            self._mapped_lun(initiator).delete()
            self._trace("revoked")

    def forget_secrets(self, initiator: str) -> None:
        """The initiator cannot log in any more; its sessions go on."""
        for name in ("userid", "password", "userid_mutual", "password_mutual"):
            write(f"{self._volume.acl_path(initiator)}/auth/{name}", "NULL")

    def close(self) -> None:
        """Nobody can log in, and the LUN leads nowhere. Waits for sessions and commands: there should be none."""
        if self._volume.enabled():
            write(f"{self._volume.group}/enable", "0")
            self._trace("closed")
        if exported := self._volume.exported():
            os.unlink(f"{self._volume.lun}/{exported[0]}")
            self._trace("lun deleted")

    # --- rtslib's objects, looked up; they hold no more than a path

    @cached_property
    def _target(self) -> Any:
        return rtslib.Target(rtslib.FabricModule("iscsi"), self._volume.iqn, mode="lookup")

    @cached_property
    def _group(self) -> Any:
        return rtslib.TPG(self._target, 1, mode="lookup")

    def _acl(self, initiator: str) -> Any:
        return rtslib.NodeACL(self._group, initiator, mode="lookup")

    def _mapped_lun(self, initiator: str) -> Any:
        return rtslib.MappedLUN(self._acl(initiator), names.LUN)

    # --- parts of the above

    def _ensure_mapped_lun(self, acl: Acl, *, read_only: bool) -> None:
        if not acl.mapped:
            if os.path.isdir(f"{self._volume.acl_path(acl.initiator)}/lun_{names.LUN}"):
                self._mapped_lun(acl.initiator).delete()
            rtslib.MappedLUN(self._acl(acl.initiator), names.LUN, names.LUN, write_protect=read_only)
            self._trace("mapped lun")
        elif acl.read_only != read_only:
            self._mapped_lun(acl.initiator).write_protect = read_only
            self._trace("write protect")

    def _ensure_secrets(self, acl: Acl, connection: Connection) -> None:
        own, mutual = connection.credentials, connection.mutual
        if (acl.username, acl.password) == (own.username, own.password) and _same(acl, mutual):
            return
        if acl.username or acl.mutual_username:
            self.forget_secrets(connection.initiator)
            self._trace("secrets forgotten")
        node = self._acl(connection.initiator)
        if mutual:
            node.chap_mutual_password, node.chap_mutual_userid = mutual.password, mutual.username
            self._trace("mutual")
        node.chap_password = own.password
        self._trace("secret")
        node.chap_userid = own.username
        self._trace("admitted")


def _same(acl: Acl, mutual: Credentials | None) -> bool:
    wanted = (mutual.username, mutual.password) if mutual else ("", "")
    return (acl.mutual_username, acl.mutual_password) == wanted
