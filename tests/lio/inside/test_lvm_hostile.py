"""A guest writes what it likes into its disk, a volume group of the pool's name too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from app.config import load
from app.diagnosis import Check, examine
from blockdev.command import run
from blockdev.loop import attached
from pools import PoolUnusable
from pools.lvm import LvmPool
from pools.lvm_filter import ADVICE
from tests.pools.behaviour import items
from tests.pools.support import read, write
from tests.support.thinpools import CONFIG, ThinPool, lvm, thin_pool
from tests.support.thinvolumes import EXTENT, emptied

GROUP = "contested"


@pytest.fixture(scope="module")
def guest_disk(xfs: Path) -> Iterator[Path]:
    """The file of a volume in which a guest has made a volume group."""
    file = xfs / "guest.raw"
    with file.open("wb") as disk:
        disk.truncate(16 << 20)
    device = run(["losetup", "--find", "--show", str(file)], timeout=10).stdout.strip()
    lvm("vgcreate", GROUP, device)
    run(["losetup", "--detach", device], timeout=10)
    yield file
    file.unlink()


@pytest.fixture(scope="module")
def group(guest_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThinPool]:
    with thin_pool(tmp_path_factory.mktemp("lvm"), GROUP, 64 << 20) as made:
        yield made


@pytest.fixture
def pool(group: ThinPool) -> Iterator[LvmPool]:
    pool = LvmPool("default", group.path)
    pool.activate()
    yield pool
    emptied(pool)


@contextmanager
def exported(disk: Path) -> Iterator[Path]:
    """As LIO does it. The host's own commands find the name twice, or the test would tell nothing."""
    with attached(disk) as device:
        found = run(["vgs", "--config", CONFIG, "--noheadings", "--options", "vg_name"], timeout=30).stdout
        assert found.split().count(GROUP) == 2
        yield device


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what stands in `devices` of the host's lvm.conf."""
    monkeypatch.setenv("LVM_SYSTEM_DIR", str(tmp_path))

    def configure(devices: str) -> None:
        (tmp_path / "lvm.conf").write_text(f"devices {{ {devices} }}\n")

    return configure


def test_a_guest_with_a_group_of_the_pool_s_name_changes_nothing(pool: LvmPool, guest_disk: Path) -> None:
    before, volume_id, snapshot, clone = guest_disk.read_bytes(), uuid4(), uuid4(), uuid4()
    with exported(guest_disk):
        pool.create(volume_id, EXTENT)  # activated before the guest's disk was there
        again = LvmPool("default", pool.path, pool_id=pool.pool_id)
        again.examine()
        again.activate()
        write(again, volume_id, b"data")
        again.snapshot(volume_id, snapshot)
        again.clone_snapshot(snapshot, clone, 2 * EXTENT)
        again.resize(volume_id, 2 * EXTENT)
        again.revert(volume_id, snapshot)
        assert again.changed_extents(clone, snapshot) == []
        assert read(again, volume_id)[:4] == b"data"
        again.delete_volume(clone)
        assert (again.foreign(), again.sweep()) == ([], [])
        assert items(again) == {("volume", volume_id, 2 * EXTENT), ("snapshot", snapshot, EXTENT)}
    assert guest_disk.read_bytes() == before


@pytest.mark.parametrize("lists", [["filter"], ["global_filter"], ["filter", "global_filter"]], ids="+".join)
def test_what_the_site_has_configured_counts_as_well(
    group: ThinPool, guest_disk: Path, site: Callable[[str], None], lists: list[str]
) -> None:
    pool = LvmPool("default", group.path)
    with exported(guest_disk):
        site("\n".join(f'{name} = [ "a|^{group.device}$|",\n "r|.*|" ]' for name in lists))
        pool.activate()
        pool.create(uuid4(), EXTENT)
    emptied(pool)
    if lists != ["filter", "global_filter"]:
        site(f'{lists[0]} = "r|.*|"')
        with pytest.raises(PoolUnusable, match=f'Volume group "{GROUP}" not found'):
            pool.activate()


def verdict(home: Path, directory: Path, target: str = "lio") -> list[Check]:
    flags = {"pools": {"default": {"path": str(directory)}}, "iscsi": {"target": target}}
    return [check for check in examine(load(home, environ={}, flags=flags)) if check.name == "lvm.conf"]


def test_the_doctor_says_whether_the_host_looks_into_guests_disks(
    lio: Path, xfs: Path, tmp_path: Path, site: Callable[[str], None]
) -> None:
    place = xfs / "doctor"
    place.mkdir()
    assert verdict(tmp_path / "home", place, target="tgt") == []
    site("")
    (check,) = verdict(tmp_path / "home", place)
    assert (check.verdict, check.detail.endswith(ADVICE)) == ("limited", True)
    site(ADVICE.removeprefix("devices {").removesuffix("}"))
    (check,) = verdict(tmp_path / "home", place)
    assert check.verdict == "ok"
