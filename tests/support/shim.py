"""Brakes on system calls, by a library preloaded into the real processes: a test stops them in the middle of an act.

    write   pwrite(2) of tgtd                      open    open(2) of a volume by tgtd
    sync    fsync(2) of a file that a pool is making
    copy    copy_file_range(2)                     unlink  unlink(2) of a volume or snapshot, when it is done

While DIR/hold-WHAT exists such a call waits, and DIR/held-WHAT says that one does. In tgtd besides: DIR/synced has a
byte per fdatasync, and no thread can be started while DIR/no-threads exists.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static const char *at(char *path, const char *prefix, const char *name) {
    const char *directory = getenv("SHIM_DIR");
    snprintf(path, 4096, "%s/%s%s", directory ? directory : "/nowhere", prefix, name);
    return path;
}
static void brake(const char *what) {
    char path[4096];
    while (!access(at(path, "hold-", what), F_OK)) {
        close(open(at(path, "held-", what), O_CREAT | O_WRONLY, 0600));
        usleep(2000);
    }
}
static int in_tgtd(void) { return !strcmp(program_invocation_short_name, "tgtd"); }
static int is_staged(int fd) {
    char link[64], path[4096] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return readlink(link, path, sizeof path - 1) > 0 && strstr(path, "/staging/") != NULL;
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    if (in_tgtd()) brake("write");
    return REAL(pwrite64)(fd, data, size, offset);
}
ssize_t copy_file_range(int from, off64_t *start, int to, off64_t *target, size_t size, unsigned flags) {
    brake("copy");
    return REAL(copy_file_range)(from, start, to, target, size, flags);
}
int fsync(int fd) {
    if (is_staged(fd)) brake("sync");
    return REAL(fsync)(fd);
}
int unlink(const char *path) {
    int result = REAL(unlink)(path);
    if (!result && (strstr(path, "/volumes/") || strstr(path, "/snapshots/"))) brake("unlink");
    return result;
}
int __open_2(const char *path, int flags) { /* what open(2) is in Debian's builds: _FORTIFY_SOURCE */
    if (in_tgtd() && strstr(path, "/volumes/")) brake("open");
    return REAL(__open_2)(path, flags);
}
int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *with) {
    char path[4096];
    if (in_tgtd() && !access(at(path, "", "no-threads"), F_OK)) return EAGAIN;
    return REAL(pthread_create)(thread, how, run, with);
}
int fdatasync(int fd) {
    char path[4096];
    int result = REAL(fdatasync)(fd);
    if (in_tgtd()) {
        int log = open(at(path, "", "synced"), O_CREAT | O_APPEND | O_WRONLY, 0600);
        if (write(log, "s", 1) != 1) abort();
        close(log);
    }
    return result;
}
"""


def build_shim(directory: Path) -> Path:
    """Compile the library into `directory`."""
    source, library = directory / "shim.c", directory / "shim.so"
    source.write_text(SHIM)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@dataclass
class Brake:
    """Holds every call of one kind while it is on; `directory` is the SHIM_DIR of the processes that heed it."""

    directory: Path
    what: str = "write"

    def on(self) -> None:
        (self.directory / f"held-{self.what}").unlink(missing_ok=True)
        (self.directory / f"hold-{self.what}").touch()

    def off(self) -> None:
        (self.directory / f"hold-{self.what}").unlink(missing_ok=True)

    def holds(self) -> bool:
        """Whether a call waits, or did since `on`."""
        return (self.directory / f"held-{self.what}").exists()

    def syncs(self) -> int:
        synced = self.directory / "synced"
        return synced.stat().st_size if synced.exists() else 0
