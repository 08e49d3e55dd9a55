"""Services for end-to-end tests: real processes, a real target, real file systems; gone after the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.filesystems import mounted
from tests.support.service import RunningService, running
from tests.support.shim import Brake, build_shim

Serve = Callable[..., RunningService]
#: What a test of the outside acts needs of the API; a process more is a second more to start.
ONE_PROCESS = {"STRATUS_SERVER__PROCESSES": "1"}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts a service with its home in `tmp_path / name`."""
    with ExitStack() as stack:

        def start(name: str = "home", arguments: tuple[str, ...] = (), **environment: str) -> RunningService:
            return stack.enter_context(running(tmp_path / name, ONE_PROCESS | environment, arguments))

        yield start


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def brakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the brakes that `braked` heeds."""
    return tmp_path_factory.mktemp("brakes")


@pytest.fixture(scope="module")
def plain_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory on a file system without reflinks, whatever the test machine has."""
    with mounted("tmpfs", 1 << 30, tmp_path_factory.mktemp("plain")) as point:
        yield point


@pytest.fixture(scope="module")
def braked(
    tmp_path_factory: pytest.TempPathFactory, shim: Path, brakes: Path, plain_directory: Path
) -> Iterator[RunningService]:
    """A service whose processes heed the brakes, with a pool that cannot reflink."""
    environment = ONE_PROCESS | {
        "LD_PRELOAD": str(shim),
        "SHIM_DIR": str(brakes),
        "STRATUS_POOLS__DEFAULT__PATH": str(plain_directory),
    }
    with running(tmp_path_factory.mktemp("braked") / "home", environment) as service:
        yield service


@pytest.fixture
def brake(brakes: Path) -> Iterator[Callable[[str], Brake]]:
    """Puts on a brake (see tests.support.shim); all are off after the test."""
    made: list[Brake] = []

    def put_on(what: str) -> Brake:
        made.append(Brake(brakes, what))
        made[-1].on()
        return made[-1]

    yield put_on
    for one in made:
        one.off()
