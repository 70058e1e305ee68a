"""What tests of several rooms need."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def listens_to_ctrl_c() -> Iterator[None]:
    """A shell's background jobs ignore SIGINT, and so did what a ``make test &`` started here: it ran to its end."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
