from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.stratus.standin import StandIn, stand_in

Run = Callable[..., Result]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def service() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture
def environment(tmp_path: Path, service: StandIn) -> dict[str, str]:
    """What the commands see: the stand-in, a home of their own, nothing of the machine's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("STRATUS_")}
    home = tmp_path / "home"
    home.mkdir()
    own = {"STRATUS_ENDPOINT": service.url, "STRATUS_TOKEN": "tok-1", "HOME": str(home), "PYTHONPATH": str(ROOT)}
    return {**kept, **own, "XDG_CONFIG_HOME": str(home / ".config"), "PYTHONUTF8": "1"}


@pytest.fixture
def run(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command by its name without `stratus-`."""
    for key in [key for key in os.environ if key.startswith("STRATUS_")]:
        monkeypatch.delenv(key)

    def run_command(name: str, *arguments: str, **more: str) -> Result:
        main = importlib.import_module("stratus.commands." + name.replace("-", "_")).main
        return CliRunner().invoke(main, arguments, env={**environment, **more}, prog_name=f"stratus-{name}")

    return run_command


def as_typed(name: str) -> list[str]:
    """The argv of a command in a process of its own, to be followed by its arguments."""
    module = "stratus.commands." + name.replace("-", "_")
    return [sys.executable, "-c", f"from {module} import main; main(prog_name='stratus-{name}')"]
