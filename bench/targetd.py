"""targetd to compare with: a checkout of open-iscsi/targetd that STRATUS_TARGETD names, run as its own script runs it.

It wants Debian's python3-gi, python3-blockdev, python3-setproctitle, python3-yaml, python3-rtslib-fb,
gir1.2-blockdev-2.0 and libblockdev-lvm2, so it runs by Debian's Python. Its port, and where its configuration lies,
cannot be chosen: it is for the test kernel only.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIABLE = "STRATUS_TARGETD"
PYTHON = "/usr/bin/python3"
PORT = 18700
CONFIG = Path("/etc/target/targetd.yaml")
USER, PASSWORD = "admin", "0123456789abcdef"
_HEADERS = {
    "Authorization": "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode(),
    "Content-Type": "application/json",
}


def checkout() -> Path:
    """Raises RuntimeError when the environment names none."""
    found = Path(os.environ.get(VARIABLE, ""), "scripts/targetd")
    if VARIABLE not in os.environ or not found.exists():
        raise RuntimeError(f"{VARIABLE} must name a checkout of https://github.com/open-iscsi/targetd")
    return found.parents[1]


@contextmanager
def running(pool: str, log: Path) -> Iterator[None]:
    """A targetd for the thin pool GROUP/POOL, until the block ends."""
    lines = [f"block_pools: [{pool}]", f"user: {USER}", f'password: "{PASSWORD}"', 'portal_addresses: ["127.0.0.1"]']
    CONFIG.write_text("\n".join([*lines, "target_name: iqn.2004-10.com.example:targetd", ""]), encoding="utf-8")
    where = checkout()
    environment = {**os.environ, "PYTHONPATH": str(where)}
    with log.open("wb") as out:
        process = subprocess.Popen([PYTHON, where / "scripts/targetd"], env=environment, stdout=out, stderr=out)
    try:
        _wait_ready(process, log)
        yield
    finally:
        process.kill()
        process.wait()


def _wait_ready(process: subprocess.Popen[bytes], log: Path, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            call("pool_list")
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"targetd does not start: {log.read_text()}") from error
            time.sleep(0.1)


def call(method: str, **params: Any) -> Any:
    """The result of a JSON-RPC call. It answers by HTTP/1.0: each call is a connection."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=120)
    try:
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        connection.request("POST", "/targetrpc", json.dumps(request), _HEADERS)
        answer = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    if "error" in answer:
        raise RuntimeError(f"targetd: {method}: {answer['error']['message']}")
    return answer["result"]
