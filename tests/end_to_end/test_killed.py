"""What a writer notices when something of the service is killed: nothing but a pause."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.end_to_end.conftest import ONE_PROCESS, Serve
from tests.support.initiator import Writer, lost
from tests.support.service import RunningService, running, wait_until

ONE = "iqn.2026-11.org.example:one"
TWO_SESSIONS = {"STRATUS_ATTACHMENTS__MAX_SESSIONS": "2"}
IDENTITY = (0x80, 0x83)  # VPD pages: unit serial number, device identification


def kill_all_but_the_target(service: RunningService) -> None:
    """The worker is stopped first: it must not see its supervisor go and end in order."""
    assert service.process is not None
    worker, serving = service.worker_pid(), service.serving()
    service.kill(worker, signal.SIGSTOP)
    service.process.kill()
    service.process.wait()
    service.kill(worker)
    wait_until(lambda: service.pids() == serving, 60, "the end of all but the target")


@pytest.fixture(scope="module")
def survivor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service for what it must survive as a whole; an initiator may have two sessions."""
    with running(tmp_path_factory.mktemp("survivor") / "home", ONE_PROCESS | TWO_SESSIONS) as service:
        yield service


def test_a_writer_survives_the_death_of_tgtd(survivor: RunningService) -> None:
    service = survivor
    attachment, one = service.attached(ONE)
    with Writer(one) as writer:
        for _ in range(3):
            writer.wait_rounds(5)
            before = service.tgtd_pid()
            service.kill(before)
            wait_until(lambda before=before: service.tgtd_pid() != before, 60, "another tgtd")
        writer.wait_rounds(5)
        assert writer.stop() == []
    assert lost(service.backing(attachment["volume_id"]), writer.expected) == []
    service.admin.detach(attachment["id"])
    assert one.login_error() is not None


def test_a_writer_survives_the_death_of_the_worker(survivor: RunningService) -> None:
    service = survivor
    attachment, one = service.attached(ONE)
    serving, before = service.serving(), service.worker_pid()
    with Writer(one) as writer, one.bare() as bare, bare.attended() as session:
        service.kill(before)
        wait_until(lambda: service.worker_pid() != before, 60, "another worker")
        wait_until(service.is_ready, 60, "the service")
        assert session.command(b"\x00", 0) == b""
        writer.wait_rounds(5)
        assert writer.stop() == []
    assert service.serving() == serving
    assert lost(service.backing(attachment["volume_id"]), writer.expected) == []
    service.admin.detach(attachment["id"])


def test_a_writer_survives_the_death_of_everything(serve: Serve) -> None:
    service = serve()
    attachment, one = service.attached(ONE)
    identity = [one.vpd(page) for page in IDENTITY]
    with Writer(one) as writer:
        writer.wait_rounds(5)
        service.kill_everything()
        assert service.pids() == []
        service.start()
        writer.wait_rounds(5)
        assert writer.stop() == []
    assert lost(service.backing(attachment["volume_id"]), writer.expected) == []
    assert [one.vpd(page) for page in IDENTITY] == identity
    assert service.admin.show(f"/v1/attachments/{attachment['id']}/connection") == attachment["connection"]
    assert service.command("stratus-storage", "verify-events").returncode == 0


@pytest.mark.parametrize("victims", ["supervisor", "all but the target"])
def test_a_target_that_outlives_the_service_is_adopted(serve: Serve, victims: str) -> None:
    service = serve(**TWO_SESSIONS)
    attachment, one = service.attached(ONE)
    serving = service.serving()
    with Writer(one) as writer, one.bare() as bare, bare.attended() as session:
        if victims == "supervisor":
            assert service.process is not None
            service.process.kill()
            service.process.wait()
            wait_until(lambda: service.pids() == serving, 60, "the end of worker and API after their supervisor's")
        else:
            kill_all_but_the_target(service)
        writer.wait_rounds(20)
        service.start()
        assert service.serving() == serving
        assert session.command(b"\x00", 0) == b""
        assert writer.stop() == []
    assert lost(service.backing(attachment["volume_id"]), writer.expected) == []
    service.admin.detach(attachment["id"])
    assert one.login_error() is not None
