"""The node's side of an image: over real HTTP, into real files, by real processes."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stratus.client import Client
from stratus.config import Config
from stratus.errors import Conflict, Corrupt, Unreachable
from stratus.puller import Digests, download, pull, receive
from tests.stratus.standin import IMAGE, Reply, Request, StandIn, image, problem, ranges

CONTENT = random.Random(1).randbytes(5_000_000)
PATH = f"/v1/images/{IMAGE}/content"
RECORD = image(CONTENT)


@pytest.fixture
def client(service: StandIn) -> Client:
    return Client(Config(service.url, token="tok-1"), delays=())


def pulled(client: Client, directory: Path) -> Path:
    return pull(client, RECORD, directory)


def asked_from(request: Request) -> int:
    """The first byte that a request wants."""
    return int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))


def test_an_image_is_complete_and_immutable(service: StandIn, client: Client, tmp_path: Path) -> None:
    service.on("GET", PATH, ranges(CONTENT))
    told: list[tuple[int, int]] = []
    path = pull(client, RECORD, tmp_path, lambda done, total: told.append((done, total)))
    assert path == tmp_path / f"{RECORD['digest']}.qcow2"
    assert path.read_bytes() == CONTENT
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert {each.name for each in tmp_path.iterdir()} == {path.name, f".{RECORD['digest']}.lock"}
    assert service.requests[0].headers["Authorization"] == "Bearer tok-1"
    assert service.requests[0].headers["Accept-Encoding"] == "identity"


def test_what_is_there_is_not_asked_for(service: StandIn, client: Client, tmp_path: Path) -> None:
    service.on("GET", PATH, ranges(CONTENT))
    assert pulled(client, tmp_path) == pulled(client, tmp_path)
    assert len(service.requests) == 1


def test_a_broken_line_goes_on_where_it_was(service: StandIn, client: Client, tmp_path: Path) -> None:
    service.on("GET", PATH, ranges(CONTENT, cut=2_000_000), ranges(CONTENT, cut=1_000_000), ranges(CONTENT))
    part = tmp_path / "part"
    with download(client, RECORD, part, lambda _, __: None):
        assert part.read_bytes() == CONTENT
    starts = [asked_from(request) for request in service.requests]
    assert len(starts) == 3
    assert 0 == starts[0] < starts[1] <= 2_000_000
    assert starts[1] < starts[2] <= 3_000_000
    assert service.requests[1].headers["If-Range"] == f'"{RECORD["digest"]}"'


def test_an_answer_that_is_whole_again_starts_anew(service: StandIn, client: Client, tmp_path: Path) -> None:
    whole = Reply(200, CONTENT, {"ETag": f'"{RECORD["digest"]}"'})
    service.on("GET", PATH, ranges(CONTENT, cut=2_000_000), whole)
    assert pulled(client, tmp_path).read_bytes() == CONTENT
    assert asked_from(service.requests[1]) > 0


def test_wrong_bytes_are_refused_and_removed(service: StandIn, client: Client, tmp_path: Path) -> None:
    torn = CONTENT[:1000] + bytes(1) + CONTENT[1001:]
    service.on("GET", PATH, ranges(torn, validator=RECORD["digest"]))
    with pytest.raises(Corrupt, match="is not it"):
        pulled(client, tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [f".{RECORD['digest']}.lock"]


def test_a_part_of_something_else_is_found_out(service: StandIn, client: Client, tmp_path: Path) -> None:
    service.on("GET", PATH, ranges(CONTENT))
    part = tmp_path / f".{RECORD['digest']}.part"
    part.write_bytes(b"x" * 1000)
    with pytest.raises(Corrupt, match="is not it"):
        pulled(client, tmp_path)
    assert pulled(client, tmp_path).read_bytes() == CONTENT


def test_a_part_that_is_too_long_is_begun_anew(service: StandIn, client: Client, tmp_path: Path) -> None:
    service.on("GET", PATH, ranges(CONTENT))
    (tmp_path / f".{RECORD['digest']}.part").write_bytes(CONTENT + b"x")
    assert pulled(client, tmp_path).read_bytes() == CONTENT


def test_a_part_that_lacks_nothing_is_verified_without_asking(service: StandIn, client: Client, tmp_path: Path) -> None:
    (tmp_path / f".{RECORD['digest']}.part").write_bytes(CONTENT)
    assert pulled(client, tmp_path).read_bytes() == CONTENT
    assert service.requests == []


@pytest.mark.parametrize(
    "odd",
    [
        Reply(200, CONTENT, {"ETag": '"another"'}),
        Reply(206, CONTENT, {"Content-Range": f"bytes 1-{len(CONTENT)}/{len(CONTENT) + 1}"}),
        Reply(206, CONTENT),
        Reply(416, "", {"Content-Range": "bytes */0"}),
        Reply(200, CONTENT + b"x"),
        Reply(200, CONTENT[:-1]),
    ],
)
def test_an_answer_to_another_question_is_refused(service: StandIn, client: Client, tmp_path: Path, odd: Reply) -> None:
    service.on("GET", PATH, odd)
    with pytest.raises(Corrupt):
        pulled(client, tmp_path)
    assert not (tmp_path / f"{RECORD['digest']}.qcow2").exists()


def test_a_refusal_is_not_repeated_and_keeps_what_came(service: StandIn, client: Client, tmp_path: Path) -> None:
    part = tmp_path / f".{RECORD['digest']}.part"
    part.write_bytes(CONTENT[:1000])
    service.on("GET", PATH, problem(404, "image-not-found"))
    with pytest.raises(Exception, match="image-not-found"):
        pulled(client, tmp_path)
    assert len(service.requests) == 1
    assert part.read_bytes() == CONTENT[:1000]


def test_who_gets_nothing_gives_up_and_says_how_to_go_on(service: StandIn, client: Client) -> None:
    service.on("GET", PATH, Reply(drop=True))
    with pytest.raises(Unreachable) as caught:
        receive(client, RECORD, Digests("sha256"), lambda _, __: None, backoff=0)
    assert len(service.requests) == 5
    assert "goes on where it was" in str(caught.value.hint)


def test_what_is_only_hashed_survives_a_broken_line(service: StandIn, client: Client) -> None:
    service.on("GET", PATH, ranges(CONTENT, cut=2_000_000), ranges(CONTENT))
    came = Digests("sha1", "sha256")
    receive(client, RECORD, came, lambda _, __: None, backoff=0)
    assert came.position == len(CONTENT)
    assert came.digests["sha256"] == RECORD["digest"]
    assert asked_from(service.requests[1]) > 1_000_000


def test_an_image_without_content_has_none(client: Client, tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="no content yet"):
        pull(client, image(digest=None, state="fetching"), tmp_path)


# ---------------------------------------------------------------- processes

PULL = """
import json, sys
from pathlib import Path
from stratus.client import Client
from stratus.config import Config
from stratus.puller import pull
url, record, directory = sys.argv[1:]
print(pull(Client(Config(url)), json.loads(record), Path(directory)))
"""


def puller(service: StandIn, directory: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", PULL, service.url, json.dumps(RECORD), str(directory)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def wait_until_it_holds(path: Path, size: int) -> None:
    while not path.exists() or path.stat().st_size < size:
        time.sleep(0.01)


def test_killed_midway_it_asks_for_the_rest_only(service: StandIn, client: Client, tmp_path: Path) -> None:
    part = tmp_path / f".{RECORD['digest']}.part"
    service.on("GET", PATH, ranges(CONTENT, cut=3_000_000), Reply(after=60))
    with puller(service, tmp_path) as process:
        wait_until_it_holds(part, 2 << 20)
        process.send_signal(signal.SIGKILL)
    came = part.stat().st_size
    service.requests.clear()
    service.on("GET", PATH, ranges(CONTENT))
    assert pulled(client, tmp_path).read_bytes() == CONTENT
    assert [asked_from(request) for request in service.requests] == [came]


def test_two_at_once_are_one_download(service: StandIn, tmp_path: Path) -> None:
    arrived: list[int] = []

    def slowly(request: Request) -> Reply:
        arrived.append(1)
        time.sleep(1.0)  # long enough for the other to be waiting; if it is not, it finds the file
        return ranges(CONTENT)(request)

    service.on("GET", PATH, slowly)
    with puller(service, tmp_path) as one, puller(service, tmp_path) as other:
        said = {process.communicate()[0] for process in (one, other)}
    assert said == {f"{tmp_path / RECORD['digest']}.qcow2\n"}
    assert (one.returncode, other.returncode, len(arrived)) == (0, 0, 1)


def test_a_part_of_another_process_is_left_to_it(client: Client, service: StandIn, tmp_path: Path) -> None:
    service.on("GET", PATH, ranges(CONTENT))
    part = tmp_path / "part"
    with download(client, RECORD, part, lambda _, __: None):
        with pytest.raises(Conflict, match="another download"), download(client, RECORD, part, lambda _, __: None):
            pass
        os.rename(part, tmp_path / "done")
    assert (tmp_path / "done").read_bytes() == CONTENT
