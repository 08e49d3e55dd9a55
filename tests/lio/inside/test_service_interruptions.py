"""The fence of tests/end_to_end/test_interrupted_exports.py on LIO, and all of test_interrupted_acts.py.

An attach and a grow that die are tgt's own: they are caught inside tgtd, while it opens the file, and in the drain
that a grow of tgt needs. What they find half-made on LIO is in test_service_half_made.py; LIO grows without a drain.
The acts on pools take minutes here and have nothing of LIO in them but the way their bytes are read: make test-slow.
"""

from __future__ import annotations

import pytest

from tests.end_to_end import test_interrupted_acts as acts
from tests.end_to_end.conftest import braked as braked
from tests.end_to_end.conftest import brakes as brakes
from tests.end_to_end.conftest import shim as shim
from tests.end_to_end.test_interrupted_exports import test_a_fence_ends_once as test_a_fence_ends_once
from tests.lio.inside.lio_service import brake as brake
from tests.lio.inside.lio_service import held_device as held_device
from tests.lio.inside.lio_service import on_lio as on_lio
from tests.lio.inside.lio_service import plain_directory as plain_directory

test_a_create_ends_once = pytest.mark.slow(acts.test_a_create_ends_once)
test_a_snapshot_ends_once = pytest.mark.slow(acts.test_a_snapshot_ends_once)
test_a_clone_ends_once = pytest.mark.slow(acts.test_a_clone_ends_once)
test_a_revert_ends_once = pytest.mark.slow(acts.test_a_revert_ends_once)
test_a_delete_ends_once = pytest.mark.slow(acts.test_a_delete_ends_once)
