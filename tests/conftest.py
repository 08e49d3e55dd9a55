"""What every test may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.service import RunningService, running


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """One service for a module's tests, which must not depend on one another."""
    home: Path = tmp_path_factory.mktemp("service") / "home"
    with running(home) as started:
        yield started
