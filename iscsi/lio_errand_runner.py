"""Run as a process of its own, by `iscsi.lio_errands`: makes changes of configfs that may wait in the kernel.

A request is a line of JSON on stdin: [number, [step, ...]], and a step is [act, directory, inode, argument, ...]. When
its errand is over, well or not, the line `number` goes to stdout; before all others -1, which says that it is ready.
Errands run beside each other: one that waits keeps no other. At the end of stdin, which is the death of who asked, all
stop at their next step: nobody would know of it.

    delete              the directory and all below it; the kernel keeps the directories that it has made itself
    rmdir               the directory alone; the kernel refuses one in which somebody has made a directory since
    write NAME VALUE    into the file NAME of the directory
    list                what is in it

What bears a directory's name by the time it is its turn may be another one than was meant, so it must have the inode it
had for who asked: a directory of configfs keeps its own as long as it is there. What is below is reached from that very
directory, and not by its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable


def delete(path: str, here: str) -> None:
    empty(here)
    os.rmdir(path)


def empty(here: str) -> None:
    with os.scandir(here) as found:
        below = [entry for entry in found if entry.is_symlink() or entry.is_dir()]
    for entry in below:
        with contextlib.suppress(OSError):  # it has gone, or it is one of the kernel's own, or cannot go yet
            if entry.is_symlink():
                os.unlink(entry.path)
            else:
                empty(entry.path)
                os.rmdir(entry.path)


def rmdir(path: str, here: str) -> None:
    os.rmdir(path)


def write(path: str, here: str, name: str, value: str) -> None:
    with open(f"{here}/{name}", "w") as file:
        file.write(value)


def list_(path: str, here: str) -> None:
    os.listdir(here)


ACTS: dict[str, Callable[..., None]] = {"delete": delete, "rmdir": rmdir, "write": write, "list": list_}


def take(act: str, path: str, inode: int, *arguments: str) -> None:
    with contextlib.suppress(OSError):
        directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if os.fstat(directory).st_ino == inode:
                ACTS[act](path, f"/proc/self/fd/{directory}", *arguments)
        finally:
            os.close(directory)


def run(number: int, steps: list[list[object]]) -> None:
    for step in steps:
        take(*step)  # type: ignore[arg-type]
    os.write(1, f"{number}\n".encode())


def main() -> None:
    os.write(1, b"-1\n")
    for line in sys.stdin:
        threading.Thread(target=run, args=json.loads(line), daemon=True).start()
    os._exit(0)  # the interpreter's own end would wait for threads that wait in the kernel


if __name__ == "__main__":
    main()
