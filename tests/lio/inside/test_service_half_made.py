"""Hands that die by SIGKILL between two layers: what they leave is brought right by the service's reconcile."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from _pytest.mark import ParameterSet

from app.config import read_effective
from iscsi.lio import LioTarget
from iscsi.lio_configfs import FABRIC
from iscsi.target import Connection, Credentials, Export
from tests.lio.inside.lio_service import MIB
from tests.lio.inside.lio_service import on_lio as on_lio
from tests.support.interruptions import standing
from tests.support.killing import killed_by_itself
from tests.support.service import RunningService, initiator_of, running, wait_until

HOST = "iqn.2026-11.org.example:host"
#: The steps of an export that is made, and of one that is taken down, in their order.
MAKING = ("backstore", "identity", "target", "group", "attributes", "lun", "acl", "mapped lun", "secret", "admitted",
          "portal")  # fmt: skip
REMOVING = ("secrets forgotten", "revoked", "closed", "lun deleted", "backstore deleted")


@pytest.fixture(scope="module")
def service(on_lio: None, dying: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """Nobody mends what a test breaks before it says so."""
    environment = {
        "STRATUS_WORKER__RECONCILE_INTERVAL": "3600",
        "LD_PRELOAD": str(dying / "shim.so"),
        "DYING": str(dying / "after"),
    }
    with running(tmp_path_factory.mktemp("half-made") / "home", environment) as started:
        yield started


def target_of(service: RunningService, trace: Callable[[str], None] = lambda _: None) -> LioTarget:
    """A second hand on what the service exports."""
    prefix = read_effective(service.home / "run" / "effective.json").iscsi.iqn_prefix
    host, _, port = service.portal.rpartition(":")
    target = LioTarget(prefix, [(host, int(port))], Path("/run/stratus/stratus-lio.lock"), trace=trace)
    return target


def die_after(step: str, done: str) -> None:
    if done == step:
        os.kill(os.getpid(), signal.SIGKILL)


def export_of(service: RunningService, attachment: dict[str, Any], tid: int) -> Export:
    """The export as the service makes it."""
    auth = attachment["connection"]["auth"]
    connection = Connection(attachment["initiator"], Credentials(auth["username"], auth["password"]))
    volume = attachment["volume_id"]
    return Export(UUID(volume), tid, service.backing(volume), 16 * MIB, False, (connection,))


def attached(service: RunningService) -> tuple[dict[str, Any], Export]:
    attachment, _ = service.attached(HOST, 16 * MIB)
    volume = UUID(attachment["volume_id"])
    (state,) = [state for state in target_of(service).inventory() if state.volume_id == volume]
    return attachment, export_of(service, attachment, state.tid)


def half_made(service: RunningService, export: Export, step: str) -> None:
    target_of(service).remove(export.volume_id)

    def make() -> None:
        target = target_of(service, partial(die_after, step))
        target.open_portals()
        target.ensure_export(export)

    assert killed_by_itself(make), step


def half_removed(service: RunningService, export: Export, step: str) -> None:
    assert killed_by_itself(lambda: target_of(service, partial(die_after, step)).remove(export.volume_id)), step


def test_half_made_and_half_removed_exports_are_completed_or_removed(service: RunningService) -> None:
    """One of each, and then one reconcile for all; those that were well notice nothing."""
    well, _ = attached(service)
    wanted = {f"made: {step}": attached(service) for step in MAKING}
    wanted |= {f"removed: {step}": attached(service) for step in REMOVING}
    orphans = {f"orphan: {step}": attached(service) for step in REMOVING}
    for attachment, _ in orphans.values():
        service.admin.detach(attachment["id"])
    for name, (_, export) in {**wanted, **orphans}.items():
        what, _, step = name.partition(": ")
        if what == "orphan":
            target_of(service).ensure_export(export)
        (half_made if what == "made" else half_removed)(service, export, step)
    with initiator_of(well).bare() as session:
        told = service.storage("reconcile", "--dry-run").stdout
        for attachment, _ in (*wanted.values(), *orphans.values()):
            assert attachment["volume_id"] in told
        assert well["volume_id"] not in told
        service.storage("reconcile")
        assert session.command(bytes(6), 0) == b""
    for name, (attachment, _) in wanted.items():
        assert initiator_of(attachment).login_error() is None, name
    for name, (attachment, _) in orphans.items():
        assert initiator_of(attachment).login_error() is not None, name
    assert len(target_of(service).inventory()) == 1 + len(wanted)
    assert service.storage("reconcile", "--dry-run").stdout == ""
    for attachment, _ in [*wanted.values(), (well, None)]:
        service.admin.detach(attachment["id"])
    assert not [name for name in os.listdir(FABRIC) if name.startswith("iqn.")]


# ---------------------------------------------------------------- the worker itself

#: Ends the process before its N-th directory or link in LIO's configfs is made or removed; the file DYING names says N.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void step(const char *path) {
    const char *file = getenv("DYING");
    int left = 0;
    FILE *counter;
    if (!file || strncmp(path, "/sys/kernel/config/target/", 26) || !(counter = fopen(file, "r+"))) return;
    if (fscanf(counter, "%d", &left) != 1) left = 0;
    rewind(counter);
    fprintf(counter, "%d\n", --left);
    fclose(counter);
    if (left <= 0) {
        unlink(file);
        kill(getpid(), SIGKILL);
    }
}
int mkdir(const char *path, mode_t mode) { step(path); return REAL(mkdir)(path, mode); }
int rmdir(const char *path) { step(path); return REAL(rmdir)(path); }
int symlink(const char *target, const char *path) { step(path); return REAL(symlink)(target, path); }
int unlink(const char *path) { step(path); return REAL(unlink)(path); }
"""


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dying")
    (directory / "shim.c").write_text(SHIM)
    argv = ["gcc", "-shared", "-fPIC", "-O1", "-o", directory / "shim.so", directory / "shim.c", "-ldl"]
    subprocess.run(argv, check=True)
    return directory


def quick(last: int, chosen: set[int]) -> list[ParameterSet]:
    """The numbers from 1 to `last`; but for the chosen ones they are for make test-slow."""
    marks = {number: () if number in chosen else (pytest.mark.slow,) for number in range(1, last + 1)}
    return [pytest.param(number, marks=mark) for number, mark in marks.items()]


@pytest.mark.parametrize("number", quick(10, {2, 5, 8}))
def test_an_attach_whose_worker_is_killed_is_ended_by_its_successor(
    service: RunningService, dying: Path, number: int
) -> None:
    """As many of the steps that make a directory or a link as tell one layer from the next."""
    volume = service.admin.make_volume(16 * MIB)["id"]
    wish = {"instance_id": "test", "node": "test", "initiator": HOST}
    operation = ended_after_a_death(
        service, dying, number, lambda: service.admin.start_operation(f"/v1/volumes/{volume}/attachments", **wish)
    )
    attachment = service.admin.wait_operation(operation)["resource"]["id"]
    connection = service.admin.show(f"/v1/attachments/{attachment}/connection")
    one = initiator_of({"initiator": HOST, "connection": connection})
    one.write(0, number, 4096)
    service.admin.detach(attachment)
    assert one.login_error() is not None


@pytest.mark.parametrize("number", quick(4, {1, 3}))
def test_a_detach_whose_worker_is_killed_is_ended_by_its_successor(
    service: RunningService, dying: Path, number: int
) -> None:
    attachment, one = service.attached(HOST, 16 * MIB)
    one.write(0, 0x5A, 4096)
    ended_after_a_death(
        service, dying, number, lambda: service.admin.start_operation(f"/v1/attachments/{attachment['id']}", "DELETE")
    )
    assert one.login_error() is not None
    (receipt,) = service.admin.events("attachment.detached", attachment["id"])
    assert receipt["detail"]["target_removed"] is True
    again = service.admin.attach(attachment["volume_id"], HOST)
    initiator_of(again).read(0, 4096, 0x5A)
    service.admin.detach(again["id"])


def ended_after_a_death(service: RunningService, dying: Path, number: int, ask: Callable[[], str]) -> str:
    """Ask, and see the worker die at its step `number`; the operation ends well, at its second attempt."""
    worker = service.worker_pid()
    (dying / "after").write_text(str(number))
    operation = ask()
    wait_until(lambda: service.worker_pid() != worker, 120, "another worker")
    assert not (dying / "after").exists()
    assert service.admin.wait_operation(operation, 120)["state"] == "succeeded"
    assert standing(service, operation) == ("succeeded", 2)
    assert service.storage("reconcile", "--dry-run").stdout == ""
    return operation
