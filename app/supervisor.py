"""`stratus-storage serve`: one foreground process tree that is the whole service.

    serve ──┬── worker ── tgtd (in a session of its own: it outlives both, and is adopted)
            └── gunicorn ── its workers

The supervisor is small so that it does not fail: it starts the two, starts again what died, kills a worker that has
gone silent, and at SIGTERM ends everything in order.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from ipaddress import ip_address

from sqlalchemy import delete

from app import accounts
from app.config import ConfigError, Settings, split_portal, write_effective
from app.keys import KeyRing, write_private
from app.models import WorkerBeat
from app.service import Service, migrate
from app.worker import host_name
from app.worker_process import end_former_target, end_target
from blockdev.locks import FileLock

PR_SET_CHILD_SUBREAPER = 36
#: How long an orderly stop may take before it is no longer waited for, seconds.
GRACE = 30.0
#: How long a killed process is waited for: only the kernel can keep it longer, and may do so for ever.
LAST_GRACE = 10.0
#: How long a worker may take to its first beat, seconds: it looks at every pool before, on a host that may be busy.
FIRST_BEAT = 60.0


def check_listen(settings: Settings) -> None:
    """Secrets do not cross a network in the clear: ConfigError unless TLS, a proxy on this host, or loopback."""
    server = settings.server
    host, _ = split_portal(server.listen)
    if (server.tls_cert is None) != (server.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key go together")
    if server.tls_cert is None and not server.behind_proxy and not _is_loopback(host):
        raise ConfigError(
            f"--listen {server.listen} is reachable from outside this host without TLS: give --tls-cert and --tls-key, "
            "or --behind-proxy if a proxy terminates TLS in front of it, or listen on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def prepare(settings: Settings) -> None:
    """A home that can be served: directories, keys, a migrated database, the first admin's token."""
    settings.make_directories()
    ring = settings.key_dir / "secrets.json"
    if not ring.exists():
        KeyRing.create(ring)
    migrate(settings)
    service = Service(settings, connections=1)
    with service.database.write() as session:
        token = accounts.bootstrap(session)
        if token is not None:
            write_private(settings.home / "admin.token", token + "\n")
        # The last beat of an earlier worker may be fresh still: it must not answer for the one that starts now.
        session.execute(delete(WorkerBeat).where(WorkerBeat.host == host_name()))
    service.database.close()


@dataclass
class Child:
    """A process that is started again whenever it ends, ever more slowly if it ends at once."""

    name: str
    argv: list[str]
    environment: dict[str, str]
    dies_by: str
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = 0.0
    not_before: float = field(default=0.0)

    def keep(self) -> None:
        if self.process is not None and self.process.poll() is None:
            if time.monotonic() - self.started > 10:
                self.pause = 0.0
            return
        if self.process is not None:
            say(f"{self.name} ended with {self.process.returncode}; starting it again")
            self.process = None
            self.not_before = time.monotonic() + self.pause
            self.pause = min(max(0.1, self.pause * 2), 5.0)
        if time.monotonic() >= self.not_before:
            self.start()

    def start(self) -> None:
        # It dies with us: a new supervisor must find nothing that still answers for the old one (but the target).
        argv = ["setpriv", "--pdeathsig", self.dies_by, "--", *self.argv]
        self.process = subprocess.Popen(argv, env=self.environment, stdin=subprocess.DEVNULL)
        self.started = time.monotonic()

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def wait(self, deadline: float) -> None:
        process = self.process
        if process is None or _ends(process, max(0.0, deadline - time.monotonic())):
            return
        say(f"{self.name} does not end; killing it")
        process.kill()
        if not _ends(process, LAST_GRACE):
            say(f"{self.name} cannot be killed: the kernel holds it, most likely for a device that does not answer")


def _ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def say(text: str) -> None:
    print(f"stratus-storage: {text}", file=sys.stderr, flush=True)


class Supervisor:
    def __init__(self, settings: Settings, *, keep_target: bool) -> None:
        self._settings = settings
        self._stopping = False
        self._told = False
        environment = {**os.environ, "STRATUS_EFFECTIVE": str(write_effective(settings))}
        self._keep_target = keep_target
        # SIGKILL, since a worker needs no farewell; gunicorn has children of its own to end.
        self.worker = Child("worker", [sys.executable, "-m", "app.cli", "worker"], environment, dies_by="KILL")
        self.api = Child("api", _gunicorn(settings), environment, dies_by="TERM")

    def run(self) -> int:
        """Until SIGTERM or SIGINT; 0 after an orderly end."""
        _adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        while not self._stopping:
            self.worker.keep()
            self.api.keep()
            if not self._told and self._hopeless():
                self._end()
                return 1
            self._kill_if_silent()
            self._tell_when_ready()
            _reap([child.process.pid for child in (self.worker, self.api) if child.process])
            time.sleep(0.1)
        return self._end()

    def _hopeless(self) -> bool:
        """What never was ready and ends at once, again and again, will not get better by itself."""
        failed = [child for child in (self.worker, self.api) if child.pause >= 1.0]
        for child in failed:
            say(f"the {child.name} does not stay up; {self._settings.log_dir} says why")
        return bool(failed)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _tell_when_ready(self) -> None:
        if not self._told and is_ready(self._settings):
            self._told = True
            server, portal = self._settings.server, self._settings.iscsi.portal
            scheme = "https" if server.tls_cert else "http"
            say(f"ready: API at {scheme}://{server.listen}, volumes at {portal}, state in {self._settings.home}")

    def _kill_if_silent(self) -> None:
        """A worker that is stopped, or hangs, holds the locks of its volumes: its successor needs it dead."""
        process, started = self.worker.process, self.worker.started
        if process is None or process.poll() is not None:
            return
        beat = self._last_beat()
        lease = self._settings.worker.lease
        age = time.monotonic() - max(beat, started)
        if age > (lease if beat > started else max(FIRST_BEAT, lease)):
            say(f"the worker has been silent for {age:.0f} s; killing it")
            process.kill()

    def _last_beat(self) -> float:
        """On the monotonic clock, of this worker or an earlier one; 0 when there was none."""
        try:
            return float((self._settings.run_dir / "worker.beat").read_text())
        except (FileNotFoundError, ValueError):
            return 0.0

    def _end(self) -> int:
        """API first, so that nothing new comes; then the worker; then the target, unless it is kept."""
        say("stopping")
        deadline = time.monotonic() + GRACE
        for child in (self.api, self.worker):
            child.end()
            if child is self.worker:
                child.end(signal.SIGCONT)
            child.wait(deadline)
        trouble = None if self._keep_target else end_target(self._settings)
        if trouble:
            say(f"stopped, but the target is not: {trouble}")
            return 1
        say("stopped, the target goes on serving" if self._keep_target else "stopped")
        return 0


def serve(settings: Settings, *, keep_target: bool) -> int:
    """Prepare the home, then supervise; the exit code. ConfigError when it cannot be, or somebody else serves it."""
    check_listen(settings)
    settings.make_directories()
    lock = FileLock(settings.run_dir / "serve.lock")
    if not lock.try_lock():
        raise ConfigError(f"{settings.home} is being served already: stop that service, or choose another --home")
    try:
        prepare(settings)
        end_former_target(settings)
        return Supervisor(settings, keep_target=keep_target).run()
    finally:
        lock.release()


def is_ready(settings: Settings) -> bool:
    """Whether the API answers and says that it is ready."""
    import http.client
    import ssl

    host, port = split_portal(settings.server.listen)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    # Only to say it on the terminal: the certificate is for the clients to check.
    context = ssl._create_unverified_context() if settings.server.tls_cert else None
    connection = http.client.HTTPConnection(host, port, timeout=2)
    if context is not None:
        connection = http.client.HTTPSConnection(host, port, timeout=2, context=context)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _gunicorn(settings: Settings) -> list[str]:
    server = settings.server
    argv = [sys.executable, "-m", "gunicorn", "wsgi:application", "--bind", server.listen]
    argv += ["--workers", str(server.processes), "--threads", str(server.threads), "--worker-class", "gthread"]
    argv += ["--timeout", "60", "--graceful-timeout", "5", "--no-control-socket", "--worker-tmp-dir", "/dev/shm"]
    argv += [
        "--error-logfile",
        str(settings.log_dir / "api.log"),
        "--access-logfile",
        str(settings.log_dir / "access.log"),
    ]
    if server.tls_cert and server.tls_key:
        argv += ["--certfile", str(server.tls_cert), "--keyfile", str(server.tls_key)]
    return argv


def _adopt_orphans() -> None:
    """What our children leave behind becomes ours to reap (prctl(2)): the target, when a worker died."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap(known: list[int]) -> None:
    """Collect orphans that ended; our own children are collected by who started them."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return
    if found is not None and found.si_pid not in known:
        os.waitpid(found.si_pid, os.WNOHANG)
