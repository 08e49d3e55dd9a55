"""The whole API, explored by schemathesis from its description alone: all checks, positive and negative data, links."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.service import BIN, Api, RunningService, running

#: A minute or two where nothing else runs; how long it takes is how much there is to explore, and no sign of anything.
pytestmark = pytest.mark.timeout(900)

HERE = Path(__file__).parent
OPERATIONS = 59
SEED = 20261122


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """One that takes every size of the description, and more volumes than an exploration makes."""
    environment = {
        "STRATUS_VOLUMES__MAX_SIZE": str(1 << 50),
        "STRATUS_IMAGES__MAX_SOURCE_SIZE": str(1 << 50),
        "STRATUS_QUOTA__SIZE": str(1 << 62),
        "STRATUS_QUOTA__COUNT": "1000000",
        # Most references name nobody: where no name server answers, that is soon known (resolv.conf(5)).
        "RES_OPTIONS": "timeout:1 attempts:1",
    }
    with running(tmp_path_factory.mktemp("explored") / "home", environment) as started:
        yield started


@dataclass
class Exploration:
    """What schemathesis reports, and every link it followed with the status that came of it."""

    report: dict[str, Any]
    followed: set[tuple[str, int]]

    @property
    def cases(self) -> int:
        return int(self.report["test_cases"]["generated"])

    def assert_clean(self) -> None:
        assert self.report["failures"] == []
        assert self.report["errors"] == []
        assert self.report["exit_code"] == 0
        if self.report["phases"]["fuzzing"]["status"] == "success":
            assert self.report["operations"]["tested"] == OPERATIONS
            assert self.cases > 50

    @property
    def phases(self) -> dict[str, str]:
        return {name: phase["status"] for name, phase in self.report["phases"].items()}

    @property
    def done(self) -> set[str]:
        """The links that led to a success."""
        return {link for link, status in self.followed if status < 300}


def explore(service: RunningService, api: Api, folder: Path, *arguments: str) -> Exploration:
    me = api.get("/v1/whoami").json()["name"]
    mine = [token["id"] for token in api.get("/v1/tokens").json()["items"] if token["user"] == me]
    report, events = folder / "report.json", folder / "events.ndjson"
    argv = [str(BIN / "schemathesis"), "--config-file", str(HERE / "schemathesis.toml"), "run"]
    argv += [service.base + "/v1/openapi.json", "--workers", "1", "--no-shrink"]
    argv += [] if "--seed" in arguments else ["--seed", str(SEED)]
    argv += ["--continue-on-failure", "--generation-database", "none", "--no-color", *arguments]
    argv += ["-H", f"Authorization: {api.headers['Authorization']}", "--report", "json,ndjson"]
    argv += ["--report-json-path", str(report), "--report-ndjson-path", str(events)]
    environment = {**os.environ, "EXPLORER": me, "EXPLORER_TOKEN_ID": mine[0], "PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600, check=False)
    print(done.stdout, done.stderr)
    assert api.get("/v1/whoami").status_code == 200
    return Exploration(json.loads(report.read_text()), set(_followed(events)))


def _followed(events: Path) -> Iterator[tuple[str, int]]:
    with events.open() as lines:
        for line in lines:
            recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
            for identifier, case in recorder.get("cases", {}).items():
                interaction = recorder["interactions"].get(identifier)
                if case.get("transition") and interaction and interaction["response"]:
                    yield _link(case["transition"]["id"]), interaction["response"]["status_code"]


def _link(transition: str) -> str:
    """`POST /v1/volumes -> [201] get_volume -> GET /v1/volumes/{id}` → `POST /v1/volumes > get_volume`."""
    source, link, _ = transition.split(" -> ")
    return f"{source} > {link.split()[1]}"


#: Tags whose operations build on one another.
CHAINED = [word for tag in ("volumes", "attachments", "snapshots", "operations") for word in ("--include-tag", tag)]
#: Which links a run follows is the generator's choice; with more of them these come up.
EXPECTED = {"POST /v1/volumes > get_volume", "POST /v1/volumes > get_operation"}
ROUNDS = 16  # a busy host generates little in the seconds of one


def test_every_operation_for_an_admin(service: RunningService, tmp_path: Path) -> None:
    found = explore(service, service.admin, tmp_path, "--phases", "examples,coverage,fuzzing", "-n", "6")
    found.assert_clean()
    assert found.phases == {"examples": "success", "coverage": "success", "fuzzing": "success", "stateful": "skip"}


def test_every_operation_for_a_user(service: RunningService, tmp_path: Path) -> None:
    explore(service, service.user("explorer"), tmp_path, "--phases", "fuzzing", "-n", "3").assert_clean()


def test_every_operation_for_a_node(service: RunningService, tmp_path: Path) -> None:
    node = service.node("explorer-node", "iqn.2026-11.org.example:explorer")
    explore(service, node, tmp_path, "--phases", "fuzzing", "-n", "3").assert_clean()


@pytest.mark.parametrize("who", ["admin", "user"])
def test_chains(service: RunningService, tmp_path: Path, who: str) -> None:
    """As many rounds as it takes to get through volumes to what is made of them, and back to what becomes of that."""
    api = service.admin if who == "admin" else service.user("chain-explorer")
    done: set[str] = set()
    cases = 0
    for number in range(ROUNDS):
        words = ("--phases", "stateful", "--max-time", "8", "--seed", str(SEED + number), *CHAINED)
        found = explore(service, api, tmp_path, *words)
        found.assert_clean()
        done |= found.done
        cases += found.cases
        if cases > 50 and done >= EXPECTED and any(link.startswith("POST /v1/volumes/{id}/") for link in done):
            return
    raise AssertionError(f"after {ROUNDS} rounds only {cases} cases, {sorted(done)}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("who", ["admin", "user", "node"])
def test_at_length(service: RunningService, tmp_path: Path, who: str) -> None:
    api = {
        "admin": lambda: service.admin,
        "user": lambda: service.user("long-explorer"),
        "node": lambda: service.node("long-explorer-node", "iqn.2026-11.org.example:long-explorer"),
    }[who]()
    explore(service, api, tmp_path, "--phases", "examples,coverage,fuzzing", "-n", "30").assert_clean()
    chains = explore(service, api, tmp_path, "--phases", "stateful", "--max-time", "45")
    chains.assert_clean()
    assert chains.cases > 50
    assert len(chains.done) >= 5
