from __future__ import annotations

import hashlib
import json
import random
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stratus import uploader
from tests.stratus.conftest import Run, as_typed
from tests.stratus.standin import (
    IMAGE,
    OPERATION,
    OTHER,
    SNAPSHOT,
    VOLUME,
    Reply,
    Request,
    StandIn,
    accepted,
    image,
    operation,
    plan,
    problem,
    ranges,
    volume,
)

CONTENT = random.Random(2).randbytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
REFERENCE = "BEE8-MMAw-Lk_IgsEExAy3d9R8h"
I = f"/v1/images/{IMAGE}"  # noqa: E741
OF_IMAGE: dict[str, Any] = {"kind": "image.fetch", "resource": {"kind": "image", "id": IMAGE}}


# ---------------------------------------------------------------- create, describe, delete, pin


def test_an_image_that_is_there_is_answered_at_once(service: StandIn, run: Run) -> None:
    service.on("POST", "/v1/images", Reply(201, image()))
    result = run("create-image", REFERENCE, "--format", "json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == image()
    assert service.requests[0].body == {"reference": REFERENCE}


def test_an_image_is_waited_for(service: StandIn, run: Run) -> None:
    service.on("POST", "/v1/images", accepted(**OF_IMAGE))
    service.on("GET", f"/v1/operations/{OPERATION}", Reply(document=operation("succeeded", 100, **OF_IMAGE)))
    service.on("GET", I, Reply(document=image()))
    result = run("create-image", "https://x.example.org/a.qcow2", "--checksum", SHA256.upper(), "-t", "a", "--public")
    assert result.exit_code == 0
    assert IMAGE in result.stdout
    body = {"reference": "https://x.example.org/a.qcow2", "checksum": SHA256, "name": "a", "visibility": "public"}
    assert service.requests[0].body == body


def test_an_image_of_a_volume_or_a_snapshot(service: StandIn, run: Run) -> None:
    service.on("POST", "/v1/images", Reply(201, image()))
    assert run("create-image", "--volume", VOLUME, "--private").exit_code == 0
    assert run("create-image", "--snapshot", SNAPSHOT).exit_code == 0
    bodies = [request.body for request in service.requests]
    assert bodies == [{"volume": VOLUME, "visibility": "private"}, {"snapshot": SNAPSHOT}]


def test_a_list_is_preloaded_and_one_refusal_does_not_keep_the_rest(service: StandIn, run: Run, tmp_path: Path) -> None:
    listed = tmp_path / "references.txt"
    listed.write_text(f"# ours\n\n{REFERENCE}\nhttps://x.example.org/a.raw sha256:{SHA256}\n")
    service.on("POST", "/v1/images", problem(409, "policy-refused"), Reply(201, image()))
    result = run("create-image", "--preload", str(listed))
    assert result.exit_code == 4
    assert f"Error: {REFERENCE}: Refused" in result.stderr
    second = {"reference": "https://x.example.org/a.raw", "checksum": f"sha256:{SHA256}"}
    assert [request.body for request in service.requests] == [{"reference": REFERENCE}, second]


def test_a_pin_follows_the_image(service: StandIn, run: Run) -> None:
    service.on("POST", "/v1/images", Reply(201, image()))
    service.on("PUT", f"{I}/pins/admin", Reply(document={"name": "admin", "kind": "admin", "digest": SHA256}))
    assert run("create-image", REFERENCE, "--pin").exit_code == 0
    assert len(service.asked("PUT", f"{I}/pins/admin")) == 1


def test_pins(service: StandIn, run: Run) -> None:
    pin = {"name": "a b", "kind": "admin", "digest": SHA256, "path": "/srv/images/x.qcow2", "format": "qcow2"}
    listed = {"name": "a b", "kind": "admin", "principal": "root", "created_at": "2026-01-02T03:04:05Z"}
    service.on("PUT", f"{I}/pins/a%20b", Reply(document=pin))
    service.on("GET", f"{I}/pins", Reply(document={"items": [listed]}))
    service.on("DELETE", f"{I}/pins/a%20b", Reply(204))
    assert "/srv/images/x.qcow2" in run("pin-image", IMAGE, "--name", "a b").stdout
    assert "root" in run("pin-image", IMAGE, "--list").stdout
    assert run("pin-image", IMAGE, "--name", "a b", "--remove").exit_code == 0
    assert len(service.asked("DELETE", f"{I}/pins/a%20b")) == 1


def test_images_are_listed_and_filtered(service: StandIn, run: Run) -> None:
    fetching = image(id=OTHER, state="fetching", size=None, digest=None, file_size=None, os=None, name=None)
    service.on("GET", "/v1/images", Reply(document={"items": [image(), fetching], "next": None}))

    def ids(*filters: str) -> list[str]:
        arguments = [argument for each in filters for argument in ("-f", each)]
        found = json.loads(run("describe-images", *arguments, "--format", "json").stdout)
        return [record["id"] for record in found]

    assert ids() == [IMAGE, OTHER]
    assert ids("state:^available$", "os:deb") == ids("size:10GiB") == ids("tag:debian") == [IMAGE]
    assert ids("reference:example.org") == [IMAGE, OTHER]
    table = run("describe-images").stdout
    assert "10GiB" in table
    assert "fetching" in table


def test_deleting_images(service: StandIn, run: Run) -> None:
    service.on("DELETE", I, problem(409, "image-in-use"))
    service.on("DELETE", f"/v1/images/{OTHER}", accepted(kind="image.delete"))
    service.on("GET", f"/v1/operations/{OPERATION}", Reply(document=operation("succeeded")))
    result = run("delete-image", IMAGE, OTHER)
    assert result.exit_code == 4
    assert f"image {OTHER} deleted" in result.stderr


def test_a_volume_starts_as_an_image(service: StandIn, run: Run) -> None:
    service.on("POST", "/v1/volumes", Reply(201, volume()))
    assert run("create-volume", "--image", REFERENCE).exit_code == 0
    assert run("create-volume", "--image", IMAGE, "-s", "20", "--checksum", f"sha256:{SHA256}").exit_code == 0
    sized = {"image": IMAGE, "size": 20 << 30, "checksum": f"sha256:{SHA256}", "visibility": "private"}
    assert [request.body for request in service.requests] == [{"image": REFERENCE, "visibility": "private"}, sized]


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("create-image", [], "Give one of REF"),
        ("create-image", [REFERENCE, "--volume", VOLUME], "Give one of REF"),
        ("create-image", ["--volume", VOLUME, "--checksum", "a" * 64], "what REF must be"),
        ("create-image", [REFERENCE, "--checksum", "md5:" + "a" * 32], "is no checksum"),
        ("create-image", [REFERENCE, "--checksum", "sha256:" + "a" * 40], "is no checksum"),
        ("create-volume", ["--image", REFERENCE, "--volume", VOLUME], "one of --image"),
        ("create-volume", ["-s", "1", "--checksum", "a" * 64], "what --image must be"),
        ("describe-images", ["debian"], "stratus-describe-images"),
        ("pin-image", [IMAGE, "--list", "--remove"], "--list goes alone"),
        ("download-image", [IMAGE], "Missing argument"),
        ("upload-image", ["/nowhere"], "does not exist"),
        ("policy-image", [], "Missing argument"),
    ],
)
def test_usage_errors_say_what_to_write(service: StandIn, run: Run, name: str, arguments: list[str], said: str) -> None:
    result = run(name, *arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert service.requests == []


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [("wrong-digest", 4), ("policy-refused", 4), ("unreachable", 7), ("image-cache-full", 7)],
)
def test_work_on_an_image_that_fails(service: StandIn, run: Run, code: str, exit_code: int) -> None:
    service.on("POST", "/v1/images", accepted(**OF_IMAGE))
    failed = operation("failed", error={"code": code, "detail": "no"}, **OF_IMAGE)
    service.on("GET", f"/v1/operations/{OPERATION}", Reply(document=failed))
    result = run("create-image", REFERENCE)
    assert result.exit_code == exit_code
    assert "Hint: " in result.stderr


def test_a_fetch_that_failed_is_not_asked_for_again(service: StandIn, run: Run) -> None:
    service.on("POST", "/v1/images", problem(503, "unreachable"))
    assert run("create-image", REFERENCE).exit_code == 7
    assert len(service.requests) == 1


# ---------------------------------------------------------------- policy


def entry(**more: Any) -> dict[str, Any]:
    return {"source": "https://mp.example.org", "identifier": REFERENCE, "endorser": "jane@example.org", **more}


PASSES = {"reference": REFERENCE, "passed": entry(), "refused": []}
REFUSED = {
    "reference": REFERENCE,
    "passed": None,
    "refused": [
        {"entry": entry(), "rule": "deny-endorsers", "detail": "jane@example.org"},
        {"entry": entry(endorser="joe@example.org"), "rule": "expired", "detail": "since 2014"},
    ],
}


def test_the_entry_that_passes_is_shown(service: StandIn, run: Run) -> None:
    service.on("POST", "/v1/judgements", Reply(200, PASSES))
    result = run("policy-image", REFERENCE)
    assert result.exit_code == 0
    assert "passed" in result.stdout
    assert "jane@example.org" in result.stdout
    assert service.requests[0].body == {"reference": REFERENCE}


def test_every_entry_that_is_refused_is_shown_with_its_rule(service: StandIn, run: Run) -> None:
    work = operation("running", kind="image.judge")
    service.on("POST", "/v1/judgements", Reply(202, work))
    done = operation("succeeded", kind="image.judge", result=REFUSED)
    service.on("GET", f"/v1/operations/{OPERATION}", Reply(document=done))
    result = run("policy-image", REFERENCE, "--checksum", SHA256)
    assert result.exit_code == 1
    assert "deny-endorsers" in result.stdout
    assert "since 2014" in result.stdout
    told = run("policy-image", REFERENCE, "--format", "json")
    assert told.exit_code == 1
    assert json.loads(told.stdout) == REFUSED


def test_an_image_nobody_speaks_of_does_not_pass(service: StandIn, run: Run) -> None:
    service.on("POST", "/v1/judgements", Reply(200, {"reference": REFERENCE, "refused": []}))
    result = run("policy-image", REFERENCE)
    assert result.exit_code == 1
    assert "nobody" in result.stderr


# ---------------------------------------------------------------- download


def test_a_download_is_verified(service: StandIn, run: Run, tmp_path: Path) -> None:
    service.on("GET", I, Reply(document=image(CONTENT)))
    service.on("GET", f"{I}/content", ranges(CONTENT, cut=1_000_000), ranges(CONTENT))
    path = tmp_path / "files" / "a.qcow2"
    path.parent.mkdir()
    result = run("download-image", IMAGE, str(path))
    assert result.exit_code == 0, result.stderr
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600
    assert SHA256 in result.stderr
    assert "100 % of 2.86MiB" in result.stderr
    assert result.stdout == ""


def test_a_file_is_replaced_only_by_force(service: StandIn, run: Run, tmp_path: Path) -> None:
    service.on("GET", I, Reply(document=image(CONTENT)))
    service.on("GET", f"{I}/content", ranges(CONTENT))
    path = tmp_path / "a.qcow2"
    path.write_text("mine")
    refused = run("download-image", IMAGE, str(path))
    assert refused.exit_code == 4
    assert "--force" in refused.stderr
    assert path.read_text() == "mine"
    assert service.requests == []
    assert run("download-image", IMAGE, str(path), "--force").exit_code == 0
    assert path.read_bytes() == CONTENT


def test_a_wrong_download_leaves_nothing(service: StandIn, run: Run, tmp_path: Path) -> None:
    service.on("GET", I, Reply(document=image(CONTENT)))
    service.on("GET", f"{I}/content", ranges(CONTENT[::-1], validator=SHA256))
    path = tmp_path / "files" / "a.qcow2"
    path.parent.mkdir()
    result = run("download-image", IMAGE, str(path))
    assert result.exit_code == 1
    assert "is not it" in result.stderr
    assert list(path.parent.iterdir()) == []


def test_a_download_that_cannot_be_written_says_so(service: StandIn, run: Run, tmp_path: Path) -> None:
    service.on("GET", I, Reply(document=image(CONTENT)))
    result = run("download-image", IMAGE, str(tmp_path / "nowhere" / "a.qcow2"))
    assert result.exit_code == 1
    assert "cannot write" in result.stderr


def test_an_interrupted_download_goes_on(service: StandIn, environment: dict[str, str], tmp_path: Path) -> None:
    service.on("GET", I, Reply(document=image(CONTENT)))
    service.on("GET", f"{I}/content", ranges(CONTENT, cut=2_000_000), Reply(after=60))
    path = tmp_path / "a.qcow2"
    command = [*as_typed("download-image"), IMAGE, str(path)]

    def hear() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=hear) as process:
        assert process.stderr is not None
        while "60 %" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert "goes on where it was" in said
    service.on("GET", f"{I}/content", ranges(CONTENT))
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert path.read_bytes() == CONTENT
    assert int(service.requests[-1].headers["Range"].strip("bytes=-")) > 1_000_000


# ---------------------------------------------------------------- upload


class Receiver:
    """The service's side of an upload: takes pieces that follow, and makes an operation of the last."""

    def __init__(self, service: StandIn, size: int = len(CONTENT)) -> None:
        self.size = size
        self.received = b""
        self.pieces: list[int] = []
        service.on("POST", "/v1/images", Reply(201, image(state="receiving", digest=None, size=None)))
        service.on("GET", f"{I}/upload", self.status)
        service.on("PUT", f"{I}/upload", self.take)
        done = operation("succeeded", 100, kind="image.commit", resource={"kind": "image", "id": IMAGE})
        service.on("GET", f"/v1/operations/{OPERATION}", Reply(document=done))
        service.on("GET", "/v1/operations", Reply(document={"items": [done], "next": None}))
        service.on("GET", I, Reply(document=image(CONTENT)))

    def status(self, _: Request) -> Reply:
        if len(self.received) == self.size:
            return problem(409, "image-not-receiving")
        return Reply(200, {"received": len(self.received), "size": self.size})

    def take(self, request: Request) -> Reply:
        span, _, total = request.headers["Content-Range"].removeprefix("bytes ").partition("/")
        first, last = (int(each) for each in span.split("-"))
        assert (last - first + 1, int(total)) == (len(request.body), self.size)
        if first != len(self.received):
            return problem(409, "upload-out-of-order")
        self.pieces.append(first)
        self.received += request.body
        if len(self.received) < self.size:
            return Reply(200, {"received": len(self.received), "size": self.size})
        return accepted(kind="image.commit", resource={"kind": "image", "id": IMAGE})


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(uploader, "PIECE", 1_000_000)
    return 1_000_000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.qcow2"
    path.write_bytes(CONTENT)
    return path


def test_an_upload_comes_in_pieces(service: StandIn, run: Run, file: Path, small_pieces: int) -> None:
    receiver = Receiver(service)
    result = run("upload-image", str(file), "-t", "mine", "--public", "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert receiver.received == CONTENT
    assert receiver.pieces == [0, small_pieces, 2 * small_pieces]
    upload = {"size": len(CONTENT), "checksum": f"sha256:{SHA256}", "format": "qcow2"}
    assert service.requests[0].body == {"upload": upload, "name": "mine", "visibility": "public"}
    assert json.loads(result.stdout)["id"] == IMAGE
    assert "uploading: 30 %" in result.stderr


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("a.raw.xz", [], {"format": "raw", "compression": "xz"}),
        ("a.img.zst", ["--image-format", "raw"], {"format": "raw", "compression": "zst"}),
        ("a.bin", ["--image-format", "qcow2", "--compression", "gz"], {"format": "qcow2", "compression": "gz"}),
        ("a.raw.gz", ["--compression", "none"], {"format": "raw"}),
        ("debian-12.5.raw", [], {"format": "raw"}),
    ],
)
def test_what_a_file_is_stands_in_its_name(
    service: StandIn, run: Run, file: Path, name: str, options: list[str], told: dict[str, str]
) -> None:
    Receiver(service)
    renamed = file.rename(file.with_name(name))
    result = run("upload-image", str(renamed), "--checksum", "a" * 128, *options)
    assert result.exit_code == 0, result.stderr
    assert service.requests[0].body["upload"] == {"size": len(CONTENT), "checksum": "a" * 128, **told}


@pytest.mark.parametrize("name", ["a.img", "a", "a.vmdk", "a.xz"])
def test_what_is_in_a_file_is_not_guessed(service: StandIn, run: Run, file: Path, name: str) -> None:
    result = run("upload-image", str(file.rename(file.with_name(name))))
    assert result.exit_code == 2
    assert "--image-format" in result.stderr
    assert service.requests == []


def test_an_empty_file_is_no_image(service: StandIn, run: Run, file: Path) -> None:
    file.write_bytes(b"")
    assert run("upload-image", str(file)).exit_code == 2
    assert service.requests == []


def test_an_upload_goes_on_where_it_was(service: StandIn, run: Run, file: Path) -> None:
    receiver = Receiver(service)
    receiver.received = CONTENT[:1_234_567]
    result = run("upload-image", str(file), "--resume", IMAGE)
    assert result.exit_code == 0, result.stderr
    assert receiver.received == CONTENT
    assert receiver.pieces == [1_234_567]
    assert service.asked("POST", "/v1/images") == []


def test_a_lost_answer_is_asked_for(service: StandIn, run: Run, file: Path, small_pieces: int) -> None:
    receiver = Receiver(service)

    def lost(request: Request) -> Reply:
        receiver.take(request)
        return Reply(drop=True)

    service.on("PUT", f"{I}/upload", receiver.take, lost, lost)
    result = run("upload-image", str(file), "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert receiver.received == CONTENT
    assert len(receiver.pieces) == 3
    assert service.asked("GET", "/v1/operations")[0].query == {"resource": IMAGE}


def test_a_piece_that_did_not_arrive_is_sent_again(service: StandIn, run: Run, file: Path, small_pieces: int) -> None:
    receiver = Receiver(service)
    service.on("PUT", f"{I}/upload", receiver.take, Reply(drop=True), problem(503, "not-ready"), receiver.take)
    assert run("upload-image", str(file)).exit_code == 0
    assert receiver.received == CONTENT


def test_a_refused_upload_says_how_to_go_on(service: StandIn, run: Run, file: Path) -> None:
    Receiver(service)
    service.on("PUT", f"{I}/upload", problem(404, "image-not-found"))
    result = run("upload-image", str(file))
    assert result.exit_code == 3
    assert f"--resume {IMAGE}" in result.stderr


def test_another_file_is_not_a_continuation(service: StandIn, run: Run, file: Path) -> None:
    Receiver(service, size=99)
    result = run("upload-image", str(file), "--resume", IMAGE)
    assert result.exit_code == 4
    assert "99 bytes" in result.stderr


def test_the_plan_of_an_upload_sends_nothing(service: StandIn, run: Run, file: Path) -> None:
    Receiver(service)
    service.on("POST", "/v1/images", Reply(200, plan()))
    assert run("upload-image", str(file), "--dry-run").exit_code == 0
    assert service.asked("PUT", f"{I}/upload") == []


def test_an_upload_that_is_not_waited_for_shows_its_operation(service: StandIn, run: Run, file: Path) -> None:
    Receiver(service)
    result = run("upload-image", str(file), "--no-wait", "--format", "json")
    assert json.loads(result.stdout)["id"] == OPERATION
    assert service.asked("GET", I) == []
