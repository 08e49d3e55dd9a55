"""Our logical volumes in a thin pool: how they are named, found and made, and what an interrupted act left of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from uuid import UUID, uuid4

from blockdev.command import CommandFailed
from pools.interface import Kind
from pools.lvm_commands import LogicalVolume, Lvm

TAG = "stratus"
POOL_TAG = f"{TAG}-pool-"
LETTERS: dict[Kind, str] = {"volume": "v", "snapshot": "s"}
STAGED, REPLACEMENT = "t", "r"
UUID_PATTERN = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_OURS = re.compile(rf"{TAG}-([vstr])-({UUID_PATTERN})")

Found = dict[str, LogicalVolume]
"""Logical volumes of ours by their names."""


def name_of(letter: str, id: UUID) -> str:
    return f"{TAG}-{letter}-{id}"


def parsed(name: str) -> tuple[str, UUID]:
    """The letter and the id in a name of ours."""
    match = _OURS.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no name of ours")
    return match[1], UUID(match[2])


def is_leftover(name: str, found: Found) -> bool:
    """Whether an interrupted act has left it and nobody needs it. A replacement is needed once its volume is gone."""
    letter, id = parsed(name)
    return letter == STAGED or (letter == REPLACEMENT and name_of("v", id) in found)


def is_heir(name: str, found: Found) -> bool:
    """Whether it is the volume itself, left without its name by a revert that was interrupted after its last word."""
    return parsed(name)[0] == REPLACEMENT and not is_leftover(name, found)


def is_unsettled(name: str, found: Found) -> bool:
    """Whether an act on it has begun and did not end."""
    return found[name].suspended or is_leftover(name, found) or is_heir(name, found)


@dataclass(frozen=True)
class Volumes:
    """What is ours in `thin_pool`: it lies there, has our kind of name, and has both TAG and `tag`, the pool's own.

    Methods with `id` are for who holds its lock, and `lvm` should hold it too. All raise CommandError.
    """

    lvm: Lvm
    thin_pool: str
    tag: str

    def holding(self, fds: tuple[int, ...]) -> Volumes:
        """The same, but each command holds the locks `fds` until it ends."""
        return replace(self, lvm=self.lvm.holding(fds))

    def path(self, name: str) -> str:
        return f"{self.lvm.group}/{name}"

    # To find

    def has(self, each: LogicalVolume) -> bool:
        """Whether it is one of these, as it was listed."""
        return bool(_OURS.fullmatch(each.name)) and each.pool == self.thin_pool and {TAG, self.tag} <= each.tags

    def all(self) -> Found:
        return self._listed(self._ours)

    def look(self, *ids: UUID) -> Found:
        """What there is for `ids`, in whatever state."""
        return self._listed(self._selection("[vstr]", *ids))

    def settled(self, *ids: UUID) -> Found:
        """What there is for `ids`, once what was begun for them is finished or undone."""
        found = self.look(*ids)
        return self.look(*ids) if self.settle(found) else found

    def settle(self, found: Found) -> bool:
        """Finish or undo what was begun; whether there was anything.

        A command of lvm(8) that was killed may leave the devices it worked on suspended. They are resumed with what
        LVM's metadata says now, and before anything else: a snapshot of one spoils the thin pool's transaction id.
        """
        asleep = [each.name for each in found.values() if each.suspended]
        if asleep:
            self.resume(*asleep)
        leftovers = [name for name in found if is_leftover(name, found)]
        heirs = [name for name in found if is_heir(name, found)]
        for letter, id in map(parsed, leftovers):
            self.remove(letter, id)
        for letter, id in map(parsed, heirs):
            self.rename(letter, "v", id)
        return bool(asleep or leftovers or heirs)

    def _listed(self, selection: str) -> Found:
        return {each.name: each for each in self.lvm.volumes(selection) if _OURS.fullmatch(each.name)}

    @property
    def _ours(self) -> str:
        return f'pool_lv="{self.thin_pool}" && tags={TAG} && tags={self.tag}'

    def _selection(self, letters: str, *ids: UUID) -> str:
        return f'{self._ours} && lv_name=~"^{TAG}-{letters}-({"|".join(map(str, ids))})$"'

    # To make

    def create(self, id: UUID, size: int) -> None:
        arguments = ("--virtualsize", f"{size}b", "--thinpool", self.thin_pool, "--wipesignatures", "n")
        self._make("v", id, *arguments, self.lvm.group)

    def deliver(self) -> None:
        """Have LVM tell the thin pool what it has noted: it does so before it makes anything else."""
        id = uuid4()
        self._make(
            STAGED, id, "--virtualsize", "512b", "--thinpool", self.thin_pool, "--wipesignatures", "n", self.lvm.group
        )
        self.remove(STAGED, id)

    def freeze(self, volume: LogicalVolume, id: UUID) -> None:
        """A snapshot of the volume: read-only, and no boot activates it."""
        arguments = ("--snapshot", self.path(volume.name), "--permission", "r", "--activate", "n")
        self._make("s", id, *arguments, skip="y")

    def copy(self, origin: LogicalVolume, id: UUID, size: int, letter: str) -> None:
        """A thin snapshot of `origin` to write to, which gets its name once it has its size."""
        if size == origin.size:
            self._snapshot(origin, letter, id)
            return
        try:
            self._snapshot(origin, STAGED, id)
            self.extend(name_of(STAGED, id), size)
        except CommandFailed:
            self.remove(STAGED, id)
            raise
        self.rename(STAGED, letter, id)

    def _snapshot(self, origin: LogicalVolume, letter: str, id: UUID) -> None:
        self._make(letter, id, "--snapshot", self.path(origin.name), "--permission", "rw", "--activate", "y")

    def _make(self, letter: str, id: UUID, *arguments: str, skip: str = "n") -> None:
        """`skip`: whether a boot leaves it alone. If it is not told, lvcreate(8) has snapshots left alone for ever."""
        tags = ("--addtag", TAG, "--addtag", self.tag)
        self.lvm.change("lvcreate", "--name", name_of(letter, id), *tags, "--setactivationskip", skip, *arguments)

    # To change

    def activate(self, *names: str) -> None:
        self.lvm.change("lvchange", "--activate", "y", *map(self.path, names))

    def resume(self, *names: str) -> None:
        self.lvm.change("lvchange", "--refresh", *map(self.path, names))

    def extend(self, name: str, size: int) -> None:
        self.lvm.change("lvextend", "--size", f"{size}b", self.path(name))

    def rename(self, old: str, new: str, id: UUID) -> None:
        self.lvm.change("lvrename", self.lvm.group, name_of(old, id), name_of(new, id))

    def remove(self, letters: str, id: UUID) -> None:
        """What there is of it, if anything: looked up and removed under one lock of the group."""
        self.lvm.change("lvremove", "--select", self._selection(f"[{letters}]", id), self.lvm.group)
