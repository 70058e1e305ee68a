"""What tests of several rooms need."""

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Hypothesis' own time limits, per example and for making them, fail on a busy machine: a dictionary took .7 s there.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture
def listens_to_ctrl_c() -> Iterator[None]:
    """A shell's background jobs ignore SIGINT, and so did what a ``make test &`` started here: it ran to its end."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
