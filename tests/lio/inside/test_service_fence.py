"""tests/end_to_end/test_fence.py on LIO, all of it."""

from __future__ import annotations

from tests.end_to_end.conftest import braked as braked
from tests.end_to_end.conftest import brakes as brakes
from tests.end_to_end.conftest import shim as shim
from tests.end_to_end.test_fence import *  # noqa: F403
from tests.lio.inside.lio_service import brake as brake
from tests.lio.inside.lio_service import held_device as held_device
from tests.lio.inside.lio_service import on_lio as on_lio
from tests.lio.inside.lio_service import plain_directory as plain_directory
