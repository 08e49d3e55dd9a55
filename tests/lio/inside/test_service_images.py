"""Volumes from images, images from volumes, and images on nodes, on production's parts: both targets, both kinds of
pools, and the kernel's own NFS between the cache and a node."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from app.db import Database
from app.models import GoldenCopy
from tests.lio.inside.conftest import CONFIGFS
from tests.lio.inside.sites import KINDS, MIB, TWO, Site, kernel, open_site, tgtd
from tests.support.imagehouse import content, sha256
from tests.support.nfs import exported_read_only
from tests.support.origin import Origin
from tests.support.service import initiator_of, wait_until
from tests.support.thinpools import lvm

SLOW = {"Prefer": "wait=60"}


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with Origin() as origin:
        yield origin


#: What an image is to a pool and what a volume is to a target do not meet: the two other pairs are for long profiles.
BRIEFLY = ("lio-lvm", "tgt-directory")
EACH = [pytest.param(kind, marks=[] if kind in BRIEFLY else [pytest.mark.slow]) for kind in KINDS]


@pytest.fixture(scope="module", params=EACH)
def site(
    request: pytest.FixtureRequest, xfs: Path, iscsid: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    workdir = tmp_path_factory.mktemp("images")
    cache = xfs / f"{workdir.name}-cache"
    cache.mkdir(mode=0o755)
    settings = {
        "STRATUS_IMAGES__PATH": str(cache),
        "STRATUS_IMAGES__ALLOW_NETWORKS": '["127.0.0.0/8"]',
        "STRATUS_IMAGES__RESERVE": "64MiB",
        "STRATUS_WORKER__POOL_INTERVAL": "0.5",  # the cache is looked at as often
    }
    with open_site(request.param, xfs, workdir, **settings) as site:
        yield site


def publish(origin: Origin, data: bytes) -> dict[str, str]:
    path = f"/{sha256(data)[:16]}.raw"
    origin.put(path, data)
    return {"reference": origin.url(path), "checksum": sha256(data)}


def image(site: Site, **body: Any) -> dict[str, Any]:
    answer = site.service.admin.post("/v1/images", json=body, headers=SLOW)
    assert answer.status_code == 201, answer.text
    return answer.json()  # type: ignore[no-any-return]


def volume_of(site: Site, **body: Any) -> str:
    """Without a size: it gets its image's."""
    answer = site.service.admin.post("/v1/volumes", json=body, headers=SLOW)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def bytes_of(site: Site, volume: str) -> bytes:
    """As a node reads them."""
    attachment = site.attach(volume)
    with kernel(attachment) as initiator:
        data = initiator.device.read_bytes()
    site.detach(attachment)
    return data


def used(site: Site) -> int:
    """Bytes taken in the pool."""
    if site.group:
        wanted = ("--noheadings", "--nosuffix", "--units", "b", "-o", "lv_size,data_percent", str(site.path))
        size, percent = lvm("lvs", *wanted).split()
        return int(int(size) * float(percent) / 100)
    os.sync()
    found = subprocess.run(["df", "--block-size=1", "--output=used", site.path], check=True, capture_output=True)
    return int(found.stdout.split()[-1])


def golden_copies(site: Site, digest: str) -> list[GoldenCopy]:
    with closing(Database(f"sqlite:///{site.service.home}/stratus.db")) as database, database.read() as session:
        return list(session.scalars(select(GoldenCopy).where(GoldenCopy.digest == digest)))


def exported(site: Site) -> int:
    """How many volumes are: by the target itself."""
    if site.target == "tgt":
        return len(tgtd(site).target.inventory())
    backstores = list(CONFIGFS.glob("target/core/iblock_*/iqn.*"))
    assert len(backstores) == len(list(CONFIGFS.glob("target/iscsi/iqn.*")))
    return len(backstores)


def no_drift(site: Site) -> None:
    told = site.service.storage("reconcile", "--dry-run")
    assert told.stderr.startswith("0 differences (") or told.stderr == "0 differences\n", told.output
    assert told.stdout.strip() == "", told.output


def test_the_second_volume_of_an_image_is_a_clone(site: Site, origin: Origin) -> None:
    data = content(1, 16 * MIB)
    asked = publish(origin, data)
    wanted = {"image": asked["reference"], "checksum": asked["checksum"]}
    first = volume_of(site, **wanted)
    assert bytes_of(site, first) == data
    before = used(site)
    second = volume_of(site, **wanted)
    assert used(site) - before < 4 * MIB
    digest = site.service.admin.show("/v1/images")["items"][0]["digest"]
    (copy,) = golden_copies(site, digest)
    assert [event["resource"]["id"] for event in site.service.admin.events("golden.created")] == [str(copy.id)]
    attachment = site.attach(second)
    initiator_of(attachment).write(0, 0x5A, MIB)
    assert exported(site) == 1
    no_drift(site)
    site.detach(attachment)
    assert bytes_of(site, second) == b"\x5a" * MIB + data[MIB:]
    assert bytes_of(site, volume_of(site, **wanted)) == data


def writer() -> int | None:
    """The qemu-img that writes a golden copy; it has written some of it."""
    for directory in Path("/proc").iterdir():
        try:
            if directory.name.isdigit() and (directory / "comm").read_text() == "qemu-img\n":
                done = dict(line.split(": ") for line in (directory / "io").read_text().splitlines())
                if int(done["wchar"]) > MIB:
                    return int(directory.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return None


def test_a_golden_copy_whose_maker_is_killed_is_made_by_the_next(site: Site, origin: Origin) -> None:
    data = content(2, 64 * MIB)
    made = image(site, **publish(origin, data))
    killed = site.service.worker_pid()
    operation = site.service.admin.start_operation("/v1/volumes", image=made["id"])
    writing = wait_until(writer, 60, "some bytes of the golden copy")
    site.service.kill(killed)
    (copy,) = golden_copies(site, made["digest"])
    assert copy.state == "creating"
    wait_until(lambda: not Path(f"/proc/{writing}").exists(), 60, "the end of what the dead worker began")
    ended = site.service.admin.wait_operation(operation)
    assert (ended["state"], site.service.worker_pid() != killed) == ("succeeded", True), ended
    (copy,) = golden_copies(site, made["digest"])
    assert copy.state == "available"
    no_drift(site)
    assert bytes_of(site, ended["resource"]["id"]) == data


@pytest.mark.parametrize("source", ["snapshot", "volume"])
def test_what_a_machine_wrote_becomes_an_image(site: Site, source: str) -> None:
    volume = site.volume(16 * MIB)
    attachment = site.attach(volume)
    written = content(3, 8 * MIB)
    with kernel(attachment) as initiator:
        initiator.device.write_bytes(written)
    origin = volume
    if source == "snapshot":
        taken = site.service.admin.post(f"/v1/volumes/{volume}/snapshots", json={"name": "a"}, headers=SLOW)
        assert taken.status_code == 201, taken.text
        origin = taken.json()["id"]
        initiator_of(attachment).write(0, 0x11, MIB)  # after the snapshot; the volume stays attached
    else:
        site.detach(attachment)
    made = image(site, **{source: origin})
    assert (made["state"], made["size"]) == ("available", 16 * MIB)
    again = volume_of(site, image=made["id"])
    if source == "snapshot":
        site.detach(attachment)
    assert bytes_of(site, again) == written + bytes(8 * MIB)
    no_drift(site)


def at_node(mount: tuple[str, ...], place: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script where `place` is what the node has mounted there: in a mount namespace of its own."""
    whole = f"set -e\nmount {shlex.join(mount)} {place}\n{script}"
    return subprocess.run(["unshare", "--mount", "sh", "-c", whole], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("site", ["lio-lvm"], indirect=True)
def test_a_node_starts_from_the_cache_by_nfs(site: Site, origin: Origin, tmp_path: Path) -> None:
    data, cache = content(4, 16 * MIB), Path(site.service.environment["STRATUS_IMAGES__PATH"])
    kept, other = (image(site, **publish(origin, each)) for each in (data, content(5, 16 * MIB)))
    with closing(site.service.node("hypervisor", TWO)) as node, exported_read_only(cache) as mount:
        answer = node.put(f"/v1/images/{kept['id']}/pins/machine-1")
        assert answer.status_code == 200, answer.text
        pin, overlay, disk = answer.json(), tmp_path / "overlay.qcow2", tmp_path / "disk.raw"
        let_go_what_can(site)
        wait_until(lambda: node.get(f"/v1/images/{other['id']}").status_code == 404, 60, "the other's eviction")
        refused = site.service.admin.delete(f"/v1/images/{kept['id']}")
        assert (refused.status_code, refused.json()["code"]) == (409, "image-pinned")
        started = at_node(mount, cache, f"""
            qemu-img create -q -f qcow2 -b {pin["path"]} -F {pin["format"]} {overlay}
            qemu-io -f qcow2 -c 'write -P 0x5a 0 1M' {overlay}
            qemu-img convert -f qcow2 -O raw {overlay} {disk}
            stat --file-system --format=%T {pin["path"]}
            ! touch {pin["path"]} 2>&1
            ! ls {cache}/staging 2>&1
            """)  # fmt: skip
        assert started.returncode == 0, started.stderr
        for told in ("nfs", "Read-only file system", "Permission denied"):
            assert told in started.stdout
        assert disk.read_bytes() == b"\x5a" * MIB + data[MIB:]
        assert sha256(Path(pin["path"]).read_bytes()) == pin["digest"]
        assert node.delete(f"/v1/images/{kept['id']}/pins/machine-1").status_code == 204
        wait_until(lambda: node.get(f"/v1/images/{kept['id']}").status_code == 404, 60, "its eviction")


def let_go_what_can(site: Site) -> None:
    """From now on, every image that nothing needs goes."""
    site.service.environment |= {"STRATUS_IMAGES__HIGH_MARK": "1", "STRATUS_IMAGES__LOW_MARK": "0"}
    site.service.restart()
