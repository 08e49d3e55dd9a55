"""How many more threads this host allows: tgtd starts some for every LUN, and a LUN that lacks them is half-made."""

from __future__ import annotations

from pathlib import Path

from iscsi.target import TargetLimit

THREADS_PER_LUN = 4  # tgtd -t; its default is 16
RESERVE = 64  # left for everybody else: a shell to repair things, the service's own workers


def check_threads(
    needed: int, pid: int | None, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")
) -> None:
    """Raises TargetLimit unless `needed` more threads fit under every limit that process `pid` (None: we) has."""
    for resource, free in _free(pid, proc, cgroup).items():
        if needed + RESERVE > free:
            raise TargetLimit(resource, needed, max(free - RESERVE, 0))


def free_threads(pid: int | None = None, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """How many more threads `check_threads` would let process `pid` (None: us) have."""
    return max(min(_free(pid, proc, cgroup).values()) - RESERVE, 0)


def _free(pid: int | None, proc: Path, cgroup: Path) -> dict[str, int]:
    in_use = int((proc / "loadavg").read_text().split()[3].split("/")[1])
    free = {
        f"threads ({name})": int((proc / "sys/kernel" / name).read_text()) - in_use
        for name in ("pid_max", "threads-max")
    }
    for directory in _pids_groups(proc / str(pid or "self") / "cgroup", cgroup):
        limit, current = _read(directory / "pids.max"), _read(directory / "pids.current")
        if limit and current and limit != "max":
            free[f"threads (pids.max of {directory})"] = int(limit) - int(current)
    return free


def _pids_groups(membership: Path, cgroup: Path) -> list[Path]:
    """The control groups, innermost first, whose pids.max binds the process: version 2, or version 1's `pids`."""
    lines = (line.split(":", 2) for line in membership.read_text().splitlines())
    for _, controllers, path in lines:
        if controllers in ("", "pids"):
            root = cgroup / controllers
            group = root / path.lstrip("/")
            inside = [group, *group.parents]
            groups = inside[: inside.index(root) + 1]
            if any((directory / "pids.max").exists() for directory in groups):
                return groups
    return []


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # the root group has no pids.max, and a group can vanish
        return ""
