"""tests/end_to_end/test_copies.py on LIO, all of it."""

from __future__ import annotations

from tests.end_to_end.conftest import brake as brake
from tests.end_to_end.conftest import brakes as brakes
from tests.end_to_end.conftest import plain_directory as plain_directory
from tests.end_to_end.conftest import shim as shim
from tests.end_to_end.test_copies import *  # noqa: F403
from tests.lio.inside.lio_service import on_lio as on_lio
