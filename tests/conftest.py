"""What every test may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.support")  # what they assert tells its values too

from tests.support.service import RunningService, running  # noqa: E402

#: Begun first, longest first, so that no worker is left alone with one of them at the end.
LONG = (
    "tests/api/test_exploration.py",
    "tests/end_to_end/test_conformance.py",
    "tests/end_to_end/",
    "tests/stratus/",
    "tests/app/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((number for number, part in enumerate(LONG) if item.nodeid.startswith(part)), len(LONG))

    items.sort(key=place)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """One service for a module's tests, which must not depend on one another."""
    home: Path = tmp_path_factory.mktemp("service") / "home"
    with running(home) as started:
        yield started
