"""The accounts of a target, kept in tgtd's slots without ever leaving a hole to be looked at.

A target's accounts lie in an array with a count. Unbinding one that is not the last leaves a hole, and as long as it
is there `show` of all targets crashes tgtd, and a login does not find the last account. Therefore:

- Slot 0 is a guard, an account nobody knows the secret of: a target never has no account at all, which would let
  initiators in without CHAP. The client of most volumes has the last slot, which is unbound without any of this.
  The guard's name is secret too: it marks the target's lines in a listing as true (see `iscsi.tgt_show`).
- An account in the middle is swapped for another one (a filler like the guard, or a new client's), while one more
  filler stands behind the last.
- A swap excludes every `show`: both lock the journal, a file beside the socket, shared or alone. It holds the target's
  number during a swap; who finds one there after a crash binds a filler, which falls into the hole, if there is one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Callable, Collection, Iterator

from iscsi.target import Credentials
from iscsi.tgt_ipc import TgtIpc

_FILLER = "stratus.slot-"
_MENDING = f"{_FILLER}mend"


def is_filler(username: str) -> bool:
    """Whether an account only fills a slot."""
    return username.startswith(_FILLER)


class AccountSlots:
    """Binds and dismisses accounts. A list `accounts` is a target's slots in order; it is kept in step."""

    def __init__(self, ipc: TgtIpc, trace: Callable[[str], None]) -> None:
        self._ipc, self._trace = ipc, trace

    def show_targets(self) -> str:
        """tgtd's listing of all targets, at a moment without holes."""
        while True:
            with self._journal(fcntl.LOCK_SH) as journal:
                if not os.fstat(journal).st_size:
                    return self._ipc.show_targets()
            self._mend()

    def guard_name(self, tid: int) -> str:
        """The target's guard. Its secret part lies beside the socket, and is as old as the directory."""
        path = self._ipc.directory / f"{self._ipc.name}.marker"
        if not path.exists():
            fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
            fresh.touch(0o600)
            fresh.write_text(secrets.token_hex(16))
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)
            fresh.unlink()
        return f"{_FILLER}guard-{tid}-{path.read_text()}"

    def guard(self, tid: int, accounts: list[str]) -> None:
        """Make sure the target has its guard."""
        guard = self.guard_name(tid)
        if guard not in accounts:
            self._create_filler(guard)
            self._ipc.bind_account(tid, guard)
            accounts.append(guard)
            self._trace("guard")

    def admit(self, tid: int, accounts: list[str], credentials: Credentials) -> None:
        """Bind a client's account."""
        self._ipc.create_account(credentials.username, credentials.password)
        self._trace("account")
        vacant = [name for name in accounts if is_filler(name) and name != self.guard_name(tid)]
        if vacant:
            self._swap(tid, accounts, vacant[0], credentials.username)
        else:
            self._ipc.bind_account(tid, credentials.username)
            accounts.append(credentials.username)
        self._trace("account bound")

    def dismiss(self, tid: int, accounts: list[str], username: str) -> None:
        """Unbind a client's account and forget it."""
        if username == accounts[-1]:
            self._ipc.unbind_account(tid, username)
            accounts.pop()
        else:
            self._swap(tid, accounts, username, self._fresh_filler(accounts))
        self._ipc.delete_account(username)
        self._trace("account dismissed")

    def _swap(self, tid: int, accounts: list[str], old: str, new: str) -> None:
        tail = self._fresh_filler([*accounts, new])
        with self._journal(fcntl.LOCK_EX) as journal:
            os.pwrite(journal, str(tid).encode(), 0)
            self._ipc.bind_account(tid, tail)
            self._ipc.unbind_account(tid, old)
            self._trace("hole")
            self._ipc.bind_account(tid, new)
            self._ipc.unbind_account(tid, tail)
            os.ftruncate(journal, 0)
        accounts[accounts.index(old)] = new

    def _mend(self) -> None:
        with self._journal(fcntl.LOCK_EX) as journal:
            if tid := os.pread(journal, 32, 0):
                self._create_filler(_MENDING)
                self._ipc.bind_account(int(tid), _MENDING)
                os.ftruncate(journal, 0)

    def _fresh_filler(self, taken: Collection[str]) -> str:
        """A filler that is in none of the slots `taken`."""
        name = next(name for number in range(1, len(taken) + 2) if (name := f"{_FILLER}{number}") not in taken)
        self._create_filler(name)
        return name

    def _create_filler(self, name: str) -> None:
        self._ipc.create_account(name, secrets.token_urlsafe(32))  # forgotten here and now

    @contextlib.contextmanager
    def _journal(self, how: int) -> Iterator[int]:
        path = self._ipc.directory / f"{self._ipc.name}.slots"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, how)
            yield descriptor
        finally:
            os.close(descriptor)
