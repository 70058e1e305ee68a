"""Text and experiments of a size for tests."""

import pydoc_data.topics

import pytest

from s3_megatron.evidence import text
from s3_megatron.evidence.experiments import Setup


@pytest.fixture(scope="session")
def corpus() -> text.Text:
    """What every Python has: its own documentation, as often as fills the blocks."""
    topics = "".join(topic for _, topic in sorted(pydoc_data.topics.topics.items())).encode()
    size = text.BLOCK * text.EVERY
    return text.cut((topics * (size // len(topics) + 1))[: size + 1])


@pytest.fixture(scope="session")
def setup() -> Setup:
    return Setup(steps=20, layers=2, width=32, heads=2, length=16, batch=4, validation=1024, watch_every=5, decay=1e-3)
