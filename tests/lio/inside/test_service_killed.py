"""tests/end_to_end/test_killed.py on LIO. The death of tgtd is tgt's own: nothing of LIO is a process."""

from __future__ import annotations

from tests.end_to_end.conftest import serve as serve
from tests.end_to_end.test_killed import survivor as survivor
from tests.end_to_end.test_killed import test_a_target_that_outlives_the_service_is_adopted as test_adopted
from tests.end_to_end.test_killed import test_a_writer_survives_the_death_of_everything as test_everything
from tests.end_to_end.test_killed import test_a_writer_survives_the_death_of_the_worker as test_the_worker
from tests.lio.inside.lio_service import on_lio as on_lio

__all__ = ["test_adopted", "test_everything", "test_the_worker"]
