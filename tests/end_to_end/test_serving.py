"""How `stratus-storage serve` starts: beside others, with TLS, and not at all where that would be unsafe."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import stat
import subprocess
from pathlib import Path

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.end_to_end.conftest import ONE_PROCESS, Serve
from tests.support.service import BIN, RunningService, free_port, running

ONE = "iqn.2026-11.org.example:one"


def try_to_serve(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`serve` that is expected to end by itself; `arguments` come last, and so override."""
    argv = [str(BIN / "stratus-storage"), "serve", "--home", str(home)]
    argv += ["--listen", f"127.0.0.1:{free_port()}", "--portal", f"127.0.0.1:{free_port()}", *arguments]
    return subprocess.run(argv, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


# ---------------------------------------------------------------- side by side


def test_two_services_live_side_by_side(serve: Serve) -> None:
    services = [serve("left"), serve("right")]
    held = [service.attached(ONE) for service in services]
    for number, (_, initiator) in enumerate(held, start=1):
        initiator.write(0, number, 4096)
    assert services[0].stop() == 0
    held[1][1].read(0, 4096, 2)
    services[0].start()
    for number, (_, initiator) in enumerate(held, start=1):
        initiator.read(0, 4096, number)
    ids = [{volume["id"] for volume in service.admin.show("/v1/volumes")["items"]} for service in services]
    assert [len(each) for each in ids] == [1, 1]
    assert ids[0] != ids[1]
    assert services[0].admin_token != services[1].admin_token
    stranger = requests.get(services[1].base + "/v1/volumes", headers=dict(services[0].admin.headers), timeout=60)
    assert (stranger.status_code, stranger.json()["code"]) == (401, "token-invalid")


def test_a_home_is_served_once(service: RunningService) -> None:
    _, one = service.attached(ONE)
    one.write(0, 0x17, 4096)
    before = service.tgtd_pid(), service.worker_pid(), service.admin_token
    second = try_to_serve(service.home)
    assert second.returncode == 2
    assert f"{service.home} is being served already" in second.stderr
    assert (service.tgtd_pid(), service.worker_pid(), service.admin_token) == before
    one.read(0, 4096, 0x17)


def test_the_path_of_a_home_may_be_long(tmp_path: Path) -> None:
    """Longer by far than the 107 bytes that the name of a socket may have (unix(7))."""
    home = tmp_path.joinpath(*(["a-directory-with-quite-a-long-name"] * 8), "home")
    assert len(str(home)) > 250
    with running(home, ONE_PROCESS) as service:
        attachment, one = service.attached(ONE)
        one.write(0, 0x18, 4096)
        one.read(0, 4096, 0x18)
        service.admin.detach(attachment["id"])


def test_nobody_else_reads_a_home(service: RunningService) -> None:
    for path in (service.home, service.home / "run", service.home / "keys", service.home / "log"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    secrets = [service.home / "admin.token", *(service.home / "keys").glob("*.key"), service.home / "keys/secrets.json"]
    assert len(secrets) >= 3
    for path in secrets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--listen", "0.0.0.0:8080"), "without TLS: give --tls-cert and --tls-key, or --behind-proxy"),
        (("--listen", "192.0.2.1:8080"), "reachable from outside this host without TLS"),
        (("--listen", "[::]:8080"), "reachable from outside this host without TLS"),
        (("--portal", "0.0.0.0:3260"), "give the address that initiators reach, not all of them"),
        (("--portal", "[::]:3260"), "give the address that initiators reach, not all of them"),
        (("--portal", "localhost:3260"), "give a numeric address"),
        (("--tls-cert", __file__), "--tls-cert and --tls-key go together"),
        (("--listen", "8080"), "is not HOST:PORT"),
    ],
)
def test_what_would_be_unsafe_is_not_served(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = try_to_serve(tmp_path / "home", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "home" / "admin.token").exists()


def test_an_unknown_setting_stops_the_start(tmp_path: Path) -> None:
    done = try_to_serve(tmp_path / "home", STRATUS_WORKER__LEASSE="3")
    assert done.returncode == 2
    assert "worker.leasse" in done.stderr
    assert not (tmp_path / "home").exists()


# ---------------------------------------------------------------- TLS


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signed itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stratus test")])
    now = dt.datetime.now(dt.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - dt.timedelta(hours=1)).not_valid_after(now + dt.timedelta(days=1))
    builder = builder.add_extension(address, False).add_extension(x509.BasicConstraints(True, None), True)
    certificate = builder.sign(key, hashes.SHA256())
    paths = directory / "cert.pem", directory / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths


def test_tls_is_spoken_and_checked_by_the_commands(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    arguments = ("--tls-cert", str(certificate), "--tls-key", str(key))
    with running(tmp_path / "home", ONE_PROCESS, arguments, certificate) as service:
        assert service.base.startswith("https://")
        _, one = service.attached(ONE)
        assert one.login_error() is None
        listed = service.command("stratus-describe-volumes", "--cacert", str(certificate), "--format", "csv")
        assert "in-use" in listed.stdout
        distrusted = service.command("stratus-describe-volumes", check=False)
        assert distrusted.returncode != 0
        assert "certificate" in distrusted.stderr
        assert distrusted.stdout == ""
        with pytest.raises(requests.exceptions.SSLError):
            requests.get(service.base + "/healthz", timeout=60)
