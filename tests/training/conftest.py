"""A world of one rank inside the test process."""

import pytest

from fastbeit.training import distributed


@pytest.fixture
def world():
    started = distributed.start("cpu")
    yield started
    distributed.stop()
