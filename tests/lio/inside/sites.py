"""Whole services in the test kernel: each target on each kind of pool, with the kernel's own initiator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.config import read_effective
from app.worker_process import tgt_host
from iscsi.tgt_host import TgtHost
from tests.lio.inside.conftest import wipe_lio
from tests.support.kernel_initiator import KernelInitiator
from tests.support.service import RunningService, initiator_of, running
from tests.support.thinpools import thin_pool

ONE, TWO = "iqn.2026-11.org.example:one", "iqn.2026-11.org.example:two"
MIB = 1 << 20
KINDS = ("lio-lvm", "lio-directory", "tgt-lvm", "tgt-directory")


@dataclass
class Site:
    """A running service with one pool, at `path`; `group` is the volume group of an lvm pool."""

    service: RunningService
    target: str
    path: Path
    group: str | None

    def volume(self, size: int = 32 * MIB, **body: Any) -> str:
        return str(self.service.admin.make_volume(size, **body)["id"])

    def attach(self, volume: str, initiator: str = ONE, **body: Any) -> dict[str, Any]:
        return self.service.admin.attach(volume, initiator, **body)

    def detach(self, attachment: dict[str, Any]) -> None:
        self.service.admin.detach(attachment["id"])


@contextmanager
def open_site(kind: str, xfs: Path, workdir: Path, **settings: str) -> Iterator[Site]:
    """One of KINDS; the pool, if it is a directory, is on `xfs`. `settings`: further STRATUS_…"""
    target, driver = kind.split("-")
    wipe_lio()
    with ExitStack() as stack:
        path, group = xfs / f"{workdir.name}-{kind}", None
        if driver == "lvm":
            pool = stack.enter_context(thin_pool(workdir, f"site-{target}", 512 * MIB))
            path, group = pool.path, pool.group
        else:
            path.mkdir()
        environment = {
            "STRATUS_ISCSI__TARGET": target,
            "STRATUS_POOLS__DEFAULT": json.dumps({"driver": driver, "path": str(path)}),
            "STRATUS_SERVER__PROCESSES": "1",
            "STRATUS_WORKER__LEASE": "15",
            "STRATUS_WORKER__RECONCILE_INTERVAL": "3600",  # what a test breaks, nobody mends before it looks
            **settings,
        }
        service = stack.enter_context(running(workdir / "home", environment))
        yield Site(service, target, path, group)


def kernel(attachment: dict[str, Any]) -> KernelInitiator:
    """The kernel's initiator for an attachment."""
    other = initiator_of(attachment)
    return KernelInitiator(
        other.portal, other.iqn, other.initiator, other.username, other.password, other.mutual, other.lun
    )


def tgtd(site: Site) -> TgtHost:
    return tgt_host(read_effective(site.service.home / "run" / "effective.json"))
