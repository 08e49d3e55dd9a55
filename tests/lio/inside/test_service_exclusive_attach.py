"""tests/end_to_end/test_exclusive_attach.py on LIO, all of it."""

from __future__ import annotations

from tests.end_to_end.test_exclusive_attach import *  # noqa: F403
from tests.lio.inside.lio_service import on_lio as on_lio
