"""nginx in front of a service, as contrib/nginx.conf has it."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.service import RunningService, free_port, wait_until

GIVEN = Path(__file__).parents[2] / "contrib" / "nginx.conf"
MAIN = """
user root;
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        include {folder}/service.conf;
    }}
}}
"""


@contextmanager
def nginx(service: RunningService, folder: Path) -> Iterator[str]:
    """Its base URL, while it serves."""
    port = free_port()
    given = GIVEN.read_text().replace("127.0.0.1:8080", f"127.0.0.1:{service.port}")
    (folder / "service.conf").write_text(given.replace("/srv/images/", f"{service.home}/images/"))
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder, port=port))
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert program is not None
    process = subprocess.Popen([program, "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf"])
    try:
        wait_until(lambda: _answers(process, port), what="nginx")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    assert process.poll() is None, "nginx has ended"
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
